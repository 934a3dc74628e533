"""Gradients of the linear head: from stored exponentials, or from exponentials formed again.

The vocabulary is outermost. For each slab of it, dW of the slab is summed over all rows in fp32 and is then done, so
that no second copy of the whole weight is ever needed, and exponentials formed again need no more than a tile:

    dL/du_v = factor F_v (+ label at v = y),   dX = dL/du W,   dW = (dL/du)^T X,   db = sum over rows of dL/du

A row that gets no gradient from upstream costs nothing here. An entropy's gradient multiplies F_v by c0 + c1 d_v.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.kernels.head import (
    SMALL_BLOCK,
    Head,
    Kernels,
    Problem,
    Rows,
    Scores,
    accumulator,
    chunk_dtype,
    chunk_tokens,
    label_logits,
    split,
)

SLAB_BLOCK = 480  # rows of the C++ kernels' blocks of the vocabulary


class Upstream(NamedTuple):
    """Gradients that reach the rows: (n,) each, fp32."""

    logps: Tensor
    entropy: Tensor | None

    def live(self) -> Tensor:
        """Index of the rows that get any."""
        live = self.logps != 0
        return (live if self.entropy is None else live | (self.entropy != 0)).nonzero()[:, 0]

    def at(self, index: Tensor) -> "Upstream":
        return Upstream(self.logps[index], None if self.entropy is None else self.entropy[index])


@dataclass
class Gradients:
    """Where gradients are added; None where nobody asks. A narrow `weight` is written once, not added to."""

    hidden: Tensor | None  # (R, H) in the accumulator's dtype
    weight: Tensor | None  # (V, H) in the accumulator's dtype, or in the weight's
    bias: Tensor | None  # (V,) in the accumulator's dtype

    @staticmethod
    def zeros(problem: Problem, wanted: Sequence[bool], once: bool = False) -> "Gradients":
        """For hidden, weight and bias; with `once` a single `add_gradients` writes them all."""
        head, dtype = problem.head, accumulator(problem.hidden.dtype)
        narrow = head.weight.dtype if once else dtype

        def like(which: int, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            return torch.zeros(x.shape, dtype=dtype, device=x.device) if wanted[which] and x is not None else None

        return Gradients(like(0, problem.hidden, dtype), like(1, head.weight, narrow), like(2, head.bias, dtype))


@dataclass(frozen=True)
class _Part:
    """Rows whose exponentials are at hand together."""

    index: Tensor  # (n,) into the targets
    scores: Scores
    factor: Tensor  # (n,)
    label: Tensor  # (n,) the label's own coefficient
    coefs: tuple[Tensor, Tensor] | None


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
    head, live = problem.head, upstream.live()
    vocab_size = head.weight.shape[0]
    if chunk is not None and not _tells_d(chunk, upstream, head):
        chunk = None
    if chunk is None:
        form = head.weight.shape[1], vocab_size, problem.hidden.dtype, head.workspace
        step, size = tile_formed_again(*form, d_weight=out.weight is not None)
    else:
        step, size = _blocks(head.slab_bytes // (4 * max(head.weight.shape[1], live.numel()))), max(1, live.numel())
    some_dead = live.numel() < index.numel()
    parts = [_part(kernels, problem, index[piece], scores.at(piece), upstream.at(piece)) for piece in split(live, size)]
    as_stored = chunk is not None and not some_dead and upstream.entropy is None
    for part in parts if out.hidden is not None else ():
        w_y = head.weight[problem.targets[part.index]].to(problem.hidden.dtype)
        at_label = w_y * part.label[:, None]
        out.hidden.index_add_(0, problem.row(part.index), at_label.to(out.hidden.dtype))  # type: ignore[union-attr]
        if chunk is not None and as_stored:
            _add_d_hidden(kernels, problem, part, chunk, head.weight, out)
    for first in range(0, vocab_size if parts else 0, step):
        slab = slice(first, min(first + step, vocab_size))
        d_weight = None if out.weight is None else out.weight[slab]
        if d_weight is not None and d_weight.dtype != accumulator(problem.hidden.dtype):
            d_weight = torch.zeros_like(d_weight, dtype=accumulator(problem.hidden.dtype))
        for part in parts:
            rows = problem.gather(part.index)
            if chunk is None:
                f = _form_again(kernels, head.rows(slab.start, slab.stop), first, rows, part)
            else:
                f = chunk.narrow(1 - kernels.TOKEN_DIM, first, slab.stop - first)
                if some_dead:
                    f = _packed(kernels, f.index_select(kernels.TOKEN_DIM, live), head.weight[slab], f.dtype)
                if part.coefs is not None:
                    f = _with_entropy(kernels, f, part.coefs, head.weight[slab])
            if not as_stored:
                _add_d_hidden(kernels, problem, part, f, head.weight[slab], out)
            _add_slab(kernels, part, rows, f, first, d_weight, None if out.bias is None else out.bias[slab])
            del f  # before the next one is made
        if out.weight is not None and d_weight is not None and d_weight.dtype != out.weight.dtype:
            out.weight[slab] = d_weight


def _tells_d(chunk: Tensor, upstream: Upstream, head: Head) -> bool:
    """Whether d_v = log F_v is exact enough for this upstream gradient.

    In bf16 it is off by 2^-9, and -p (g + h (log p + entropy)) by 2^-9 h p: too much where h is all there is.
    """
    if upstream.entropy is None:
        return True
    exact = chunk.dtype.itemsize > 2 or bool(4 * upstream.entropy.norm() <= upstream.logps.norm())
    return head.softcap is None and exact


def tile_formed_again(
    hidden_size: int, vocab_size: int, dtype: torch.dtype, workspace: int, *, d_weight: bool
) -> tuple[int, int]:
    """(rows of the vocabulary, rows of hidden) whose exponentials are formed again together."""
    if not d_weight:
        return vocab_size, chunk_tokens(hidden_size, vocab_size, dtype, workspace)
    step = min(vocab_size, _blocks(workspace // 8 // (4 * hidden_size)))
    # beside its exponentials a row has copies of itself and what it adds to dX, all (n, H)
    row = step * (chunk_dtype(dtype).itemsize + 1) + 20 * hidden_size
    return step, max(SMALL_BLOCK, workspace // 2 // row // SMALL_BLOCK * SMALL_BLOCK)


def _blocks(rows: int) -> int:
    return max(SLAB_BLOCK, rows // SLAB_BLOCK * SLAB_BLOCK)


def _part(kernels: Kernels, problem: Problem, index: Tensor, scores: Scores, upstream: Upstream) -> _Part:
    """What F is multiplied by, and the label's own coefficient, so that dL/du = factor F (c0 + c1 d) + label at y."""
    (g, h), rows, total = upstream, problem.gather(index), scores.total
    _, slope = label_logits(kernels, problem.head, rows)
    scale = rows.inv_temperature * problem.head.logit_scale
    label, factor, coefs = g * scores.rest / total, -scale * g / total, None
    if h is not None:
        # p log p -> 0 where the label is far below
        log_p = scores.logps.clamp(min=-200.0)
        label = label - h * (scores.label_d.exp() / total) * (log_p + scores.entropy)
        factor, coefs = -scale / total, (g + h * (scores.entropy - total.log()), h)
    return _Part(index, scores, factor.to(total.dtype), (label * slope.to(total.dtype) * scale).to(total.dtype), coefs)


def _form_again(kernels: Kernels, head: Head, first: int, rows: Rows, part: _Part) -> Tensor:
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


def _add_d_hidden(kernels: Kernels, problem: Problem, part: _Part, f: Tensor, weight: Tensor, out: Gradients) -> None:
    if out.hidden is not None:
        d_rows = kernels.d_hidden(f, part.index.numel(), weight).mul_(part.factor[:, None])
        out.hidden.index_add_(0, problem.row(part.index), d_rows)


def _add_slab(
    kernels: Kernels, part: _Part, rows: Rows, f: Tensor, first: int, d_weight: Tensor | None, d_bias: Tensor | None
) -> None:
    """To dW and db of the rows of the vocabulary from `first` on."""
    size = f.shape[1 - kernels.TOKEN_DIM]
    inside = ((rows.targets >= first) & (rows.targets < first + size)).nonzero()[:, 0]
    at, label = rows.targets[inside] - first, part.label[inside]
    if d_weight is not None:
        x = rows.x.to(part.factor.dtype)
        kernels.add_d_weight(f, x * part.factor[:, None], d_weight)
        d_weight.index_add_(0, at, x[inside] * label[:, None])
    if d_bias is not None:
        kernels.add_d_bias(f, part.factor, d_bias)
        d_bias.index_add_(0, at, label)
