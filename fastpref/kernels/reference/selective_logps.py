"""Per-token log-probabilities from logits, in eager PyTorch: the oracle of every test."""

import torch
from torch import Tensor


def selective_logps(
    logits: Tensor,  # (M, V)
    targets: Tensor,  # (M,)
    inv_temperature: Tensor,  # (M,)
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
) -> dict[str, Tensor]:
    """(M,) each: logps, entropy, log_sum_sq_probs, mean_logits, is_top1; zero where the target is ignored."""
    kept = (targets != ignore_index).nonzero()[:, 0]
    y = targets[kept][:, None]
    z = logits[kept].to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z * inv_temperature[kept, None].to(z.dtype)
    logp = torch.log_softmax(z, -1)
    found = {
        "logps": logp.gather(1, y)[:, 0],
        "entropy": -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0)).sum(-1),
        "log_sum_sq_probs": torch.logsumexp(2 * logp, -1),
        "mean_logits": z.mean(-1),
        "is_top1": z.gather(1, y)[:, 0] >= z.amax(-1) if kept.numel() else torch.zeros_like(kept, dtype=torch.bool),
    }
    return {name: z.new_zeros(targets.shape).to(value.dtype).index_put((kept,), value) for name, value in found.items()}
