"""A loss on the log-probs of a trained head in three passes, where its rows do not fit one chunk.

A chunk holds whole groups of rows: tokens, sequences or pairs, whatever a term of the loss depends on. A group's
log-probs give its slopes g = dL/dlogp, h = dL/dentropy, and its gradients are formed in forward, before the next group
overwrites the chunk; kept are dL/dhidden and dL/dweight in fp32, multiplied in backward by the upstream factor. Of a
group larger than a chunk the first rows are scored twice: one more pass for them.

Where the exponentials of all rows take no more than a chunk and that fp32 copy of dL/dweight, linear_logps keeps them
instead: nothing is added up over chunks, and dL/dweight is rounded as it is formed.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref import kernels
from fastpref.heads.plan import why_not_in_forward
from fastpref.kernels import chunks
from fastpref.kernels import head as driver
from fastpref.kernels.head_gradients import Gradients, Upstream, add_gradients
from fastpref.kernels.memory import huge_pages, recycled
from fastpref.kernels.shard import Shard
from fastpref.ops import _head
from fastpref.ops._once import once_differentiable
from fastpref.ops.linear_logps import rows_of_one_chunk

# (index into the targets, their logps, entropy and other outputs, first group, last group + 1) -> the loss of these
# groups, a sum; differentiable in logps and entropy
GroupLoss = Callable[[Tensor, dict[str, Tensor], int, int], Tensor]


class Way(NamedTuple):
    """How a loss that is summed goes through the head."""

    swept: bool  # by `sweep`; else it stands on linear_logps
    extra: int = 0  # bytes of exponentials that linear_logps may then keep beside the workspace


def way_of(flat: _head.FlatHead, couples: str, *, frozen_too: bool = False) -> Way:
    """Not swept: in one chunk, where all rows are coupled, where an fp32 copy of the weight's gradient has no room or
    does not pay, under torch.compile and in a CUDA graph.

    Nor with a frozen head, unless `frozen_too`: swept, a gradient of entropy costs no pass more, and tokens without a
    gradient cost none after the first.
    """
    if flat.backend == "reference" or _head.recorded(flat.targets):
        return Way(False)
    if not flat.trained:
        return Way(frozen_too and torch.is_grad_enabled() and flat.hidden.requires_grad)
    if rows_of_one_chunk(flat) is not None:
        return Way(False)
    hidden_size = flat.weight.shape[1]
    rows = chunks.chunk_tokens(hidden_size, flat.most_rows, flat.hidden.dtype, flat.workspace)
    copy = flat.most_rows * hidden_size * flat.inv_temperature.itemsize if flat.weight.requires_grad else 0
    if why_not_in_forward(couples, rows, copy, flat.max_extra_bytes) is not None:
        return Way(False)
    return Way(True) if rows_of_one_chunk(flat, copy) is None else Way(False, copy)


def sweep(
    fn: str, flat: _head.FlatHead, group: Tensor, n_groups: int, loss_of: GroupLoss
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, token outputs (M,) each). `group` (M,): the rows of one group are scored together.

    `loss_of` is called once a chunk, for a run of whole groups; a group without rows is in one of the runs.
    Differentiable in hidden, weight and bias, through the loss and through logps and entropy of the outputs.
    """
    index = _head.kept_index(
        fn,
        "hidden",
        flat.hidden,
        flat.vocab_size,
        flat.targets,
        flat.rows,
        flat.inv_temperature,
        flat.ignore_index,
        flat.check_finite,
        flat.backend,
    )
    capacity = chunks.chunk_tokens(flat.weight.shape[1], flat.most_rows, flat.hidden.dtype, flat.workspace)
    tensors = flat.hidden, flat.weight, flat.bias, flat.targets, flat.rows, flat.inv_temperature
    shard = _head.shard(flat.group, flat.bounds)
    form = _Form(flat.softcap, flat.logit_scale, flat.deterministic, flat.backend, flat.workspace, capacity, shard)
    runs = list(_runs_of_groups(index, group, n_groups, capacity))
    loss, *outputs = _Sweep.apply(*tensors, runs, form, partial(_slopes, fn, loss_of))
    return loss, dict(zip(("logps", *_head.OUTPUTS), outputs, strict=True))


class _Form(NamedTuple):
    """What is not a tensor."""

    softcap: float | None
    logit_scale: float
    deterministic: bool
    backend: str | None
    workspace: int
    capacity: int  # rows of a chunk
    shard: Shard | None

    def problem(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: Tensor | None,
        inv_temperature: Tensor,
    ) -> tuple[driver.Kernels, driver.Problem]:
        head = driver.Head(weight, bias, self.softcap, self.logit_scale, self.workspace, self.deterministic, self.shard)
        run: Any = kernels.choose("head", hidden.device.type, self.backend)
        return run, driver.Problem(hidden, head, targets, rows, inv_temperature)


class _Sweep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *tensors, runs, form, slopes_of = arguments
        run, problem = form.problem(*tensors)
        gradients = Gradients.begun(problem, ctx.needs_input_grad[:3])
        loss = problem.inv_temperature.new_zeros(())
        found = []
        with torch.autocast(problem.hidden.device.type, enabled=False):
            for index, first, last in runs:
                before, kept = index[: -form.capacity], index[-form.capacity :]
                parts = chunks.split(before, form.capacity)
                scored = [driver.score(run, problem.head, problem.gather(part)) for part in parts]
                chunk = recycled(run.new_chunk(kept.numel(), problem.head.weight, problem.hidden.dtype))
                scored.append(driver.score(run, problem.head, problem.gather(kept), chunk))
                scores = driver.Scores(*(torch.cat(some) for some in zip(*scored, strict=True)))
                total, upstream = slopes_of(index, scores, first, last)
                loss += total
                found.append(scores)
                late = slice(before.numel(), None)
                add_gradients(run, problem, kept, scores.at(late), upstream.at(late), gradients, chunk)
                del chunk  # before the next one is made
                if before.numel():
                    early = slice(before.numel())
                    add_gradients(run, problem, before, scores.at(early), upstream.at(early), gradients)
        gradients.finish()
        problem.head.add_over_ranks(gradients.hidden)
        indices = [index for index, _, _ in runs]
        every = driver.Scores(*(torch.cat(some) for some in zip(*found, strict=True)))
        ctx.form = form
        ctx.save_for_backward(*tensors, torch.cat(indices), gradients.hidden, gradients.weight, gradients.bias, *every)
        return loss, *_outputs(ctx, problem, indices, found)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_loss: Tensor | None, grad_logps: Tensor | None, grad_entropy: Tensor | None, *_: None
    ) -> tuple[Any, ...]:
        hidden, weight, bias, targets, rows, inv_temperature, index, d_hidden, d_weight, d_bias, *scored = (
            ctx.saved_tensors
        )
        extra = Gradients(None, None, None)
        if grad_logps is not None or grad_entropy is not None:
            run, problem = ctx.form.problem(hidden, weight, bias, targets, rows, inv_temperature)
            extra = Gradients.begun(problem, ctx.needs_input_grad[:3])
            scores = driver.Scores(*scored)
            of_logps = torch.zeros_like(scores.logps) if grad_logps is None else grad_logps[index]
            upstream = Upstream(of_logps, None if grad_entropy is None else grad_entropy[index])
            with torch.autocast(hidden.device.type, enabled=False):
                add_gradients(run, problem, index, scores, upstream, extra)
            extra.finish()
            problem.head.add_over_ranks(extra.hidden)
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
    ctx.mark_non_differentiable(*out[2:])
    return out


def _slopes(
    fn: str, loss_of: GroupLoss, index: Tensor, scores: driver.Scores, first: int, last: int
) -> tuple[Tensor, Upstream]:
    """(loss, its slopes) of the groups first to last - 1, whose targets are at `index`."""
    # a graph of its own: hooks on saved tensors, such as a checkpoint's, are for the graph around it
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
        outputs = {name: getattr(scores, name).detach() for name in ("logps", *_head.OUTPUTS)}
        leaves = outputs["logps"].requires_grad_(), outputs["entropy"].requires_grad_()
        loss = loss_of(index, outputs, first, last)
        if not loss.requires_grad:  # a loss of nothing that is trained
            return loss, Upstream(torch.zeros_like(scores.logps), None)
        _refuse_learnable(fn, loss, leaves)
        of_logps, of_entropy = torch.autograd.grad(loss, leaves, allow_unused=True)
    return loss.detach(), Upstream(torch.zeros_like(scores.logps) if of_logps is None else of_logps, of_entropy)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def summed(fn: str, losses: Tensor, outputs: dict[str, Tensor]) -> Tensor:
    """The sum of losses that stand on linear_logps, whose `outputs` these are; refuses what a sweep refuses."""
    loss = losses.sum()
    if not torch.compiler.is_compiling():
        _refuse_learnable(fn, loss, (outputs["logps"], outputs["entropy"]))
    return loss


def _refuse_learnable(fn: str, loss: Tensor, leaves: tuple[Tensor, ...]) -> None:
    """Raises if something beside `leaves` would get a gradient from this graph: of a sweep it would get none."""
    seen, ahead = {x.grad_fn for x in leaves}, [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and not any(leaf is known for known in leaves):
            raise ValueError(
                f"{fn}: the loss must depend on nothing learnable but the log-probs; got a tensor of shape "
                f'{tuple(leaf.shape)} that requires grad: use reduction="none", or linear_logps and your loss on it'
            )
        ahead.extend(next_node for next_node, _ in node.next_functions)


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
    out = huge_pages(torch.empty(formed.shape, dtype=dtype, device=formed.device))
    for first in range(0, formed.shape[0], 4096):
        slab = slice(first, first + 4096)
        if factor is None:
            out[slab] = extra[slab]  # type: ignore[index]
        else:
            out[slab] = formed[slab] * factor if extra is None else formed[slab] * factor + extra[slab]
    return out
