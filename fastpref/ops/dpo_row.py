"""The common preference losses of pairs on a CUDA device: losses, rewards and metrics in one launch, slopes kept.

The maths is that of losses/preference.py, where it is right. Not a registered op: torch.compile traces the functions.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref import kernels
from fastpref.ops._once import once_differentiable

METRICS = (
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected"),
)


class PairRows(NamedTuple):
    losses: Tensor  # (B,), differentiable in the policy's log-probs
    chosen_rewards: Tensor  # (B,), as all that follows without gradient
    rejected_rewards: Tensor
    metrics: dict[str, Tensor]  # 0-d, under TRL's names


def dpo_row(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    *,
    loss: str,
    beta: float,
    smoothing: float,
    weight: float,
) -> PairRows:
    """`weight` times the loss ("sigmoid", "robust", "hinge" or "ipo") of float32 sums of log-probs, (B,) each, nats."""
    inputs = chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths
    losses, chosen_rewards, rejected_rewards, metrics = _DpoRow.apply(*inputs, loss, beta, smoothing, weight)
    return PairRows(losses, chosen_rewards, rejected_rewards, dict(zip(METRICS, metrics.unbind(), strict=True)))


class _DpoRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chosen: Tensor, *others: Any) -> tuple[Tensor, ...]:
        run: Any = kernels.choose("dpo_row", "cuda", "cuda")
        (losses, of_chosen, of_rejected, *rewards), metrics = run.dpo_row(chosen, *others)
        ctx.save_for_backward(of_chosen, of_rejected)
        ctx.mark_non_differentiable(*rewards, metrics)
        return losses, *rewards, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor, *_: Tensor) -> tuple[Any, ...]:
        of_chosen, of_rejected = ctx.saved_tensors
        return grad_losses * of_chosen, grad_losses * of_rejected, *(None,) * 8
