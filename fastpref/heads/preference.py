"""Losses of preference pairs on the fused head: hidden states in, loss and gradients out, no logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.heads.sweep import in_parts, sweep
from fastpref.losses._protocol import Loss, Terms, resolve
from fastpref.losses.preference import PREFERENCE_LOSSES, Pairs, Tokens, check_beta, rewards
from fastpref.ops import _check, _head
from fastpref.ops.linear_logps import token_outputs

FN = "linear_preference_loss"
REDUCTIONS = ("mean", "sum", "none")


class PreferenceOutput(NamedTuple):
    """All float32. `loss` and the logps are differentiable, rewards and metrics are detached.

    A tuple, so that FSDP2 and DDP find the tensors in what a model's forward returns.
    """

    loss: Tensor  # (), or (B,) with reduction="none"
    chosen_logps: Tensor  # (B,) summed over completion tokens, nats
    rejected_logps: Tensor
    chosen_rewards: Tensor  # (B,) beta times the log-ratio to the reference
    rejected_rewards: Tensor
    metrics: dict[str, Tensor]  # 0-d, on the device, under TRL's names


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    loss_type: str | Loss | Sequence[str | Loss] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    ref_logps: Tensor | None = None,
    ref_token_logps: Tensor | None = None,
    reference_free: bool = False,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    rows: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    workspace: int | None = None,
    max_extra_bytes: int | None = None,
    deterministic: bool = False,
    check_finite: bool = False,
    backend: str | None = None,
    **options: Any,
) -> PreferenceOutput:
    """The loss of B preference pairs from hidden states; sigmoid: mean of -log sigmoid(beta (r_w - r_l)).

    Rafailov et al. 2023, arXiv:2305.18290, eq. 7; the other types cite their papers. A trained head is passed over
    three times, forward and backward together, a frozen one twice; `plan` says why it may be more.

    Args:
        hidden: (2B, T, H), B chosen sequences, then B rejected, pair i with i + B; or packed (N, H) with cu_seqlens.
        weight: (V, H), the dtype of hidden.
        targets: (2B, T) or (N,), already shifted; `ignore_index` at prompt and padding tokens, which cost nothing.
        loss_type: a name in PREFERENCE_LOSSES, a function f(pairs, *, beta, ...) -> (B,), or a list of them with
            `loss_weights`. A function may declare `couples`; undeclared it counts as coupling the batch.
        beta: strength of the pull to the reference, > 0.
        ref_logps: (2B,) log-probs of the completions under the reference, summed, nats. Or
        ref_token_logps: the same per token, shaped like targets. Or
        ref_hidden, ref_weight: the reference's hidden states and head; scored here in one pass, without gradient, with
            the same head options. Or
        reference_free: the reference counts as uniform. At most one of the four.
        reduction: "mean" over pairs, "sum", or "none": (B,).
        num_items: pairs over all ranks and micro-batches of the step: the loss is sum / num_items.
        bias, ignore_index, temperature, softcap, logit_scale, rows, workspace, deterministic, check_finite, backend:
            as in linear_logps.
        max_extra_bytes: where the batch takes several chunks, what the fp32 copy of the weight's gradient may take,
            4 V H; with less, four passes and no copy.
        cu_seqlens: (2B + 1,) int32: where each sequence's targets start, and the end. Packed input needs it.
        options: the loss's own keywords, as `label_smoothing` of sigmoid.
    Returns:
        PreferenceOutput. An empty batch has loss 0 and gradients 0.
    Raises:
        ValueError: shapes, an odd number of sequences, an unknown loss, a reference that is needed and missing or given
            twice.
        TypeError: dtypes, or an option that the loss does not own.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"{FN}: reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"{FN}: num_items and reduction={reduction!r} were both given; choose one")
    check_beta(FN, beta)
    terms = resolve(FN, PREFERENCE_LOSSES, loss_type, loss_weights, options)
    head_options: dict[str, Any] = {
        "bias": bias,
        "ignore_index": ignore_index,
        "temperature": temperature,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "rows": rows,
        "cu_seqlens": cu_seqlens,
        "workspace": workspace,
        "max_extra_bytes": max_extra_bytes,
        "deterministic": deterministic,
        "check_finite": check_finite,
        "backend": backend,
    }
    flat = _head.flatten(FN, hidden, weight, targets, **head_options)
    sequence, n_sequences = _sequences(hidden, targets, cu_seqlens)
    n_pairs = n_sequences // 2
    reference = _reference(
        flat, targets, n_sequences, ref_logps, ref_token_logps, reference_free, ref_hidden, ref_weight, head_options
    )
    scale = _scale(reduction, num_items, n_pairs)
    job = _Job(terms, beta, flat.targets != ignore_index, sequence, n_pairs, *reference)

    if n_pairs and reduction != "none" and in_parts(flat, terms.couples, max_extra_bytes):
        loss, found = sweep(FN, flat, sequence % n_pairs, n_pairs, job.loss_of)
        loss = loss * scale
        pairs = job.pairs(found["logps"], found)
    else:
        found = token_outputs(FN, flat)
        pairs = job.pairs(found["logps"], found)
        losses = terms(FN, pairs.chosen_logps, pairs, beta=beta)
        loss = losses if reduction == "none" else losses.sum() * scale
    chosen_rewards, rejected_rewards = rewards(pairs, beta)
    return PreferenceOutput(
        loss,
        pairs.chosen_logps,
        pairs.rejected_logps,
        chosen_rewards,
        rejected_rewards,
        _metrics(pairs, chosen_rewards, rejected_rewards),
    )


def _sequences(hidden: Tensor, targets: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, int]:
    """(M,) the sequence of each target, and how many sequences there are."""
    if hidden.dim() == 3:
        n = hidden.shape[0]
        sequence = torch.arange(n, device=targets.device)[:, None].expand(targets.shape).reshape(-1)
    elif cu_seqlens is None:
        raise ValueError(f"{FN}: packed hidden (N, H) needs cu_seqlens, (2B + 1,) int32")
    else:
        n = cu_seqlens.shape[0] - 1
        bounds, total = cu_seqlens.long(), targets.shape[0]
        sequence = torch.searchsorted(bounds[1:], torch.arange(total, device=targets.device), right=True)
    if n % 2:
        raise ValueError(f"{FN}: hidden must hold B chosen, then B rejected sequences; got an odd number, {n}")
    return sequence, n


def _reference(
    flat: _head.FlatHead,
    targets: Tensor,
    n_sequences: int,
    ref_logps: Tensor | None,
    ref_token_logps: Tensor | None,
    reference_free: bool,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    head_options: dict[str, Any],
) -> tuple[Tensor | None, Tensor | None]:
    """(sums (2B,), per token (M,)) under the reference; None where not known."""
    if (ref_hidden is None) != (ref_weight is None):
        raise ValueError(f"{FN}: ref_hidden and ref_weight go together; got only one")
    given = {
        "ref_logps": ref_logps is not None,
        "ref_token_logps": ref_token_logps is not None,
        "ref_hidden": ref_hidden is not None,
        "reference_free=True": reference_free,
    }
    if sum(given.values()) > 1:
        raise ValueError(
            f"{FN}: give one reference; got {' and '.join(name for name, there in given.items() if there)}"
        )
    _check.tensors(
        FN, ref_logps=ref_logps, ref_token_logps=ref_token_logps, ref_hidden=ref_hidden, ref_weight=ref_weight
    )
    _check.same_device(FN, hidden=flat.hidden, ref_logps=ref_logps, ref_token_logps=ref_token_logps)
    _check.floating(FN, (*_check.FLOATS, torch.float64), ref_logps=ref_logps, ref_token_logps=ref_token_logps)
    dtype = flat.inv_temperature.dtype
    if reference_free:
        return flat.hidden.new_zeros(n_sequences, dtype=dtype), None
    if ref_logps is not None:
        if ref_logps.shape != (n_sequences,):
            raise ValueError(
                f"{FN}: ref_logps must be ({n_sequences},), one sum a sequence; got {tuple(ref_logps.shape)}"
            )
        return ref_logps.detach().to(dtype), None
    if ref_token_logps is not None:
        _check.same_shape(FN, targets=targets, ref_token_logps=ref_token_logps)
        return None, ref_token_logps.detach().reshape(-1).to(dtype)
    if ref_hidden is not None and ref_weight is not None:
        with torch.no_grad():
            ref = _head.flatten(FN, ref_hidden, ref_weight, targets, **head_options)
            return None, token_outputs(FN, ref)["logps"]
    return None, None


def _scale(reduction: str, num_items: float | Tensor | None, n_pairs: int) -> float | Tensor:
    """What the sum of the losses is multiplied by."""
    if num_items is None:
        return 1 / max(n_pairs, 1) if reduction == "mean" else 1.0
    if isinstance(num_items, Tensor):
        if num_items.dim() or num_items.requires_grad:
            raise ValueError(f"{FN}: num_items must be a number or a 0-d tensor; got shape {tuple(num_items.shape)}")
        return 1 / num_items
    _check.number(FN, num_items=num_items)
    if not 0 < num_items < float("inf"):
        raise ValueError(f"{FN}: num_items must be > 0 and finite; got {num_items}")
    return 1 / num_items


@dataclass(frozen=True)
class _Job:
    """From log-probs of tokens to pairs, for the whole batch or for some of its pairs."""

    terms: Terms
    beta: float
    live: Tensor  # (M,) bool
    sequence: Tensor  # (M,)
    n_pairs: int
    ref_sums: Tensor | None  # (2B,)
    ref_tokens: Tensor | None  # (M,)

    def pairs(self, logps: Tensor, outputs: dict[str, Tensor]) -> Pairs:
        """All pairs; `logps` and `outputs` (M,)."""
        return self._pairs(logps, outputs, self.live, self.sequence, self.n_pairs, self.ref_sums, self.ref_tokens)

    def loss_of(self, index: Tensor, outputs: dict[str, Tensor], first: int, last: int) -> Tensor:
        """The sum of the losses of pairs first to last - 1, whose targets are at `index`; `outputs` (n,) each."""
        n = last - first
        pair, is_rejected = self.sequence[index] % self.n_pairs, self.sequence[index] >= self.n_pairs
        here = torch.arange(first, last, device=index.device)
        ref_sums = None if self.ref_sums is None else self.ref_sums[torch.cat((here, here + self.n_pairs))]
        ref_tokens = None if self.ref_tokens is None else self.ref_tokens[index]
        live, sequence = torch.ones_like(index, dtype=torch.bool), pair - first + n * is_rejected
        pairs = self._pairs(outputs["logps"], outputs, live, sequence, n, ref_sums, ref_tokens)
        return self.terms(FN, pairs.chosen_logps, pairs, beta=self.beta).sum()

    def _pairs(
        self,
        logps: Tensor,
        outputs: dict[str, Tensor],
        live: Tensor,
        sequence: Tensor,
        n_pairs: int,
        ref_sums: Tensor | None,
        ref_tokens: Tensor | None,
    ) -> Pairs:
        def halves(x: Tensor) -> tuple[Tensor, Tensor]:
            return x[:n_pairs], x[n_pairs:]

        def sums(x: Tensor) -> Tensor:
            # a sum of 1,024 log-probs is off by 4e-3 nats if it is kept in fp32
            total = torch.zeros(2 * n_pairs, dtype=torch.float64, device=x.device)
            return total.index_add(0, sequence, x.double()).to(x.dtype)

        lengths = torch.zeros_like(sequence.new_empty(2 * n_pairs)).index_add(0, sequence, live.long())
        if ref_tokens is not None:
            ref_tokens = torch.where(live, ref_tokens, 0.0)
            ref_sums = sums(ref_tokens)
        tokens = Tokens(logps, ref_tokens, live, sequence, {name: outputs[name].detach() for name in _head.OUTPUTS})
        ref_chosen, ref_rejected = (None, None) if ref_sums is None else halves(ref_sums)
        return Pairs(*halves(sums(logps)), ref_chosen, ref_rejected, *halves(lengths), tokens, FN)


def _metrics(pairs: Pairs, chosen_rewards: Tensor, rejected_rewards: Tensor) -> dict[str, Tensor]:
    """TRL's, over this call; tokens weigh alike in logits/*, entropy and accuracy. 0 where nothing is averaged."""
    tokens = pairs.tokens
    assert tokens is not None
    n_pairs = pairs.chosen_logps.shape[0]
    rejected = tokens.sequence >= n_pairs

    def mean(x: Tensor) -> Tensor:
        return x.detach().sum() / max(x.numel(), 1)

    def over_tokens(x: Tensor, where: Tensor) -> Tensor:
        return torch.where(where, x.float(), 0.0).sum() / where.sum().clamp(min=1)

    chosen_live, rejected_live = tokens.mask & ~rejected, tokens.mask & rejected
    return {
        "rewards/chosen": mean(chosen_rewards),
        "rewards/rejected": mean(rejected_rewards),
        "rewards/accuracies": mean((chosen_rewards > rejected_rewards).float()),
        "rewards/margins": mean(chosen_rewards - rejected_rewards),
        "logps/chosen": mean(pairs.chosen_logps),
        "logps/rejected": mean(pairs.rejected_logps),
        "logits/chosen": over_tokens(tokens.outputs["mean_logits"], chosen_live),
        "logits/rejected": over_tokens(tokens.outputs["mean_logits"], rejected_live),
        "entropy": over_tokens(tokens.outputs["entropy"], tokens.mask),
        "mean_token_accuracy": over_tokens(tokens.outputs["is_top1"], chosen_live),
    }
