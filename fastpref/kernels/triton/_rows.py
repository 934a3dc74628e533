"""What is done to single rows: the label's own dot product, and sums of rows that go to the same place."""

import triton
import triton.language as tl


@triton.jit
def label_dots_kernel(
    x_ptr,  # (n, H)
    weight_ptr,  # (V, H)
    target_ptr,  # (n,) int64
    out_ptr,  # (n,) fp64, written
    H,
    stride_xn,
    stride_wv,
    stride_wh,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)

    total = tl.zeros((BLOCK,), tl.float64)
    for first in tl.range(0, H, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < H
        x = tl.load(x_ptr + row * stride_xn + column, mask=inside, other=0.0)
        w = tl.load(weight_ptr + target * stride_wv + column.to(tl.int64) * stride_wh, mask=inside, other=0.0)
        total += x.to(tl.float64) * w.to(x.dtype).to(tl.float64)

    tl.store(out_ptr + row, tl.sum(total, 0))


@triton.jit
def add_rows_kernel(
    order_ptr,  # (n,) int64: positions, by rising index, equal ones in their order
    index_ptr,  # (n,) int64: where the rows go; outside [0, R): nowhere
    values_ptr,  # (n, H)
    scale_ptr,  # (n,) fp32 or None
    out_ptr,  # (R, H) fp32, added to
    n,
    R,
    H,
    stride_vn,
    stride_or,
    AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The program at the first of a run of equal indices adds up the run, in its order: the same bits every time."""
    place = tl.program_id(0)
    to = tl.load(index_ptr + tl.load(order_ptr + place))
    # of the program before: -1 stands for no row
    before = tl.load(order_ptr + tl.maximum(place - 1, 0))
    first = (place == 0) | (tl.load(index_ptr + before) != to)
    if first & (to >= 0) & (to < R):
        # the end of the run: a search by halves, since the order is sorted
        low, high = place, n
        while high - low > 1:
            middle = (low + high) // 2
            same = tl.load(index_ptr + tl.load(order_ptr + middle)) == to
            low = tl.where(same, middle, low)
            high = tl.where(same, high, middle)
        for block in tl.range(0, H, BLOCK):
            column = block + tl.arange(0, BLOCK)
            real = column < H
            out_ptrs = out_ptr + to * stride_or + column
            total = tl.load(out_ptrs, mask=real, other=0.0)
            for start in tl.range(place, high, AT_ONCE):
                at = start + tl.arange(0, AT_ONCE)
                row = tl.load(order_ptr + at, mask=at < high, other=0)
                mask = (at < high)[:, None] & real[None, :]
                values = tl.load(values_ptr + row[:, None] * stride_vn + column[None, :], mask=mask, other=0.0)
                values = values.to(tl.float32)
                if scale_ptr is not None:
                    values *= tl.load(scale_ptr + row, mask=at < high, other=0.0)[:, None]
                total += tl.sum(values, 0)
            tl.store(out_ptrs, total, mask=real)
