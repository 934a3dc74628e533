"""Refuses a second derivative, however it is asked for."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *depends_on: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("fastpref: this op is differentiable once; a second derivative was asked for")


class _ReadOnce:
    """A ctx whose saved tensors may be looked at twice: under a checkpoint the real one's may not."""

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def once_differentiable(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """The backward of an op whose gradients, under create_graph, raise when they are differentiated.

    The tensors they depend on (the upstream gradient, and what forward saved) are inputs of what raises: autograd then
    meets it on every way to them. torch's own decorator raises only if the upstream gradient requires grad: after
    `.sum()` a gradient penalty would silently lose its second derivative.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        ctx = _ReadOnce(ctx)
        with torch.no_grad():
            found = backward(ctx, *grads)
        depends_on = [x for x in (*grads, *ctx.saved_tensors) if isinstance(x, Tensor) and x.requires_grad]
        return tuple(_Refuse.apply(x.detach(), *depends_on) if isinstance(x, Tensor) else x for x in found)

    return run
