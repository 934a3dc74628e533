"""Per-token divergence between two linear heads, in eager PyTorch: the oracle of every test.

Any device and dtype (16-bit inputs are widened to fp32 first), differentiable by autograd, all logits in memory.
"""

import math

import torch
from torch import Tensor


def linear_divergence(
    p: tuple[Tensor, Tensor, Tensor | None],  # hidden (M, H), weight (V, H), bias (V,)
    q: tuple[Tensor, Tensor, Tensor | None],
    index: Tensor,  # (K,) of the rows that count
    inv_temperature: Tensor,  # (M,)
    jsd_beta: float | None,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """(M,) KL(p || q), or with jsd_beta = b: b KL(q || m) + (1 - b) KL(p || m), m = b q + (1 - b) p; else zero."""
    log_p, log_q = (_log_probs(*side, index, inv_temperature, softcap, logit_scale) for side in (p, q))

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a.exp() * (a - b)).sum(-1)

    if jsd_beta is None:
        found = kl(log_p, log_q)
    else:
        log_m = torch.logaddexp(log_q + math.log(jsd_beta), log_p + math.log1p(-jsd_beta))
        found = jsd_beta * kl(log_q, log_m) + (1 - jsd_beta) * kl(log_p, log_m)
    return inv_temperature.new_zeros(inv_temperature.shape).index_put((index,), found)


def _log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    inv_temperature: Tensor,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    dtype = inv_temperature.dtype
    z = hidden[index].to(dtype) @ weight.to(hidden.dtype).to(dtype).T
    if bias is not None:
        z = z + bias.to(dtype)
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return torch.log_softmax(z * inv_temperature[index, None], -1)
