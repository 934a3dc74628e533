"""Losses of preference pairs on the fused head: hidden states in, loss and gradients out, no logits."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastpref.heads._divisor import divisor
from fastpref.heads._rows import pair_rows
from fastpref.heads._sequences import Sequences, mean, reference, token_metrics
from fastpref.heads.sweep import Way, summed, sweep, way_of
from fastpref.losses._protocol import Loss
from fastpref.losses._sums import place
from fastpref.losses.dpo import PairLoss, bind
from fastpref.losses.pairs import Pairs
from fastpref.ops import _head
from fastpref.ops.linear_logps import token_outputs

FN = "linear_preference_loss"


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
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float | None = None,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
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
            the same head options, a bias among them, which must be frozen. Or
        reference_free: the reference counts as uniform. At most one of the four.
        f_divergence_type: the pull to the reference: "reverse_kl", "forward_kl", "js_divergence" or "alpha_divergence"
            with f_alpha_divergence_coef in [0, 1], None: 0.5 (f-DPO, Wang et al. 2023, arXiv:2309.16240); for sigmoid,
            robust, hinge, ipo, exo_pair, discopop and sigmoid_norm. Your own function finds it in `pairs.margins`.
        ld_alpha: what a token counts beyond the length of the shorter of the two answers, in [0, 1]; None: 1 (LD-DPO,
            Liu et al. 2024, arXiv:2409.06411). With losses of log-ratios, whose reference must be known per token.
            Lengths, sft and the logps returned count every token.
        use_weighting: each pair's loss times how likely its answers are under the policy, without gradient (WPO, Zhou
            et al. 2024, arXiv:2406.11827, eq. 2); with any loss that does not couple the batch.
        reduction: "mean" over pairs, "sum", or "none": (B,).
        num_items: pairs over all ranks and micro-batches of the step: the loss is sum / num_items.
        bias, ignore_index, temperature, softcap, logit_scale, rows, process_group, workspace, deterministic,
            check_finite, backend: as in linear_logps.
        max_extra_bytes: where the batch takes several chunks, what the fp32 copy of the weight's gradient may take,
            4 V H, or exponentials in its place; with less, four passes and neither.
        cu_seqlens: (2B + 1,) int32: where each sequence's targets start, and the end. Packed input needs it.
        options: the loss's own keywords, as `label_smoothing` of sigmoid.
    Returns:
        PreferenceOutput. An empty batch has loss 0 and gradients 0.
    Raises:
        ValueError: shapes, an odd number of sequences, an unknown loss, a reference that is needed and missing or given
            twice.
        TypeError: dtypes, or an option that the loss does not own.
    """
    changes = (f_divergence_type, f_alpha_divergence_coef, ld_alpha, use_weighting)
    loss_of_pairs = bind(FN, loss_type, loss_weights, beta, *changes, options)
    of_logits = bias, ignore_index, temperature, softcap, logit_scale, rows, cu_seqlens, process_group
    head = _head.HeadOptions(*of_logits, workspace, max_extra_bytes, deterministic, check_finite, backend)
    flat = _head.flatten(FN, hidden, weight, targets, head)
    _, of, n = place(FN, "targets", targets, cu_seqlens)
    if n % 2:
        raise ValueError(f"{FN}: hidden must hold B chosen, then B rejected sequences; got an odd number, {n}")
    by = divisor(FN, reduction, num_items, n // 2)
    ref = reference(FN, flat, targets, n, ref_logps, ref_token_logps, reference_free, ref_hidden, ref_weight, head)
    batch = Sequences(n, flat.targets != ignore_index, of, *ref)

    way = way_of(flat, loss_of_pairs.terms.couples) if n and reduction != "none" else Way(False)
    if way.swept:
        loss, found = sweep(FN, flat, of % (n // 2), n // 2, partial(_loss_of, loss_of_pairs, batch))
        pairs = _pairs(batch, found)
        fused = pair_rows(loss_of_pairs, pairs)
    else:
        found = token_outputs(FN, flat, extra=way.extra)
        pairs = _pairs(batch, found)
        fused = pair_rows(loss_of_pairs, pairs)
        losses = loss_of_pairs(pairs) if fused is None else fused.losses
        loss = losses if reduction == "none" else summed(FN, losses, found)
    logps = pairs.chosen_logps, pairs.rejected_logps
    if fused is not None:
        rewards, metrics = (fused.chosen_rewards, fused.rejected_rewards), fused.metrics
    else:
        rewards = loss_of_pairs.rewards(pairs)
        metrics = _pair_metrics(pairs, *rewards)
    return PreferenceOutput(loss / by, *logps, *rewards, {**metrics, **_token_metrics(pairs)})


def _loss_of(
    loss: PairLoss, batch: Sequences, index: Tensor, outputs: dict[str, Tensor], first: int, last: int
) -> Tensor:
    """The sum of the losses of pairs first to last - 1, whose targets are at `index`; `outputs` (m,) each."""
    chosen = torch.arange(first, last, device=index.device)
    pairs = _pairs(batch.part(index, torch.cat((chosen, chosen + batch.n // 2))), outputs)
    fused = pair_rows(loss, pairs)
    return (loss(pairs) if fused is None else fused.losses).sum()


def _pairs(batch: Sequences, outputs: dict[str, Tensor]) -> Pairs:
    def halves(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[: batch.n // 2], x[batch.n // 2 :]

    sums, ref_sums, lengths, tokens = batch.summed(outputs)
    ref_chosen, ref_rejected = (None, None) if ref_sums is None else halves(ref_sums)
    return Pairs(*halves(sums), ref_chosen, ref_rejected, *halves(lengths), tokens, FN)


def _pair_metrics(pairs: Pairs, chosen_rewards: Tensor, rejected_rewards: Tensor) -> dict[str, Tensor]:
    """TRL's, over this call; 0 where nothing is averaged."""
    return {
        "rewards/chosen": mean(chosen_rewards),
        "rewards/rejected": mean(rejected_rewards),
        "rewards/accuracies": mean(chosen_rewards > rejected_rewards),
        "rewards/margins": mean(chosen_rewards - rejected_rewards),
        "logps/chosen": mean(pairs.chosen_logps),
        "logps/rejected": mean(pairs.rejected_logps),
    }


def _token_metrics(pairs: Pairs) -> dict[str, Tensor]:
    tokens = pairs.tokens
    assert tokens is not None
    chosen = tokens.sequence < pairs.chosen_logps.shape[0]
    right = mean(tokens.outputs["is_top1"], tokens.mask & chosen)
    return {**token_metrics(tokens, chosen), "mean_token_accuracy": right}
