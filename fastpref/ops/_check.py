"""Checks of a public function's arguments: each raises `function: argument wanted ...; got ...`.

`fn` is the name of the function the user called; tensors come as keywords, named as the user names them,
and None stands for an optional argument that was not given.
"""

import numbers
from itertools import pairwise

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
WIDE_FLOATS = (*FLOATS, torch.float64)


def tensors(fn: str, **arguments: Tensor | None) -> None:
    """Each argument is a tensor."""
    for name, value in arguments.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{fn}: {name} must be a tensor; got {type(value).__name__}")


def reverse_mode_only(fn: str, **arguments: Tensor | None) -> None:
    """No argument has a forward-mode tangent, which would be lost, or is differentiated by torch.func."""
    if torch.compiler.is_compiling():
        return
    for name, value in _given(arguments):
        if torch._C._functorch.is_gradtrackingtensor(value):
            got = "one inside a transform of torch.func"
        elif torch.autograd.forward_ad.unpack_dual(value).tangent is not None:
            got = "one with a forward-mode tangent"
        else:
            continue
        raise ValueError(
            f"{fn}: {name} must be differentiated in reverse mode, by backward() or torch.autograd.grad; got {got}"
        )


def same_shape(fn: str, **arguments: Tensor | None) -> None:
    """Each argument has the shape of the first."""
    (first, wanted), *others = _given(arguments)
    for name, value in others:
        if value.shape != wanted.shape:
            raise ValueError(f"{fn}: {name} must have the shape of {first}, {_shape(wanted)}; got {_shape(value)}")


def same_device(fn: str, **arguments: Tensor | None) -> None:
    """Each argument is on the device of the first."""
    (first, wanted), *others = _given(arguments)
    for name, value in others:
        if value.device != wanted.device:
            raise ValueError(f"{fn}: {name} must be on the device of {first}, {wanted.device}; got {value.device}")


def same_dtype(fn: str, **arguments: Tensor | None) -> None:
    """Each argument has the dtype of the first."""
    (first, wanted), *others = _given(arguments)
    for name, value in others:
        if value.dtype != wanted.dtype:
            raise TypeError(f"{fn}: {name} must have the dtype of {first}, {_dtype(wanted)}; got {_dtype(value)}")


def floating(fn: str, dtypes: tuple[torch.dtype, ...] = FLOATS, **arguments: Tensor | None) -> None:
    """Each argument has one of `dtypes`."""
    for name, value in _given(arguments):
        if value.dtype not in dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise TypeError(f"{fn}: {name} must be one of {names}; got {_dtype(value)}")


def integer(fn: str, **arguments: Tensor | None) -> None:
    """Each argument has an integer dtype."""
    for name, value in _given(arguments):
        if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
            raise TypeError(f"{fn}: {name} must be integers; got {_dtype(value)}")


def rank(fn: str, wanted: tuple[int, ...], **arguments: Tensor | None) -> None:
    """Each argument has one of these numbers of dimensions."""
    for name, value in _given(arguments):
        if value.dim() not in wanted:
            ranks = " or ".join(map(str, wanted))
            raise ValueError(f"{fn}: {name} must have {ranks} dimensions; got shape {_shape(value)}")


def number(fn: str, **arguments: float) -> None:
    """Each argument is a number: no tensor, whose gradient would be lost."""
    for name, value in arguments.items():
        if isinstance(value, bool | Tensor) or not isinstance(value, numbers.Real):
            raise TypeError(f"{fn}: {name} must be a number; got {type(value).__name__}")


def finite(fn: str, **arguments: float) -> None:
    """Each argument is a number, and neither NaN nor infinite."""
    number(fn, **arguments)
    for name, value in arguments.items():
        if not abs(value) < float("inf"):
            raise ValueError(f"{fn}: {name} must be finite; got {value}")


def flag(fn: str, **arguments: bool) -> None:
    """Each argument is True or False."""
    for name, value in arguments.items():
        if not isinstance(value, bool):
            raise TypeError(f"{fn}: {name} must be True or False; got {value!r}")


def between(fn: str, low: float, high: float, **arguments: float) -> None:
    """Each argument is a number, low <= argument <= high; NaN is not."""
    number(fn, **arguments)
    for name, value in arguments.items():
        if not low <= value <= high:
            raise ValueError(f"{fn}: {name} must be in [{low}, {high}]; got {value}")


def cu_seqlens(fn: str, value: Tensor, total: int, of: str) -> None:
    """value is (S + 1,), and where looking at it waits for nothing, rises from 0 to `total`, the number of `of`."""
    rank(fn, (1,), cu_seqlens=value)
    integer(fn, cu_seqlens=value)
    if value.numel() == 0:
        raise ValueError(f"{fn}: cu_seqlens must be (S + 1,), starting with 0; got an empty tensor")
    if torch.compiler.is_compiling() or value.is_cuda:
        return
    bounds = value.tolist()
    if bounds[0] != 0 or bounds[-1] != total or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"{fn}: cu_seqlens must rise from 0 to the number of {of}, {total}; got {bounds}")


def num_items(fn: str, value: float | Tensor) -> float | Tensor:
    """value, a number > 0 or a detached 0-d tensor, whose value is not looked at: that would wait for the device."""
    if isinstance(value, Tensor):
        if value.dim():
            raise ValueError(f"{fn}: num_items must be a number or a 0-d tensor; got shape {_shape(value)}")
        if value.requires_grad:
            raise ValueError(f"{fn}: num_items must be detached; got a tensor that requires grad")
        return value
    number(fn, num_items=value)
    if not 0 < value < float("inf"):
        raise ValueError(f"{fn}: num_items must be > 0 and finite; got {value}")
    return value


def _given(arguments: dict[str, Tensor | None]) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in arguments.items() if value is not None]


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
