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
    return _check.num_items(fn, num_items)
