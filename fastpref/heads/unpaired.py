"""Losses of unpaired completions on the fused head: hidden states in, loss and gradients out, no logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastpref.heads._divisor import divisor
from fastpref.heads._sequences import mean, reference, sequences
from fastpref.heads.sweep import in_parts, sweep
from fastpref.losses._protocol import Loss, Terms
from fastpref.losses.pairs import Tokens
from fastpref.losses.unpaired import Unpaired, bind, check_desirable, checked_kl, rewards
from fastpref.ops import _head
from fastpref.ops.linear_logps import token_outputs

FN = "linear_unpaired_loss"


class UnpairedOutput(NamedTuple):
    """All float32. `loss` and `logps` are differentiable, rewards and metrics are detached.

    A tuple, so that FSDP2 and DDP find the tensors in what a model's forward returns.
    """

    loss: Tensor  # (), or (S,) with reduction="none"
    logps: Tensor  # (S,) summed over completion tokens, nats
    rewards: Tensor  # (S,) beta times the log-ratio to the reference
    metrics: dict[str, Tensor]  # 0-d, on the device, under TRL's names


def linear_unpaired_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    desirable: Tensor,
    *,
    loss_type: str | Loss | Sequence[str | Loss] = "kto",
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    ref_logps: Tensor | None = None,
    ref_token_logps: Tensor | None = None,
    reference_free: bool = False,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    kl: float | Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
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
) -> UnpairedOutput:
    """The loss of S completions labelled desirable or not; kto: mean of 1 - sigmoid(+-beta (r - kl)).

    Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7; the other types cite their papers. A trained head is passed over
    three times, forward and backward together, a frozen one twice; `plan` says why it may be more.

    Args:
        hidden: (S, T, H); or packed (N, H) with cu_seqlens.
        weight: (V, H), the dtype of hidden.
        targets: (S, T) or (N,), already shifted; `ignore_index` at prompt and padding tokens, which cost nothing.
        desirable: (S,) bool.
        loss_type: a name in UNPAIRED_LOSSES, a function f(unpaired, *, beta, ...) -> (S,), or a list of them with
            `loss_weights`. A function may declare `couples`; undeclared it counts as coupling the batch.
        beta: strength of the pull to the reference, > 0.
        ref_logps: (S,) log-probs of the completions under the reference, summed, nats. Or ref_token_logps, ref_hidden
            and ref_weight, or reference_free, as in linear_preference_loss.
        kl: a number or a detached 0-d tensor, >= 0, the same on all processes: `kto_kl`. Needed by kto.
        reduction: "mean" over sequences, "sum", or "none": (S,).
        num_items: sequences over all ranks and micro-batches of the step: the loss is sum / num_items.
        bias, ignore_index, temperature, softcap, logit_scale, rows, process_group, workspace, max_extra_bytes,
            deterministic, check_finite, backend: as in linear_preference_loss.
        cu_seqlens: (S + 1,) int32: where each sequence's targets start, and the end. Packed input needs it.
        options: the loss's own keywords: desirable_weight, undesirable_weight.
    Returns:
        UnpairedOutput. An empty batch has loss 0 and gradients 0. A metric of a kind that the call has none of is 0;
        count/chosen and count/rejected are what to weigh the means of several calls by.
    Raises:
        ValueError: shapes, an unknown loss, a reference or kl that is needed and missing, a reference given twice.
        TypeError: dtypes, or an option that the loss does not own.
    """
    terms = bind(FN, loss_type, loss_weights, beta, options)
    of_logits = bias, ignore_index, temperature, softcap, logit_scale, rows, cu_seqlens, process_group
    head = _head.HeadOptions(*of_logits, workspace, max_extra_bytes, deterministic, check_finite, backend)
    flat = _head.flatten(FN, hidden, weight, targets, head)
    sequence, n = sequences(FN, hidden, targets, cu_seqlens)
    check_desirable(FN, desirable, flat.hidden, n)
    ref_sums, ref_tokens = reference(
        FN, flat, targets, n, ref_logps, ref_token_logps, reference_free, ref_hidden, ref_weight, head
    )
    by = divisor(FN, reduction, num_items, n)
    live, kl = flat.targets != ignore_index, checked_kl(FN, kl, flat.inv_temperature)
    job = _Job(terms, beta, live, sequence, desirable, ref_sums, ref_tokens, kl)

    if n and reduction != "none" and in_parts(flat, terms.couples):
        loss, found = sweep(FN, flat, sequence, n, job.loss_of)
        unpaired = job.unpaired(found["logps"], found)
    else:
        found = token_outputs(FN, flat)
        unpaired = job.unpaired(found["logps"], found)
        losses = terms(FN, unpaired.logps, unpaired, beta=beta)
        loss = losses if reduction == "none" else losses.sum()
    of_each = rewards(unpaired, beta)
    return UnpairedOutput(loss / by, unpaired.logps, of_each, _metrics(unpaired, of_each))


@dataclass(frozen=True)
class _Job:
    """From log-probs of tokens to sequences, for the whole batch or for some of it."""

    terms: Terms
    beta: float
    live: Tensor  # (M,) bool
    sequence: Tensor  # (M,)
    desirable: Tensor  # (S,)
    ref_sums: Tensor | None  # (S,)
    ref_tokens: Tensor | None  # (M,)
    kl: Tensor | None

    def unpaired(self, logps: Tensor, outputs: dict[str, Tensor]) -> Unpaired:
        """All sequences; `logps` and `outputs` (M,)."""
        return self._unpaired(logps, outputs, self.live, self.sequence, self.desirable, self.ref_sums, self.ref_tokens)

    def loss_of(self, index: Tensor, outputs: dict[str, Tensor], first: int, last: int) -> Tensor:
        """The sum of the losses of sequences first to last - 1, whose targets are at `index`; `outputs` (n,) each."""
        live, sequence = torch.ones_like(index, dtype=torch.bool), self.sequence[index] - first
        ref_sums = None if self.ref_sums is None else self.ref_sums[first:last]
        ref_tokens = None if self.ref_tokens is None else self.ref_tokens[index]
        desirable = self.desirable[first:last]
        unpaired = self._unpaired(outputs["logps"], outputs, live, sequence, desirable, ref_sums, ref_tokens)
        return self.terms(FN, unpaired.logps, unpaired, beta=self.beta).sum()

    def _unpaired(
        self,
        logps: Tensor,
        outputs: dict[str, Tensor],
        live: Tensor,
        sequence: Tensor,
        desirable: Tensor,
        ref_sums: Tensor | None,
        ref_tokens: Tensor | None,
    ) -> Unpaired:
        n = desirable.shape[0]
        ref_tokens = None if ref_tokens is None else torch.where(live, ref_tokens, 0.0)
        tokens = Tokens(logps, ref_tokens, live, sequence, {name: outputs[name].detach() for name in _head.OUTPUTS})
        if ref_tokens is not None:
            ref_sums = tokens.sums(ref_tokens, n)
        return Unpaired(tokens.sums(logps, n), desirable, ref_sums, self.kl, tokens.lengths(n), tokens, FN)


def _metrics(unpaired: Unpaired, of_each: Tensor) -> dict[str, Tensor]:
    """TRL's of KTO, over this call: the desirable are the chosen."""
    tokens, chosen = unpaired.tokens, unpaired.desirable
    assert tokens is not None
    of_chosen = tokens.mask & chosen[tokens.sequence]
    chosen_reward, rejected_reward = mean(of_each, chosen), mean(of_each, ~chosen)
    metrics = {
        "rewards/chosen": chosen_reward,
        "rewards/rejected": rejected_reward,
        "rewards/margins": torch.where(chosen.any() & ~chosen.all(), chosen_reward - rejected_reward, 0.0),
        "logps/chosen": mean(unpaired.logps, chosen),
        "logps/rejected": mean(unpaired.logps, ~chosen),
        "logits/chosen": mean(tokens.outputs["mean_logits"], of_chosen),
        "logits/rejected": mean(tokens.outputs["mean_logits"], tokens.mask & ~of_chosen),
        "entropy": mean(tokens.outputs["entropy"], tokens.mask),
        "count/chosen": chosen.sum().float(),
        "count/rejected": (~chosen).sum().float(),
    }
    return metrics if unpaired.kl is None else {**metrics, "kl": unpaired.kl.float()}
