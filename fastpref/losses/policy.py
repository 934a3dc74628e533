"""Policy losses on log-probabilities of sampled tokens; `linear_policy_loss` is the same on the fused head."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.losses._protocol import Loss
from fastpref.losses._sums import place
from fastpref.losses.objective import objective
from fastpref.ops import _check


class PolicyOutput(NamedTuple):
    """All float32. The loss, logps and entropy are differentiable, metrics are detached."""

    loss: Tensor  # (), or one a token with reduction="none"
    logps: Tensor  # shaped like the targets, 0 where nothing is scored
    entropy: Tensor | None  # likewise, nats; None: not known
    metrics: dict[str, Tensor]  # 0-d, on the device, under TRL's names


def policy_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    loss_type: str | Loss | Sequence[str | Loss] = "ppo",
    loss_weights: Sequence[float] | None = None,
    importance_sampling_level: str = "token",
    token_weights: Tensor | None = None,
    ref_logps: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    use_bias_correction_kl: bool = False,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    reduction: str | None = None,
    num_items: float | Tensor | None = None,
    max_length: int | None = None,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> PolicyOutput:
    """The policy-gradient loss of sampled tokens; ppo: mean of -min(r A, clip(r, 1 - e, 1 + e) A), r = pi / pi_old.

    Schulman et al. 2017, arXiv:1707.06347, eq. 7; the other types cite their papers. Beyond 20 nats a ratio grows along
    its tangent in place of the exponential, and stays finite.

    Args:
        logps: (B, T), or packed (N,) with cu_seqlens: log-probability of each sampled token under the policy, nats.
        old_logps: the same under the policy that sampled them. None: on-policy, logps without their gradient.
        advantages: (B,), one a sequence, or shaped like logps. No gradient.
        mask: like logps, any dtype; nonzero where the policy chose the token. Nothing is read elsewhere, NaN allowed.
        loss_type: a name in POLICY_LOSSES, a function f(rollout, ...) -> (N,), or a list of them with `loss_weights`. A
            function may declare `couples`; undeclared it counts as coupling the batch.
        importance_sampling_level: "token", or "sequence": r is the geometric mean of the ratios of the sequence, for
            the losses that have no ratio of their own (gspo, luspo, rloo, vespo).
        token_weights: (B,) or shaped like logps, a factor on the surrogate, not on KL or entropy: truncated importance
            sampling against the sampler's log-probs, or 0 where a token is too far off-policy. No gradient.
        ref_logps: like logps, under the reference, for the KL term.
        kl_coef: weight of the KL term, >= 0; kl_estimator: "k1", "k2" or "k3" (losses/kl.py).
        use_bias_correction_kl: the KL term times r, with r's gradient (DeepSeek-V3.2, arXiv:2512.02556): its
            gradient is then unbiased off-policy too.
        entropy: like logps; entropy_coef: weight of its mean, subtracted.
        reduction: "mean" over live tokens; "sequence_mean": of each sequence, then over sequences; "sequence_sum": a
            sum within each; "constant": that over max_length; "sum"; "none": shaped like logps. None: the paper's.
        num_items: what the reduction counts, tokens for "mean" and else sequences, over all ranks and micro-batches of
            the step, in place of those of this call.
        max_length: of a completion, tokens, for "constant".
        cu_seqlens: (S + 1,) int32, where each packed sequence starts, and the end.
        options: the loss's own keywords: `epsilon`, `epsilon_high`, `delta`, `sapo_temperature_pos`, ...
    Returns:
        PolicyOutput, float32 (float64 for float64), with the logps and entropy given. An empty batch has loss 0.
    Raises:
        ValueError: shapes, an unknown name, a number out of range, or a reference or entropy that is missing.
        TypeError: dtypes, or an option that the loss does not own.
    """
    fn = "policy_loss"
    _check.tensors(fn, logps=logps, mask=mask, cu_seqlens=cu_seqlens)
    _check.floating(fn, _check.WIDE_FLOATS, logps=logps)
    _check.same_shape(fn, logps=logps, mask=mask, entropy=entropy)
    _check.same_device(fn, logps=logps, mask=mask, entropy=entropy, cu_seqlens=cu_seqlens)
    where = place(fn, "logps", logps, cu_seqlens)
    dtype = torch.promote_types(logps.dtype, torch.float32)
    goal = objective(
        fn,
        mask.reshape(-1) != 0,
        where,
        dtype,
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
    if entropy is None and entropy_coef:
        raise ValueError(f"{fn}: entropy_coef = {entropy_coef} needs entropy, and got none")
    flat = logps.reshape(-1).to(dtype)
    flat_entropy = None if entropy is None else entropy.reshape(-1).to(dtype)
    losses = goal.losses(flat, flat_entropy)
    loss = losses.reshape(logps.shape) if goal.reduction == "none" else losses.sum()
    wide_entropy = None if entropy is None else entropy.to(dtype)
    return PolicyOutput(loss, logps.to(dtype), wide_entropy, goal.metrics(flat, flat_entropy))
