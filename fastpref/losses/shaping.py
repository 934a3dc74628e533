"""Rewards before they become advantages: the KL penalty in them, running normalisation, and the adaptive KL weight.

State is a NamedTuple that goes in and comes out; nothing is kept here, and a checkpoint holds it as it is.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastpref.losses.kl import kl_estimator_named
from fastpref.ops import _check
from fastpref.ops.masked_whiten import masked_moments


def shape_rewards(
    scores: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor, *, kl_coef: float, kl_estimator: str = "k1"
) -> Tensor:
    """(B, T) rewards: -kl_coef kl_t at each live token, and the score of the sequence at its last live one.

    Ziegler et al. 2019, arXiv:1909.08593, eq. 2; Stiennon et al. 2020, arXiv:2009.01325, section 3.4.
    Args:
        scores: (B,) of whole sequences, in units of reward.
        logps: (B, T) of the sampled tokens under the policy that drew them, nats.
        ref_logps: like logps, under the reference.
        mask: like logps, any dtype; nonzero where the policy chose the token. Nothing is read elsewhere, NaN allowed.
        kl_coef: >= 0.
        kl_estimator: "k1" (whose expectation is the KL), "k2" or "k3".
    Returns:
        (B, T) float32 (float64 for float64), detached, 0 at masked tokens. The score of a sequence without live tokens
        is nowhere.
    """
    fn = "shape_rewards"
    _check.tensors(fn, scores=scores, logps=logps, ref_logps=ref_logps, mask=mask)
    _check.floating(fn, _check.WIDE_FLOATS, scores=scores, logps=logps, ref_logps=ref_logps)
    _check.rank(fn, (2,), logps=logps)
    _check.same_shape(fn, logps=logps, ref_logps=ref_logps, mask=mask)
    _check.same_device(fn, logps=logps, ref_logps=ref_logps, mask=mask, scores=scores)
    if scores.shape != logps.shape[:1]:
        raise ValueError(f"{fn}: scores must be ({logps.shape[0]},), one a row of logps; got {tuple(scores.shape)}")
    _check.number(fn, kl_coef=kl_coef)
    if not 0 <= kl_coef < float("inf"):
        raise ValueError(f"{fn}: kl_coef must be >= 0 and finite; got {kl_coef}")
    kl, live = kl_estimator_named(fn, kl_estimator), mask != 0
    dtype = torch.promote_types(logps.dtype, torch.float32)
    policy, reference = (torch.where(live, x.detach().to(dtype), 0.0) for x in (logps, ref_logps))
    after = live.flip(1).cumsum(1).flip(1)  # live tokens from here on
    ends = live & (after == 1)
    return torch.where(ends, scores.detach().to(dtype)[:, None], 0.0) - kl_coef * kl(policy, reference)


class RunningMoments(NamedTuple):
    """Of all that was seen; float64 once there was anything. `RunningMoments()` has seen nothing."""

    n: float | Tensor = 0.0
    mean: float | Tensor = 0.0
    sum_sq: float | Tensor = 0.0  # of deviations from the mean


def update_moments(
    moments: RunningMoments,
    x: Tensor,
    mask: Tensor | None = None,
    *,
    process_group: "dist.ProcessGroup | None" = None,
) -> RunningMoments:
    """The moments with x added to what was seen. Chan, Golub and LeVeque 1979, eq. 2.1.

    Args:
        moments: so far.
        x: any shape. Under data parallelism each process gives its own.
        mask: like x; nonzero where an entry counts. None: all do.
        process_group: what its processes give is counted, on each alike; each must call. None: of this process alone,
            as in masked_whiten.
    """
    fn = "update_moments"
    _check.tensors(fn, x=x, mask=mask)
    _check.floating(fn, _check.WIDE_FLOATS, x=x)
    _check.same_shape(fn, x=x, mask=mask)
    live = torch.ones_like(x, dtype=torch.bool) if mask is None else mask != 0
    count, mean, sum_sq = masked_moments(torch.where(live, x.detach(), 0.0).double(), live, process_group)
    total, gap = moments.n + count, mean - moments.mean
    share = count / torch.clamp(total, min=1)
    return RunningMoments(total, moments.mean + gap * share, moments.sum_sq + sum_sq + gap.square() * moments.n * share)


def normalize_rewards(
    rewards: Tensor, moments: RunningMoments, *, center: bool = True, clip: float | None = None
) -> Tensor:
    """(rewards - mean) / standard deviation of what was seen, clipped to +-clip; centred only until two were seen.

    center: False divides only, which keeps the sign of a reward. Zheng et al. 2023, arXiv:2307.04964, section 5.3.1,
    score reward normalisation and clipping. float32 (float64 for float64), detached.
    """
    fn = "normalize_rewards"
    _check.tensors(fn, rewards=rewards)
    _check.floating(fn, _check.WIDE_FLOATS, rewards=rewards)
    if clip is not None:
        _check.number(fn, clip=clip)
        if not clip > 0:
            raise ValueError(f"{fn}: clip must be > 0, or None; got {clip}")
    n, mean, sum_sq = (torch.as_tensor(x, dtype=torch.float64, device=rewards.device) for x in moments)
    deviation = torch.where(n > 1, torch.sqrt(sum_sq / (n - 1).clamp(min=1) + 1e-8), 1.0)
    normal = (rewards.detach().double() - (mean if center else 0.0)) / deviation
    if clip is not None:
        normal = normal.clamp(-clip, clip)
    return normal.to(torch.promote_types(rewards.dtype, torch.float32))


class AdaptiveKL(NamedTuple):
    """The weight of the KL penalty, and where it steers to."""

    coef: float
    target: float  # nats a sequence, or whatever `kl` is measured in
    gain: float = 0.1  # of one update


def update_kl_coef(state: AdaptiveKL, kl: float) -> AdaptiveKL:
    """The state with coef (1 + gain e), e = (kl - target) / target clipped to +-0.2.

    Ziegler et al. 2019, arXiv:1909.08593, section 2.2, a proportional controller in log space; their gain is 0.1 an
    update (in their code: episodes of the update / 10,000).
    """
    _check.finite("update_kl_coef", kl=kl, coef=state.coef, target=state.target, gain=state.gain)
    if not state.target > 0:
        raise ValueError(f"update_kl_coef: target must be > 0; got {state.target}")
    error = max(-0.2, min(0.2, kl / state.target - 1))
    return state._replace(coef=state.coef * (1 + state.gain * error))
