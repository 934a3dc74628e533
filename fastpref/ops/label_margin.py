"""How far a label's logit stands above the mean of its row: what label smoothing adds, without a pass of its own."""

from typing import Any

import torch
from torch import Tensor

from fastpref import kernels
from fastpref.kernels import chunks
from fastpref.kernels import head as driver
from fastpref.kernels.reference.label_margin import label_margin as reference
from fastpref.ops import _head
from fastpref.ops._once import once_differentiable

ROWS = 4096  # at a time


def label_margin(flat: _head.FlatHead, mean_logits: Tensor) -> Tensor:
    """(M,) z_y - mean_v z_v of the logits as used, given the means; 0 where the target is ignored.

    Differentiable once, through both terms, in hidden, weight and bias where there is no softcap (on the reference
    backend always): it is then linear,

        d / dx = s (w_y - mean_v w_v),    d / dw_v = s (1[v = y] - 1 / V) x,    s = logit_scale / temperature.
    """
    parameters, where = (flat.hidden, flat.weight, flat.bias), (flat.targets, flat.rows, flat.inv_temperature)
    bent = flat.softcap, flat.logit_scale, flat.ignore_index
    if flat.backend == "reference":
        with torch.autocast(flat.hidden.device.type, enabled=False):
            return reference(*parameters, *where, *bent, mean_logits)
    capped = flat.softcap is not None
    trained = (x.detach() if capped and x is not None else x for x in parameters)
    process_group = flat.group, flat.bounds
    return _op(*trained, *where, mean_logits.detach(), *bent, flat.workspace, flat.backend, *process_group)


@torch.library.custom_op("fastpref::label_margin", mutates_args=())
@_head.without_autocast
def _op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    inv_temperature: Tensor,
    mean_logits: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    workspace: int,
    backend: str | None,
    group: str | None,
    bounds: list[int],
) -> Tensor:
    run: Any = kernels.choose("head", hidden.device.type, backend)
    head = driver.Head(weight, bias, softcap, logit_scale, workspace, shard=_head.shard(group, bounds))
    problem = driver.Problem(hidden, head, targets, rows, inv_temperature)
    out = torch.zeros_like(mean_logits)
    for part in chunks.split((targets != ignore_index).nonzero()[:, 0], ROWS):
        z_y, _ = driver.label_logits(run, head, problem.gather(part))
        if head.shard is not None:
            z_y = head.shard.total(z_y)
        out[part] = (z_y - mean_logits[part].double()).to(out.dtype)
    return out


@_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Any, targets: Tensor, rows: Any, inv_temperature: Tensor, *_: Any
) -> Tensor:
    return torch.empty_like(inv_temperature)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, _, ctx.logit_scale, ctx.ignore_index, _, _, group, bounds = inputs
    ctx.where = group, bounds
    ctx.save_for_backward(*tensors)


@once_differentiable
def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    found = _backward_op(grad, *ctx.saved_tensors, ctx.logit_scale, ctx.ignore_index, *ctx.where, wanted)
    return (*(x if needed else None for x, needed in zip(found, wanted, strict=True)), *(None,) * 11)


@torch.library.custom_op("fastpref::label_margin_backward", mutates_args=())
@_head.without_autocast
def _backward_op(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    inv_temperature: Tensor,
    logit_scale: float,
    ignore_index: int,
    group: str | None,
    bounds: list[int],
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, rounded once; empty where not wanted."""
    index = ((targets != ignore_index) & (grad != 0)).nonzero()[:, 0]
    slope = grad * inv_temperature * logit_scale
    labels, which = targets[index].unique(return_inverse=True)
    shard, vocab_size = _head.shard(group, bounds), bounds[-1]
    # which labels are rows of this weight, and which rows; the others are another process's
    own, own_labels = (y if shard is None else shard.own(y) for y in (targets, labels))
    here = (own_labels >= 0).nonzero()[:, 0]
    of_hidden, of_weight, of_bias = hidden.new_empty(0), weight.new_empty(0), hidden.new_empty(0)
    if wanted[0]:
        of_hidden = slope.new_zeros(hidden.shape)
        slabs = weight.split(ROWS)
        mean = torch.stack([w.to(hidden.dtype).sum(0, dtype=torch.float64) for w in slabs]).sum(0) / vocab_size
        for part in chunks.split(index, ROWS):
            y = own[part, None]
            w_y = torch.where(y >= 0, weight[y[:, 0].clamp(min=0)].to(hidden.dtype), 0.0)
            above = (w_y - mean).to(slope.dtype)
            driver.add_in_order(of_hidden, part if rows is None else rows[part], slope[part, None] * above)
        if shard is not None:
            shard.add_over_ranks(of_hidden)
    if wanted[1]:
        at_labels = slope.new_zeros((labels.numel(), hidden.shape[1]), dtype=torch.float64)
        for part, at in zip(index.split(ROWS), which.split(ROWS), strict=True):
            x = hidden[part if rows is None else rows[part]]
            driver.add_in_order(at_labels, at, slope[part, None].double() * x)
        everywhere = at_labels.sum(0) / -vocab_size
        of_weight = everywhere.to(weight.dtype).expand_as(weight).clone(memory_format=torch.contiguous_format)
        of_weight[own_labels[here]] = at_labels[here].add_(everywhere).to(weight.dtype)
    if wanted[2] and bias is not None:
        at_labels = slope.new_zeros(labels.numel(), dtype=torch.float64)
        driver.add_in_order(at_labels, which, slope[index].double())
        of_bias = (at_labels.sum() / -vocab_size).repeat(weight.shape[0])
        of_bias[own_labels[here]] += at_labels[here]
    return of_hidden.to(hidden.dtype), of_weight, of_bias.to(hidden.dtype)


@_backward_op.register_fake
def _(grad: Tensor, hidden: Tensor, weight: Tensor, bias: Any, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if needed and x is not None else like.new_empty(0)
        for x, like, needed in zip((hidden, weight, bias), (hidden, weight, hidden), rest[-1], strict=True)
    )


_op.register_autograd(_backward, setup_context=_save)
