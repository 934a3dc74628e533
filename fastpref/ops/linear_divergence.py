"""Per-token divergence between two linear heads over the full vocabulary, as a differentiable op."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastpref import kernels
from fastpref.kernels.chunks import default_workspace, most_rows
from fastpref.kernels.divergence import Form, Side
from fastpref.kernels.reference.linear_divergence import linear_divergence as reference
from fastpref.kernels.shard import agree
from fastpref.ops import _check, _head
from fastpref.ops._once import once_differentiable

FN = "linear_divergence"
KINDS = ("reverse_kl", "forward_kl", "jsd")


def linear_divergence(
    hidden_p: Tensor,
    weight_p: Tensor,
    hidden_q: Tensor,
    weight_q: Tensor,
    *,
    kind: str = "reverse_kl",
    jsd_beta: float = 0.5,
    mask: Tensor | None = None,
    bias_p: Tensor | None = None,
    bias_q: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    process_group: "dist.ProcessGroup | None" = None,
    workspace: int | None = None,
    check_finite: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Divergence of each token, p the policy (the student) and q the reference (the teacher).

        reverse_kl   KL(p || q) = sum_v p_v (log p_v - log q_v)
        forward_kl   KL(q || p)
        jsd          b KL(q || m) + (1 - b) KL(p || m), m = b q + (1 - b) p, b = jsd_beta

    jsd is D_JSD(b)(q || p) of GKD, Agarwal et al. 2024, arXiv:2306.13649, section 2. No factor of temperature^2.
    The (N, V) logits never exist: a chunk of rows at a time, in fp32, at most `workspace` bytes for both.

    A pass is 2 N H V FLOPs of one head. A value takes one of each; with both heads frozen one more for each hidden that
    gets a gradient, formed in forward. With a trained head backward scores both again and takes one for each tensor
    that gets a gradient; where the tokens do not fit one chunk a 16-bit weight needs 4 V H bytes for its sum.

    Args:
        hidden_p: (B, T, H), or packed (N, H); bfloat16, float16 or float32 (float64: a named backend).
        weight_p: (V, H), the dtype of hidden_p. Under autocast both sides are read in its dtype.
        hidden_q, weight_q: as many tokens over the same V; the hidden size and the dtype may be others.
        jsd_beta: of kind "jsd", in (0, 1).
        mask: bool, shaped like the tokens: those that count. Elsewhere nothing is read (NaN allowed), the result is 0
            and so are the gradients. None: all.
        bias_p, bias_q: (V,).
        temperature: a number, or one per token. It, softcap and logit_scale apply to both heads.
        softcap, logit_scale: as in linear_logps.
        process_group: weights and biases are this process's rows of the vocabulary, as in linear_logps. Each tells the
            others five numbers a token and sweep.
        workspace: bytes for the buffers of a chunk. None: 256 MiB on CPU, 1/32 of the memory of a GPU.
        check_finite: refuse NaN or infinite hidden states at tokens that count.
        backend: "torch" or "reference"; None: "torch".
    Returns:
        The tokens' shape, float32, nats, >= 0. Differentiable once in the hidden states, weights and biases; a second
        derivative raises.
    Raises:
        ValueError: shapes, devices or options do not fit, or a weight is a DTensor.
        TypeError: dtypes differ or are not supported.
    """
    if kind not in KINDS:
        raise ValueError(f"{FN}: kind must be one of {', '.join(KINDS)}; got {kind!r}")
    _check.number(FN, jsd_beta=jsd_beta)
    if not 0 < jsd_beta < 1:
        raise ValueError(f"{FN}: jsd_beta must be in (0, 1); got {jsd_beta}")
    if kind != "jsd" and jsd_beta != 0.5:
        raise ValueError(f"{FN}: jsd_beta goes with kind='jsd'; got kind={kind!r} and jsd_beta={jsd_beta}")
    _check.tensors(
        FN,
        hidden_p=hidden_p,
        weight_p=weight_p,
        hidden_q=hidden_q,
        weight_q=weight_q,
        bias_p=bias_p,
        bias_q=bias_q,
        mask=mask,
    )
    p = _side("p", hidden_p, weight_p, bias_p, backend)
    q = _side("q", hidden_q, weight_q, bias_q, backend)
    tokens = hidden_p.shape[:-1]
    if hidden_q.shape[:-1] != tokens:
        raise ValueError(f"{FN}: hidden_q must hold the tokens of hidden_p, {tuple(tokens)}; got {_tuple(hidden_q)}")
    if weight_q.shape[0] != weight_p.shape[0]:
        raise ValueError(f"{FN}: weight_q must have the rows of weight_p, {weight_p.shape[0]}; got {_tuple(weight_q)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != tokens):
        got = f"{mask.dtype} of shape {_tuple(mask)}".removeprefix("torch.")
        raise ValueError(f"{FN}: mask must be bool, {tuple(tokens)}; got {got}")
    if isinstance(temperature, Tensor) and temperature.shape not in ((), tokens):
        raise ValueError(
            f"{FN}: temperature must be a number or one per token, {tuple(tokens)}; got {_tuple(temperature)}"
        )
    _check.same_device(
        FN, hidden_p=hidden_p, weight_p=weight_p, hidden_q=hidden_q, weight_q=weight_q, bias_p=bias_p, bias_q=bias_q
    )
    _check.same_device(FN, hidden_p=hidden_p, mask=mask)
    _head.check_bending(FN, softcap, logit_scale)
    if workspace is None:
        workspace = default_workspace(hidden_p.device)
    widest = torch.promote_types(p.hidden.dtype, q.hidden.dtype)
    group, bounds = None, [0, weight_p.shape[0]]
    if process_group is not None:
        _head.check_group(FN, process_group, hidden_p.device, backend)
        bounds, workspace, _ = agree(FN, process_group, hidden_p, weight_p, hidden_q.shape[-1], workspace)
        group = process_group.group_name
    _head.check_workspace(FN, workspace, most_rows(bounds), widest)
    live = torch.ones(tokens, dtype=torch.bool, device=hidden_p.device) if mask is None else mask
    inv_temperature = _head.inverse(FN, temperature, p.hidden.new_empty(0, dtype=widest), live)
    if kind == "forward_kl":  # KL(q || p) is the other one with the sides exchanged
        p, q = q, p
    options = jsd_beta if kind == "jsd" else None, softcap, logit_scale
    if backend == "reference":
        index = _kept(live.reshape(-1), inv_temperature, p.hidden, q.hidden, check_finite)
        with torch.autocast(hidden_p.device.type, enabled=False):
            return reference(p, q, index, inv_temperature, *options).reshape(tokens)
    trained = any(x is not None and x.requires_grad for x in (*p[1:], *q[1:]))
    unit = [torch.is_grad_enabled() and not trained and side.hidden.requires_grad for side in (p, q)]
    found, *_ = _op(
        *p, *q, live.reshape(-1), inv_temperature, *options, workspace, check_finite, backend, group, bounds, *unit
    )
    return found.reshape(tokens)


def _side(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None) -> Side:
    """One head's tensors, checked and flat, and in the dtype of autocast if there is one."""
    named = {f"hidden_{name}": hidden, f"weight_{name}": weight, f"bias_{name}": bias}
    _head.refuse_sharded(FN, **named)
    if backend != "reference":
        _check.reverse_mode_only(FN, **named)
    _check.rank(FN, (2, 3), **{f"hidden_{name}": hidden})
    _check.rank(FN, (2,), **{f"weight_{name}": weight})
    _check.floating(FN, _check.FLOATS if backend is None else _check.WIDE_FLOATS, **named)
    hidden, weight, bias, autocast_weight = _head.under_autocast(hidden, weight, bias)
    named = {f"hidden_{name}": hidden, f"weight_{name}": None if autocast_weight else weight, f"bias_{name}": bias}
    _check.same_dtype(FN, **named)
    vocab_size, hidden_size = weight.shape
    if hidden.shape[-1] != hidden_size or vocab_size == 0 or hidden_size == 0:
        wanted = f"(V, {hidden.shape[-1]}), as hidden_{name} is (..., H), with V, H >= 1"
        raise ValueError(f"{FN}: weight_{name} must be {wanted}; got {_tuple(weight)}")
    if bias is not None and bias.shape != (vocab_size,):
        raise ValueError(f"{FN}: bias_{name} must be ({vocab_size},), the rows of weight_{name}; got {_tuple(bias)}")
    return Side(hidden.reshape(-1, hidden_size), weight, bias)


def _tuple(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _kept(live: Tensor, inv_temperature: Tensor, a: Tensor, b: Tensor, check_finite: bool) -> Tensor:
    """Index of the tokens that count. On CUDA values are looked at only with check_finite: it waits."""
    index = live.nonzero()[:, 0]
    if check_finite or not live.is_cuda:
        _head.check_scale(FN, inv_temperature[index], "token that counts")
    if check_finite and not all(bool(x[index].isfinite().all()) for x in (a, b)):
        raise ValueError(f"{FN}: hidden_p and hidden_q must be finite at every token that counts")
    return index


@torch.library.custom_op("fastpref::linear_divergence", mutates_args=())
@_head.without_autocast
def _op(
    hidden_p: Tensor,
    weight_p: Tensor,
    bias_p: Tensor | None,
    hidden_q: Tensor,
    weight_q: Tensor,
    bias_q: Tensor | None,
    live: Tensor,
    inv_temperature: Tensor,
    jsd_beta: float | None,
    softcap: float | None,
    logit_scale: float,
    workspace: int,
    check_finite: bool,
    backend: str | None,
    group: str | None,
    bounds: list[int],
    unit_p: bool,
    unit_q: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """KL(p || q) or the JSD, and where the heads are frozen its gradient for each hidden state, unscaled."""
    run = kernels.choose("linear_divergence", hidden_p.device.type, backend)
    index = _kept(live, inv_temperature, hidden_p, hidden_q, check_finite)
    p, q = Side(hidden_p, weight_p, bias_p), Side(hidden_q, weight_q, bias_q)
    form = Form(jsd_beta, softcap, logit_scale, workspace, most_rows(bounds), _head.shard(group, bounds))
    return run.linear_divergence(p, q, index, inv_temperature, form, (unit_p, unit_q))


@_op.register_fake
def _(hidden_p: Tensor, weight_p: Any, bias_p: Any, hidden_q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    inv_temperature, (unit_p, unit_q) = rest[3], rest[-2:]
    units = (inv_temperature.new_empty(x.shape if u else 0) for x, u in ((hidden_p, unit_p), (hidden_q, unit_q)))
    return torch.empty_like(inv_temperature), *units


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, (jsd_beta, softcap, logit_scale, workspace, _, *where, unit_p, unit_q) = inputs[:8], inputs[8:]
    ctx.options = jsd_beta, softcap, logit_scale, workspace, *where
    ctx.unit = unit_p, unit_q
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


@once_differentiable
def _backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Any, ...]:
    *tensors, unit_p, unit_q = ctx.saved_tensors
    no_gradient = (None,) * 12  # of the other arguments
    if any(ctx.unit):
        live = (tensors[6] & (grad != 0))[:, None]  # 0 times NaN is NaN
        scaled = [
            torch.where(live, unit * grad[:, None], 0.0).to(hidden.dtype) if there else None
            for hidden, unit, there in zip((tensors[0], tensors[3]), (unit_p, unit_q), ctx.unit, strict=True)
        ]
        return scaled[0], None, None, scaled[1], None, None, *no_gradient
    wanted = list(ctx.needs_input_grad[:6])
    found = _backward_op(grad, *tensors, *ctx.options, wanted)
    return *(x if there else None for x, there in zip(found, wanted, strict=True)), *no_gradient


@torch.library.custom_op("fastpref::linear_divergence_backward", mutates_args=())
@_head.without_autocast
def _backward_op(
    grad: Tensor,
    hidden_p: Tensor,
    weight_p: Tensor,
    bias_p: Tensor | None,
    hidden_q: Tensor,
    weight_q: Tensor,
    bias_q: Tensor | None,
    live: Tensor,
    inv_temperature: Tensor,
    jsd_beta: float | None,
    softcap: float | None,
    logit_scale: float,
    workspace: int,
    backend: str | None,
    group: str | None,
    bounds: list[int],
    wanted: list[bool],
) -> list[Tensor]:
    run = kernels.choose("linear_divergence", hidden_p.device.type, backend)
    p, q = Side(hidden_p, weight_p, bias_p), Side(hidden_q, weight_q, bias_q)
    form = Form(jsd_beta, softcap, logit_scale, workspace, most_rows(bounds), _head.shard(group, bounds))
    return run.gradients(grad, p, q, live.nonzero()[:, 0], inv_temperature, form, wanted)


@_backward_op.register_fake
def _(grad: Tensor, *rest: Any) -> list[Tensor]:
    inputs, wanted = rest[:6], rest[-1]
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if there and x is not None else grad.new_empty(0)
        for x, there in zip(inputs, wanted, strict=True)
    ]


_op.register_autograd(_backward, setup_context=_save)
