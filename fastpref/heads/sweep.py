"""A loss on the log-probs of a trained head in three passes, where its rows do not fit one chunk.

A chunk holds whole groups of rows (pairs). A group's log-probs give its slopes g = dL/dlogp, and its gradients are
formed in forward, before the next group overwrites the chunk; kept are dL/dhidden and dL/dweight in fp32, multiplied
in backward by the upstream factor. A group larger than a chunk is scored, and then scored again in pieces: one more
pass for its rows.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref import kernels
from fastpref.kernels import head as driver
from fastpref.kernels.head_gradients import Gradients, Upstream, add_gradients
from fastpref.ops import _head
from fastpref.ops._once import once_differentiable

# (index into the targets, their Scores, first group, last group + 1) -> (sum of the losses of these groups, dL/dlogps)
Slopes = Callable[[Tensor, driver.Scores, int, int], tuple[Tensor, Tensor]]


def sweep(
    fn: str, flat: _head.FlatHead, group: Tensor, n_groups: int, slopes: Slopes
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, token outputs (M,) each). `group` (M,): the rows of one group are scored together.

    `slopes` is called once a chunk, for a run of whole groups; a group without rows is in one of the runs.
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
    capacity = driver.chunk_tokens(hidden_size, vocab_size, flat.hidden.dtype, flat.workspace)
    tensors = flat.hidden, flat.weight, flat.bias, flat.targets, flat.rows, flat.inv_temperature
    form = _Form(flat.softcap, flat.logit_scale, flat.deterministic, flat.backend, flat.workspace, capacity)
    runs = list(_runs_of_groups(index, group, n_groups, capacity))
    loss, *outputs = _Sweep.apply(*tensors, runs, form, slopes)
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
        head = driver.Head(weight, bias, self.softcap, self.logit_scale, self.workspace, self.deterministic)
        run: Any = kernels.choose("head", hidden.device.type, self.backend)
        return run, driver.Problem(hidden, head, targets, rows, inv_temperature)


class _Sweep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *tensors, runs, form, slopes = arguments
        run, problem = form.problem(*tensors)
        gradients = Gradients.zeros(problem, ctx.needs_input_grad[:3])
        loss = problem.inv_temperature.new_zeros(())
        found = []
        with torch.autocast(problem.hidden.device.type, enabled=False):
            for index, first, last in runs:
                fits = index.numel() <= form.capacity
                chunk = run.new_chunk(index.numel(), problem.head.weight, problem.hidden.dtype) if fits else None
                pieces = index.split(form.capacity)
                scored = [driver.score(run, problem.head, problem.gather(piece), chunk) for piece in pieces]
                scores = driver.Scores(*(torch.cat(some) for some in zip(*scored, strict=True)))
                total, slope = slopes(index, scores, first, last)
                loss += total
                add_gradients(run, problem, index, scores, Upstream(slope, None), gradients, chunk)
                found.append(scores)
                del chunk  # before the next one is made
        parts = [index for index, _, _ in runs]
        every = driver.Scores(*(torch.cat(some) for some in zip(*found, strict=True)))
        ctx.form = form
        ctx.save_for_backward(*tensors, torch.cat(parts), gradients.hidden, gradients.weight, gradients.bias, *every)
        return loss, *_outputs(ctx, problem, parts, found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, grad_logps: Tensor | None, *_: None) -> tuple[Any, ...]:
        hidden, weight, bias, targets, rows, inv_temperature, index, d_hidden, d_weight, d_bias, *scored = (
            ctx.saved_tensors
        )
        extra = Gradients(None, None, None)
        if grad_logps is not None:
            run, problem = ctx.form.problem(hidden, weight, bias, targets, rows, inv_temperature)
            extra = Gradients.zeros(problem, ctx.needs_input_grad[:3])
            scores, upstream = driver.Scores(*scored), Upstream(grad_logps[index], None)
            with torch.autocast(hidden.device.type, enabled=False):
                add_gradients(run, problem, index, scores, upstream, extra)
        of_hidden = _combine(d_hidden, grad_loss, extra.hidden, hidden.dtype)
        of_weight = _combine(d_weight, grad_loss, extra.weight, weight.dtype)
        return of_hidden, of_weight, _combine(d_bias, grad_loss, extra.bias, hidden.dtype), *(None,) * 6


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


def _runs_of_groups(index: Tensor, group: Tensor, n_groups: int, capacity: int) -> Iterator[tuple[Tensor, int, int]]:
    """(rows of `index`, first group, last group + 1): runs that fit `capacity`, or one group that does not."""
    of_row = group[index]
    rows = index[torch.argsort(of_row, stable=True)]
    start = first = taken = 0
    for number, count in enumerate(torch.bincount(of_row, minlength=n_groups).tolist()):
        if taken and taken + count > capacity:
            yield rows[start : start + taken], first, number
            start, first, taken = start + taken, number, 0
        taken += count
    yield rows[start:], first, n_groups


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
