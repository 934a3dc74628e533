"""Log-probs of rows of logits that exist: one read of them forward; in backward one more, and one write."""

import triton
import triton.language as tl

from fastpref.kernels.triton._score import tanh


@triton.jit
def selective_sums_kernel(
    logits_ptr,  # (M, V)
    target_ptr,  # (M,) int64
    inv_temperature_ptr,  # (M,) fp32; 0: a row that does not count, and is not read
    label_ptr,  # (M,) fp32 written: the label's logit
    sums_ptr,  # (5, M) fp32 written: over v != y of exp d, exp d d, exp^2 d, d = z - max z; of z over all v; that max
    M,
    V,
    stride_m,
    softcap,
    logit_scale,
    BLOCK: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    inv_temperature = tl.load(inv_temperature_ptr + row)
    target = tl.load(target_ptr + row)
    highest, exp_sum, exp_d_sum, exp_sq_sum, z_sum, z_y = _nothing()
    if inv_temperature != 0.0:
        for first in tl.range(0, V, BLOCK):
            column = first + tl.arange(0, BLOCK)
            real = column < V
            z = tl.load(logits_ptr + row * stride_m + column, mask=real, other=0.0).to(tl.float32) * logit_scale
            if HAS_CAP:
                z = softcap * tanh(z / softcap)
            z *= inv_temperature
            z_sum += tl.sum(tl.where(real, z, 0.0), 0)
            z_y += tl.sum(tl.where(column == target, z, 0.0), 0)
            z = tl.where(real & (column != target), z, float("-inf"))
            before = highest
            highest = tl.maximum(highest, tl.max(z, 0))
            # all of a row may be -inf
            anchor = tl.where(highest == float("-inf"), 0.0, highest)
            moved = tl.where(exp_sum > 0.0, before - anchor, 0.0)
            shrunk = tl.exp(moved)
            d = tl.where(z - anchor < -200.0, -200.0, z - anchor)
            e = tl.exp(z - anchor)
            exp_d_sum = shrunk * (exp_d_sum + moved * exp_sum) + tl.sum(e * d, 0)
            exp_sum = shrunk * exp_sum + tl.sum(e, 0)
            exp_sq_sum = shrunk * shrunk * exp_sq_sum + tl.sum(e * e, 0)

    tl.store(label_ptr + row, z_y)
    tl.store(sums_ptr + row, exp_sum)
    tl.store(sums_ptr + M + row, exp_d_sum)
    tl.store(sums_ptr + 2 * M + row, exp_sq_sum)
    tl.store(sums_ptr + 3 * M + row, z_sum)
    tl.store(sums_ptr + 4 * M + row, highest)


@triton.jit
def _nothing():
    """The sums of an empty row."""
    zero = tl.zeros((), tl.float32)
    return tl.full((), float("-inf"), tl.float32), zero, zero, zero, zero, zero


@triton.jit
def selective_gradient_kernel(
    logits_ptr,  # (M, V)
    target_ptr,  # (M,) int64
    inv_temperature_ptr,  # (M,) fp32; 0: zeros are written, nothing is read
    anchor_ptr,  # (M,) fp32, as are those that follow
    total_ptr,
    slope_ptr,  # dL/dlogp
    entropy_slope_ptr,  # dL/dentropy, or None
    label_slope_ptr,  # what stands at the label
    entropy_ptr,
    out_ptr,  # (M, V) written; may be the logits
    V,
    stride_m,
    stride_om,
    softcap,
    logit_scale,
    BLOCK: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < V
    inv_temperature = tl.load(inv_temperature_ptr + row)
    out_ptrs = out_ptr + row * stride_om + column
    if inv_temperature == 0.0:
        tl.store(out_ptrs, tl.zeros((BLOCK,), out_ptr.dtype.element_ty), mask=real)
    else:
        anchor, total = tl.load(anchor_ptr + row), tl.load(total_ptr + row)
        z = tl.load(logits_ptr + row * stride_m + column, mask=real, other=0.0).to(tl.float32) * logit_scale
        if HAS_CAP:
            bent = tanh(z / softcap)
            z = softcap * bent
        d = z * inv_temperature - anchor
        p = tl.exp(d) / total
        weight = tl.load(slope_ptr + row)
        if entropy_slope_ptr is not None:
            # held where p log p is 0
            log_p = d - tl.log(total)
            log_p = tl.where(log_p < -200.0, -200.0, log_p)
            weight += tl.load(entropy_slope_ptr + row) * (log_p + tl.load(entropy_ptr + row))
        dz = tl.where(column == tl.load(target_ptr + row), tl.load(label_slope_ptr + row), -p * weight)
        if HAS_CAP:
            dz *= 1.0 - bent * bent
        dz *= inv_temperature * logit_scale
        tl.store(out_ptrs, dz.to(out_ptr.dtype.element_ty), mask=real)
