"""The critic's loss."""

import torch
from torch import Tensor

from fastpref.ops import _check


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    epsilon: float = 0.2,
    num_items: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, clip fraction): half the mean of max((V - R)^2, (clip(V, V_old - epsilon, V_old + epsilon) - R)^2).

    PPO's clipped value loss, as in OpenAI's baselines (Huang et al. 2022, "The 37 implementation details of PPO",
    detail 9). epsilon = inf is half the mean squared error.

    Args:
        values: (B, T) or (N,), V of each state under the critic being trained.
        old_values: like values, under the critic that the returns were made with. No gradient.
        returns: like values. No gradient.
        mask: like values, any dtype; nonzero where a state counts. Nothing is read elsewhere, NaN allowed.
        epsilon: in units of value, >= 0.
        num_items: live states over all ranks and micro-batches of the step, in place of those of this call.
    Returns:
        Two () float32 (float64 for float64): the loss, differentiable in values, and the share of live states where the
        clipped error is the larger one, detached. 0 and 0 where no state is live.
    """
    fn = "value_loss"
    every = {"values": values, "old_values": old_values, "returns": returns}
    _check.tensors(fn, **every, mask=mask)
    _check.floating(fn, _check.WIDE_FLOATS, **every)
    _check.same_shape(fn, **every, mask=mask)
    _check.same_device(fn, **every, mask=mask)
    _check.number(fn, epsilon=epsilon)
    if not epsilon >= 0:
        raise ValueError(f"{fn}: epsilon must be >= 0; got {epsilon}")
    live, dtype = mask != 0, torch.promote_types(values.dtype, torch.float32)
    value, old, target = (torch.where(live, x.to(dtype), 0.0) for x in (values, old_values.detach(), returns.detach()))
    unclipped = (value - target).square()
    clipped = (value.clamp(old - epsilon, old + epsilon) - target).square()
    count = live.sum().clamp(min=1)
    items = count if num_items is None else _check.num_items(fn, num_items)
    return 0.5 * torch.maximum(unclipped, clipped).sum() / items, (clipped > unclipped).sum().to(dtype) / count
