"""z_y - mean_v z_v of each row in eager PyTorch, differentiable by autograd: the oracle of smoothed cross-entropy."""

import torch
from torch import Tensor


def label_margin(
    hidden: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (M,)
    rows: Tensor | None,  # (M,) the row of hidden that predicts each target
    inv_temperature: Tensor,  # (M,)
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    mean_logits: Tensor,  # (M,) differentiable
) -> Tensor:
    """(M,); zero where the target is ignored."""
    dtype = mean_logits.dtype
    kept = (targets != ignore_index).nonzero()[:, 0]
    x, w = hidden[kept if rows is None else rows[kept]], weight[targets[kept]].to(hidden.dtype)
    z = (x.to(dtype) * w.to(dtype)).sum(-1)
    if bias is not None:
        z = z + bias[targets[kept]].to(dtype)
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    margin = z * inv_temperature[kept] - mean_logits[kept]
    return mean_logits.new_zeros(targets.shape).index_put((kept,), margin)
