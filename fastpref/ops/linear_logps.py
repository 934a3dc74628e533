"""Per-token log-probabilities of a linear head as a differentiable op, without the logits."""

from collections.abc import Collection
from typing import Any, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor

from fastpref import kernels
from fastpref.kernels import chunks
from fastpref.kernels import head as driver
from fastpref.kernels.head_gradients import Gradients, Upstream, add_gradients
from fastpref.kernels.head_unit import unit_scores, unit_tile
from fastpref.kernels.memory import recycled
from fastpref.kernels.reference.linear_logps import linear_logps as reference
from fastpref.ops import _head
from fastpref.ops._once import once_differentiable


class LogPs(NamedTuple):
    """Shaped like targets, float32; 0 where the target is ignored. None: not asked for."""

    logps: Tensor
    entropy: Tensor | None = None  # of the whole distribution, nats; differentiable, as logps is
    log_sum_sq_probs: Tensor | None = None  # log sum_v p_v^2
    mean_logits: Tensor | None = None  # mean over v of the logits as used: scaled, capped, over the temperature
    is_top1: Tensor | None = None  # bool: no logit is above the target's


@overload
def linear_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, outputs: tuple[()] = ..., **options: Any
) -> Tensor: ...
@overload
def linear_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, outputs: Collection[str], **options: Any
) -> LogPs: ...
def linear_logps(  # type: ignore[misc]  # the options written out once, here
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: Collection[str] = (),
    rows: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    process_group: "dist.ProcessGroup | None" = None,
    workspace: int | None = None,
    max_extra_bytes: int | None = None,
    deterministic: bool = False,
    check_finite: bool = False,
    backend: str | None = None,
) -> Tensor | LogPs:
    """log softmax(z)[target] of each token: u = logit_scale (x . w + bias), z = softcap tanh(u / softcap) / T.

    The (N, V) logits never exist: a chunk of rows at a time, in fp32, at most `workspace` bytes.

    Args:
        hidden: (B, T, H), or packed (N, H); bfloat16, float16 or float32 (float64: backend "reference" or "torch").
            Row t predicts target t: shift before the call.
        weight: (V, H), as in nn.Linear; the dtype of hidden. Under autocast both are read in its dtype.
        targets: (B, T) or (N,), integers in [0, V). At `ignore_index` nothing is computed, hidden is not read
            (NaN allowed), the result is 0 and so is the gradient.
        bias: (V,).
        temperature: a number, or one per token, shaped like targets. No gradient.
        softcap: as in Gemma 2; None: off.
        outputs: any of "entropy", "log_sum_sq_probs", "mean_logits", "is_top1".
        rows: (M,) the row of packed hidden that predicts each of M targets: one row may serve several.
        cu_seqlens: (S + 1,) bounds of S sequences among the targets. No effect here; accepted as a head option.
        process_group: weight and bias are this process's rows of the vocabulary, in the order of the group's ranks, any
            number on each; hidden and targets are the same on all, and so are what is returned and hidden's gradient,
            the sum over the processes. Each tells the others two numbers a token and sweep, six with `outputs` (the
            Triton kernels four and eleven, for they do not wait to see which rows need scoring again). All must make
            the same calls. Not within torch.compile(fullgraph=True).
        workspace: bytes for the buffers of a chunk. None: 256 MiB on CPU, 1/32 of the memory of a GPU. On a CPU one
            buffer of at most 512 MiB stays for the next call.
        max_extra_bytes: no effect here, where no second copy of the weight's gradient is ever kept.
        deterministic: fixed GEMM blocks on the torch backend; the C++ kernels always have them.
        check_finite: refuse NaN or infinite hidden, and on CUDA check targets (this waits for the device).
        backend: "cpu", "triton", "torch" or "reference"; None: the fastest here.
    Returns:
        logps shaped like targets, float32; with `outputs` a LogPs. Differentiable once in hidden, weight and bias;
        a second derivative raises. Passes over the head: one without gradient; with a frozen head two, three if
        entropy is asked for; with a trained one three if all rows fit a chunk, else four.
    Raises:
        ValueError: shapes, devices or options do not fit, a target is out of range, or weight is a DTensor.
        TypeError: dtypes differ or are not supported.
    """
    _head.check_outputs("linear_logps", outputs)
    of_logits = bias, ignore_index, temperature, softcap, logit_scale, rows, cu_seqlens, process_group
    head = _head.HeadOptions(*of_logits, workspace, max_extra_bytes, deterministic, check_finite, backend)
    flat = _head.flatten("linear_logps", hidden, weight, targets, head)
    found = token_outputs("linear_logps", flat, entropy="entropy" in outputs, only_logps=not outputs)
    wanted = {name: found[name].reshape(targets.shape) for name in ("logps", *outputs)}
    return LogPs(**wanted) if outputs else wanted["logps"]


def token_outputs(
    fn: str, flat: _head.FlatHead, *, entropy: bool = False, only_logps: bool = False, extra: int = 0
) -> dict[str, Tensor]:
    """(M,) each: logps and every extra output; `entropy` says that its gradient may be asked for.

    A frozen head then keeps its chunk if it can, for dlogp/dhidden alone would have to be formed in vain. `only_logps`:
    the extra outputs are not read, and where the vocabulary is in parts they mean nothing. `extra`: bytes that the kept
    chunk may take beside the workspace.
    """
    hidden, weight, bias, targets, rows, inv_temperature, *options, _ = flat
    if flat.backend == "reference":
        where = targets, rows, inv_temperature, flat.ignore_index, flat.check_finite, flat.backend
        _head.kept_index(fn, "hidden", hidden, flat.vocab_size, *where)
        with torch.autocast(hidden.device.type, enabled=False):
            bent = flat.softcap, flat.logit_scale, flat.ignore_index
            return reference(hidden, weight, bias, targets, rows, inv_temperature, *bent)
    keep_rows, unit = 0, False
    if torch.is_grad_enabled():
        unit = hidden.requires_grad and not flat.trained and not entropy
        keeps = flat.trained or (entropy and hidden.requires_grad)
        keep_rows = (rows_of_one_chunk(flat, extra) or 0) if keeps else 0
    found = _op(fn, hidden, weight, bias, targets, rows, inv_temperature, *options, unit, keep_rows, not only_logps)
    return dict(zip(("logps", *_head.OUTPUTS), found, strict=False))


def rows_of_one_chunk(flat: _head.FlatHead, extra: int = 0) -> int | None:
    """Rows of a chunk that holds every live target; None: `workspace` and `extra` bytes have no room for it."""
    fits = chunks.chunk_tokens(flat.weight.shape[1], flat.most_rows, flat.hidden.dtype, flat.workspace, extra)
    count = flat.targets.numel()
    if not _head.recorded(flat.targets):
        # where counting waits for the device, only if all of the targets do not fit: it may save a pass
        run = kernels.choose("head", flat.targets.device.type, flat.backend)
        if count > fits or not (flat.targets.is_cuda or run.STATIC):
            count = int((flat.targets != flat.ignore_index).sum())
    return count if count <= fits else None


@torch.library.custom_op("fastpref::linear_logps", mutates_args=())
@_head.without_autocast
def _op(
    fn: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    inv_temperature: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    workspace: int,
    deterministic: bool,
    check_finite: bool,
    backend: str | None,
    group: str | None,
    bounds: list[int],
    unit_d_hidden: bool,
    keep_rows: int,
    all_sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logps, the extra outputs, and what a backward needs: a state (4, M), dlogp/dhidden (M, H), the stored chunk.

    The last two are empty unless asked for: dlogp/dhidden by unit_d_hidden (the head is frozen), the chunk by
    keep_rows (it holds all rows).
    """
    run = kernels.choose("head", hidden.device.type, backend)
    shard = _head.shard(group, bounds, all_sums)
    head = driver.Head(weight, bias, softcap, logit_scale, workspace, deterministic, shard)
    problem = driver.Problem(hidden, head, targets, rows, inv_temperature)
    if run.STATIC and not check_finite:
        index, problem = problem.live_first(ignore_index)
        index = index[:keep_rows] if keep_rows else index
    else:
        where = targets, rows, inv_temperature, ignore_index, check_finite, backend
        index = _head.kept_index(fn, "hidden", hidden, head.vocab_size, *where)
    dtype = chunks.accumulator(hidden.dtype)
    out = [hidden.new_zeros(targets.shape, dtype=dtype) for _ in _head.OUTPUTS]
    top1 = hidden.new_zeros(targets.shape, dtype=torch.bool)
    state = hidden.new_zeros((4, targets.numel()), dtype=dtype)
    unit = hidden.new_zeros((targets.numel() if unit_d_hidden else 0, hidden.shape[1]), dtype=dtype)
    kept = recycled(run.new_chunk(keep_rows, weight, hidden.dtype)) if keep_rows else hidden.new_empty(0)
    size = keep_rows or chunks.score_tokens(weight.shape[1], head.most_rows, workspace)
    if unit_d_hidden:
        _, size = unit_tile(weight.shape[1], head.most_rows, hidden.dtype, workspace, slabs=run.SLABS and shard is None)
    for part in chunks.evenly(index, size):
        rows_here = problem.gather(part)
        if unit_d_hidden:
            alone = driver.Problem(rows_here.x, head, problem.targets[part], None, rows_here.inv_temperature)
            scores, unit[part] = unit_scores(run, alone)
        else:
            scores = driver.score(run, head, rows_here, kept if keep_rows else None)
        if problem.masked:
            scores = scores.where(rows_here.inv_temperature != 0)
        state[:, part] = torch.stack((scores.anchor, scores.label_d, scores.rest, scores.mean_d))
        for full, name in zip((*out, top1), ("logps", *_head.OUTPUTS), strict=True):
            full[part] = getattr(scores, name)
    if unit_d_hidden:
        head.add_over_ranks(unit)
    return *out, top1, state, unit, kept  # type: ignore[return-value]


@_op.register_fake
def _(fn: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, backend, _, _, unit_d_hidden, keep_rows, _ = rest
    dtype = chunks.accumulator(hidden.dtype)
    out = [hidden.new_empty(targets.shape, dtype=dtype) for _ in _head.OUTPUTS]
    top1 = hidden.new_empty(targets.shape, dtype=torch.bool)
    state = hidden.new_empty((4, targets.shape[0]), dtype=dtype)
    unit = hidden.new_empty((targets.shape[0] if unit_d_hidden else 0, hidden.shape[1]), dtype=dtype)
    run = kernels.choose("head", hidden.device.type, backend)
    return *out, top1, state, unit, run.new_chunk(keep_rows, weight, hidden.dtype) if keep_rows else hidden.new_empty(0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, hidden, weight, bias, targets, rows, inv_temperature, *options, ctx.unit_d_hidden, ctx.keep_rows, _ = inputs
    ctx.softcap, ctx.logit_scale, ctx.ignore_index, ctx.workspace, ctx.deterministic, _, *ctx.where = options
    logps, entropy, *_, state, unit, kept = output
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, targets, rows, inv_temperature, logps, entropy, state, unit, kept)


@once_differentiable
def _backward(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None, *_: None) -> tuple[Any, ...]:
    hidden, weight, bias, targets, rows, inv_temperature, logps, entropy, state, unit, kept = ctx.saved_tensors
    no_gradient = (None,) * 15  # of the other arguments
    if grad_logps is None and grad_entropy is None:
        return None, None, None, None, *no_gradient
    if grad_logps is None:
        grad_logps = torch.zeros_like(logps)
    if ctx.unit_d_hidden and grad_entropy is None:
        live = (targets != ctx.ignore_index) & (grad_logps != 0)
        return None, _scale_unit(unit, grad_logps, live, rows, hidden), None, None, *no_gradient
    wanted = [ctx.needs_input_grad[i] for i in (1, 2, 3)]
    found = _backward_op(
        grad_logps,
        grad_entropy,
        hidden,
        weight,
        bias,
        targets,
        rows,
        inv_temperature,
        logps,
        entropy,
        state,
        kept if ctx.keep_rows else None,
        ctx.softcap,
        ctx.logit_scale,
        ctx.ignore_index,
        ctx.workspace,
        ctx.deterministic,
        *ctx.where,
        wanted,
    )
    of_inputs = (gradient if needed else None for gradient, needed in zip(found, wanted, strict=True))
    return None, *of_inputs, *no_gradient


def _scale_unit(unit: Tensor, grad_logps: Tensor, live: Tensor, rows: Tensor | None, hidden: Tensor) -> Tensor:
    """dL/dhidden: the rows of dlogp/dhidden scaled, and added up where one row of hidden serves several targets."""
    scaled = torch.where(live[:, None], unit * grad_logps[:, None], 0.0)  # 0 times NaN is NaN
    if rows is not None:
        total = scaled.new_zeros(hidden.shape)  # of scaled, which vmap may have given a dimension more
        driver.add_in_order(total, rows, scaled)
        scaled = total
    return scaled.to(hidden.dtype)


@torch.library.custom_op("fastpref::linear_logps_backward", mutates_args=())
@_head.without_autocast
def _backward_op(
    grad_logps: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    inv_temperature: Tensor,
    logps: Tensor,
    entropy: Tensor,
    state: Tensor,
    chunk: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    workspace: int,
    deterministic: bool,
    backend: str | None,
    group: str | None,
    bounds: list[int],
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; empty where not wanted. From the stored chunk if there is one."""
    run = kernels.choose("head", hidden.device.type, backend)
    head = driver.Head(weight, bias, softcap, logit_scale, workspace, deterministic, _head.shard(group, bounds))
    problem = driver.Problem(hidden, head, targets, rows, inv_temperature)
    if run.STATIC:
        index, problem = problem.live_first(ignore_index)
        index = index if chunk is None else index[: chunk.shape[run.TOKEN_DIM]]
    else:
        index = (targets != ignore_index).nonzero()[:, 0]
    anchor, label_d, rest, mean_d = state[:, index]
    unused = logps.new_empty(0).expand(index.numel(), 0)
    scores = driver.Scores(anchor, label_d, rest, mean_d, logps[index], entropy[index], unused, unused, unused)
    upstream = Upstream(grad_logps[index], None if grad_entropy is None else grad_entropy[index])
    if problem.masked:
        upstream = upstream.where(problem.inv_temperature[index] != 0)
    found = Gradients.begun(problem, wanted, once=True)
    add_gradients(run, problem, index, scores, upstream, found, chunk)
    found.finish()
    head.add_over_ranks(found.hidden)
    pairs = (found.hidden, hidden), (found.weight, weight), (found.bias, bias)
    return tuple(hidden.new_empty(0) if x is None else x.to(of.dtype) for x, of in pairs)  # type: ignore


@_backward_op.register_fake
def _(
    grad_logps: Tensor, grad_entropy: Any, hidden: Tensor, weight: Tensor, bias: Any, *rest: Any
) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if needed and x is not None else hidden.new_empty(0)
        for x, needed in zip((hidden, weight, bias), rest[-1], strict=True)
    )


_op.register_autograd(_backward, setup_context=_save)
