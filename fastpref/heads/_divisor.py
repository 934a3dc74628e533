"""What a loss divides the sum of its terms by."""

from torch import Tensor

from fastpref.ops import _check

REDUCTIONS = ("mean", "sum", "none")


def divisor(fn: str, reduction: str, num_items: float | Tensor | None, count: int | Tensor) -> float | Tensor:
    """`count` for "mean" (1 where nothing is counted), `num_items` if it is given, else 1."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{fn}: reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if num_items is None:
        if reduction != "mean":
            return 1.0
        return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
    if reduction != "mean":
        raise ValueError(f"{fn}: num_items and reduction={reduction!r} were both given; choose one")
    if isinstance(num_items, Tensor):
        if num_items.dim() or num_items.requires_grad:
            raise ValueError(f"{fn}: num_items must be a number or a 0-d tensor; got shape {tuple(num_items.shape)}")
        return num_items
    _check.number(fn, num_items=num_items)
    if not 0 < num_items < float("inf"):
        raise ValueError(f"{fn}: num_items must be > 0 and finite; got {num_items}")
    return num_items
