"""Measures tiles for the Triton kernels on this GPU and writes the fastest into fastpref/kernels/triton/table.py.

    python benchmarks/tune_triton.py [--shapes 4096x151936 ...] [--dtype bfloat16 float32] [--tokens 8192]
                                     [--seconds 240] [--dry-run]

From the table's own row a tile is changed in one size at a time, and the change kept where the median of its times is
lower, until none helps or `--seconds`, shared by the searches, are over. A candidate that does not compile, does not
fit or gives other numbers than the row it started from is left out, and said to be. Then the products are compared
with the library's, on all rows and with half of them without a gradient; `library` is decided on all rows. The new row
is for this architecture, this width of dtype, and H and V up to those measured; rows for other sizes stay.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpref import kernels
from fastpref.benchmarks._inputs import Shape
from fastpref.kernels.head import Head
from fastpref.kernels.triton import configs, head, table

DEVICE = "cuda"
ROUNDS = 7
CHOICES = {
    "descriptors": (False, True),  # the first that is tried: on sm_90 and newer what changes most
    "rows": (32, 64, 128, 256),
    "columns": (32, 64, 128, 256),
    "depth": (16, 32, 64, 128),
    "tiles": (1, 2, 4, 8, 16),
    "warps": (4, 8, 16),
    "stages": (2, 3, 4, 5, 6),
    "fresh": (1, 2, 4, 8, 16),
}


def milliseconds(call: Callable[[], object]) -> float:
    """Median of ROUNDS, by events; after a call that compiles and one that warms up."""
    for _ in range(2):
        call()
    times = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


class Problem:
    """Operands on the GPU: peaked logits, since on zeros or equal rows a GPU runs faster than on a model's."""

    def __init__(self, shape: Shape, dtype: torch.dtype, tokens: int) -> None:
        generator = torch.Generator(DEVICE).manual_seed(0)
        normal: dict[str, Any] = {"device": DEVICE, "generator": generator}
        weight = torch.randn(shape.vocab, shape.hidden, **normal).to(dtype) / shape.hidden**0.5
        self.targets = torch.randint(shape.vocab, (tokens,), **normal)
        x = 3 * torch.randn(tokens, shape.hidden, **normal) + 10 * weight[self.targets]
        self.x, self.head = x.to(dtype), Head(weight, None, None, 1.0, 2**32)
        self.anchor = head.label_dots(self.x, weight, self.targets).float()
        self.ones = torch.ones(tokens, device=DEVICE)
        self.factor = torch.randn(tokens, **normal)
        self.chunk = head.new_chunk(tokens, weight, dtype)
        self.score()
        self.scaled = head.scaled(self.x, self.factor)
        self.out = torch.empty(shape.vocab, shape.hidden, device=DEVICE)

    def score(self) -> Tensor:
        sums = head.score(self.x, self.head, self.targets, self.anchor, self.ones, self.chunk, None)
        return torch.stack((sums.exp.log1p(), sums.z))

    def d_hidden(self) -> Tensor:
        return head.d_hidden(self.chunk, len(self.x), self.head.weight, self.x.dtype, self.factor)

    def d_weight(self) -> Tensor:
        head.d_weight(self.chunk, self.scaled, self.factor, self.out, False)
        return self.out


class Tuned:
    """The configuration that the launchers are given, instead of the table's."""

    def __init__(self, start: configs.Config) -> None:
        self.config = start
        configs.lookup = lambda *_: self.config  # type: ignore[assignment]

    def milliseconds(self, call: Callable[[], Tensor], expected: Tensor, **changes: Any) -> float | str:
        """Of a call under a changed configuration, or why it is out."""
        before, self.config = self.config, self.config._replace(**changes)
        try:
            found = call()
            error = float((found - expected).norm() / expected.norm())
            return milliseconds(call) if error < 1e-3 else f"off by {error:.1e}"
        except Exception as failure:  # a compiler's or a driver's, of many kinds: a candidate, not the library, failed
            torch.cuda.synchronize()
            return f"{type(failure).__name__}: {str(failure).splitlines()[0][:80] if str(failure) else ''}"
        finally:
            self.config = before


def neighbours(tile: Any) -> Iterator[Any]:
    """Tiles that differ in one size, or trade rows for columns."""
    for name in (name for name in CHOICES if name in tile._fields):
        for value in CHOICES[name]:
            other = tile._replace(**{name: value})
            if value != getattr(tile, name) and valid(other):
                yield other
    swapped = tile._replace(rows=tile.columns, columns=tile.rows)
    if swapped != tile:
        yield swapped


def valid(tile: Any) -> bool:
    if not isinstance(tile, configs.Score):
        return True
    # 256 of depth in an accumulator; the planner counts on 240 columns for a partial sum
    return tile.fresh * tile.depth <= 256 and tile.columns * tile.tiles >= 240


def search(tuned: Tuned, field: str, call: Callable[[], Tensor], flops: float, seconds: float) -> None:
    """Puts the fastest tile that was found into tuned.config."""
    until, expected = time.monotonic() + seconds, call().clone()
    library = {"library": False}
    best, best_ms = getattr(tuned.config, field), tuned.milliseconds(call, expected, **library)
    tried = {best}
    print(f"{field}: start {best} {best_ms} ms")
    improved = True
    while improved and time.monotonic() < until:
        improved = False
        for tile in neighbours(best):
            if tile in tried or time.monotonic() > until:
                continue
            tried.add(tile)
            found = tuned.milliseconds(call, expected, **library, **{field: tile})
            if isinstance(found, str):
                print(f"  {tile} out: {found}", flush=True)
            elif isinstance(best_ms, str) or found < 0.995 * best_ms:
                best, best_ms, improved = tile, found, True
                print(f"  {tile} {found:.3f} ms, {flops / found / 1e9:.0f} TFLOP/s", flush=True)
    tuned.config = tuned.config._replace(**{field: best})


def tune(shape: Shape, dtype: torch.dtype, tokens: int, seconds: float) -> Iterator[configs.Row]:
    """The row, after each search: what was found by then is kept if a later one does not come to its end."""
    arch = configs.arch_of(torch.device(DEVICE))
    tuned = Tuned(configs.lookup(arch, dtype, shape.hidden, shape.vocab))
    problem = Problem(shape, dtype, tokens)
    flops = 2.0 * tokens * shape.hidden * shape.vocab
    print(f"\n{arch}, {dtype}, H {shape.hidden}, V {shape.vocab}, {tokens} tokens")
    device = torch.cuda.get_device_name()
    measured = f"{device}, torch {torch.__version__}, triton {version('triton')}"

    def row() -> configs.Row:
        return configs.Row(arch, 8 * dtype.itemsize, shape.hidden, shape.vocab, tuned.config, measured)

    for field, call, part in (
        ("score", problem.score, seconds / 2),
        ("d_hidden", problem.d_hidden, seconds / 4),
        ("d_weight", problem.d_weight, seconds / 4),
    ):
        search(tuned, field, call, flops, part)
        yield row()
    total = {}
    for alive in (1.0, 0.5):
        problem.factor[int(alive * tokens) :] = 0
        for library in (True, False):
            tuned.config = tuned.config._replace(library=library)
            times = {name: milliseconds(getattr(problem, name)) for name in ("d_hidden", "d_weight")}
            total[alive, library] = sum(times.values())
            rates = ", ".join(
                f"{name} {ms:.3f} ms, {alive * flops / ms / 1e9:.0f} TFLOP/s" for name, ms in times.items()
            )
            print(f"{alive:.0%} of rows with a gradient, {'library' if library else 'triton'}: {rates}")
    tuned.config = tuned.config._replace(library=total[1.0, True] <= total[1.0, False])
    yield row()


def merged(rows: Sequence[configs.Row], new: Sequence[configs.Row]) -> list[configs.Row]:
    """The table with the new rows in the place of those they repeat; the narrowest limits come first."""

    def key(row: configs.Row) -> tuple[str, int, int, int]:
        return row[:4]

    def limits(row: configs.Row) -> tuple[float, ...]:
        return tuple(size or float("inf") for size in (row.hidden_size, row.vocab_size))

    every = {**{key(row): row for row in rows}, **{key(row): row for row in new}}
    order = {pair: i for i, pair in enumerate(dict.fromkeys(row[:2] for row in every.values()))}
    return sorted(every.values(), key=lambda row: (order[row[:2]], *limits(row)))


def source(rows: Sequence[configs.Row]) -> str:
    """table.py with these rows, as the formatter would have it."""
    path = Path(table.__file__)
    opening = path.read_text().split("ROWS = (")[0]

    def text(value: Any) -> str:
        return f'"{value}"' if isinstance(value, str) else str(value)

    def tile(value: Any) -> str:
        given = [text(x) for x in value]
        while value._field_defaults.get(value._fields[len(given) - 1]) == value[len(given) - 1]:
            given.pop()
        return f"{type(value).__name__}({', '.join(given)})"

    lines = []
    for row in rows:
        config = f"Config({', '.join([*map(tile, row.config[:3]), str(row.config.library)])})"
        lines += ["    Row(", *(f"        {text(x)}," for x in row[:4])]
        if len(config) + 9 > 120:
            parts = [*map(tile, row.config[:3]), str(row.config.library)]
            lines += ["        Config(", *(f"            {part}," for part in parts), "        ),"]
        else:
            lines.append(f"        {config},")
        lines += [f"        {text(row.measured)},", "    ),"]
    return opening + "\n".join(["ROWS = (", *lines, ")"]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, default=[Shape.parse("4096x151936")])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=240.0, help="for each shape and dtype")
    parser.add_argument("--dry-run", action="store_true", help="print the rows, do not write them")
    chosen = parser.parse_args(arguments)
    if reason := kernels.why_not("triton"):
        parser.exit(1, f"tune_triton: needs a GPU and Triton: {reason}\n")
    lookup, rows = configs.lookup, list(table.ROWS)
    for shape in chosen.shapes:
        for dtype in chosen.dtype:
            configs.lookup = lookup
            for row in tune(shape, getattr(torch, dtype), chosen.tokens, chosen.seconds):
                rows = merged(rows, [row])
                if chosen.dry_run:
                    print(row, flush=True)
                else:
                    Path(table.__file__).write_text(source(rows))


if __name__ == "__main__":
    main()
