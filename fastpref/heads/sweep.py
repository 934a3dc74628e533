"""A loss on the log-probs of a trained head in three passes: its gradients are formed in forward, chunk by chunk.

A chunk holds whole groups of rows (pairs; the whole batch for a loss that couples it). Once a group's log-probs are
known, so are its slopes g = dL/dlogp, and the stored chunk gives both gradient products before the next overwrites it.
What is kept for backward are dL/dhidden and dL/dweight in fp32, multiplied there by the upstream factor. A group
larger than a chunk is scored, and then scored again in pieces: one more pass for its rows.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastpref import kernels
from fastpref.kernels import head as driver
from fastpref.ops import _head
from fastpref.ops._once import once_differentiable

# (index into the targets, their Scores) -> (sum of the group's losses, dL/dlogps); called once a chunk of whole groups
Slopes = Callable[[Tensor, driver.Scores], tuple[Tensor, Tensor]]


def sweep(fn: str, flat: _head.FlatHead, group: Tensor, slopes: Slopes) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, token outputs (M,) each). `group` (M,): rows of one group are scored together.

    Differentiable in hidden, weight and bias, through the loss and through the outputs' logps.
    """
    loss, *outputs = _Sweep.apply(flat.hidden, flat.weight, flat.bias, fn, flat, group, slopes)
    return loss, dict(zip(("logps", *_head.OUTPUTS), outputs, strict=True))


class _Sweep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        fn: str,
        flat: _head.FlatHead,
        group: Tensor,
        slopes: Slopes,
    ) -> tuple[Tensor, ...]:
        run = kernels.choose("head", hidden.device.type, flat.backend)
        # detached: a saved Problem must not hold the graph that made its inputs
        flat = flat._replace(
            hidden=hidden.detach(), weight=weight.detach(), bias=None if bias is None else bias.detach()
        )
        problem = _problem(flat)
        with torch.autocast(hidden.device.type, enabled=False):
            index = _head.kept_index(
                fn,
                "hidden",
                flat.hidden,
                flat.weight.shape[0],
                flat.targets,
                flat.rows,
                flat.inv_temperature,
                flat.ignore_index,
                flat.check_finite,
            )
            gradients = driver.Gradients.zeros(problem, *ctx.needs_input_grad[:3])
            dtype = driver.accumulator(hidden.dtype)
            full = driver.Scores(*(hidden.new_zeros(flat.targets.shape, dtype=dtype) for _ in range(8)))
            full = full._replace(is_top1=full.is_top1.bool())
            loss = hidden.new_zeros((), dtype=dtype)
            capacity = driver.chunk_tokens(weight.shape[1], weight.shape[0], weight.dtype, flat.workspace)
            for part in _whole_groups(index, group, capacity):
                fits = part.numel() <= capacity
                chunk = run.new_chunk(part.numel(), weight) if fits else None
                pieces = [
                    driver.score(run, problem.head, problem.gather(i), chunk) for i in driver.split(part, capacity)
                ]
                scores = driver.Scores(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))
                total, slope = slopes(part, scores)
                loss += total
                upstream = driver.Upstream(slope, None)
                if chunk is not None:
                    gradients.add(run, problem, part, scores, upstream, chunk)
                else:
                    driver.backward(run, problem, part, scores, upstream, gradients, flat.workspace)
                for whole, some in zip(full, scores, strict=True):
                    whole[part] = some
        ctx.save_for_backward(
            flat.hidden, flat.weight, flat.bias, gradients.hidden, gradients.weight, gradients.bias, *full, index
        )
        # the tensors come back from saved_tensors
        ctx.flat = flat._replace(hidden=index, weight=index, bias=None)
        ctx.set_materialize_grads(False)
        outputs = (full.logps, full.entropy, full.log_sum_sq_probs, full.mean_logits, full.is_top1)
        ctx.mark_non_differentiable(*outputs[1:])
        return loss, *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, grad_logps: Tensor | None, *_: None) -> tuple[Any, ...]:
        hidden, weight, bias, *rest = ctx.saved_tensors
        formed, full, index = rest[:3], driver.Scores(*rest[3:11]), rest[11]
        flat = ctx.flat._replace(hidden=hidden, weight=weight, bias=bias)
        extra: list[Tensor | None] = [None, None, None]
        if grad_logps is not None:
            problem, run = _problem(flat), kernels.choose("head", hidden.device.type, flat.backend)
            gradients = driver.Gradients.zeros(problem, *ctx.needs_input_grad[:3])
            scores = driver.Scores(*(x[index] for x in full))
            with torch.autocast(hidden.device.type, enabled=False):
                upstream = driver.Upstream(grad_logps[index], None)
                driver.backward(run, problem, index, scores, upstream, gradients, flat.workspace)
            extra = [gradients.hidden, gradients.weight, gradients.bias]
        dtype = hidden.dtype
        found = [_combine(a, grad_loss, b, dtype) for a, b in zip(formed, extra, strict=True)]
        return (*found, None, None, None, None)


def _problem(flat: _head.FlatHead) -> driver.Problem:
    head = driver.Head(flat.weight, flat.bias, flat.softcap, flat.logit_scale, flat.deterministic)
    return driver.Problem(flat.hidden, head, flat.targets, flat.rows, flat.inv_temperature)


def _whole_groups(index: Tensor, group: Tensor, capacity: int) -> Iterator[Tensor]:
    """`index` in parts of whole groups, each as long as fits `capacity`, or one group that does not."""
    of_row = group[index]
    order = torch.argsort(of_row, stable=True)
    _, counts = torch.unique_consecutive(of_row[order], return_counts=True)
    taken = first = 0
    for count in counts.tolist():
        if taken and taken + count > capacity:
            yield index[order[first : first + taken]]
            first, taken = first + taken, 0
        taken += count
    if taken:
        yield index[order[first : first + taken]]


def _combine(formed: Tensor | None, factor: Tensor | None, extra: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """formed * factor + extra, rounded once, a slab at a time: no second copy in fp32."""
    if formed is None or (factor is None and extra is None):
        return None
    out = torch.empty(formed.shape, dtype=dtype, device=formed.device)
    for first in range(0, formed.shape[0], 4096):
        slab = slice(first, first + 4096)
        if factor is None:
            out[slab] = extra[slab]  # type: ignore[index]
        else:
            out[slab] = formed[slab] * factor if extra is None else formed[slab] * factor + extra[slab]
    return out
