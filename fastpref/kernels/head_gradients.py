"""Gradients of the linear head: from stored exponentials, or from exponentials formed again.

The vocabulary is outermost. For each slab of it, dW of the slab is summed over all rows in fp32 and is then done, so
that no second copy of the whole weight is ever needed, and exponentials formed again need no more than a tile:

    dL/du_v = factor F_v (+ label at v = y),   dX = dL/du W,   dW = (dL/du)^T X,   db = sum over rows of dL/du

Rows that get no gradient from upstream leave the products, or stay in them as zeros where that is cheaper. An entropy's
gradient multiplies F_v by c0 + c1 d_v.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.kernels.chunks import MIB, SMALL_BLOCK, accumulator, chunk_dtype, chunk_tokens, evenly
from fastpref.kernels.head import Head, Kernels, Problem, Rows, Scores, label_logits
from fastpref.kernels.memory import huge_pages

SLAB_BLOCK = 480  # rows of the C++ kernels' blocks of the vocabulary


class Upstream(NamedTuple):
    """Gradients that reach the rows: (n,) each, fp32."""

    logps: Tensor
    entropy: Tensor | None

    def live(self) -> Tensor:
        """Index of the rows that get any."""
        live = self.logps != 0
        return (live if self.entropy is None else live | (self.entropy != 0)).nonzero()[:, 0]

    def where(self, counts: Tensor) -> "Upstream":
        """0 where a row does not count."""
        of_entropy = None if self.entropy is None else self.entropy.masked_fill(~counts, 0)
        return Upstream(self.logps.masked_fill(~counts, 0), of_entropy)

    def at(self, index: Tensor | slice) -> "Upstream":
        return Upstream(self.logps[index], None if self.entropy is None else self.entropy[index])


@dataclass
class Gradients:
    """Where gradients are added, in the accumulator's dtype; None where nobody asks."""

    hidden: Tensor | None  # (R, H)
    weight: Tensor | None  # (V, H) not initialised until something is added
    bias: Tensor | None  # (V,)
    once: bool = False  # one `add_gradients` gives all: the weight's is in the weight's dtype
    written: bool = False  # the weight's

    @staticmethod
    def begun(problem: Problem, wanted: Sequence[bool], once: bool = False) -> "Gradients":
        """For hidden, weight and bias; `finish` ends them."""
        head, dtype = problem.head, accumulator(problem.hidden.dtype)

        def like(which: int, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            return (
                huge_pages(torch.empty(x.shape, dtype=dtype, device=x.device))
                if wanted[which] and x is not None
                else None
            )

        found = Gradients(
            like(0, problem.hidden, dtype),
            like(1, head.weight, head.weight.dtype if once else dtype),
            like(2, head.bias, dtype),
            once,
        )
        for x in (found.hidden, found.bias):
            if x is not None:
                x.zero_()
        return found

    def finish(self) -> None:
        """Nothing more is added: a weight's that got nothing is zero."""
        if self.weight is not None and not self.written:
            self.weight.zero_()


@dataclass(frozen=True)
class Part:
    """Rows whose exponentials are at hand together."""

    index: Tensor  # (n,) into the targets
    scores: Scores
    factor: Tensor  # (n,)
    label: Tensor  # (n,) the label's own coefficient
    coefs: tuple[Tensor, Tensor] | None


class _Operands(NamedTuple):
    """What the products of a part read beside F."""

    rows: Rows
    scaled: Tensor  # (n, H) factor x
    order: Tensor  # (n,) of the targets


def add_gradients(
    kernels: Kernels,
    problem: Problem,
    index: Tensor,
    scores: Scores,
    upstream: Upstream,
    out: Gradients,
    chunk: Tensor | None = None,
) -> None:
    """Adds what the rows at `index` give: two GEMMs, or one where hidden or weight gets no gradient.

    `chunk` holds F of these rows. Without it, and where an entropy's gradient needs more than it tells, F is formed
    again: one GEMM more.
    """
    # where the host does not wait, dead rows stay: kernels leave out blocks of them
    live = torch.arange(index.numel(), device=index.device) if kernels.STATIC else upstream.live()
    if not live.numel():
        return
    if chunk is not None and _tells_d(kernels, chunk, upstream, problem.head):
        if kernels.STATIC or not _worth_leaving_out(problem, index, scores, live):
            part = part_of(kernels, problem, index, scores, upstream)
            _add_from_chunk(kernels, problem, part, chunk, None, out)
        else:
            part = part_of(kernels, problem, index[live], scores.at(live), upstream.at(live))
            _add_from_chunk(kernels, problem, part, chunk, live, out)
        return
    vocab_size, hidden_size = problem.head.weight.shape
    step, size = tile_formed_again(
        hidden_size, vocab_size, problem.hidden.dtype, problem.head.workspace, d_weight=out.weight is not None
    )
    parts = [part_of(kernels, problem, index[i], scores.at(i), upstream.at(i)) for i in evenly(live, size)]
    _add_formed_again(kernels, problem, parts, step, out)


def _add_from_chunk(
    kernels: Kernels, problem: Problem, part: Part, chunk: Tensor, live: Tensor | None, out: Gradients
) -> None:
    """`live`: where in the chunk the rows of the part are; None: they are all of its rows."""
    head, operands = problem.head, _operands(kernels, problem, part)
    (vocab_size, hidden_size), n = head.weight.shape, part.index.numel()
    add_label_to_hidden(kernels, problem, part, out.hidden)
    as_stored = live is None and part.coefs is None
    if as_stored:
        _add_d_hidden(kernels, problem, part, chunk, head.weight, out)
    # a slab has a temporary the size of its dW, and unless F is as stored, of itself
    beside = hidden_size if as_stored else max(hidden_size, n)
    rounds = kernels.ROUNDS and out.once
    in_place = as_stored and (out.weight is None or rounds or out.weight.dtype == part.factor.dtype)
    step = vocab_size if in_place else _blocks(head.slab_bytes // (4 * beside))
    for slab, d_weight in _slabs(head, out, step, part.factor.dtype, rounds):
        f = chunk.narrow(1 - kernels.TOKEN_DIM, slab.start, slab.stop - slab.start)
        if live is not None:
            f = _packed(kernels, f.index_select(kernels.TOKEN_DIM, live), head.weight[slab], f.dtype)
        if part.coefs is not None:
            f = _with_entropy(kernels, f, part.coefs, head.weight[slab])
        if not as_stored:
            _add_d_hidden(kernels, problem, part, f, head.weight[slab], out)
        _add_slab(kernels, part, operands, f, slab, d_weight, out.bias, accumulate=out.written)
    out.written = True


def _add_formed_again(kernels: Kernels, problem: Problem, parts: list[Part], step: int, out: Gradients) -> None:
    head = problem.head
    for part in parts:
        add_label_to_hidden(kernels, problem, part, out.hidden)
    only = _operands(kernels, problem, parts[0]) if len(parts) == 1 else None
    rounds = kernels.ROUNDS and out.once and len(parts) == 1
    d_rows = None  # of one part: added up over the slabs, then scaled once
    if only is not None and kernels.SLABS and out.hidden is not None:
        d_rows = out.hidden.new_zeros(only.rows.x.shape)
    for slab, d_weight in _slabs(head, out, step, parts[0].factor.dtype, rounds):
        for part in parts:
            operands = only or _operands(kernels, problem, part)
            f = _form_again(kernels, head.rows(slab.start, slab.stop), slab.start, operands.rows, part)
            if d_rows is None:
                _add_d_hidden(kernels, problem, part, f, head.weight[slab], out)
            else:
                kernels.add_d_hidden(f, head.weight[slab], problem.hidden.dtype, d_rows)
            accumulate = out.written or part is not parts[0]
            _add_slab(kernels, part, operands, f, slab, d_weight, out.bias, accumulate=accumulate)
            del f  # before the next one is made
    if d_rows is not None and out.hidden is not None:
        _add_to_hidden(kernels, problem, parts[0], d_rows, parts[0].factor, out.hidden)
    out.written = True


def _slabs(
    head: Head, out: Gradients, step: int, dtype: torch.dtype, rounds: bool
) -> Iterator[tuple[slice, Tensor | None]]:
    """Slabs of the vocabulary, each with what its dW is added to: rows of `out`, or a sum that is written there.

    `rounds`: what is 16-bit is written by round_d_weight.
    """
    (vocab_size, hidden_size), weight = head.weight.shape, out.weight
    narrow = weight is not None and weight.dtype != dtype and not rounds
    total = head.weight.new_empty(min(step, vocab_size) if narrow else 0, hidden_size, dtype=dtype)
    for first in range(0, vocab_size, step):
        slab = slice(first, min(first + step, vocab_size))
        if weight is None or not narrow:
            yield slab, None if weight is None else weight[slab]
        else:
            here = total[: slab.stop - first]
            yield slab, here
            weight[slab] = here


def _worth_leaving_out(problem: Problem, index: Tensor, scores: Scores, live: Tensor) -> bool:
    """Whether the dead rows of a stored chunk leave it. They add exactly 0, unless they are not finite.

    Copying the live ones costs as much as a quarter of their products.
    """
    n = index.numel()
    if live.numel() == n:
        return False
    if 2 * live.numel() <= n:
        return True
    dead = torch.ones(n, dtype=torch.bool, device=index.device).index_fill_(0, live, False).nonzero()[:, 0]
    x = problem.hidden[problem.row(index[dead])]
    return not bool(scores.total[dead].isfinite().all() and x.isfinite().all())


def _tells_d(kernels: Kernels, chunk: Tensor, upstream: Upstream, head: Head) -> bool:
    """Whether d_v = log F_v is exact enough for this upstream gradient, as far as the host knows.

    In bf16 it is off by 2^-9, and -p (g + h (log p + entropy)) by 2^-9 h p: too much where h is all there is.
    """
    if upstream.entropy is None:
        return True
    if head.softcap is not None or chunk.dtype.itemsize > 2:
        return head.softcap is None
    return not kernels.STATIC and bool(4 * upstream.entropy.norm() <= upstream.logps.norm())


def tile_formed_again(
    hidden_size: int, vocab_size: int, dtype: torch.dtype, workspace: int, *, d_weight: bool
) -> tuple[int, int]:
    """(rows of the vocabulary, rows of hidden) whose exponentials are formed again together."""
    if not d_weight:
        return vocab_size, chunk_tokens(hidden_size, vocab_size, dtype, workspace)
    slab = min(workspace // 4, max(workspace // 8, 8 * MIB))  # of dW, in fp32
    step = min(vocab_size, _blocks(slab // (4 * hidden_size)))
    # beside its exponentials a row has copies of itself and what it adds to dX, all (n, H)
    row = step * (chunk_dtype(dtype).itemsize + 1) + 20 * hidden_size
    return step, max(SMALL_BLOCK, workspace * 3 // 4 // row // SMALL_BLOCK * SMALL_BLOCK)


def _blocks(rows: int) -> int:
    return max(SLAB_BLOCK, rows // SLAB_BLOCK * SLAB_BLOCK)


def part_of(kernels: Kernels, problem: Problem, index: Tensor, scores: Scores, upstream: Upstream) -> Part:
    """What F is multiplied by, and the label's own coefficient, so that dL/du = factor F (c0 + c1 d) + label at y."""
    (g, h), rows, total = upstream, problem.gather(index), scores.total
    _, slope = label_logits(kernels, problem.head, rows)
    scale = rows.inv_temperature * problem.head.logit_scale
    label, factor, coefs = g * scores.rest / total, -scale * g / total, None
    if h is not None:
        # log p + entropy = d - mean_d, whose parts do not cancel in a confident row; p d -> 0 for a label far below
        label_d = scores.label_d.clamp(min=-200.0)
        label = label - h * (label_d.exp() / total) * (label_d - scores.mean_d)
        factor, coefs = -scale / total, (g - h * scores.mean_d, h)
    return Part(index, scores, factor.to(total.dtype), (label * slope.to(total.dtype) * scale).to(total.dtype), coefs)


def _form_again(kernels: Kernels, head: Head, first: int, rows: Rows, part: Part) -> Tensor:
    """F of a slab of the vocabulary, anchored as before."""
    vocab_size = head.weight.shape[0]
    inside = (rows.targets >= first) & (rows.targets < first + vocab_size)
    targets = torch.where(inside, rows.targets - first, -1)
    f = kernels.new_chunk(targets.numel(), head.weight, rows.x.dtype)
    kernels.score(rows.x, head, targets, part.scores.anchor, rows.inv_temperature, f, part.coefs)
    return f


def _packed(kernels: Kernels, values: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A chunk of its own with these values."""
    n = values.shape[kernels.TOKEN_DIM]
    out = kernels.new_chunk(n, weight, dtype)
    out.narrow(kernels.TOKEN_DIM, 0, n).copy_(values)
    out.narrow(kernels.TOKEN_DIM, n, out.shape[kernels.TOKEN_DIM] - n).zero_()
    return out


def _with_entropy(kernels: Kernels, f: Tensor, coefs: tuple[Tensor, Tensor], weight: Tensor) -> Tensor:
    """F (c0 + c1 log F)."""
    c0, c1 = (c.unsqueeze(1 - kernels.TOKEN_DIM) for c in coefs)
    e = f.narrow(kernels.TOKEN_DIM, 0, coefs[0].numel()).to(c0.dtype)
    weighed = torch.where(e > 0, e.log(), 0.0).mul_(c1).add_(c0).mul_(e)
    return _packed(kernels, weighed, weight, f.dtype)


def _operands(kernels: Kernels, problem: Problem, part: Part) -> _Operands:
    rows = problem.gather(part.index)
    return _Operands(rows, kernels.scaled(rows.x, part.factor), kernels.order_of(rows.targets))


def add_label_to_hidden(kernels: Kernels, problem: Problem, part: Part, out: Tensor | None) -> None:
    if out is not None:
        y, label = problem.head.own(problem.targets[part.index]), part.label
        if problem.head.shard is not None:
            y, label = y.clamp(min=0), torch.where(y >= 0, label, 0.0)
        w_y = problem.head.weight[y].to(problem.hidden.dtype)
        _add_to_hidden(kernels, problem, part, w_y, label, out)


def _add_to_hidden(
    kernels: Kernels, problem: Problem, part: Part, values: Tensor, scale: Tensor | None, out: Tensor
) -> None:
    row = problem.row(part.index)
    if problem.rows is not None:  # a row may serve several targets
        kernels.add_rows(out, row, values, scale, kernels.order_of(row))
    else:
        out.index_add_(0, row, (values if scale is None else values * scale[:, None]).to(out.dtype))


def _add_d_hidden(kernels: Kernels, problem: Problem, part: Part, f: Tensor, weight: Tensor, out: Gradients) -> None:
    if out.hidden is not None:
        d_rows = kernels.d_hidden(f, part.index.numel(), weight, problem.hidden.dtype, part.factor)
        _add_to_hidden(kernels, problem, part, d_rows, None, out.hidden)


def _add_slab(
    kernels: Kernels,
    part: Part,
    operands: _Operands,
    f: Tensor,
    slab: slice,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    *,
    accumulate: bool,
) -> None:
    """To dW and db of the slab; not `accumulate`: dW is not initialised."""
    (rows, scaled, order), at = operands, operands.rows.targets - slab.start
    if d_weight is not None and d_weight.dtype != part.factor.dtype:
        kernels.round_d_weight(f, scaled, rows.x, at, part.label, d_weight)
    elif d_weight is not None:
        kernels.d_weight(f, scaled, part.factor, d_weight, accumulate)
        kernels.add_rows(d_weight, at, rows.x, part.label, order)
    if d_bias is not None:
        kernels.add_d_bias(f, part.factor, d_bias[slab])
        kernels.add_rows(d_bias[slab, None], at, part.label[:, None], None, order)
