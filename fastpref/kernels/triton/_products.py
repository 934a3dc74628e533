"""The products of the gradients, into fp32: d_hidden = diag(factor) F W, d_weight = F^T (diag(factor) X).

Rows without a gradient, ignored ones among them, have factor 0. Blocks of such rows cost nothing: d_hidden writes
zeros, d_weight takes the blocks that are left from a list, so that the host need not know how many there are.
"""

import triton
import triton.language as tl


@triton.jit
def d_hidden_kernel(
    f_ptr,  # (n, V)
    weight_ptr,  # (V, H)
    factor_ptr,  # (n,) fp32
    out_ptr,  # (n, H) fp32, written
    n,
    V,
    H,
    stride_fn,
    stride_wv,
    stride_wh,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr,
    READ: tl.constexpr,  # the weight is read in it
    PRECISION: tl.constexpr,
):
    tile, block = _grouped(tl.cdiv(n, BLOCK_N), tl.cdiv(H, BLOCK_H), GROUP)
    row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    column = block * BLOCK_H + tl.arange(0, BLOCK_H)
    factor = tl.load(factor_ptr + row, mask=row < n, other=0.0)
    wanted = tl.max((factor != 0.0).to(tl.int32), 0)

    total = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    if wanted != 0:
        # held where rows lie; a mask where elements do, or the compiler would not see that they are contiguous
        held_row, real = tl.minimum(row, n - 1).to(tl.int64), column < H
        depth = tl.arange(0, BLOCK_V)
        f_ptrs = f_ptr + held_row[:, None] * stride_fn + depth[None, :]
        w_ptrs = weight_ptr + depth.to(tl.int64)[:, None] * stride_wv + column.to(tl.int64)[None, :] * stride_wh
        for k in tl.range(0, tl.cdiv(V, BLOCK_V)):
            inside = depth < V - k * BLOCK_V
            f = tl.load(f_ptrs, mask=inside[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=inside[:, None] & real[None, :], other=0.0)
            total = tl.dot(f, w.to(READ).to(f.dtype), total, input_precision=PRECISION)
            f_ptrs += BLOCK_V
            w_ptrs += BLOCK_V * tl.cast(stride_wv, tl.int64)

    where = row.to(tl.int64)[:, None] * H + column[None, :]
    tl.store(out_ptr + where, total * factor[:, None], mask=(row < n)[:, None] & (column < H)[None, :])


@triton.jit
def d_weight_kernel(
    f_ptr,  # (n, V)
    scaled_ptr,  # (n, H) contiguous
    block_ptr,  # (blocks of BLOCK_N rows,) int64: those with a gradient first
    count_ptr,  # () int64: how many these are
    out_ptr,  # (V, H) fp32, written or added to
    n,
    V,
    H,
    stride_fn,
    stride_ov,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, block = _grouped(tl.cdiv(V, BLOCK_V), tl.cdiv(H, BLOCK_H), GROUP)
    vocab = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    column = block * BLOCK_H + tl.arange(0, BLOCK_H)
    depth = tl.arange(0, BLOCK_N)

    total = tl.zeros((BLOCK_V, BLOCK_H), tl.float32)
    for k in tl.range(0, tl.load(count_ptr)):
        row = tl.load(block_ptr + k) * BLOCK_N + depth
        inside = row < n
        f_ptrs = f_ptr + row[:, None] * stride_fn + vocab[None, :]
        f = tl.load(f_ptrs, mask=inside[:, None] & (vocab < V)[None, :], other=0.0)
        x_ptrs = scaled_ptr + row[:, None] * H + column[None, :]
        x = tl.load(x_ptrs, mask=inside[:, None] & (column < H)[None, :], other=0.0)
        total = tl.dot(f.T, x, total, input_precision=PRECISION)

    out_ptrs = out_ptr + vocab.to(tl.int64)[:, None] * stride_ov + column[None, :]
    mask = (vocab < V)[:, None] & (column < H)[None, :]
    if ACCUMULATE:
        total += tl.load(out_ptrs, mask=mask, other=0.0)
    tl.store(out_ptrs, total, mask=mask)


@triton.jit
def d_bias_kernel(
    f_ptr,  # (n, V)
    factor_ptr,  # (n,) fp32
    out_ptr,  # (V,) fp32, added to
    n,
    V,
    stride_fn,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    real = column < V

    total = tl.zeros((COLUMNS,), tl.float32)
    for first in tl.range(0, n, ROWS):
        row = first + tl.arange(0, ROWS)
        factor = tl.load(factor_ptr + row, mask=row < n, other=0.0)
        f_ptrs = f_ptr + row.to(tl.int64)[:, None] * stride_fn + column[None, :]
        f = tl.load(f_ptrs, mask=(row < n)[:, None] & real[None, :], other=0.0).to(tl.float32)
        total += tl.sum(f * factor[:, None], 0)

    tl.store(out_ptr + column, tl.load(out_ptr + column, mask=real, other=0.0) + total, mask=real)


@triton.jit
def _grouped(rows, columns, GROUP: tl.constexpr):
    """(row, column) of this program's tile: bands of GROUP rows, so that the programs in flight share operands."""
    program = tl.program_id(0)
    band = program // (GROUP * columns)
    height = tl.minimum(rows - band * GROUP, GROUP)
    place = program % (GROUP * columns)
    return band * GROUP + place % height, place // height
