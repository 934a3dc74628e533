"""The arguments that every function of the linear head takes, checked once and laid flat."""

import functools
from collections.abc import Callable, Collection
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastpref.kernels.chunks import MIB, default_workspace, most_rows, smallest_workspace
from fastpref.kernels.shard import Shard, agree
from fastpref.ops import _check

F = TypeVar("F", bound=Callable[..., Any])
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
BACKENDS = ("reference", "torch", "cpu", "triton")


class HeadOptions(NamedTuple):
    """What every function of the linear head takes beside its tensors; `linear_logps` says what each means."""

    bias: Tensor | None = None
    ignore_index: int = -100
    temperature: float | Tensor = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    rows: Tensor | None = None
    cu_seqlens: Tensor | None = None
    process_group: "dist.ProcessGroup | None" = None
    workspace: int | None = None
    max_extra_bytes: int | None = None
    deterministic: bool = False
    check_finite: bool = False
    backend: str | None = None


class FlatHead(NamedTuple):
    """R rows of hidden, M targets."""

    hidden: Tensor  # (R, H)
    weight: Tensor  # (V, H) in the dtype of hidden, or fp32
    bias: Tensor | None  # (V,)
    targets: Tensor  # (M,) int64
    rows: Tensor | None  # (M,) int64
    inv_temperature: Tensor  # (M,) fp32, fp64 for fp64 inputs
    softcap: float | None
    logit_scale: float
    ignore_index: int
    workspace: int
    deterministic: bool
    check_finite: bool
    backend: str | None
    group: str | None  # the name of the process group whose processes hold parts of the vocabulary
    bounds: list[int]  # (W + 1,) where each process's rows start, and V; [0, V] without a group
    max_extra_bytes: int | None

    @property
    def trained(self) -> bool:
        """Whether a parameter of the head may get a gradient."""
        parameters = self.weight, self.bias
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in parameters)

    @property
    def vocab_size(self) -> int:
        return self.bounds[-1]

    @property
    def most_rows(self) -> int:
        """Rows of the largest part of the vocabulary: what all processes must decide by alike."""
        return most_rows(self.bounds)


def shard(group: str | None, bounds: list[int], all_sums: bool = True) -> Shard | None:
    return None if group is None else Shard(group, bounds, all_sums)


def flatten(
    fn: str, hidden: Tensor, weight: Tensor, targets: Tensor, options: HeadOptions, prefix: str = ""
) -> FlatHead:
    """The call laid flat: shapes, dtypes, devices and options checked; values are checked where the rows are read.

    `prefix`: hidden and weight are the user's {prefix}hidden and {prefix}weight.
    """
    h, w = f"{prefix}hidden", f"{prefix}weight"
    bias, rows, cu_seqlens, backend = options.bias, options.rows, options.cu_seqlens, options.backend
    workspace, process_group, ignore_index = options.workspace, options.process_group, options.ignore_index
    check_max_extra_bytes(fn, options.max_extra_bytes)
    _check.flag(fn, deterministic=options.deterministic, check_finite=options.check_finite)
    others = {"targets": targets, "bias": bias, "rows": rows, "cu_seqlens": cu_seqlens}
    _check.tensors(fn, **{h: hidden, w: weight}, **others)
    refuse_sharded(fn, **{w: weight, "bias": bias})
    if backend != "reference":
        _check.reverse_mode_only(fn, **{h: hidden, w: weight, "bias": bias})
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{fn}: backend must be None or one of {', '.join(BACKENDS)}; got {backend!r}")
    hidden, weight, bias, autocast_weight = under_autocast(hidden, weight, bias)
    _check.rank(fn, (2, 3), **{h: hidden})
    _check.rank(fn, (2,), **{w: weight})
    _check.rank(fn, (1,), bias=bias, rows=rows)
    eager = backend in ("reference", "torch")
    _check.floating(fn, _check.WIDE_FLOATS if eager else _check.FLOATS, **{h: hidden})
    _check.same_dtype(fn, **{h: hidden, w: None if autocast_weight else weight, "bias": bias})
    _check.same_device(fn, **{h: hidden, w: weight}, **others)
    vocab_size, hidden_size = weight.shape
    if hidden.shape[-1] != hidden_size:
        raise ValueError(f"{fn}: {w} must be (V, {hidden.shape[-1]}), as {h} is (..., H); got {tuple(weight.shape)}")
    if hidden_size == 0 or (vocab_size == 0 and process_group is None):
        raise ValueError(f"{fn}: {w} must be (V, H) with V, H >= 1; got {tuple(weight.shape)}")
    if bias is not None and bias.shape[0] != vocab_size:
        raise ValueError(f"{fn}: bias must be ({vocab_size},), the rows of {w}; got {tuple(bias.shape)}")
    _check.integer(fn, targets=targets, rows=rows)
    _check_layout(fn, h, hidden, targets, rows, cu_seqlens)

    check_bending(fn, options.softcap, options.logit_scale)
    if workspace is None:
        workspace = default_workspace(hidden.device)
    group, bounds, max_extra_bytes = None, [0, vocab_size], options.max_extra_bytes
    if process_group is not None:
        check_group(fn, process_group, hidden.device, backend)
        mine = workspace, max_extra_bytes
        bounds, workspace, max_extra_bytes = agree(fn, process_group, hidden, weight, targets.numel(), *mine)
        if min(b - a for a, b in pairwise(bounds)) == 0:
            raise ValueError(f"{fn}: {w} must have a row or more on every process; got bounds {bounds}")
        group = process_group.group_name
    check_workspace(fn, workspace, most_rows(bounds), hidden.dtype)
    if not isinstance(ignore_index, int):
        raise TypeError(f"{fn}: ignore_index must be an int; got {type(ignore_index).__name__}")
    inv_temperature = inverse(fn, options.temperature, hidden, targets)
    hidden, targets = hidden.reshape(-1, hidden_size), targets.reshape(-1).long()
    # where the target is ignored its row is not read, whatever stands there
    where = targets, None if rows is None else rows.long().where(targets != ignore_index, 0), inv_temperature
    if unseen(hidden.device, backend, options.check_finite):
        where = in_range(*where, ignore_index, bounds[-1], hidden.shape[0])
    return FlatHead(
        hidden,
        weight,
        bias,
        *where,
        options.softcap,
        options.logit_scale,
        ignore_index,
        workspace,
        options.deterministic,
        options.check_finite,
        backend,
        group,
        bounds,
        max_extra_bytes,
    )


def check_group(fn: str, process_group: "dist.ProcessGroup", device: torch.device, backend: str | None) -> None:
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(f"{fn}: process_group must be a ProcessGroup; got {type(process_group).__name__}")
    # NCCL serves GPUs alone: its own error, on the first collective, names neither
    served = sorted({each.type for each in process_group._device_types})
    if device.type not in served:
        raise ValueError(
            f"{fn}: process_group must serve the device of hidden, {device.type}; got one for {', '.join(served)}"
        )
    if backend == "reference":
        raise ValueError(f"{fn}: backend must be another than 'reference' with a process_group")


def recorded(x: Tensor) -> bool:
    """Whether what is done with x is traced or captured: the values of this run say nothing then."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def refuse_sharded(fn: str, **arguments: Tensor | None) -> None:
    for name, value in arguments.items():
        if value is not None and type(value).__name__ == "DTensor":
            raise ValueError(
                f"{fn}: {name} must be whole; got a DTensor. Call this inside the model's forward, where the head is: "
                "model = fastpref.fused_lm_head(model), then model(..., head=fn)"
            )


def _check_layout(
    fn: str, name: str, hidden: Tensor, targets: Tensor, rows: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    shape = tuple(hidden.shape)
    if rows is not None:
        if hidden.dim() != 2:
            raise ValueError(f"{fn}: rows wants packed {name} (N, H); got {shape}")
        if targets.shape != rows.shape:
            raise ValueError(
                f"{fn}: targets must have the shape of rows, {tuple(rows.shape)}; got {tuple(targets.shape)}"
            )
    elif targets.shape != hidden.shape[:-1]:
        raise ValueError(f"{fn}: targets must be {shape[:-1]}, as {name} is {shape}; got {tuple(targets.shape)}")
    if cu_seqlens is not None:
        if hidden.dim() != 2:
            raise ValueError(f"{fn}: cu_seqlens wants packed {name} (N, H); got {shape}")
        _check.cu_seqlens(fn, cu_seqlens, targets.shape[0], "targets")


def without_autocast(f: F) -> F:
    """f, which computes in the dtypes it is given: inside an op autocast would narrow its matrix products."""

    @functools.wraps(f)
    def run(*args: Any) -> Any:
        device = next(a.device.type for a in args if isinstance(a, Tensor))
        with torch.autocast(device, enabled=False):
            return f(*args)

    return run  # type: ignore[return-value]


def under_autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """(hidden, weight, bias) in autocast's dtype, and whether weight still is fp32: it is rounded as it is read.

    So there is no copy of it, and its gradient stays fp32.
    """
    if not torch.is_autocast_enabled(hidden.device.type) or hidden.dtype == torch.float64:
        return hidden, weight, bias, False
    dtype = torch.get_autocast_dtype(hidden.device.type)
    rounded_late = weight.dtype == torch.float32
    weight = weight if rounded_late else weight.to(dtype)
    return hidden.to(dtype), weight, None if bias is None else bias.to(dtype), rounded_late


def check_workspace(fn: str, workspace: int, vocab_size: int, dtype: torch.dtype) -> None:
    if not isinstance(workspace, int):
        raise TypeError(f"{fn}: workspace must be an int, in bytes; got {type(workspace).__name__}")
    if workspace < MIB or workspace >= 2**60:
        raise ValueError(f"{fn}: workspace is in bytes and must be at least 1 MiB; got {workspace}")
    if workspace < (least := smallest_workspace(vocab_size, dtype)):
        raise ValueError(f"{fn}: workspace must be at least {least} bytes at V = {vocab_size}; got {workspace}")


def check_max_extra_bytes(fn: str, max_extra_bytes: int | None) -> None:
    if max_extra_bytes is not None and (not isinstance(max_extra_bytes, int) or max_extra_bytes < 0):
        raise ValueError(f"{fn}: max_extra_bytes must be a number of bytes >= 0, or None; got {max_extra_bytes!r}")


def check_outputs(fn: str, outputs: Collection[str]) -> None:
    if isinstance(outputs, str):
        raise TypeError(f"{fn}: outputs must be a collection of names; got the string {outputs!r}")
    unknown = [name for name in outputs if name not in OUTPUTS]
    if unknown:
        raise ValueError(f"{fn}: outputs must be among {', '.join(OUTPUTS)}; got {unknown[0]!r}")


def check_bending(fn: str, softcap: float | None, logit_scale: float) -> None:
    _check.number(fn, logit_scale=logit_scale, **({} if softcap is None else {"softcap": softcap}))
    # comparisons, which torch.compile can trace, and bounds within fp32
    if softcap is not None and not 1e-30 < softcap < 1e30:
        raise ValueError(f"{fn}: softcap must be in (1e-30, 1e30), or None; got {softcap}")
    if not -1e30 < logit_scale < 1e30:
        raise ValueError(f"{fn}: logit_scale must be finite and below 1e30; got {logit_scale}")


def inverse(fn: str, temperature: float | Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
    """(M,) 1 / temperature, in the accumulator's dtype."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if isinstance(temperature, Tensor):
        if temperature.shape not in ((), targets.shape):
            raise ValueError(
                f"{fn}: temperature must be a number or have the shape of targets, {tuple(targets.shape)}; "
                f"got {tuple(temperature.shape)}"
            )
        _check.same_device(fn, hidden=hidden, temperature=temperature)
        return (1 / temperature.detach().to(dtype)).expand(targets.shape).reshape(-1)
    _check.number(fn, temperature=temperature)
    if not 1e-30 < temperature < 1e30:
        raise ValueError(f"{fn}: temperature must be in (1e-30, 1e30); got {temperature}")
    return torch.full((targets.numel(),), 1 / temperature, dtype=dtype, device=hidden.device)


def check_scale(fn: str, inv_temperature: Tensor, where: str) -> None:
    """Waits for the device."""
    wrong = inv_temperature[~(inv_temperature.isfinite() & (inv_temperature > 0))]
    if wrong.numel():
        raise ValueError(f"{fn}: temperature must be > 0 and finite at every {where}; got {1 / wrong[0]:g}")


def unseen(device: torch.device, backend: str | None, check_finite: bool) -> bool:
    """Whether the values of targets, rows and temperatures go unchecked: to look at them waits for the device."""
    return not check_finite and (device.type == "cuda" or backend == "triton")


def in_range(
    targets: Tensor, rows: Tensor | None, inv_temperature: Tensor, ignore_index: int, vocab_size: int, n_rows: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(targets, rows, inverse temperatures) that nothing is read out of bounds by. Waits for nothing.

    A live target that is out of range, or whose row is, has a NaN for its temperature, and so has all that it gives.
    """
    if n_rows == 0:
        return torch.full_like(targets, ignore_index), rows, inv_temperature
    wrong = (targets < 0) | (targets >= vocab_size)
    if rows is not None:
        wrong, rows = wrong | (rows < 0) | (rows >= n_rows), rows.clamp(0, n_rows - 1)
    wrong = wrong & (targets != ignore_index)
    live = 0 if ignore_index else vocab_size - 1
    return targets.masked_fill(wrong, live), rows, inv_temperature.masked_fill(wrong, torch.nan)


def kept_index(
    fn: str,
    name: str,
    hidden: Tensor,
    vocab_size: int,
    targets: Tensor,
    rows: Tensor | None,
    inv_temperature: Tensor,
    ignore_index: int,
    check_finite: bool,
    backend: str | None,
) -> Tensor:
    """Index of the targets that are not ignored, checked unless they go unseen."""
    index = (targets != ignore_index).nonzero()[:, 0]
    if index.numel() and not unseen(targets.device, backend, check_finite):
        y = targets[index]
        if int(y.min()) < 0 or int(y.max()) >= vocab_size:
            bad = y[(y < 0) | (y >= vocab_size)][0]
            raise ValueError(f"{fn}: targets must be in [0, {vocab_size}) or {ignore_index} (ignored); got {int(bad)}")
        row = index if rows is None else rows[index]
        if int(row.min()) < 0 or int(row.max()) >= hidden.shape[0]:
            got = f"{int(row.min())} to {int(row.max())}"
            raise ValueError(f"{fn}: rows must be in [0, {hidden.shape[0]}), the rows of hidden; got {got}")
        check_scale(fn, inv_temperature[index], "live target")
        if check_finite and not bool(hidden[row].isfinite().all()):
            raise ValueError(f"{fn}: {name} must be finite at every live target; got NaN or infinity")
    return index
