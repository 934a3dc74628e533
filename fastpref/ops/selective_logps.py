"""Per-token log-probabilities from logits that already exist, as a differentiable op."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from fastpref import kernels
from fastpref.kernels import head as driver
from fastpref.kernels.memory import huge_pages
from fastpref.kernels.reference.selective_logps import selective_logps as reference
from fastpref.ops import _check, _head
from fastpref.ops._once import once_differentiable
from fastpref.ops.linear_logps import LogPs


def selective_logps(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: Collection[str] = (),
    check_finite: bool = False,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Tensor | LogPs:
    """log softmax(z)[target] of each token, z = softcap tanh(u / softcap) / temperature, u = logit_scale logits.

    No copy of the logits in fp32. The gradient is (N, V), in the dtype of logits.

    Args:
        logits: (..., V); bfloat16, float16 or float32 (float64: backend "reference" or "torch").
        targets: (...), integers in [0, V). At `ignore_index` logits are not read; the result and the gradient are 0.
        temperature: a number, or one per token, shaped like targets. No gradient.
        softcap, logit_scale, outputs, check_finite: as in linear_logps.
        inplace_backward: the gradient is written over the logits, and no (N, V) allocated for it. The logits are lost
            then: whoever needs them after, as a second backward does, raises. They must be contiguous, and no leaf.
        backend: "cpu", "triton", "torch" or "reference"; None: the fastest here.
    Returns:
        logps shaped like targets, float32; with `outputs` a LogPs. Differentiable once in logits.
    Raises:
        ValueError: shapes, devices or options do not fit, a target is out of range, or logits cannot be overwritten.
        TypeError: a dtype is not supported.
    """
    fn = "selective_logps"
    _head.check_outputs(fn, outputs)
    _check.tensors(fn, logits=logits, targets=targets)
    if backend != "reference":
        _check.reverse_mode_only(fn, logits=logits)
    if backend is not None and backend not in _head.BACKENDS:
        raise ValueError(f"{fn}: backend must be None or one of {', '.join(_head.BACKENDS)}; got {backend!r}")
    eager = backend in ("reference", "torch")
    _check.floating(fn, _check.WIDE_FLOATS if eager else _check.FLOATS, logits=logits)
    _check.integer(fn, targets=targets)
    _check.same_device(fn, logits=logits, targets=targets)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{fn}: logits must have at least one column, (..., V); got shape {tuple(logits.shape)}")
    if targets.shape != logits.shape[:-1]:
        wanted = tuple(logits.shape[:-1])
        raise ValueError(f"{fn}: targets must be {wanted}, logits (..., V) without V; got {tuple(targets.shape)}")
    _head.check_bending(fn, softcap, logit_scale)
    if inplace_backward and torch.is_grad_enabled() and logits.requires_grad:
        _check_overwritable(fn, logits, backend)
    inv_temperature = _head.inverse(fn, temperature, logits, targets)
    rows, flat_targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1).long()
    if _head.unseen(logits.device, backend, check_finite):
        where = flat_targets, None, inv_temperature
        flat_targets, _, inv_temperature = _head.in_range(*where, ignore_index, rows.shape[1], rows.shape[0])
    flat = rows, flat_targets, inv_temperature
    if backend == "reference":
        _kept(fn, *flat, ignore_index, check_finite, backend)
        found = reference(*flat, softcap, logit_scale, ignore_index)
    else:
        *tensors, _ = _op(fn, *flat, softcap, logit_scale, ignore_index, check_finite, inplace_backward, backend)
        found = dict(zip(("logps", *_head.OUTPUTS), tensors, strict=True))
    wanted_outputs = {name: found[name].reshape(targets.shape) for name in ("logps", *outputs)}
    return LogPs(**wanted_outputs) if outputs else wanted_outputs["logps"]


def _check_overwritable(fn: str, logits: Tensor, backend: str | None) -> None:
    """Raises where writing the gradient over the logits would change what autograd's version counter does not guard."""
    wanted = f"{fn}: inplace_backward wants"
    if backend == "reference":
        raise ValueError(f"{wanted} a backend with a backward of its own; got 'reference'")
    if not logits.is_contiguous():
        raise ValueError(f"{wanted} contiguous logits; got strides {logits.stride()} of {tuple(logits.shape)}")
    base = logits if logits._base is None else logits._base
    if base.is_leaf:
        raise ValueError(
            f"{wanted} logits that were computed; got a leaf, or a view of one, which would be overwritten"
        )


def _kept(fn: str, logits: Tensor, targets: Tensor, inv_t: Tensor, *how: Any) -> Tensor:
    return _head.kept_index(fn, "logits", logits, logits.shape[1], targets, None, inv_t, *how)


@torch.library.custom_op("fastpref::selective_logps", mutates_args=())
@_head.without_autocast
def _op(
    fn: str,
    logits: Tensor,
    targets: Tensor,
    inv_temperature: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    check_finite: bool,
    inplace_backward: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logps, the extra outputs, and what a backward needs: a state (2, M)."""
    run = kernels.choose("selective_logps", logits.device.type, backend)
    index = None
    if check_finite or not run.STATIC:
        index = _kept(fn, logits, targets, inv_temperature, ignore_index, check_finite, backend)
    if run.STATIC:
        targets, inv_temperature = driver.switched_off(targets, inv_temperature, ignore_index)
    return run.selective_logps(logits, targets, index, inv_temperature, softcap, logit_scale)


@_op.register_fake
def _(fn: str, logits: Tensor, targets: Tensor, *_: Any) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    out = [logits.new_empty(targets.shape, dtype=dtype) for _ in range(4)]
    top1 = logits.new_empty(targets.shape, dtype=torch.bool)
    return *out, top1, logits.new_empty((2, *targets.shape), dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, logits, targets, inv_temperature, *ctx.options, _, ctx.inplace, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, inv_temperature, *output[:2], output[-1])


@once_differentiable
def _backward(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None, *_: None) -> tuple[Any, ...]:
    logits, targets, inv_temperature, logps, entropy, state = ctx.saved_tensors
    if grad_logps is None and grad_entropy is None:
        return (None,) * 10
    if grad_logps is None:
        grad_logps = torch.zeros_like(logps)
    # in place: the version counter of the logits tells whoever saved them
    out = logits.detach() if ctx.inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
    given = grad_logps, grad_entropy, logits, targets, inv_temperature, logps, entropy, state
    _backward_op(out, *given, *ctx.options, ctx.backend)
    return None, out, *(None,) * 8


@torch.library.custom_op("fastpref::selective_logps_backward", mutates_args=("out",))
@_head.without_autocast
def _backward_op(
    out: Tensor,
    grad_logps: Tensor,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    inv_temperature: Tensor,
    logps: Tensor,
    entropy: Tensor,
    state: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    backend: str | None,
) -> None:
    """The gradient into out, which is fresh memory or that of the logits."""
    run = kernels.choose("selective_logps", out.device.type, backend)
    if out.data_ptr() != logits.data_ptr():
        huge_pages(out)
    index = None
    if run.STATIC:
        targets, inv_temperature = driver.switched_off(targets, inv_temperature, ignore_index)
    else:
        index = (targets != ignore_index).nonzero()[:, 0]
    given = grad_logps, grad_entropy, logits, targets, index, inv_temperature, softcap, logit_scale
    run.d_logits(*given, logps, entropy, state, out)


@_backward_op.register_fake
def _(*_: Any) -> None:
    return None


_op.register_autograd(_backward, setup_context=_save)
