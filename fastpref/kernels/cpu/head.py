"""Launchers of the head's C++ kernels (csrc/head*.cpp): fp64 sums of 8 rows each in fp32, 16-bit chunks in bf16.

A chunk is (V, stride): tokens contiguous, padded with zeros to `token_pad`.
"""

import torch
from torch import Tensor

from fastpref import _cpu
from fastpref.kernels.chunks import chunk_dtype
from fastpref.kernels.cpu._isa import DTYPES, isa
from fastpref.kernels.head import Head, Sums
from fastpref.kernels.head import add_rows as add_rows
from fastpref.kernels.head import order_of as order_of

TOKEN_DIM = 1
STATIC = False
ROUNDS = True
SLABS = True


def _is_wider(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels round this fp32 weight to 16-bit `dtype` as they read it."""
    return weight.dtype == torch.float32 and dtype != torch.float32


def label_dots(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(n,) fp64: x . w_y, summed in fp64."""
    n, hidden_size = x.shape
    x, targets = x.contiguous(), targets.contiguous()
    out = x.new_empty(n, dtype=torch.float64)
    _cpu.label_dots(
        x.data_ptr(),
        weight.data_ptr(),
        targets.data_ptr(),
        out.data_ptr(),
        n,
        hidden_size,
        *weight.stride(),
        DTYPES[x.dtype],
        _is_wider(weight, x.dtype),
        torch.get_num_threads(),
    )
    return out


def new_chunk(n: int, weight: Tensor, dtype: torch.dtype) -> Tensor:
    stride = -(-n // _cpu.token_pad) * _cpu.token_pad
    return weight.new_empty(weight.shape[0], stride, dtype=chunk_dtype(dtype))


def score(
    x: Tensor,
    head: Head,
    targets: Tensor,
    anchor: Tensor,
    inv_temperature: Tensor,
    chunk: Tensor | None,
    coefs: tuple[Tensor, Tensor] | None,
    before: Sums | None = None,
) -> Sums:
    weight, (n, hidden_size) = head.weight, x.shape
    bias = None if head.bias is None else head.bias.float().contiguous()
    c0, c1 = (c.contiguous() for c in coefs) if coefs else (None, None)
    x, anchor, inv_temperature = x.contiguous(), anchor.contiguous(), inv_temperature.contiguous()
    targets = targets.contiguous()
    sums = x.new_empty(len(Sums._fields), n, dtype=torch.float64) if before is None else torch.stack(before)
    _cpu.head_score(
        isa(),
        *(
            0 if t is None else t.data_ptr()
            for t in (x, weight, bias, targets, anchor, inv_temperature, c0, c1, sums, chunk)
        ),
        n,
        hidden_size,
        weight.shape[0],
        *weight.stride(),
        0 if chunk is None else chunk.stride(0),
        head.logit_scale,
        head.softcap or 0.0,
        DTYPES[x.dtype],
        _is_wider(weight, x.dtype),
        before is not None,
        torch.get_num_threads(),
    )
    return Sums(*sums)


def d_hidden(chunk: Tensor, n: int, weight: Tensor, dtype: torch.dtype, factor: Tensor) -> Tensor:
    """(n, H) fp32: diag(factor) F W."""
    out = chunk.new_empty(n, weight.shape[1], dtype=torch.float32)
    add_d_hidden(chunk, weight, dtype, out, accumulate=False)
    return out.mul_(factor[:, None])


def add_d_hidden(chunk: Tensor, weight: Tensor, dtype: torch.dtype, out: Tensor, *, accumulate: bool = True) -> None:
    """out (n, H) fp32 += F W."""
    (n, hidden_size), vocab_size = out.shape, weight.shape[0]
    _cpu.head_d_hidden(
        isa(),
        chunk.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        n,
        hidden_size,
        vocab_size,
        *weight.stride(),
        chunk.stride(0),
        accumulate,
        DTYPES[dtype],
        _is_wider(weight, dtype),
        torch.get_num_threads(),
    )


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    return x.to(factor.dtype) * factor[:, None]


def d_weight(chunk: Tensor, scaled: Tensor, factor: Tensor, out: Tensor, accumulate: bool) -> None:
    """out (V, H) fp32 = F^T scaled, or += if accumulate; scaled (n, H) fp32 is rounded to the product's operands."""
    _d_weight(chunk, scaled, out, (None, None, None, None), accumulate, chunk.dtype)


def round_d_weight(chunk: Tensor, scaled: Tensor, x: Tensor, targets: Tensor, label: Tensor, out: Tensor) -> None:
    """out (V, H) = F^T scaled, and label[t] x[t] at row targets[t]; summed in fp32, rounded once to the dtype of x."""
    of_label = out, x.contiguous(), label.contiguous(), targets.contiguous()
    _d_weight(chunk, scaled, None, of_label, False, x.dtype)


def _d_weight(
    chunk: Tensor,
    scaled: Tensor,
    out: Tensor | None,
    rounded: tuple[Tensor | None, ...],
    accumulate: bool,
    dtype: torch.dtype,
) -> None:
    n, hidden_size = scaled.shape
    scaled = scaled.contiguous()
    _cpu.head_d_weight(
        isa(),
        *(0 if t is None else t.data_ptr() for t in (chunk, scaled, out, *rounded)),
        n,
        hidden_size,
        chunk.shape[0],
        chunk.stride(0),
        accumulate,
        DTYPES[dtype],
        torch.get_num_threads(),
    )


def add_d_bias(chunk: Tensor, factor: Tensor, out: Tensor) -> None:
    """out (V,) fp32 += F^T factor."""
    for first in range(0, out.numel(), 4096):
        block = chunk[first : first + 4096, : factor.numel()].float()
        out[first : first + 4096] += block @ factor
