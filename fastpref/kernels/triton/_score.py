"""The forward sweep: logits as tiles of a GEMM, exponential sums in its epilogue, F of the tile stored if asked for.

A program owns BLOCK_N rows and TILES tiles of BLOCK_V columns, and writes its own partial sums: no atomics, no order
between programs. `sums_kernel` adds the partial sums of a row in the order of the vocabulary, so that a row's bits
depend on dtype, H and V and not on its neighbours.

Tensor cores truncate what they add to an accumulator (Ootomo and Yokota 2022, arXiv:2203.03341, section 3): a sum over
all of H would be biased by some 1e-6 of the logit. So a fresh accumulator starts every FRESH tiles of
depth, 256 of H at most.
"""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Cephes' tanhf: an odd polynomial below 0.625, else 1 - 2 / (exp(2 |x|) + 1)."""
    s = x * x
    p = ((-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2) * s + 1.33314422036e-1
    near = (p * s - 3.33332819422e-1) * s * x + x
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.where(size > 20.0, 20.0, size)) + 1.0)
    return tl.where(size < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def _tile(
    x_ptr,  # (BLOCK_N, BLOCK_K) first tile of the rows
    w_ptr,  # (BLOCK_K, BLOCK_V) first tile of the columns
    H,
    stride_wh,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FRESH: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(BLOCK_N, BLOCK_V) fp32: x w."""
    total = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    part = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    depth = tl.arange(0, BLOCK_K)
    for k in tl.range(0, tl.cdiv(H, BLOCK_K)):
        if EVEN:
            x = tl.load(x_ptr)
            w = tl.load(w_ptr)
        else:
            inside = depth < H - k * BLOCK_K
            x = tl.load(x_ptr, mask=inside[None, :], other=0.0)
            w = tl.load(w_ptr, mask=inside[:, None], other=0.0)
        if FRESH == 1:
            total += tl.dot(x, w.to(x.dtype), input_precision=PRECISION)
        else:
            part = tl.dot(x, w.to(x.dtype), part, input_precision=PRECISION)
            if k % FRESH == FRESH - 1:
                total += part
                part = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        x_ptr += BLOCK_K
        w_ptr += BLOCK_K * stride_wh
    return total + part


@triton.jit
def _tile_of_descriptors(
    x_descriptor,  # (n, H) in blocks of (BLOCK_N, BLOCK_K)
    w_descriptor,  # (V, H) in blocks of (BLOCK_V, BLOCK_K)
    row,
    column,
    H,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FRESH: tl.constexpr,
):
    """As `_tile`, its operands fetched by the tensor memory accelerator; what is outside of them is 0."""
    total = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    part = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for k in tl.range(0, tl.cdiv(H, BLOCK_K)):
        x = x_descriptor.load([row, k * BLOCK_K])
        w = w_descriptor.load([column, k * BLOCK_K])
        part = tl.dot(x, w.T, part)
        if k % FRESH == FRESH - 1:
            total += part
            part = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    return total + part


@triton.jit
def _halves(tile):
    """The left and the right columns, without moving data between threads."""
    return tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _columns(tile, which: tl.constexpr, PARTS: tl.constexpr):
    """Columns which / PARTS to (which + 1) / PARTS; PARTS is 4 or 8."""
    low, high = _halves(tile)
    low, high = _halves(low if which < PARTS // 2 else high)
    quarter = low if which % (PARTS // 2) < PARTS // 4 else high
    if PARTS == 8:
        low, high = _halves(quarter)
        quarter = low if which % 2 == 0 else high
    return quarter


@triton.jit
def _add_columns(
    u,  # (BLOCK_N, columns) fp32 products
    first,  # the first of these columns
    exp_sum,
    exp_d_sum,
    exp_sq_sum,
    z_sum,
    max_d,
    row,
    inside,
    target,
    anchor,
    inv_temperature,
    bias_ptr,
    c0_ptr,
    c1_ptr,
    chunk_ptr,
    V,
    stride_cn,
    softcap,
    logit_scale,
    HAS_CAP: tl.constexpr,
):
    """The sums with these columns; F of them stored."""
    column = first + tl.arange(0, u.shape[1])
    real = column < V
    z = u
    if bias_ptr is not None:
        z += tl.load(bias_ptr + column, mask=real, other=0.0).to(tl.float32)[None, :]
    z *= logit_scale
    if HAS_CAP:
        bent = tanh(z / softcap)
        z = softcap * bent
    z *= inv_temperature[:, None]
    z_sum += tl.sum(tl.where(real[None, :], z, 0.0), 1)
    other = real[None, :] & (column[None, :] != target[:, None])
    d = tl.where(other, z - anchor[:, None], float("-inf"))
    highest = tl.maximum(max_d, tl.max(d, 1))
    # held where exp would pass fp32's range: such a row is scored again with another anchor
    e = tl.exp(tl.where(d > 80.0, 80.0, d))
    d = tl.where(d < -200.0, -200.0, d)
    # e (d - the largest d): were it e d, a label far below its row would make entropy the difference of two large sums
    exp_d_sum += exp_sum * tl.where(exp_sum > 0.0, max_d - highest, 0.0)
    exp_d_sum += tl.sum(e * tl.where(e > 0.0, d - highest[:, None], 0.0), 1)
    exp_sum += tl.sum(e, 1)
    exp_sq_sum += tl.sum(e * e, 1)
    max_d = highest
    if chunk_ptr is not None:
        if c0_ptr is not None:
            c0 = tl.load(c0_ptr + row, mask=inside, other=0.0)
            c1 = tl.load(c1_ptr + row, mask=inside, other=0.0)
            e *= c0[:, None] + c1[:, None] * d
        if HAS_CAP:
            e *= 1.0 - bent * bent
        f_ptrs = chunk_ptr + row[:, None] * stride_cn + column[None, :]
        # zeros up to the end of the row, which is aligned where V need not be
        room = (column < stride_cn)[None, :]
        tl.store(f_ptrs, e.to(chunk_ptr.dtype.element_ty), mask=inside[:, None] & room)
    return exp_sum, exp_d_sum, exp_sq_sum, z_sum, max_d


@triton.jit
def score_kernel(
    x_ptr,  # (n, H), as is weight (V, H): a pointer, or with DESCRIPTORS a descriptor
    weight_ptr,
    bias_ptr,  # (V,) or None
    target_ptr,  # (n,) int64; -1: none of these columns
    anchor_ptr,  # (n,) fp32
    inv_temperature_ptr,  # (n,) fp32; 0: a row that is not wanted
    c0_ptr,  # (n,) fp32 or None: F is multiplied by c0 + c1 d
    c1_ptr,
    index_ptr,  # (n,) int64 or None: the rows to score, `count` of them
    count_ptr,  # () int64
    chunk_ptr,  # (n, stride_cn) written, V columns and zeros, or None
    sums_ptr,  # (blocks, 5, n) fp32 written: of exp, exp (d - the largest d), exp^2, z, and the largest d
    n,
    V,
    H,
    stride_xn,
    stride_wv,
    stride_wh,
    stride_cn,
    softcap,  # 0: none
    logit_scale,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,  # row tiles that run side by side, for the second-level cache
    FRESH: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_K divides H
    HAS_CAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_tiles = tl.cdiv(n, BLOCK_N)
    blocks = tl.cdiv(V, BLOCK_V * TILES)
    program = tl.program_id(0)
    band = program // (GROUP * blocks)
    height = tl.minimum(row_tiles - band * GROUP, GROUP)
    place = program % (GROUP * blocks)
    tile = band * GROUP + place % height
    block = place // height

    at = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = at < n
    if index_ptr is not None:
        inside = at < tl.load(count_ptr)
        row = tl.load(index_ptr + at, mask=inside, other=0)
    else:
        row = tl.minimum(at, n - 1).to(tl.int64)
    inv_temperature = tl.load(inv_temperature_ptr + row, mask=inside, other=0.0)
    wanted = tl.max((inv_temperature != 0.0).to(tl.int32), 0)
    first_tile = block * TILES
    tiles = tl.minimum(TILES, tl.cdiv(V, BLOCK_V) - first_tile)

    exp_sum = tl.zeros((BLOCK_N,), tl.float32)
    exp_d_sum = tl.zeros((BLOCK_N,), tl.float32)
    exp_sq_sum = tl.zeros((BLOCK_N,), tl.float32)
    z_sum = tl.zeros((BLOCK_N,), tl.float32)
    max_d = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    if wanted != 0:
        target = tl.load(target_ptr + row, mask=inside, other=-1).to(tl.int32)
        anchor = tl.load(anchor_ptr + row, mask=inside, other=0.0)
        depth = tl.arange(0, BLOCK_K)
        for t in tl.range(0, tiles):
            if DESCRIPTORS:
                first = (first_tile + t) * BLOCK_V
                u = _tile_of_descriptors(x_ptr, weight_ptr, tile * BLOCK_N, first, H, BLOCK_N, BLOCK_V, BLOCK_K, FRESH)
            else:
                held = tl.minimum((first_tile + t) * BLOCK_V + tl.arange(0, BLOCK_V), V - 1).to(tl.int64)
                x_ptrs = x_ptr + row[:, None] * stride_xn + depth[None, :]
                w_ptrs = weight_ptr + held[None, :] * stride_wv + depth[:, None].to(tl.int64) * stride_wh
                u = _tile(x_ptrs, w_ptrs, H, stride_wh, BLOCK_N, BLOCK_V, BLOCK_K, FRESH, EVEN, PRECISION)
            # in parts: all of a tile's exponentials and their products at once would not fit the registers
            PARTS: tl.constexpr = 8 if HAS_CAP else 4
            for part in tl.static_range(PARTS):
                exp_sum, exp_d_sum, exp_sq_sum, z_sum, max_d = _add_columns(
                    _columns(u, part, PARTS),
                    (first_tile + t) * BLOCK_V + part * (BLOCK_V // PARTS),
                    exp_sum,
                    exp_d_sum,
                    exp_sq_sum,
                    z_sum,
                    max_d,
                    row,
                    inside,
                    target,
                    anchor,
                    inv_temperature,
                    bias_ptr,
                    c0_ptr,
                    c1_ptr,
                    chunk_ptr,
                    V,
                    stride_cn,
                    softcap,
                    logit_scale,
                    HAS_CAP,
                )
    elif chunk_ptr is not None:
        # zeros, not what the memory held: products may read these rows and multiply them by 0
        for t in tl.range(0, tiles):
            column = (first_tile + t) * BLOCK_V + tl.arange(0, BLOCK_V)
            f_ptrs = chunk_ptr + row[:, None] * stride_cn + column[None, :]
            nothing = tl.zeros((BLOCK_N, BLOCK_V), chunk_ptr.dtype.element_ty)
            tl.store(f_ptrs, nothing, mask=inside[:, None] & (column < stride_cn)[None, :])

    out = sums_ptr + block.to(tl.int64) * (5 * n) + row
    tl.store(out, exp_sum, mask=inside)
    tl.store(out + n, exp_d_sum, mask=inside)
    tl.store(out + 2 * n, exp_sq_sum, mask=inside)
    tl.store(out + 3 * n, z_sum, mask=inside)
    tl.store(out + 4 * n, max_d, mask=inside)


@triton.jit
def sums_kernel(
    parts_ptr,  # (blocks, 5, n) fp32
    out_ptr,  # (5, n) fp64, written; the second one of exp d
    n,
    blocks,
    ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    field = tl.program_id(1)
    inside = row < n

    if field == 4:
        highest = tl.full((ROWS,), float("-inf"), tl.float64)
        for first in tl.range(0, blocks, AT_ONCE):
            block = first + tl.arange(0, AT_ONCE)
            where = (block.to(tl.int64)[:, None] * 5 + field) * n + row[None, :]
            mask = (block < blocks)[:, None] & inside[None, :]
            some = tl.load(parts_ptr + where, mask=mask, other=float("-inf")).to(tl.float64)
            highest = tl.maximum(highest, tl.max(some, 0))
        tl.store(out_ptr + field.to(tl.int64) * n + row, highest, mask=inside)
    else:
        total = tl.zeros((ROWS,), tl.float64)
        for first in tl.range(0, blocks, AT_ONCE):
            block = first + tl.arange(0, AT_ONCE)
            where = (block.to(tl.int64)[:, None] * 5 + field) * n + row[None, :]
            mask = (block < blocks)[:, None] & inside[None, :]
            some = tl.load(parts_ptr + where, mask=mask, other=0.0).to(tl.float64)
            if field == 1:
                e = tl.load(parts_ptr + where - n, mask=mask, other=0.0).to(tl.float64)
                highest = tl.load(parts_ptr + where + 3 * n, mask=mask, other=0.0).to(tl.float64)
                some += tl.where(e > 0.0, e * highest, 0.0)
            total += tl.sum(some, 0)
        tl.store(out_ptr + field.to(tl.int64) * n + row, total, mask=inside)
