"""Policy losses on the fused head: hidden states in, loss and gradients out, no logits."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastpref.heads._rows import token_rows
from fastpref.heads.sweep import Way, summed, sweep, way_of
from fastpref.losses._protocol import Loss
from fastpref.losses._sums import Place, place
from fastpref.losses.objective import Objective, objective
from fastpref.losses.policy import PolicyOutput
from fastpref.ops import _head
from fastpref.ops.linear_logps import token_outputs

FN = "linear_policy_loss"


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    advantages: Tensor,
    old_logps: Tensor | None = None,
    loss_type: str | Loss | Sequence[str | Loss] = "ppo",
    loss_weights: Sequence[float] | None = None,
    importance_sampling_level: str = "token",
    token_weights: Tensor | None = None,
    ref_logps: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    use_bias_correction_kl: bool = False,
    entropy_coef: float = 0.0,
    reduction: str | None = None,
    num_items: float | Tensor | None = None,
    max_length: int | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    rows: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    process_group: "dist.ProcessGroup | None" = None,
    workspace: int | None = None,
    max_extra_bytes: int | None = None,
    deterministic: bool = False,
    check_finite: bool = False,
    backend: str | None = None,
    **options: Any,
) -> PolicyOutput:
    """The policy-gradient loss of sampled tokens from hidden states; ppo: mean of -min(r A, clip(r, 1 - e, 1 + e) A).

    Schulman et al. 2017, arXiv:1707.06347, eq. 7, r = pi / pi_old; the other types cite their papers. A trained head is
    passed over three times, forward and backward together, a frozen one twice, with an entropy bonus or without; tokens
    that get no gradient (clipped, of advantage 0 and without KL) cost one pass.

    Args:
        hidden: (B, T, H), or packed (N, H) with cu_seqlens. Row t predicts target t: shift before the call.
        weight: (V, H), the dtype of hidden.
        targets: (B, T) or (N,), the sampled tokens; `ignore_index` at what the policy did not choose (prompt, padding,
            tool output), which costs nothing.
        advantages: (B,), one a sequence, or shaped like targets.
        old_logps: shaped like targets: log-probs under the policy that sampled, with the same temperature and other
            head options. None: on-policy, the current ones without their gradient.
        loss_type, loss_weights, importance_sampling_level, token_weights, ref_logps, kl_coef, kl_estimator,
            use_bias_correction_kl, entropy_coef, reduction, num_items, max_length, options: as in policy_loss.
        bias, ignore_index, temperature, softcap, logit_scale, rows, process_group, workspace, deterministic,
            check_finite, backend: as in linear_logps.
        max_extra_bytes: where the batch takes several chunks, what the fp32 copy of the weight's gradient may take,
            4 V H, or exponentials in its place; with less, four passes and neither.
        cu_seqlens: (S + 1,) int32: where each sequence's targets start, and the end. Packed input needs it.
    Returns:
        PolicyOutput, logps and entropy shaped like targets. An empty batch has loss 0 and gradients 0. The entropy is
        that of the whole distribution. A gradient that reaches logps or entropy costs a pass more.
    Raises:
        ValueError: shapes, an unknown name, a number out of range, or a reference that is needed and missing.
        TypeError: dtypes, or an option that the loss does not own.
    """
    of_logits = bias, ignore_index, temperature, softcap, logit_scale, rows, cu_seqlens, process_group
    head = _head.HeadOptions(*of_logits, workspace, max_extra_bytes, deterministic, check_finite, backend)
    flat = _head.flatten(FN, hidden, weight, targets, head)
    where = place(FN, "targets", targets, cu_seqlens)
    goal = objective(
        FN,
        flat.targets != ignore_index,
        where,
        flat.inv_temperature.dtype,
        advantages=advantages,
        old_logps=old_logps,
        loss_type=loss_type,
        loss_weights=loss_weights,
        importance_sampling_level=importance_sampling_level,
        token_weights=token_weights,
        ref_logps=ref_logps,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        use_bias_correction_kl=use_bias_correction_kl,
        entropy_coef=entropy_coef,
        reduction=reduction,
        num_items=num_items,
        max_length=max_length,
        options=options,
    )
    n = flat.targets.numel()
    apart = n and goal.reduction != "none" and goal.couples in ("token", "sequence")
    way = way_of(flat, goal.couples, frozen_too=True) if apart else Way(False)
    if way.swept:
        token = torch.arange(n, device=flat.targets.device)
        group, n_groups = (token, n) if goal.couples == "token" else (where.sequence, where.n_sequences)
        loss, found = sweep(FN, flat, group, n_groups, partial(_loss_of, goal))
        fused = token_rows(goal, found["logps"].detach(), found["entropy"].detach(), _bounds(where, cu_seqlens))
    else:
        found = token_outputs(FN, flat, entropy=entropy_coef != 0, extra=way.extra)
        fused = token_rows(goal, found["logps"], found["entropy"], _bounds(where, cu_seqlens))
        losses = goal.losses(found["logps"], found["entropy"]) if fused is None else fused.losses
        loss = losses.reshape(targets.shape) if goal.reduction == "none" else summed(FN, losses, found)
    logps, entropy = found["logps"], found["entropy"]
    metrics = goal.metrics(logps, entropy) if fused is None else fused.metrics
    return PolicyOutput(loss, logps.reshape(targets.shape), entropy.reshape(targets.shape), metrics)


def _loss_of(goal: Objective, index: Tensor, outputs: dict[str, Tensor], first: int, last: int) -> Tensor:
    """The sum over the live tokens at `index`, of the groups first to last - 1."""
    some = goal.at(index, first, last)
    rows = token_rows(some, outputs["logps"], outputs["entropy"])
    return (some.losses(outputs["logps"], outputs["entropy"]) if rows is None else rows.losses).sum()


def _bounds(where: Place, cu_seqlens: Tensor | None) -> Tensor:
    """(S + 1,) int64: where each sequence starts, and the end."""
    if cu_seqlens is not None:
        return cu_seqlens.long()
    return torch.arange(where.n_sequences + 1, device=where.sequence.device) * where.shape[1]
