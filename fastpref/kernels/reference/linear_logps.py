"""Per-token log-probabilities of a linear head, in a few lines of eager PyTorch: the oracle of every test.

Any device and dtype (16-bit inputs are widened to fp32 first), differentiable by autograd, all logits in memory.
"""

import torch
from torch import Tensor

from fastpref.kernels.reference.selective_logps import selective_logps


def linear_logps(
    hidden: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (M,)
    rows: Tensor | None,  # (M,) the row of hidden that predicts each target
    inv_temperature: Tensor,  # (M,)
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
) -> dict[str, Tensor]:
    """(M,) each: logps, entropy, log_sum_sq_probs, mean_logits, is_top1; zero where the target is ignored."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    kept = (targets != ignore_index).nonzero()[:, 0]
    u = hidden[kept if rows is None else rows[kept]].to(dtype) @ weight.to(hidden.dtype).to(dtype).T
    if bias is not None:
        u = u + bias.to(dtype)
    found = selective_logps(u, targets[kept], inv_temperature[kept], softcap, logit_scale, ignore_index)
    return {name: u.new_zeros(targets.shape).to(x.dtype).index_put((kept,), x) for name, x in found.items()}
