"""Cross-entropy on the fused head: hidden states in, the SFT loss and its gradients out, no logits."""

from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from fastpref.heads._divisor import divisor
from fastpref.heads._sequences import mean
from fastpref.heads.sweep import Way, sweep, way_of
from fastpref.ops import _check, _head
from fastpref.ops.label_margin import label_margin
from fastpref.ops.linear_logps import token_outputs

FN = "linear_cross_entropy"
HOT = 2.0**40  # a temperature at which exp(z / HOT) is 1 in fp32, |z| < 2^16


@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, return_metrics: Literal[False] = ..., **options: Any
) -> Tensor: ...
@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, return_metrics: Literal[True], **options: Any
) -> tuple[Tensor, dict[str, Tensor]]: ...
def linear_cross_entropy(  # type: ignore[misc]  # the options written out once, here
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    return_metrics: bool = False,
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
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """-(1 - s) log p_y - (s / V) sum_v log p_v of each token, s = label_smoothing, averaged over unskipped tokens.

    As torch.nn.functional.cross_entropy of the logits as used (scaled, capped, over the temperature), which never
    exist as a whole. A trained head is passed over three times, forward and backward together, a frozen one twice;
    four times with reduction="none" or under torch.compile where the tokens do not fit one chunk. Smoothing costs no
    pass, and for a moment a second gradient of weight, rounded on its own; with a softcap, as many passes again.

    Args:
        hidden: (B, T, H), or packed (N, H). Row t predicts target t: shift before the call.
        weight: (V, H), the dtype of hidden.
        targets: (B, T) or (N,); `ignore_index` at prompt and padding tokens, which cost nothing.
        reduction: "mean" over unskipped tokens, "sum", or "none": shaped like targets, 0 where skipped.
        num_items: tokens over all ranks and micro-batches of the step: the loss is sum / num_items.
        label_smoothing: the share of probability spread evenly over all V classes, in [0, 1].
        return_metrics: return (loss, metrics): entropy and mean_token_accuracy, TRL's names, means over unskipped
            tokens, 0-d and detached. They cost no pass.
        bias, ignore_index, temperature, softcap, logit_scale, rows, cu_seqlens, process_group, workspace,
            deterministic, check_finite, backend: as in linear_logps.
        max_extra_bytes: where the tokens take several chunks, what the fp32 copy of the weight's gradient may take,
            4 V H, or exponentials in its place; with less, four passes and neither.
    Returns:
        The loss, float32. No token, or only skipped ones: 0 with gradients 0. Differentiable once in hidden, weight
        and bias.
    Raises:
        ValueError: shapes, options or targets, as in linear_logps; reduction, num_items or label_smoothing.
        TypeError: dtypes, or an option that is not a number.
    """
    _check.between(FN, 0, 1, label_smoothing=label_smoothing)
    of_logits = bias, ignore_index, temperature, softcap, logit_scale, rows, cu_seqlens, process_group
    head = _head.HeadOptions(*of_logits, workspace, max_extra_bytes, deterministic, check_finite, backend)
    flat = _head.flatten(FN, hidden, weight, targets, head)
    live = flat.targets != ignore_index
    by = divisor(FN, reduction, num_items, live.sum())
    summed = reduction != "none"
    logps, found = _logps(flat, summed, label_smoothing > 0 or return_metrics)
    loss = 0.0 - logps  # not -logps: a skipped token's loss is 0, not -0
    if label_smoothing:
        # sum_v log p_v / V = log p_y - (z_y - mean_v z_v)
        margin = label_margin(flat, found["mean_logits"])
        margin = margin.sum() if summed else margin
        if softcap is not None and backend != "reference":  # label_margin differentiates it on that one alone
            # dmargin / dz_v = 1[v = y] - 1 / V has no exponential, and a chunk holds nothing else. But
            # d HOT log softmax(z / HOT)_y / dz_v = 1[v = y] - softmax(z / HOT)_v is the same in fp32 where |z| < 2^16,
            # so all that knows a softcap is used as it is. The price is the passes of a second loss.
            hot, _ = _logps(flat._replace(inv_temperature=flat.inv_temperature / HOT), summed, False)
            margin = margin + HOT * (hot - hot.detach())
        loss = loss + label_smoothing * margin
    loss = loss / by if summed else loss.reshape(targets.shape)
    if not return_metrics:
        return loss
    return loss, {"entropy": mean(found["entropy"], live), "mean_token_accuracy": mean(found["is_top1"], live)}


def _logps(flat: _head.FlatHead, summed: bool, with_outputs: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """(logps, summed or (M,), token outputs)."""
    way = way_of(flat, "token") if summed else Way(False)
    if way.swept:
        n = flat.targets.numel()
        group = torch.arange(n, device=flat.targets.device)
        return sweep(FN, flat, group, n, lambda index, outputs, first, last: outputs["logps"].sum())
    found = token_outputs(FN, flat, only_logps=not with_outputs, extra=way.extra)
    return found["logps"].sum() if summed else found["logps"], found
