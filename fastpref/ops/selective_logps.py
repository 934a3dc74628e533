"""Per-token log-probabilities from logits that already exist, as a differentiable op."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from fastpref import kernels
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
    backend: str | None = None,
) -> Tensor | LogPs:
    """log softmax(z)[target] of each token, z = softcap tanh(u / softcap) / temperature, u = logit_scale logits.

    No second copy of the logits in fp32: a block of rows at a time. The gradient is (N, V), in the dtype of logits.

    Args:
        logits: (..., V); bfloat16, float16 or float32 (float64: backend "reference" or "torch").
        targets: (...), integers in [0, V). At `ignore_index` logits are not read; the result and the gradient are 0.
        temperature: a number, or one per token, shaped like targets. No gradient.
        softcap, logit_scale, outputs, check_finite: as in linear_logps.
        backend: "torch" or "reference"; None: "torch".
    Returns:
        logps shaped like targets, float32; with `outputs` a LogPs. Differentiable once in logits.
    Raises:
        ValueError: shapes, devices or options do not fit, or a target is out of range.
        TypeError: a dtype is not supported.
    """
    fn = "selective_logps"
    _head.check_outputs(fn, outputs)
    _check.tensors(fn, logits=logits, targets=targets)
    if backend is not None and backend not in ("torch", "reference"):
        raise ValueError(f"{fn}: backend must be None, 'torch' or 'reference'; got {backend!r}")
    _check.floating(fn, (*_check.FLOATS, *((torch.float64,) if backend else ())), logits=logits)
    _check.integer(fn, targets=targets)
    _check.same_device(fn, logits=logits, targets=targets)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{fn}: logits must have at least one column, (..., V); got shape {tuple(logits.shape)}")
    if targets.shape != logits.shape[:-1]:
        wanted = tuple(logits.shape[:-1])
        raise ValueError(f"{fn}: targets must be {wanted}, logits (..., V) without V; got {tuple(targets.shape)}")
    _head.check_bending(fn, softcap, logit_scale)
    inv_temperature = _head.inverse(fn, temperature, logits, targets)
    flat = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1).long(), inv_temperature
    if backend == "reference":
        _kept(fn, *flat, ignore_index, check_finite)
        found = reference(*flat, softcap, logit_scale, ignore_index)
    else:
        tensors = _op(fn, *flat, softcap, logit_scale, ignore_index, check_finite)
        found = dict(zip(("logps", *_head.OUTPUTS), tensors, strict=True))
    wanted_outputs = {name: found[name].reshape(targets.shape) for name in ("logps", *outputs)}
    return LogPs(**wanted_outputs) if outputs else wanted_outputs["logps"]


def _kept(fn: str, logits: Tensor, targets: Tensor, inv_t: Tensor, ignore_index: int, check_finite: bool) -> Tensor:
    return _head.kept_index(fn, "logits", logits, logits.shape[1], targets, None, inv_t, ignore_index, check_finite)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    run = kernels.choose("selective_logps", logits.device.type)
    index = _kept(fn, logits, targets, inv_temperature, ignore_index, check_finite)
    return run.selective_logps(logits, targets, index, inv_temperature, softcap, logit_scale)


@_op.register_fake
def _(fn: str, logits: Tensor, targets: Tensor, *_: Any) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    out = [logits.new_empty(targets.shape, dtype=dtype) for _ in range(4)]
    return *out, logits.new_empty(targets.shape, dtype=torch.bool)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, logits, targets, inv_temperature, ctx.softcap, ctx.logit_scale, ctx.ignore_index, _ = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, inv_temperature, *output[:2])


@once_differentiable
def _backward(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None, *_: None) -> tuple[Any, ...]:
    logits, targets, inv_temperature, logps, entropy = ctx.saved_tensors
    if grad_logps is None and grad_entropy is None:
        return (None,) * 8
    if grad_logps is None:
        grad_logps = torch.zeros_like(logps)
    options = ctx.softcap, ctx.logit_scale, ctx.ignore_index
    found = _backward_op(grad_logps, grad_entropy, logits, targets, inv_temperature, logps, entropy, *options)
    return None, found, *(None,) * 6


@torch.library.custom_op("fastpref::selective_logps_backward", mutates_args=())
@_head.without_autocast
def _backward_op(
    grad_logps: Tensor,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    inv_temperature: Tensor,
    logps: Tensor,
    entropy: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
) -> Tensor:
    run = kernels.choose("selective_logps", logits.device.type)
    index = (targets != ignore_index).nonzero()[:, 0]
    given = grad_logps, grad_entropy, logits, targets, index, inv_temperature, softcap, logit_scale, logps, entropy
    return run.d_logits(*given)


@_backward_op.register_fake
def _(grad_logps: Tensor, grad_entropy: Any, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


_op.register_autograd(_backward, setup_context=_save)
