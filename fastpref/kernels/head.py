"""The linear head, a chunk of tokens at a time: what every backend's kernels are driven by.

With z the logits, y the target and a an anchor (the label's own logit, so that a confident row keeps full precision):

    d_v = z_v - a,  e_v = exp(d_v),  S' = sum over v != y of e_v,  S = e_y + S'
    logp = -log1p(S')  (a = z_y),    entropy = max(0, log S - (1/S) sum e_v d_v)

    dL/dz_v = g 1[v = y] - p_v (g + h (log p_v + entropy)),    p_v = e_v / S,  g = dL/dlogp,  h = dL/dentropy

A row whose S' passes 2^60 is scored once more, anchored at its maximum: the sum of its e^2 would not survive fp32.
A chunk stores F_v = e_v (1 - tanh^2), label entry zero; the label's rank-one terms are added in fp32.
head_gradients.py goes on from there.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastpref.kernels.chunks import ROW_BLOCK, accumulator, most_rows, split
from fastpref.kernels.shard import Shard, in_order

RESCORE_ABOVE = 2.0**60  # of S'; 41.6 nats


class Head(NamedTuple):
    """The parameters of the head and what is done to its logits."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    softcap: float | None
    logit_scale: float
    workspace: int  # bytes for the buffers of one chunk
    deterministic: bool = False
    shard: Shard | None = None  # weight and bias are this process's rows of the vocabulary

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0] if self.shard is None else self.shard.vocab_size

    @property
    def most_rows(self) -> int:
        """Rows of the largest part of the vocabulary: by these all processes size their chunks."""
        return self.weight.shape[0] if self.shard is None else most_rows(self.shard.bounds)

    def own(self, targets: Tensor) -> Tensor:
        """Targets as rows of `weight`; -1 where another process holds the row."""
        return targets if self.shard is None else self.shard.own(targets)

    def add_over_ranks(self, *gradients: Tensor | None) -> None:
        """Gradients of hidden, each of which every process has formed from its rows, become whole."""
        for x in gradients:
            if self.shard is not None and x is not None:
                self.shard.add_over_ranks(x)

    @property
    def slab_bytes(self) -> int:
        """Of one fp32 temporary beside a chunk; a handful live at once."""
        return self.workspace // 32

    def rows(self, first: int, last: int) -> "Head":
        """The head of part of the vocabulary."""
        bias = None if self.bias is None else self.bias[first:last]
        return self._replace(weight=self.weight[first:last], bias=bias)


class Sums(NamedTuple):
    """(n,) each, over v != y except z, which is over all v."""

    exp: Tensor
    exp_d: Tensor
    exp_sq: Tensor
    z: Tensor
    max_d: Tensor


class Kernels(Protocol):
    """What a backend provides. `chunk` holds n rows of F, or has room for more, in a layout of its own.

    The weight is read in the dtype of hidden, `dtype`, whatever its own is.
    """

    TOKEN_DIM: int  # the dimension of a chunk that the tokens are along; the vocabulary is along the other
    STATIC: bool  # the host never waits for the device: no shape depends on a value
    ROUNDS: bool  # has round_d_weight
    SLABS: bool  # has add_d_hidden, and score can go on from sums

    def label_dots(self, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor: ...

    def new_chunk(self, n: int, weight: Tensor, dtype: torch.dtype) -> Tensor: ...

    # a target of -1 is none of these rows of weight. coefs = (c0, c1): the chunk is F (c0 + c1 d). only (n,) bool, of
    # STATIC kernels: the other rows, and F of them, are left out. before, of SLABS kernels: the sums of the rows
    # of weight in front of these, a multiple of 480; the bits are those of one score
    def score(
        self,
        x: Tensor,
        head: Head,
        targets: Tensor,
        anchor: Tensor,
        inv_temperature: Tensor,
        chunk: Tensor | None,
        coefs: tuple[Tensor, Tensor] | None,
        only: Tensor | None = None,
        before: Sums | None = None,
    ) -> Sums: ...

    # out += F W
    def add_d_hidden(self, chunk: Tensor, weight: Tensor, dtype: torch.dtype, out: Tensor) -> None: ...

    # diag(factor) F W
    def d_hidden(self, chunk: Tensor, n: int, weight: Tensor, dtype: torch.dtype, factor: Tensor) -> Tensor: ...

    # diag(factor) X as d_weight wants it
    def scaled(self, x: Tensor, factor: Tensor) -> Tensor: ...

    def d_weight(self, chunk: Tensor, scaled: Tensor, factor: Tensor, out: Tensor, accumulate: bool) -> None: ...

    # out = F^T scaled, and label[t] x[t] at row targets[t] if there is one; rounded once to the 16 bits of out and x
    def round_d_weight(
        self, chunk: Tensor, scaled: Tensor, x: Tensor, targets: Tensor, label: Tensor, out: Tensor
    ) -> None: ...

    def add_d_bias(self, chunk: Tensor, factor: Tensor, out: Tensor) -> None: ...

    # out[index[i]] += scale[i] values[i], the same bits every time; an index outside of out is left out
    def order_of(self, index: Tensor) -> Tensor: ...

    def add_rows(self, out: Tensor, index: Tensor, values: Tensor, scale: Tensor | None, order: Tensor) -> None: ...


@dataclass(frozen=True)
class Rows:
    """n rows to score, gathered."""

    x: Tensor  # (n, H)
    targets: Tensor  # (n,) as rows of the weight; -1: another process's
    inv_temperature: Tensor  # (n,) 0: a row that does not count


@dataclass(frozen=True)
class Problem:
    """All rows of a call, flat; `index` below is always into the M targets."""

    hidden: Tensor  # (R, H)
    head: Head
    targets: Tensor  # (M,) of the whole vocabulary
    rows: Tensor | None  # (M,) into hidden
    inv_temperature: Tensor  # (M,)
    masked: bool = False  # rows that do not count are among those that are gathered, as zeros

    def row(self, index: Tensor) -> Tensor:
        """The rows of hidden that predict the targets at `index`."""
        return index if self.rows is None else self.rows[index]

    def gather(self, index: Tensor) -> Rows:
        x, inv_temperature = self.hidden[self.row(index)], self.inv_temperature[index]
        if self.masked:
            x.masked_fill_((inv_temperature == 0)[:, None], 0)
        return Rows(x, self.head.own(self.targets[index]), inv_temperature)

    def live_first(self, ignore_index: int) -> tuple[Tensor, "Problem"]:
        """(index of all targets, those that count first; the problem with the others switched off). Waits for nothing.

        What does not count has inverse temperature 0.
        """
        targets, scale = switched_off(self.targets, self.inv_temperature, ignore_index)
        index = (self.targets == ignore_index).to(torch.uint8).argsort(stable=True)
        index = index if self.hidden.shape[0] else index[:0]
        return index, Problem(self.hidden, self.head, targets, self.rows, scale, masked=True)


def switched_off(targets: Tensor, inv_temperature: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(targets, inverse temperatures): 0 where a target does not count."""
    ignored = targets == ignore_index
    return targets.masked_fill(ignored, 0), inv_temperature.masked_fill(ignored, 0.0)


class Scores(NamedTuple):
    """(n,) each, in fp32 (fp64 for fp64 inputs): all that later steps need of the logits."""

    anchor: Tensor
    label_d: Tensor  # z_y - anchor
    rest: Tensor  # S'
    mean_d: Tensor  # sum_v p_v d_v = log S - entropy
    logps: Tensor
    entropy: Tensor
    log_sum_sq_probs: Tensor
    mean_logits: Tensor
    is_top1: Tensor  # bool

    @property
    def total(self) -> Tensor:
        return self.label_d.exp() + self.rest

    def at(self, index: Tensor | slice) -> "Scores":
        return Scores(*(x[index] for x in self))

    def where(self, counts: Tensor) -> "Scores":
        """0 where a row does not count."""
        return Scores(*(x.masked_fill(~counts, 0) for x in self))


def score(
    kernels: Kernels,
    head: Head,
    rows: Rows,
    chunk: Tensor | None = None,
) -> Scores:
    """One pass over the vocabulary; F into `chunk` if given."""
    z_y, anchor = label_anchor(kernels, head, rows)
    sums = kernels.score(rows.x, head, rows.targets, anchor, rows.inv_temperature, chunk, None)
    if head.shard is not None:
        sums = _over_ranks(head.shard, sums, with_max=kernels.STATIC)
    if kernels.STATIC:
        again = _is_far(sums, z_y) & sums.max_d.isfinite()
        anchor = torch.where(again, anchor + sums.max_d.to(anchor.dtype), anchor)
        found = kernels.score(rows.x, head, rows.targets, anchor, rows.inv_temperature, chunk, None, again)
        if head.shard is not None:
            found = _over_ranks(head.shard, found)
        sums = Sums(*(torch.where(again, new, old) for new, old in zip(found, sums, strict=True)))
    else:
        at = _is_far(sums, z_y).nonzero()[:, 0]  # the same on all processes
        if head.shard is not None and not head.shard.all_sums and at.numel():
            sums.max_d[at] = head.shard.gather(sums.max_d[at]).amax(0)
        for few in split(wants_maximum(sums, z_y), ROW_BLOCK):
            _score_at_maximum(kernels, head, rows, few, anchor, sums, chunk)

    return finish(anchor, z_y - anchor.double(), sums, head.vocab_size)


def label_anchor(kernels: Kernels, head: Head, rows: Rows) -> tuple[Tensor, Tensor]:
    """(z_y (n,) fp64, what is subtracted from a row's logits: z_y rounded, 0 where it is infinite)."""
    z_y, _ = label_logits(kernels, head, rows)
    if head.shard is not None:
        z_y = head.shard.total(z_y)
    return z_y, torch.where(z_y.isinf(), 0.0, z_y).to(accumulator(rows.x.dtype))


def _is_far(sums: Sums, z_y: Tensor) -> Tensor:
    return (sums.exp > RESCORE_ABOVE) | z_y.isneginf()


def wants_maximum(sums: Sums, z_y: Tensor) -> Tensor:
    """Index of the rows that are scored once more, anchored at their maximum."""
    return (_is_far(sums, z_y) & sums.max_d.isfinite()).nonzero()[:, 0]


def finish(anchor: Tensor, label_d: Tensor, sums: Sums, vocab_size: int) -> Scores:
    """From sums, anchored; label_d (n,) fp64 is what rounding the anchor left of z_y, or the distance to the maximum.

    The sums are fp64, so is what follows, rounded once at the end, to the dtype of the anchor.
    """
    dtype = anchor.dtype
    # -log1p(S' exp(-label_d)) keeps a confident row's precision, and its sign
    e_y = label_d.exp()
    near = label_d > -600  # below, exp(-label_d) leaves fp64's range
    rest = torch.where(near, sums.exp * (-label_d).exp(), 0.0)
    total = e_y + sums.exp
    entropy = torch.where(
        near, torch.log1p(rest) + (label_d * sums.exp - sums.exp_d) / total, total.log() - sums.exp_d / total
    )
    return Scores(
        anchor=anchor,
        label_d=label_d.to(dtype),
        rest=sums.exp.to(dtype),
        mean_d=((sums.exp_d + torch.where(e_y > 0, e_y * label_d, 0.0)) / total).to(dtype),
        logps=torch.where(near, 0.0 - torch.log1p(rest), label_d - total.log()).to(dtype),
        entropy=entropy.clamp(min=0).to(dtype),
        log_sum_sq_probs=((sums.exp_sq + e_y * e_y).log() - 2 * total.log()).to(dtype),
        mean_logits=(sums.z / vocab_size).to(dtype),
        is_top1=(sums.max_d <= label_d) & ~total.isnan(),
    )


def _score_at_maximum(
    kernels: Kernels, head: Head, rows: Rows, few: Tensor, anchor: Tensor, sums: Sums, chunk: Tensor | None
) -> None:
    """Scores the rows at `few` again; writes what they give into anchor, sums and chunk."""
    x, targets, inv_temperature = rows.x[few], rows.targets[few], rows.inv_temperature[few]
    anchor[few] += sums.max_d[few].to(anchor.dtype)
    few_chunk = None if chunk is None else kernels.new_chunk(few.numel(), head.weight, x.dtype)
    found = kernels.score(x, head, targets, anchor[few], inv_temperature, few_chunk, None)
    if head.shard is not None:
        found = _over_ranks(head.shard, found)
    if chunk is not None and few_chunk is not None:
        found_rows = few_chunk.narrow(kernels.TOKEN_DIM, 0, few.numel())
        chunk.index_copy_(kernels.TOKEN_DIM, few, found_rows)
    for all_rows, some in zip(sums, found, strict=True):
        all_rows[few] = some


def _over_ranks(shard: Shard, sums: Sums, with_max: bool = False) -> Sums:
    """Of the whole vocabulary; where only log-probs are asked for, that of exp alone, and max_d if it is wanted."""
    if not shard.all_sums and not with_max:
        return sums._replace(exp=shard.total(sums.exp))
    if not shard.all_sums:
        exp, max_d = shard.gather(torch.stack((sums.exp, sums.max_d))).unbind(1)
        return sums._replace(exp=in_order(exp), max_d=max_d.amax(0))
    parts = shard.gather(torch.stack(sums))
    exp, exp_d, exp_sq, z = in_order(parts[:, :-1])
    return Sums(exp, exp_d, exp_sq, z, parts[:, -1].amax(0))


def label_logits(kernels: Kernels, head: Head, rows: Rows) -> tuple[Tensor, Tensor]:
    """(z_y, 1 - tanh^2 at the label), both (n,) fp64; z_y is 0 where another process holds the label's row."""
    at = rows.targets if head.shard is None else rows.targets.clamp(min=0)
    u = kernels.label_dots(rows.x, head.weight, at).double()
    if head.bias is not None:
        u = u + head.bias[at].double()
    u = u * head.logit_scale
    slope = torch.ones_like(u)
    if head.softcap is not None:
        bent = torch.tanh(u / head.softcap)
        u, slope = head.softcap * bent, 1 - bent * bent
    z_y = u * rows.inv_temperature.double()
    return z_y if head.shard is None else torch.where(rows.targets >= 0, z_y, 0.0), slope


def order_of(index: Tensor) -> Tensor:
    """What `add_rows` below does not need."""
    return index


def add_rows(out: Tensor, index: Tensor, values: Tensor, scale: Tensor | None, order: Tensor) -> None:
    """out[index[i]] += scale[i] values[i]; an index outside of out is left out."""
    inside = ((index >= 0) & (index < out.shape[0])).nonzero()[:, 0]
    rows = values[inside].to(out.dtype)
    add_in_order(out, index[inside], rows if scale is None else rows * scale[inside, None])


def add_in_order(out: Tensor, index: Tensor, rows: Tensor) -> None:
    """out[index[i]] += rows[i], the same bits every time; no index outside of out."""
    # index_add adds in a fixed order on a CPU and by atomics on CUDA, where index_put sorts; on a CPU that one adds
    # fp32 by atomics
    if out.is_cuda:
        out.index_put_((index,), rows, accumulate=True)
    else:
        out.index_add_(0, index, rows)
