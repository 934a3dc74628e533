"""How the benchmarks measure: times interleaved with a yardstick, memory, provenance, and the table."""

import ctypes
import gc
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import fastpref
from fastpref import kernels
from fastpref.kernels.memory import release

# the profiler's own messages, two lines a call, would stand between the rows
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

MIB = 2**20
Row = dict[str, Any]


SHORTEST = 0.005  # seconds below which a call is timed several times in a row


class Absent(Exception):
    """Why a contender is not measured here."""


class WrongAnswer(Exception):
    """A contender's result is not the loss that was asked for, whatever its speed."""


def wait() -> None:
    """Until a GPU, if one is in use, has done what it was told."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds(call: Callable[[], object], times: int = 1) -> float:
    """Of one call, the mean of so many in a row."""
    wait()
    start = time.perf_counter()
    for _ in range(times):
        call()
    wait()
    return (time.perf_counter() - start) / times


def against(
    bare: Callable[[], object], call: Callable[[], object], rounds: int, longest: float = 60.0, warm: bool = False
) -> Row:
    """Median seconds of a call and of the bare one, run in turn, and the median and range of their ratios.

    longest: seconds that the rounds may take; a call that is too slow for it gets fewer, at least one.
    warm: the call has been made before.
    """
    bare()
    if not warm:
        call()
    gc.collect()
    pairs = [(seconds(bare), seconds(call))]
    rounds = max(1, min(rounds, int(longest / sum(pairs[0]))))
    if rounds > 1:
        times = [max(1, round(SHORTEST / max(one, 1e-6))) for one in pairs[0]]
        pairs = [(seconds(bare, times[0]), seconds(call, times[1])) for _ in range(rounds)]
    ratios = [spent / least for least, spent in pairs]
    return {
        "seconds": statistics.median(spent for _, spent in pairs),
        "bare_s": statistics.median(least for least, _ in pairs),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "rounds": rounds,
    }


def allocated(call: Callable[[], object]) -> int:
    """Bytes of torch's allocations alive at once, at the most, beyond those alive before the call.

    What a library takes without asking torch is not in it.
    """
    if torch.cuda.is_initialized():
        wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    release()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        call()
    alive = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def resident(prepare: Callable[..., tuple[Callable[[], object], Callable[[], object]]], *arguments: Any) -> int:
    """Bytes that a call adds to the resident set at its highest, its result included; Linux.

    prepare(*arguments), a module's function, gives (a tiny call, the call). It runs in a process of its own: what an
    earlier step freed may stay resident, and the next one would look cheap.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_resident, prepare, arguments).result()


def _resident(
    prepare: Callable[..., tuple[Callable[[], object], Callable[[], object]]], arguments: tuple[Any, ...]
) -> int:
    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

    tiny, call = prepare(*arguments)
    tiny()  # what the first call of all loads is not the head's
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept would be room for the call that nobody counts
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to now
    before = status("VmRSS")
    kept = call()  # noqa: F841  alive until the mark is read
    return status("VmHWM") - before


def provenance(packages: Sequence[str] = ("torch",)) -> Row:
    """Device, threads, versions and commit; None for a package that is not installed."""
    root = Path(__file__).resolve().parents[1]
    commit = ""
    if (root / ".git").exists() and (root / "csrc").exists() and shutil.which("git"):  # not installed somewhere
        git = partial(subprocess.run, cwd=root, capture_output=True, text=True)
        commit = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
        # results and words may change while a run writes them; what runs may not
        what = [".", ":!benchmarks/results", ":!*.md"]
        if git(["git", "status", "--porcelain", "--untracked-files=no", "--", *what]).stdout:
            commit += "-dirty"
    listed = Path("/proc/cpuinfo")
    cpu = listed.read_text() if listed.exists() else ""
    model = next((line.split(":")[1].strip() for line in cpu.splitlines() if "model name" in line), platform.machine())
    has = [name.upper() for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f" {name}" in cpu]
    kernel = kernels.why_not("cpu")
    if kernel is None:
        from fastpref.kernels.cpu.head import isa

        kernel = isa()
    return {
        "device": f"{model}, {has[0] if has else 'no vector units known'}{'' if 'AMX_BF16' in has else ', no AMX'}",
        "kernel": kernel,
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "commit": commit or f"fastpref {fastpref.__version__}",
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Table:
    """Prints rows as they come, and appends each as a line of JSON with where it was measured.

    columns: (heading, key, format); a row without the key shows "-". A row with a "reason" shows that instead.
    Of the keys in a row's "best", the value is marked *.
    """

    def __init__(
        self, benchmark: str, columns: Sequence[tuple[str, str, str]], packages: Sequence[str], file: Path | None
    ) -> None:
        self.about = {"benchmark": benchmark, **provenance(packages)}
        self.columns, self.file, self.rows = columns, file, list[Row]()
        print(", ".join(f"{name} {value or 'not installed'}" for name, value in self.about.items()))

    def heading(self, title: str) -> None:
        print(f"\n{title}\n{'':18}" + "".join(f"{name:>12}" for name, _, _ in self.columns))

    def add(self, row: Row) -> None:
        cells = "".join(self._cell(row, *rest) for _, *rest in self.columns)
        print(f"{row['contender']:18}{'  ' + row['reason'] if 'reason' in row else cells}", flush=True)
        self.rows.append({**row, **self.about})
        if self.file:
            with self.file.open("a") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")

    @staticmethod
    def _cell(row: Row, key: str, form: str) -> str:
        value = row.get(key)
        mark = "*" if key in row.get("best", ()) else ""
        return f"{'-' if value is None else format(value, form) + mark:>12}"


def or_reason(peer: str, measure: Callable[[], Row]) -> Row:
    """The row of `measure`, or one that says why there is none; a failure of fastpref itself is not caught."""
    try:
        return measure()
    except (Absent, ImportError) as error:
        return {"reason": f"not measured: {error}"}
    except WrongAnswer as error:
        if peer.startswith("fastpref"):
            raise
        return {"reason": f"wrong: {error}"}
    except Exception as error:
        if peer.startswith("fastpref"):
            raise
        return {"reason": f"failed: {type(error).__name__}: {str(error).splitlines()[0][:80]}"}


def bare_products(
    n: int,
    hidden: int,
    vocab: int,
    trained_head: bool,
    reference: bool,
    dtype: torch.dtype,
    *,
    gradients: bool = True,
    device: str = "cpu",
) -> Callable[[], None]:
    """The products that a step on n tokens cannot avoid, into outputs that are there already.

    Logits of the policy, d_hidden, d_weight if the head is trained, logits of the reference: 2 n H V FLOPs each.
    """
    x, w = (torch.randn(size, hidden, device=device).to(dtype) for size in (n, vocab))
    z, d_x, d_w = torch.empty(n, vocab, dtype=dtype, device=device), torch.empty_like(x), torch.empty_like(w)

    def run() -> None:
        torch.mm(x, w.T, out=z)
        if gradients:
            torch.mm(z, w, out=d_x)
        if gradients and trained_head:
            torch.mm(z.T, x, out=d_w)
        if reference:
            torch.mm(x, w.T, out=z)

    return run


def fastest_products(dtype: torch.dtype, make: Callable[[torch.dtype], Callable[[], None]]) -> tuple[Any, str]:
    """(the products, the name of their dtype): for 16-bit inputs, of 16-bit and fp32 operands what is faster here."""
    found = {}
    for operands in dict.fromkeys((dtype, torch.float32)):
        run = make(operands)
        run()
        found[operands] = (min(seconds(run) for _ in range(2)), run)
    best = min(found, key=lambda operands: found[operands][0])
    return found[best][1], str(best).removeprefix("torch.")
