"""Whitening over the unmasked entries of a batch, on one process or over several."""

import torch
import torch.distributed as dist
from torch import Tensor

from fastpref.ops import _check


def masked_whiten(x: Tensor, mask: Tensor, *, process_group: "dist.ProcessGroup | None" = None) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8) of the unmasked entries, 0 at the others; variance unbiased.

    Args:
        x: any shape; bfloat16, float16, float32 or float64.
        mask: like x, any dtype; nonzero where an entry counts. x is not read elsewhere, NaN allowed.
        process_group: mean and variance are those over its processes, each of which must call. None: of this process
            alone, also where torch.distributed is initialised: give dist.group.WORLD for all.
    Returns:
        Like x, float32 (float64 for float64), detached. A single entry becomes 0.
    """
    fn = "masked_whiten"
    _check.tensors(fn, x=x, mask=mask)
    _check.floating(fn, _check.WIDE_FLOATS, x=x)
    _check.same_shape(fn, x=x, mask=mask)
    _check.same_device(fn, x=x, mask=mask)
    live = mask != 0
    clean = torch.where(live, x.detach(), 0.0).to(torch.promote_types(x.dtype, torch.float32))
    count, mean, sum_sq = masked_moments(clean, live, process_group)
    return whitened_(clean, live, count, mean, sum_sq)


def masked_moments(
    x: Tensor, live: Tensor, process_group: "dist.ProcessGroup | None" = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(count, mean, sum of squares about it) of the live entries, () float64; x is 0 at the others."""

    def total(part: Tensor) -> Tensor:
        if process_group is not None:
            dist.all_reduce(part, group=process_group)
        return part

    count, summed = total(torch.stack((live.sum().double(), x.sum(dtype=torch.float64))))
    mean = summed / count.clamp(min=1)
    # about the mean, in a second pass: sums of squares about 0 cancel where |mean| is much larger than the deviation
    return count, mean, total(torch.where(live, x - mean.to(x.dtype), 0.0).square().sum(dtype=torch.float64))


def whitened_(x: Tensor, live: Tensor | None, count: Tensor, mean: Tensor, sum_sq: Tensor) -> Tensor:
    """x itself, whitened by its count, mean and sum of squares about it; 0 where it is not live."""
    scale = torch.rsqrt(sum_sq / (count - 1).clamp(min=1) + 1e-8)
    x.sub_(mean.to(x.dtype)).mul_(scale.to(x.dtype))
    if live is not None:
        # not torch.where: on a CPU that takes ten times as long, and a product would leave NaN
        bits = torch.int64 if x.dtype == torch.float64 else torch.int32
        x.view(bits).bitwise_and_(live.to(bits).neg_())
    return x
