"""The clipped policy loss of tokens on a CUDA device: losses and metrics in two launches, slopes kept.

The maths is that of losses/surrogates.py, kl.py and objective.py, where it is right. Not a registered op: torch.compile
traces the functions.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref import kernels
from fastpref.ops._once import once_differentiable

METRICS = (
    *("clip_ratio/low_mean", "clip_ratio/low_min", "clip_ratio/high_mean", "clip_ratio/high_max"),
    *("clip_ratio/region_mean", "policy/approxkl_avg", "kl", "entropy"),
)


class TokenRows(NamedTuple):
    losses: Tensor  # (N,), 0 where nothing is live; differentiable in logps, in the entropy if entropy_coef is not 0
    metrics: dict[str, Tensor]  # 0-d, detached, under TRL's names; empty without bounds


def ppo_row(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    shares: Tensor,
    token_weights: Tensor | None,
    ref_logps: Tensor | None,
    entropy: Tensor | None,
    mask: Tensor,
    bounds: Tensor | None,
    *,
    low: float,
    high: float,
    delta: float,
    weight: float,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
) -> TokenRows:
    """Each token's share of weight s + kl_coef kl - entropy_coef H; csrc/ppo_row.h has the formulas.

    (N,) float32 tensors, a bool mask, and where metrics are wanted int64 bounds (S + 1,): where each sequence starts,
    and the end. old_logps None: on-policy. delta infinite: no dual clip.
    """
    entropy = entropy if entropy is None or entropy_coef else entropy.detach()
    tensors = logps, old_logps, advantages, shares, token_weights, ref_logps, entropy, mask, bounds
    losses, metrics = _PpoRow.apply(*tensors, low, high, delta, weight, kl_coef, kl_estimator, entropy_coef)
    if metrics is None:
        return TokenRows(losses, {})
    found = dict(zip(METRICS, metrics.unbind(), strict=True))
    absent = {"kl": ref_logps is None, "entropy": entropy is None}
    return TokenRows(losses, {name: x for name, x in found.items() if not absent.get(name, False)})


class _PpoRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        run: Any = kernels.choose("ppo_row", "cuda", "cuda")
        (losses, of_logps, of_entropy), metrics = run.ppo_row(*arguments)
        ctx.save_for_backward(of_logps, of_entropy)
        if metrics is not None:
            ctx.mark_non_differentiable(metrics)
        return losses, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor, _: Tensor | None) -> tuple[Any, ...]:
        of_logps, of_entropy = ctx.saved_tensors
        of_entropy = grad_losses * of_entropy if ctx.needs_input_grad[6] else None
        return grad_losses * of_logps, *(None,) * 5, of_entropy, *(None,) * 9
