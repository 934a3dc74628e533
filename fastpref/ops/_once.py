"""Refuses a second derivative, however it is asked for."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("fastpref: this op is differentiable once; a second derivative was asked for")


def once_differentiable(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """The backward of an op whose gradients, under create_graph, raise when they are differentiated.

    torch's own decorator does so only if the upstream gradient requires grad: after `.sum()` a gradient penalty
    would silently lose its second derivative.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        again = torch.is_grad_enabled()
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not again:
            return found
        with torch.enable_grad():
            return tuple(_Refuse.apply(x.detach().requires_grad_()) if isinstance(x, Tensor) else x for x in found)

    return run
