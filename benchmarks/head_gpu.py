"""One step of the head on a GPU, DPO and PPO, as a multiple of the matrix products it cannot avoid, and its phases.

    python benchmarks/head_gpu.py [--shapes 4096x151936 ...] [--pairs 4] [--length 2048] [--loss dpo ppo]
                                  [--head trained frozen] [--contenders fastpref naive ...] [--rounds 10] [--json FILE]

The rows are those of `fastpref bench head`: each timed step right after the bare products of the same run, into outputs
that exist; every answer compared with float64 first. By default half of 16,384 tokens count: 8,192. `fastpref 512 MiB`
is the step in four passes, with no fp32 copy of the weight's gradient. Before them, the phases of a step at the same
sizes, on packed rows: achieved TFLOP/s of 2 n H V FLOPs each, beside torch.mm in 16 bits; `half`: half of the rows have
no gradient, and the rate counts them.
"""

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastpref import kernels
from fastpref.benchmarks import _peers
from fastpref.benchmarks import head as suite
from fastpref.benchmarks._inputs import Shape, batch, exact_logps
from fastpref.benchmarks._measure import MIB, Row, Table, allocated, seconds
from fastpref.benchmarks._settings import Settings
from fastpref.kernels.head import Head

DEVICE = "cuda"
FOUR_PASSES = "fastpref 512 MiB"
PEERS = ("fastpref", FOUR_PASSES, "naive", "naive-compiled", "trl", "liger", "liger-logps", "torch-lce",
         "torch-lce-chunked", "cce-exact", "verl-triton")  # fmt: skip
COLUMNS = (
    ("median ms", "milliseconds", ".3f"),
    ("lowest", "milliseconds_min", ".3f"),
    ("highest", "milliseconds_max", ".3f"),
    ("TFLOP/s", "tflops", ".0f"),
    ("extra MiB", "extra_MiB", ".0f"),
)


def phases(table: Table, shape: Shape, n: int, dtype: torch.dtype, rounds: int) -> None:
    """A row for each kernel of a step."""
    from fastpref.kernels.triton import configs, head

    generator = torch.Generator(DEVICE).manual_seed(0)
    normal: dict[str, Any] = {"device": DEVICE, "generator": generator}
    weight = torch.randn(shape.vocab, shape.hidden, **normal).to(dtype) / shape.hidden**0.5
    targets = torch.randint(shape.vocab, (n,), **normal)
    x = (3 * torch.randn(n, shape.hidden, **normal) + 10 * weight[targets]).to(dtype)
    anchor, ones = head.label_dots(x, weight, targets).float(), torch.ones(n, device=DEVICE)
    factor = torch.randn(n, **normal)
    half = torch.where(torch.arange(n, device=DEVICE) < n // 2, factor, 0.0)
    chunk, parameters = head.new_chunk(n, weight, dtype), Head(weight, None, None, 1.0, 2**32)
    rows = {"factor": factor, "half": half}
    scaled = {name: head.scaled(x, row) for name, row in rows.items()}
    d_weight = torch.empty(shape.vocab, shape.hidden, device=DEVICE)
    lookup = configs.lookup

    def products(name: str, library: bool) -> dict[str, Callable[[], object]]:
        def run(call: Callable[[], object]) -> object:
            configs.lookup = lambda *key: lookup(*key)._replace(library=library)  # type: ignore[assignment]
            try:
                return call()
            finally:
                configs.lookup = lookup

        row, operand, label = rows[name], scaled[name], f"{'library' if library else 'triton'}"
        label += ", half" if name == "half" else ""
        return {
            f"d_hidden, {label}": lambda: run(lambda: head.d_hidden(chunk, n, weight, dtype, row)),
            f"d_weight, {label}": lambda: run(lambda: head.d_weight(chunk, operand, row, d_weight, False)),
        }

    logits = torch.empty(n, shape.vocab, dtype=dtype, device=DEVICE)
    score = partial(head.score, x, parameters, targets, anchor, ones)
    calls: dict[str, Callable[[], object]] = {
        "torch.mm": lambda: torch.mm(x, weight.T, out=logits),
        "sweep": lambda: score(None, None),
        "sweep, stored": lambda: score(chunk, None),
        **products("factor", True),
        **products("factor", False),
        **products("half", False),
    }
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):  # in turn: clocks drift with temperature
        for name, call in calls.items():
            times[name].append(1000 * seconds(call))
    table.heading(f"phases, H {shape.hidden}, V {shape.vocab:,}, {dtype}, {n:,} packed tokens")
    for name, spent in times.items():
        spent.sort()
        median = spent[len(spent) // 2]
        row: Row = {"contender": name, "H": shape.hidden, "V": shape.vocab, "tokens": n, "dtype": str(dtype)[6:]}
        row |= {"milliseconds": median, "milliseconds_min": spent[0], "milliseconds_max": spent[-1]}
        row |= {"tflops": 2e-9 * n * shape.hidden * shape.vocab / median, "extra_MiB": allocated(calls[name]) / MIB}
        table.add(row)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, default=[Shape.parse("4096x151936")])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--loss", nargs="+", default=["dpo", "ppo"])
    parser.add_argument("--head", nargs="+", choices=["trained", "frozen"], default=["trained", "frozen"])
    parser.add_argument("--contenders", nargs="+", default=list(PEERS))
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048, help="of a sequence; the first half is prompt")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    if reason := kernels.why_not("triton"):
        parser.exit(1, f"head_gpu: needs a GPU and Triton: {reason}\n")
    _peers.CONTENDERS[FOUR_PASSES] = partial(_peers._fastpref, workspace=512 * MIB, max_extra_bytes=0)
    dtype = getattr(torch, chosen.dtype)
    settings = Settings(device=DEVICE, shapes=chosen.shapes, dtypes=[dtype], rounds=chosen.rounds)
    table, failed = Table("head_gpu", suite.COLUMNS, _peers.PACKAGES, chosen.json), False
    for shape in chosen.shapes:
        n = chosen.pairs * chosen.length
        phases(Table("head_gpu phases", COLUMNS, ("torch", "triton"), chosen.json), shape, n, dtype, chosen.rounds)
        torch.cuda.empty_cache()
        inputs = batch(shape, chosen.pairs, chosen.length, dtype).to(DEVICE)
        # the float64 pass of `sampled` is 10 TFLOP, a minute of the host's and a moment of the GPU's
        exact = exact_logps(inputs.hidden, inputs.weight, inputs.targets)
        inputs = replace(inputs, old_logps=(exact + 0.1 * torch.randn_like(exact)).float())
        for loss in chosen.loss:
            true = suite.truth(loss, inputs)
            for head in chosen.head:
                try:
                    case = suite.case_of(loss, head == "trained", inputs, true, settings)
                    suite.fill(table, case, settings, chosen.contenders)
                except Exception:  # fastpref's own: the other tables are measured, and the status tells
                    traceback.print_exc()
                    failed = True
                torch.cuda.empty_cache()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
