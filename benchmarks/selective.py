"""selective_logps on logits that exist: per-token log-probs, forward, and forward with backward.

The bound, by hand: forward reads N V logits once, s N V bytes; forward and backward read them twice and write their
gradient, 3 s N V. Nothing beats moving them: `copy` is torch's copy_ of as many bytes in all, timed in the same rounds.
`inplace` writes the gradient over the logits, which saves the memory.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpref import selective_logps
from fastpref.benchmarks._inputs import Shape, head_weight, peaked_rows, relative_error
from fastpref.benchmarks._measure import MIB, Absent, Row, Table, WrongAnswer, against, allocated, or_reason
from fastpref.benchmarks._settings import Settings

COLUMNS = (
    ("seconds", "seconds", ".5f"),
    ("ratio", "ratio", ".2f"),
    ("lowest", "ratio_min", ".2f"),
    ("highest", "ratio_max", ".2f"),
    ("extra MiB", "extra_MiB", ".0f"),
    ("logps", "logps_error", ".1e"),
    ("d_logits", "d_logits_error", ".1e"),
)
PACKAGES = ("torch", "trl", "liger-kernel")
LOGITS = {"cpu": 2**25, "cuda": 2**29}  # 64 MiB and 1 GiB in bf16; a quarter with --quick
WRONG = {torch.float32: 1e-3, torch.bfloat16: 0.1}

Function = Callable[[Tensor, Tensor], Any]  # (logits (N, V), targets (N,)) -> (N,)


def naive(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def _trl() -> Function:
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax


def _trl_triton() -> Function:
    if not torch.cuda.is_available():
        raise Absent("its kernels are for GPUs")
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    return lambda logits, targets: selective_log_softmax_and_entropy(logits, targets)[0]


def _liger() -> Function:
    if not torch.cuda.is_available():
        raise Absent("its kernels are for GPUs")
    from liger_kernel.transformers import LigerCrossEntropyLoss

    loss = LigerCrossEntropyLoss(reduction="none")
    return lambda logits, targets: -loss(logits, targets)


CONTENDERS: dict[str, Callable[[], Function]] = {
    "fastpref": lambda: selective_logps,
    "fastpref-inplace": lambda: partial(selective_logps, inplace_backward=True),
    "naive": lambda: naive,
    "naive-compiled": lambda: torch.compile(naive),
    "torch-ce": lambda: lambda logits, targets: -F.cross_entropy(logits, targets, reduction="none"),
    "trl": _trl,
    "trl-triton": _trl_triton,
    "liger": _liger,
}


def copy_of(n_bytes: int, device: str) -> Callable[[], object]:
    """Moves so many bytes, half read and half written."""
    source = torch.ones(n_bytes // 8, device=device)
    return partial(torch.empty_like(source).copy_, source)


def run(settings: Settings) -> list[Row]:
    table = Table("selective", COLUMNS, PACKAGES, settings.json)
    for shape in settings.shapes:
        for dtype in settings.dtypes:
            logits, targets, upstream = inputs(shape, dtype, settings)
            for backward in (False, True):
                fill(table, shape, logits, targets, upstream if backward else None, settings)
    return table.rows


def inputs(shape: Shape, dtype: torch.dtype, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """(logits (N, V), targets, upstream gradient) of peaked rows."""
    n = max(16, LOGITS[settings.device.partition(":")[0]] // shape.vocab // (4 if settings.quick else 1))
    generator = torch.Generator().manual_seed(0)
    narrow = Shape(min(shape.hidden, 64), shape.vocab)  # of the logits only their spread is seen
    weight = head_weight(narrow, generator)
    hidden, targets = peaked_rows(weight, n, generator)
    upstream = torch.randn(n, generator=generator)
    return tuple(x.to(settings.device) for x in ((hidden @ weight.T).to(dtype), targets, upstream))  # type: ignore[return-value]


class _Computed(torch.autograd.Function):
    """Stands for the head that computed the logits: what writes over them refuses a leaf."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def step(function: Function, logits: Tensor, targets: Tensor, upstream: Tensor | None) -> tuple[Tensor, ...]:
    if upstream is None:
        with torch.no_grad():
            return (function(logits, targets),)
    leaf = logits.detach().requires_grad_()
    logps = function(_Computed.apply(leaf), targets)
    return logps.detach(), *torch.autograd.grad(logps, leaf, upstream.to(logps.dtype))


def on_fresh_logits(function: Function, logits: Tensor, targets: Tensor, upstream: Tensor | None) -> Any:
    return step(function, logits.clone(), targets, upstream)


def measure(
    name: str, copy: Callable[[], object], true: tuple[Tensor, ...], rounds: int, *arguments: Tensor | None
) -> Row:
    """The answer is judged on a copy of the logits, the clock runs on the logits, whatever is left of them."""
    torch.compiler.reset()
    function, logits = CONTENDERS[name](), arguments[0]
    assert logits is not None
    got = on_fresh_logits(function, *arguments)  # type: ignore[arg-type]
    row: Row = {"logps_error": float((got[0].double() - true[0]).square().mean().sqrt())}
    if len(got) > 1:
        row["d_logits_error"] = relative_error([got[1]], [true[1]])
    for key, error in row.items():
        if not error <= WRONG[logits.dtype]:
            raise WrongAnswer(f"{key} {error:.1e}")
    own = logits.clone() if "inplace" in name else logits
    call = partial(step, function, own, *arguments[1:])  # type: ignore[arg-type]
    return row | against(copy, call, rounds) | {"extra_MiB": allocated(call) / MIB}


def fill(
    table: Table, shape: Shape, logits: Tensor, targets: Tensor, upstream: Tensor | None, settings: Settings
) -> None:
    moved = logits.nbytes * (1 if upstream is None else 3)
    about = {
        "model": shape.model,
        "V": shape.vocab,
        "dtype": str(logits.dtype).removeprefix("torch."),
        "tokens": len(targets),
        "pass": "forward" if upstream is None else "forward and backward",
        "bare_bytes": moved,
    }
    true = step(naive_double, logits, targets, upstream)
    copy = copy_of(moved, settings.device)
    title = (
        "{pass}, {tokens} rows of V {V:,} ({model}), {dtype}; bound: {bare_bytes:.2e} B moved, `ratio` is over a copy"
    )
    table.heading(title.format(**about))
    for name in CONTENDERS:
        row = partial(measure, name, copy, true, settings.rounds, logits, targets, upstream)
        table.add({"contender": name, **about, **or_reason(name, row)})


def naive_double(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.double().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
