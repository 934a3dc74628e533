"""Divergence between two linear heads in eager PyTorch: a chunk of rows at a time, all else a slab of the vocabulary.

With d = log p - log q, and for JSD also a = log p - log m and b = log q - log m, m = beta q + (1 - beta) p:

    KL  = sum p d                                      JSD = (1 - beta) sum p a + beta sum q b
    dKL / dz_p  = p (d - sum p d)                      dJSD / dz_p = (1 - beta) p (a - sum p a)
    dKL / dz_q  = q - p                                dJSD / dz_q = beta q (b - sum q b)

A sum of p d whose terms cancel loses what it is about where p and q are close. As sum q - p = 0, each term is
p d + (q - p) instead, second order in d and >= 0, also as it is rounded.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.kernels.chunks import chunk_dtype
from fastpref.kernels.divergence import Form, Side
from fastpref.kernels.shard import Shard
from fastpref.kernels.torch.head import slabs_of, wide_product


class Part(NamedTuple):
    """Some rows; valid until the next part is made."""

    rows: Tensor  # (n,)
    divergence: Tensor  # (n,)
    factor: Tensor  # (n,) what is missing from the slopes: logit_scale / T
    slopes: tuple[Tensor, Tensor]  # (n, V) dD/du of p and of q, where they were asked for


def linear_divergence(
    p: Side, q: Side, index: Tensor, inv_temperature: Tensor, form: Form, unit: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """(M,) the divergence, 0 at what is not in `index`; dD/dhidden of p and of q, each empty unless asked for."""
    out = torch.zeros_like(inv_temperature)
    units = [
        inv_temperature.new_zeros(side.hidden.shape if there else 0) for side, there in zip((p, q), unit, strict=True)
    ]
    for part in _parts(p, q, index, inv_temperature, form, any(unit)):
        out[part.rows] = part.divergence
        for side, slopes, d_hidden in zip((p, q), part.slopes, units, strict=True):
            if d_hidden.numel():
                d_hidden[part.rows] = _d_hidden(slopes, side) * part.factor[:, None]
    _add_over_ranks(form.shard, units)
    return out, units[0], units[1]


def gradients(
    grad: Tensor,  # (M,)
    p: Side,
    q: Side,
    index: Tensor,
    inv_temperature: Tensor,
    form: Form,
    wanted: list[bool],  # of hidden, weight and bias of p, then of q
) -> list[Tensor]:
    """Gradients in the dtypes of the inputs, empty where not wanted. Every row is scored again."""
    # a row that nobody sends a gradient to costs nothing, and may be NaN
    index = index[grad[index] != 0]
    one_chunk = form.shard is None and index.numel() <= _chunk_rows(inv_temperature.dtype, form)
    inputs = (*p, *q)
    found = []
    for x, there in zip(inputs, wanted, strict=True):
        # what several chunks add to, or several processes, is kept in fp32 until the last
        dtype = x.dtype if x is not None and one_chunk else inv_temperature.dtype
        found.append(torch.zeros(x.shape if there and x is not None else 0, dtype=dtype, device=grad.device))
    for part in _parts(p, q, index, inv_temperature, form, True):
        factor = part.factor * grad[part.rows]
        for side, slopes, (d_hidden, d_weight, d_bias) in zip((p, q), part.slopes, (found[:3], found[3:]), strict=True):
            if d_hidden.numel():
                d_hidden[part.rows] = (_d_hidden(slopes, side) * factor[:, None]).to(d_hidden.dtype)
            if d_weight.numel():
                scaled = _operand(side.hidden[part.rows].to(factor.dtype) * factor[:, None], side)
                for slab in slabs_of(max(scaled.shape), d_weight.shape[0]):
                    d_weight[slab] += wide_product(_operand(slopes[:, slab].T, side), scaled)
            if d_bias.numel():
                d_bias += factor @ slopes
    _add_over_ranks(form.shard, [found[0], found[3]])
    return [g if x is None else g.to(x.dtype) for g, x in zip(found, inputs, strict=True)]


def _add_over_ranks(shard: Shard | None, d_hidden: list[Tensor]) -> None:
    """Gradients of hidden, each of which every process has formed from its rows, become whole."""
    for x in d_hidden:
        if shard is not None and x.numel():
            shard.add_over_ranks(x)


def _chunk_rows(dtype: torch.dtype, form: Form) -> int:
    """Their logits under both heads take 3/4 of `workspace`; the rest is for temporaries."""
    return max(1, form.workspace * 3 // 4 // (2 * dtype.itemsize * form.most_rows))


def _parts(p: Side, q: Side, index: Tensor, inv_temperature: Tensor, form: Form, with_slopes: bool) -> Iterator[Part]:
    vocab_size, size = p.weight.shape[0], _chunk_rows(inv_temperature.dtype, form)
    buffers = inv_temperature.new_empty((2, min(size, index.numel()), vocab_size))
    for rows in index.split(size) if index.numel() else ():
        inv_t = inv_temperature[rows]
        log_p, log_q = buffers[:, : rows.numel()]
        lse_p, lse_q = (_log_probs(side, rows, inv_t, form, out) for side, out in ((p, log_p), (q, log_q)))
        slabs = slabs_of(rows.numel(), vocab_size, form.workspace // 32)
        divergence, center_p, center_q = _sums(log_p, log_q, slabs, form)
        for slab in slabs if with_slopes else ():
            a, b = log_p[:, slab], log_q[:, slab]
            d_p, d_q = _slopes(a, b, center_p, center_q, form.jsd_beta)
            if form.softcap is not None:
                d_p *= _bend(a, lse_p, inv_t, form.softcap)
                d_q *= _bend(b, lse_q, inv_t, form.softcap)
            a.copy_(d_p)
            b.copy_(d_q)
        yield Part(rows, divergence, inv_t * form.logit_scale, (log_p, log_q))


def _log_probs(side: Side, rows: Tensor, inv_temperature: Tensor, form: Form, out: Tensor) -> Tensor:
    """log softmax(z) into out (n, V); returns logsumexp(z)."""
    x, (vocab_size, hidden_size) = side.hidden[rows], side.weight.shape
    slabs = slabs_of(max(rows.numel(), hidden_size), vocab_size, form.workspace // 32)
    for slab in slabs:
        z = wide_product(x, side.weight[slab].to(x.dtype).T)
        if side.bias is not None:
            z += side.bias[slab]
        z *= form.logit_scale
        if form.softcap is not None:
            z = form.softcap * torch.tanh(z / form.softcap)
        out[:, slab] = z * inv_temperature[:, None]
    peak = out.amax(-1)
    out -= peak[:, None]
    log_total = sum(out[:, slab].exp().sum(-1, dtype=torch.float64) for slab in slabs).log().to(out.dtype)  # type: ignore[union-attr]
    lse = peak + log_total
    if form.shard is not None:
        everywhere = form.shard.gather(lse)
        lse = everywhere.logsumexp(0)
        log_total = lse - peak
    out -= log_total[:, None]
    return lse


def _sums(log_p: Tensor, log_q: Tensor, slabs: list[slice], form: Form) -> tuple[Tensor, Tensor, Tensor]:
    """(n,) each: the divergence, and the means that the slopes of p and of q are taken from."""
    beta = form.jsd_beta
    sums = torch.zeros(3, log_p.shape[0], dtype=torch.float64, device=log_p.device)
    for slab in slabs:
        a, b = log_p[:, slab], log_q[:, slab]
        p, q = a.exp(), b.exp()
        terms = [(1.0, p, a - b, q)]
        if beta is not None:
            to_p, to_q = _to_mixture(a - b, beta)
            m = beta * q + (1 - beta) * p
            terms = [(1 - beta, p, to_p, m), (beta, q, to_q, m)]
        for center, (share, mass, log_ratio, other) in zip(sums[1:], terms, strict=False):
            product = mass * log_ratio
            sums[0] += share * product.add(_excess(mass, log_ratio, other)).sum(-1, dtype=torch.float64)
            center += product.sum(-1, dtype=torch.float64)
    if form.shard is not None:
        sums = form.shard.total(sums)
    divergence, center_p, center_q = sums.to(log_p.dtype)
    return divergence, center_p, center_q


def _slopes(a: Tensor, b: Tensor, center_p: Tensor, center_q: Tensor, beta: float | None) -> tuple[Tensor, Tensor]:
    """dD/dz of p and of q, from log p and log q."""
    p, q = a.exp(), b.exp()
    if beta is None:
        return p * (a - b - center_p[:, None]), _excess(p, a - b, q)
    to_p, to_q = _to_mixture(a - b, beta)
    return (1 - beta) * p * (to_p - center_p[:, None]), beta * q * (to_q - center_q[:, None])


def _to_mixture(d: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(log p - log m, log q - log m), m = beta q + (1 - beta) p, from d = log p - log q."""
    log_p_share, log_q_share = d.new_tensor(math.log1p(-beta)), d.new_tensor(math.log(beta))
    return -torch.logaddexp(log_p_share, log_q_share - d), -torch.logaddexp(log_q_share, log_p_share + d)


def _excess(mass: Tensor, log_ratio: Tensor, other: Tensor) -> Tensor:
    """other - mass, where log_ratio = log(mass / other): not as a difference where they are close."""
    return torch.where(log_ratio.abs() < 1, mass * torch.expm1(-log_ratio), other - mass)


def _bend(log_probs: Tensor, lse: Tensor, inv_temperature: Tensor, softcap: float) -> Tensor:
    """1 - tanh^2, as z = softcap tanh / T."""
    return 1 - ((log_probs + lse[:, None]) / (softcap * inv_temperature[:, None])).square()


def _d_hidden(slopes: Tensor, side: Side) -> Tensor:
    """(n, H): slopes @ weight."""
    n, (vocab_size, hidden_size) = slopes.shape[0], side.weight.shape
    out = slopes.new_zeros(n, hidden_size)
    for slab in slabs_of(max(n, hidden_size), vocab_size):
        out += wide_product(_operand(slopes[:, slab], side), _operand(side.weight[slab].to(side.hidden.dtype), side))
    return out


def _operand(x: Tensor, side: Side) -> Tensor:
    """x as it enters a gradient product: in 16 bits on a GPU, if the inputs are."""
    return x.to(chunk_dtype(side.hidden.dtype)) if x.is_cuda else x
