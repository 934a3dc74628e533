"""Losses of unpaired completions on the fused head: hidden states in, loss and gradients out, no logits."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastpref.heads._divisor import divisor
from fastpref.heads._sequences import Sequences, mean, reference, token_metrics
from fastpref.heads.sweep import Way, summed, sweep, way_of
from fastpref.losses._protocol import Loss, Terms
from fastpref.losses._sums import place
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
    _, of, n = place(FN, "targets", targets, cu_seqlens)
    check_desirable(FN, desirable, flat.hidden, n)
    by = divisor(FN, reduction, num_items, n)
    ref = reference(FN, flat, targets, n, ref_logps, ref_token_logps, reference_free, ref_hidden, ref_weight, head)
    batch = Sequences(n, flat.targets != ignore_index, of, *ref)
    at = checked_kl(FN, kl, flat.inv_temperature)

    way = way_of(flat, terms.couples) if n and reduction != "none" else Way(False)
    if way.swept:
        loss, found = sweep(FN, flat, of, n, partial(_loss_of, terms, beta, batch, desirable, at))
        unpaired = _unpaired(batch, desirable, at, found)
    else:
        found = token_outputs(FN, flat, extra=way.extra)
        unpaired = _unpaired(batch, desirable, at, found)
        losses = terms(FN, unpaired.logps, unpaired, beta=beta)
        loss = losses if reduction == "none" else summed(FN, losses, found)
    of_each = rewards(unpaired, beta)
    return UnpairedOutput(loss / by, unpaired.logps, of_each, _metrics(unpaired, of_each))


def _loss_of(
    terms: Terms,
    beta: float,
    batch: Sequences,
    desirable: Tensor,
    kl: Tensor | None,
    index: Tensor,
    outputs: dict[str, Tensor],
    first: int,
    last: int,
) -> Tensor:
    """The sum of the losses of sequences first to last - 1, whose targets are at `index`; `outputs` (m,) each."""
    part = batch.part(index, torch.arange(first, last, device=index.device))
    unpaired = _unpaired(part, desirable[first:last], kl, outputs)
    return terms(FN, unpaired.logps, unpaired, beta=beta).sum()


def _unpaired(batch: Sequences, desirable: Tensor, kl: Tensor | None, outputs: dict[str, Tensor]) -> Unpaired:
    sums, ref_sums, lengths, tokens = batch.summed(outputs)
    return Unpaired(sums, desirable, ref_sums, kl, lengths, tokens, FN)


def _metrics(unpaired: Unpaired, of_each: Tensor) -> dict[str, Tensor]:
    """TRL's of KTO, over this call: the desirable are the chosen."""
    tokens, chosen = unpaired.tokens, unpaired.desirable
    assert tokens is not None
    chosen_reward, rejected_reward = mean(of_each, chosen), mean(of_each, ~chosen)
    metrics = {
        "rewards/chosen": chosen_reward,
        "rewards/rejected": rejected_reward,
        "rewards/margins": torch.where(chosen.any() & ~chosen.all(), chosen_reward - rejected_reward, 0.0),
        "logps/chosen": mean(unpaired.logps, chosen),
        "logps/rejected": mean(unpaired.logps, ~chosen),
        **token_metrics(tokens, chosen[tokens.sequence]),
        "count/chosen": chosen.sum().float(),
        "count/rejected": (~chosen).sum().float(),
    }
    return metrics if unpaired.kl is None else {**metrics, "kl": unpaired.kl.float()}
