"""The head's steps on a GPU: the forward sweep in Triton, the gradients' products in Triton or by the library.

Nothing here waits for the device: rows that are not wanted have inverse temperature or factor 0, and tiles of such rows
return at once. A chunk is (n, V), its rows a multiple of 16 bytes apart. The weight is read in the dtype of hidden,
whatever its own is, and fp16 products run in bf16, whose exponent F needs.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastpref.kernels.chunks import chunk_dtype
from fastpref.kernels.head import Head, Sums
from fastpref.kernels.triton import configs
from fastpref.kernels.triton._products import d_bias_kernel, d_hidden_kernel, d_weight_kernel
from fastpref.kernels.triton._rows import add_rows_kernel, label_dots_kernel
from fastpref.kernels.triton._score import score_kernel, sums_kernel

TOKEN_DIM = 0
STATIC = True
ROUNDS = False
SLABS = False

GROUP = 16  # row tiles of a band that runs side by side
ALIGNED = 64  # columns that the rows of a chunk are padded to
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# the default of fp_fusion changes between versions of Triton
COMPILE = {"enable_fp_fusion": True}


def _config(hidden: Tensor, weight: Tensor) -> configs.Config:
    vocab_size, hidden_size = weight.shape
    return configs.lookup(configs.arch_of(hidden.device), hidden.dtype, hidden_size, vocab_size)


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _precision() -> str:
    """Of products of fp32 operands: true fp32, unless torch's own switch allows tf32."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def label_dots(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(n,) fp64: x . w_y, summed in fp64."""
    x = _rows_contiguous(x)
    out = torch.empty(x.shape[0], dtype=torch.float64, device=x.device)
    if out.numel():
        strides = x.stride(0), *weight.stride()
        with on_device_of(x):
            label_dots_kernel[(out.numel(),)](
                x, weight, targets.contiguous(), out, x.shape[1], *strides, BLOCK=1024, **COMPILE
            )
    return out


def new_chunk(n: int, weight: Tensor, dtype: torch.dtype) -> Tensor:
    vocab_size = weight.shape[0]
    stride = -(-vocab_size // ALIGNED) * ALIGNED
    return torch.empty(n, stride, dtype=chunk_dtype(dtype), device=weight.device)[:, :vocab_size]


def score(
    x: Tensor,
    head: Head,
    targets: Tensor,
    anchor: Tensor,
    inv_temperature: Tensor,
    chunk: Tensor | None,
    coefs: tuple[Tensor, Tensor] | None,
    only: Tensor | None = None,
) -> Sums:
    """only (n,) bool: the other rows are left out; their sums are not written, nor is F of them."""
    weight, n = head.weight, x.shape[0]
    (vocab_size, hidden_size), config = weight.shape, _config(x, weight).score
    x, (c0, c1) = _rows_contiguous(x), coefs or (None, None)
    index = count = None
    if only is not None:
        index, count = (~only).to(torch.uint8).argsort(stable=True), only.sum()
    # gathered rows have addresses of their own
    descriptors = config.descriptors and only is None and x.dtype == weight.dtype and _describable(x, weight)
    blocks = triton.cdiv(vocab_size, config.columns * config.tiles)
    parts = torch.empty(blocks, len(Sums._fields), n, dtype=torch.float32, device=x.device)
    sums = torch.empty(len(Sums._fields), n, dtype=torch.float64, device=x.device)
    if not n:
        return Sums(*sums)
    with on_device_of(x):
        score_kernel[(triton.cdiv(n, config.rows) * blocks,)](
            TensorDescriptor.from_tensor(x, [config.rows, config.depth]) if descriptors else x,
            TensorDescriptor.from_tensor(weight, [config.columns, config.depth]) if descriptors else weight,
            None if head.bias is None else head.bias.contiguous(),
            targets.contiguous(),
            anchor.contiguous(),
            inv_temperature.contiguous(),
            None if c0 is None else c0.contiguous(),
            None if c1 is None else c1.contiguous(),
            index,
            count,
            None if chunk is None else chunk.as_strided((chunk.shape[0], chunk.stride(0)), chunk.stride()),
            parts,
            n,
            vocab_size,
            hidden_size,
            x.stride(0),
            *weight.stride(),
            0 if chunk is None else chunk.stride(0),
            head.softcap or 0.0,
            head.logit_scale,
            BLOCK_N=config.rows,
            BLOCK_V=config.columns,
            BLOCK_K=config.depth,
            TILES=config.tiles,
            GROUP=GROUP,
            FRESH=config.fresh,
            EVEN=hidden_size % config.depth == 0,
            HAS_CAP=head.softcap is not None,
            DESCRIPTORS=descriptors,
            PRECISION=_precision(),
            num_warps=config.warps,
            num_stages=config.stages,
            **COMPILE,
        )
        grid = triton.cdiv(n, 32), len(Sums._fields)
        sums_kernel[grid](parts, sums, n, blocks, ROWS=32, AT_ONCE=32, **COMPILE)
    return Sums(*sums)


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """(n, H): diag(factor) X, the other operand of d_weight."""
    return (x.to(factor.dtype) * factor[:, None]).to(chunk_dtype(x.dtype))


def d_hidden(chunk: Tensor, n: int, weight: Tensor, dtype: torch.dtype, factor: Tensor) -> Tensor:
    """(n, H) fp32: diag(factor) F W."""
    vocab_size, hidden_size = weight.shape
    config = _config(chunk, weight)
    # another dtype would have to be converted, a whole copy of the weight
    if config.library and chunk.is_cuda and weight.dtype == dtype == chunk.dtype:
        return _product(chunk[:n], weight).mul_(factor[:, None])
    out = torch.empty(n, hidden_size, dtype=torch.float32, device=weight.device)
    tile = config.d_hidden
    grid = (triton.cdiv(n, tile.rows) * triton.cdiv(hidden_size, tile.columns),)
    with on_device_of(weight):
        d_hidden_kernel[grid](
            chunk,
            weight,
            factor,
            out,
            n,
            vocab_size,
            hidden_size,
            chunk.stride(0),
            *weight.stride(),
            BLOCK_N=tile.rows,
            BLOCK_H=tile.columns,
            BLOCK_V=tile.depth,
            GROUP=GROUP,
            READ=_TYPES[dtype],
            PRECISION=_precision(),
            num_warps=tile.warps,
            num_stages=tile.stages,
            **COMPILE,
        )
    return out


def d_weight(chunk: Tensor, scaled: Tensor, factor: Tensor, out: Tensor, accumulate: bool) -> None:
    """out (V, H) fp32 = F^T scaled, or += if accumulate."""
    n, hidden_size = scaled.shape
    config = _config(chunk, out)
    if config.library and chunk.is_cuda:
        f = chunk[:n].T
        if f.dtype == torch.float32:
            torch.addmm(out, f, scaled, out=out) if accumulate else torch.mm(f, scaled, out=out)
        elif accumulate:
            torch.addmm(out, f, scaled, out_dtype=torch.float32, out=out)
        else:
            torch.mm(f, scaled, out_dtype=torch.float32, out=out)
        return
    tile = config.d_weight
    wanted = factor.new_zeros(triton.cdiv(n, tile.depth) * tile.depth, dtype=torch.bool)
    torch.ne(factor, 0, out=wanted[:n])
    block = wanted.view(-1, tile.depth).any(1)
    grid = (triton.cdiv(out.shape[0], tile.rows) * triton.cdiv(hidden_size, tile.columns),)
    with on_device_of(out):
        d_weight_kernel[grid](
            chunk,
            scaled.contiguous(),
            (~block).to(torch.uint8).argsort(stable=True),
            block.sum(),
            out,
            n,
            out.shape[0],
            hidden_size,
            chunk.stride(0),
            out.stride(0),
            BLOCK_V=tile.rows,
            BLOCK_H=tile.columns,
            BLOCK_N=tile.depth,
            GROUP=GROUP,
            ACCUMULATE=accumulate,
            PRECISION=_precision(),
            num_warps=tile.warps,
            num_stages=tile.stages,
            **COMPILE,
        )


def add_d_bias(chunk: Tensor, factor: Tensor, out: Tensor) -> None:
    """out (V,) fp32 += F^T factor."""
    grid = (triton.cdiv(out.numel(), 128),)
    with on_device_of(out):
        d_bias_kernel[grid](
            chunk, factor, out, factor.numel(), out.numel(), chunk.stride(0), ROWS=32, COLUMNS=128, **COMPILE
        )


def order_of(index: Tensor) -> Tensor:
    """(n,) for `add_rows`: positions by rising index, equal ones as they stand."""
    return index.argsort(stable=True)


def add_rows(out: Tensor, index: Tensor, values: Tensor, scale: Tensor | None, order: Tensor) -> None:
    """out[index[i]] += scale[i] values[i], in fp32 and in the order of i; an index outside of `out` is left out."""
    n, width = values.shape
    if not n:
        return
    with on_device_of(out):
        add_rows_kernel[(n,)](
            order,
            index.contiguous(),
            values,
            scale,
            out,
            n,
            out.shape[0],
            width,
            values.stride(0),
            out.stride(0),
            AT_ONCE=16,
            BLOCK=min(1024, triton.next_power_of_2(width)),
            **COMPILE,
        )


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32, by the library."""
    return a @ b if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)


def _describable(*operands: Tensor) -> bool:
    """Whether the tensor memory accelerator can address them: rows contiguous, and 16 bytes or a multiple apart."""
    return all(
        x.stride(1) == 1 and x.stride(0) * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0 and x.stride(0) > 0
        for x in operands
    )


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()
