"""A loss on the log-probs of a trained head in three passes: what scored a row gives its gradient, too.

Where all rows fit one chunk, the chunk is kept, and backward forms both gradient products from it, once the upstream
factor is known. Where they do not, a chunk holds whole groups of rows (pairs; the whole batch for a loss that couples
it): a group's log-probs give its slopes g = dL/dlogp, and its gradients are formed in forward, before the next group
overwrites the chunk; kept are dL/dhidden and dL/dweight in fp32, multiplied in backward by the upstream factor. A group
larger than a chunk is scored, and then scored again in pieces: one more pass for its rows.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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
    vocab_size, hidden_size = flat.weight.shape
    capacity = driver.chunk_tokens(hidden_size, vocab_size, flat.weight.dtype, flat.workspace)
    rest = flat.targets, flat.rows, flat.inv_temperature
    form = _Form(flat.softcap, flat.logit_scale, flat.deterministic, flat.backend, flat.workspace, capacity)
    function = _OneChunk if index.numel() <= capacity else _ManyChunks
    loss, *outputs = function.apply(flat.hidden, flat.weight, flat.bias, *rest, index, group, form, slopes)
    return loss, dict(zip(("logps", *_head.OUTPUTS), outputs, strict=True))


class _Form(NamedTuple):
    """What is not a tensor."""

    softcap: float | None
    logit_scale: float
    deterministic: bool
    backend: str | None
    workspace: int
    capacity: int  # rows of a chunk

    def problem(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: Tensor | None,
        inv_temperature: Tensor,
    ) -> tuple[driver.Kernels, driver.Problem]:
        head = driver.Head(weight, bias, self.softcap, self.logit_scale, self.deterministic)
        run: Any = kernels.choose("head", hidden.device.type, self.backend)
        return run, driver.Problem(hidden, head, targets, rows, inv_temperature)


class _OneChunk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *tensors, index, _, form, slopes = arguments
        run, problem = form.problem(*tensors)
        with torch.autocast(problem.hidden.device.type, enabled=False):
            chunk = run.new_chunk(index.numel(), problem.head.weight)
            scores = driver.score(run, problem.head, problem.gather(index), chunk)
            loss, slope = slopes(index, scores)
        ctx.form = form
        ctx.save_for_backward(*tensors, index, chunk, slope, *scores)
        return loss, *_outputs(ctx, problem, [index], [scores])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, grad_logps: Tensor | None, *_: None) -> tuple[Any, ...]:
        *tensors, index, chunk, slope = ctx.saved_tensors[:9]
        run, problem = ctx.form.problem(*tensors)
        scores = driver.Scores(*ctx.saved_tensors[9:])
        upstream = torch.zeros_like(slope) if grad_loss is None else grad_loss * slope
        if grad_logps is not None:
            upstream = upstream + grad_logps[index]
        with torch.autocast(problem.hidden.device.type, enabled=False):
            wanted = ctx.needs_input_grad[:3]
            found = driver.gradients_of_chunk(
                run, problem, index, scores, driver.Upstream(upstream, None), chunk, *wanted
            )
        return (*found, *(None,) * 7)


class _ManyChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *tensors, index, group, form, slopes = arguments
        run, problem = form.problem(*tensors)
        gradients = driver.Gradients.zeros(problem, *ctx.needs_input_grad[:3])
        loss = problem.inv_temperature.new_zeros(())
        parts, found = [], []
        with torch.autocast(problem.hidden.device.type, enabled=False):
            for part in _whole_groups(index, group, form.capacity):
                fits = part.numel() <= form.capacity
                chunk = run.new_chunk(part.numel(), problem.head.weight) if fits else None
                pieces = driver.split(part, form.capacity)
                scored = [driver.score(run, problem.head, problem.gather(piece), chunk) for piece in pieces]
                scores = driver.Scores(*(torch.cat(some) for some in zip(*scored, strict=True)))
                total, slope = slopes(part, scores)
                loss += total
                if chunk is not None:
                    gradients.add(run, problem, part, scores, driver.Upstream(slope, None), chunk)
                else:
                    upstream = driver.Upstream(slope, None)
                    driver.backward(run, problem, part, scores, upstream, gradients, form.workspace)
                parts.append(part)
                found.append(scores)
        ctx.form = form
        order, scores = torch.cat(parts), driver.Scores(*(torch.cat(some) for some in zip(*found, strict=True)))
        ctx.save_for_backward(*tensors, order, gradients.hidden, gradients.weight, gradients.bias, *scores)
        return loss, *_outputs(ctx, problem, parts, found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, grad_logps: Tensor | None, *_: None) -> tuple[Any, ...]:
        *tensors, index, d_hidden, d_weight, d_bias = ctx.saved_tensors[:10]
        run, problem = ctx.form.problem(*tensors)
        extra = driver.Gradients(None, None, None)
        if grad_logps is not None:
            extra = driver.Gradients.zeros(problem, *ctx.needs_input_grad[:3])
            scores, upstream = driver.Scores(*ctx.saved_tensors[10:]), driver.Upstream(grad_logps[index], None)
            with torch.autocast(problem.hidden.device.type, enabled=False):
                driver.backward(run, problem, index, scores, upstream, extra, ctx.form.workspace)
        dtype = problem.hidden.dtype
        both = ((d_hidden, extra.hidden), (d_weight, extra.weight), (d_bias, extra.bias))
        return (*(_combine(formed, grad_loss, more, dtype) for formed, more in both), *(None,) * 7)


def _outputs(ctx: Any, problem: driver.Problem, parts: list[Tensor], found: list[driver.Scores]) -> list[Tensor]:
    """(M,) each: logps and the extra outputs, zero where nothing was scored."""
    ctx.set_materialize_grads(False)
    out = []
    for name in ("logps", *_head.OUTPUTS):
        dtype = torch.bool if name == "is_top1" else problem.inv_temperature.dtype
        out.append(torch.zeros(problem.targets.shape, dtype=dtype, device=problem.targets.device))
        for part, scores in zip(parts, found, strict=True):
            out[-1][part] = getattr(scores, name)
    ctx.mark_non_differentiable(*out[1:])
    return out


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
