"""Log-probabilities from logits in eager PyTorch, a block of rows at a time: no second copy of all logits in fp32."""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**22  # of one fp32 temporary; about four live at once
FAR = 27.0  # nats: a label further below the maximum is anchored there, or exp would leave fp32's range

STATIC = False


def selective_logps(
    logits: Tensor,  # (M, V)
    targets: Tensor,  # (M,)
    index: Tensor,  # (K,) of the targets that count
    inv_temperature: Tensor,  # (M,)
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, ...]:
    """(M,) each: logps, entropy, log_sum_sq_probs, mean_logits, is_top1; zero at what is not in `index`.

    And (2, M), what a backward needs of the rows: the logit that stood for 0, and the sum of exponentials.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    out = [torch.zeros(targets.shape, dtype=dtype, device=logits.device) for _ in range(4)]
    top1 = torch.zeros(targets.shape, dtype=torch.bool, device=logits.device)
    state = torch.zeros((2, *targets.shape), dtype=dtype, device=logits.device)
    for part in _blocks(index, logits.shape[1]):
        z, _ = _bend(logits[part].to(dtype), inv_temperature[part], softcap, logit_scale)
        anchor, label_d, e, d, rest = _anchored(z, targets[part])
        # in fp64: entropy is the difference of two sums, and feels the rounding of both
        label_d = label_d.double()
        e_y = label_d.exp()
        total = e_y + rest
        log_total = torch.where(label_d == 0, torch.log1p(rest), total.log())
        out[0][part] = (label_d - log_total).to(dtype)
        mean_d = ((e * d).sum(-1, dtype=torch.float64) + e_y * label_d.clamp(min=-200.0)) / total
        out[1][part] = (log_total - mean_d).clamp(min=0).to(dtype)
        out[2][part] = (((e * e).sum(-1, dtype=torch.float64) + e_y * e_y).log() - 2 * log_total).to(dtype)
        out[3][part] = z.mean(-1)
        top1[part] = (d <= label_d[:, None]).all(-1)
        state[:, part] = torch.stack((anchor, total.to(dtype)))
    return *out, top1, state


def d_logits(
    grad_logps: Tensor,  # (M,)
    grad_entropy: Tensor | None,  # (M,)
    logits: Tensor,
    targets: Tensor,
    index: Tensor,
    inv_temperature: Tensor,
    softcap: float | None,
    logit_scale: float,
    logps: Tensor,  # (M,), as returned
    entropy: Tensor,
    state: Tensor,  # (2, M)
    out: Tensor,  # (M, V), all written; may be `logits`
) -> None:
    """g (1[v = y] - p_v) - h p_v (log p_v + entropy), through temperature, cap and scale."""
    out[torch.ones_like(targets, dtype=torch.bool).index_fill_(0, index, False)] = 0
    for part in _blocks(index, logits.shape[1]):
        z, slope = _bend(logits[part].to(logps.dtype), inv_temperature[part], softcap, logit_scale)
        anchor, total = state[:, part, None]
        d, g, logp = z - anchor, grad_logps[part], logps[part]
        p, at_label = d.exp().div_(total), -g * torch.expm1(logp)
        if grad_entropy is None:
            dz = p.mul_(-g[:, None])
        else:
            h, mean = grad_entropy[part], entropy[part]
            # held where p log p is 0
            from_mean = (d - total.log()).clamp_(min=-200.0).add_(mean[:, None])
            dz = p.mul_(-(g[:, None] + h[:, None] * from_mean))
            at_label -= h * logp.exp() * (logp.clamp(min=-200.0) + mean)
        dz.scatter_(1, targets[part][:, None], at_label[:, None])
        if slope is not None:
            dz *= slope
        out[part] = dz.mul_((inv_temperature[part] * logit_scale)[:, None]).to(out.dtype)


def _blocks(index: Tensor, vocab_size: int) -> Iterator[Tensor]:
    if index.numel():
        yield from index.split(max(1, BLOCK_ELEMENTS // vocab_size))


def _bend(
    u: Tensor, inv_temperature: Tensor, softcap: float | None, logit_scale: float
) -> tuple[Tensor, Tensor | None]:
    """(z, 1 - tanh^2 or None)."""
    u *= logit_scale
    slope = None
    if softcap is not None:
        bent = torch.tanh(u / softcap)
        u, slope = bent * softcap, 1 - bent * bent
    return u * inv_temperature[:, None], slope


def _anchored(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(anchor, z_y - anchor, and at v != y e = exp(d) and d = z - anchor, and the sum of e)."""
    y = targets[:, None]
    z_y = z.gather(1, y)[:, 0]
    others = z.scatter(1, y, -torch.inf)
    highest = others.amax(-1)
    at_maximum = ((highest - z_y > FAR) | z_y.isneginf()) & ~highest.isneginf()
    anchor = torch.where(at_maximum, highest, torch.where(z_y.isneginf(), 0.0, z_y))
    d = others.sub_(anchor[:, None])
    e = d.exp()
    return anchor, z_y - anchor, e, d.clamp_(min=-200.0), e.sum(-1, dtype=torch.float64)
