"""The head's steps in eager PyTorch, a slab of the vocabulary at a time: any device, the same memory contract.

Logits are formed in fp32 from 16-bit inputs (fp64 from fp64), never rounded to 16 bits. A chunk is (n, V), or has
more rows than are used.
With `deterministic` a library GEMM always sees blocks of one size, so a row's bits do not depend on its neighbours.
"""

import torch
from torch import Tensor

from fastpref.kernels.chunks import SMALL_BLOCK, accumulator, chunk_dtype
from fastpref.kernels.head import Head, Sums
from fastpref.kernels.head import add_rows as add_rows
from fastpref.kernels.head import order_of as order_of

# when deterministic: rows of a GEMM, and what its columns are derived from
BLOCK, BLOCK_WORKSPACE = 64, 32 * 2**20

TOKEN_DIM = 0
STATIC = False
ROUNDS = False
SLABS = False


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the accumulator's precision."""
    dtype = accumulator(a.dtype)
    if a.is_cuda and a.dtype == b.dtype and a.dtype.itemsize == 2:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def _logits(x: Tensor, weight: Tensor, *, few: bool) -> Tensor:
    """x @ weight.T; of a few columns a library's product would have bits that depend on the place of a row."""
    columns = weight.shape[0]
    if few:
        weight = torch.cat((weight, weight.new_zeros(SMALL_BLOCK - columns, weight.shape[1])))
    return wide_product(x, weight.T)[:, :columns]


def slabs_of(n: int, vocab_size: int, slab_bytes: int = 2 * 2**20) -> list[slice]:
    """Slices of the vocabulary whose (n, slice) in fp32 takes slab_bytes."""
    size = max(64, slab_bytes // (4 * max(n, 1)))
    return [slice(first, min(first + size, vocab_size)) for first in range(0, vocab_size, size)]


def label_dots(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(n,) fp64: x . w_y."""
    return torch.cat(
        [
            (a.double() * weight[y].to(x.dtype).double()).sum(-1)
            for a, y in zip(x.split(1024), targets.split(1024), strict=True)
        ]
    )


def new_chunk(n: int, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(n, weight.shape[0], dtype=chunk_dtype(dtype), device=weight.device)


def score(
    x: Tensor,
    head: Head,
    targets: Tensor,
    anchor: Tensor,
    inv_temperature: Tensor,
    chunk: Tensor | None,
    coefs: tuple[Tensor, Tensor] | None,
) -> Sums:
    if head.deterministic:
        return _score_blocks(x, head, targets, anchor, inv_temperature, chunk, coefs)
    weight, n = head.weight, x.shape[0]
    sums = torch.zeros(len(Sums._fields), n, dtype=torch.float64, device=x.device)
    sums[4] = -torch.inf
    for slab in slabs_of(n, weight.shape[0], head.slab_bytes):
        z = _logits(x, weight[slab].to(x.dtype), few=weight.shape[0] < SMALL_BLOCK)
        if head.bias is not None:
            z += head.bias[slab]
        z *= head.logit_scale
        slope = None
        if head.softcap is not None:
            bent = torch.tanh(z / head.softcap)
            z, slope = bent * head.softcap, 1 - bent * bent
        z *= inv_temperature[:, None]
        sums[3] += z.sum(-1, dtype=torch.float64)
        d = z.sub_(anchor[:, None])
        inside = ((targets >= slab.start) & (targets < slab.stop)).nonzero()[:, 0]
        label = (inside, targets[inside] - slab.start)
        d[label] = -torch.inf
        sums[4] = torch.maximum(sums[4], d.amax(-1))
        # held where exp would pass fp32's range: such a row is scored again with another anchor
        e = d.clamp(max=80.0).exp_()
        d.clamp_(min=-200.0)
        sums[0] += e.sum(-1, dtype=torch.float64)
        sums[1] += (e * d).sum(-1, dtype=torch.float64)
        sums[2] += (e * e).sum(-1, dtype=torch.float64)
        if chunk is not None:
            if coefs is not None:
                e *= d.mul_(coefs[1][:, None]).add_(coefs[0][:, None])
            chunk[:n, slab] = e if slope is None else e * slope
    return Sums(*sums)


def _score_blocks(
    x: Tensor,
    head: Head,
    targets: Tensor,
    anchor: Tensor,
    inv_temperature: Tensor,
    chunk: Tensor | None,
    coefs: tuple[Tensor, Tensor] | None,
) -> Sums:
    """`score`, its rows in blocks of one size, the last one padded with copies of the last row."""
    n, plain = x.shape[0], head._replace(deterministic=False, workspace=BLOCK_WORKSPACE)
    parts = [x.new_zeros((len(Sums._fields), 0), dtype=torch.float64)]
    for first in range(0, n, BLOCK):
        index = torch.arange(first, first + BLOCK, device=x.device).clamp(max=n - 1)
        block = None if chunk is None else new_chunk(BLOCK, head.weight, x.dtype)
        some = None if coefs is None else (coefs[0][index], coefs[1][index])
        sums = score(x[index], plain, targets[index], anchor[index], inv_temperature[index], block, some)
        live = min(BLOCK, n - first)
        parts.append(torch.stack(sums)[:, :live])
        if chunk is not None and block is not None:
            chunk[first : first + live] = block[:live]
    return Sums(*torch.cat(parts, 1))


def d_hidden(chunk: Tensor, n: int, weight: Tensor, dtype: torch.dtype, factor: Tensor) -> Tensor:
    """(n, H): diag(factor) F W, in the accumulator's precision."""
    out = torch.zeros(n, weight.shape[1], dtype=accumulator(chunk.dtype), device=weight.device)
    for slab in slabs_of(max(n, weight.shape[1]), weight.shape[0]):
        out += wide_product(chunk[:n, slab], weight[slab].to(dtype).to(chunk.dtype))
    return out.mul_(factor[:, None])


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    return x.to(factor.dtype) * factor[:, None]


def d_weight(chunk: Tensor, scaled: Tensor, factor: Tensor, out: Tensor, accumulate: bool) -> None:
    """out (V, H) = F^T scaled, or += if accumulate."""
    n = scaled.shape[0]
    operand = scaled.to(chunk.dtype) if chunk.is_cuda else scaled
    for slab in slabs_of(max(scaled.shape), out.shape[0]):
        f = chunk[:n, slab].T
        product = wide_product(f, operand) if chunk.is_cuda else f.to(out.dtype) @ operand
        out[slab] = out[slab].add_(product) if accumulate else product


def add_d_bias(chunk: Tensor, factor: Tensor, out: Tensor) -> None:
    """out (V,) += F^T factor."""
    for slab in slabs_of(factor.numel(), out.numel()):
        out[slab] += factor @ chunk[: factor.numel(), slab].to(factor.dtype)
