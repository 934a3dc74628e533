"""Resident memory of a DPO step's head beyond its inputs, outputs and gradients, beside what plan() says; Linux.

    python benchmarks/memory_cpu.py [--shape 896x151936] [--workspace 256 32] [--dtype bfloat16] [--json FILE]

Each row is a process of its own: how far its resident set rises during one forward and backward of the policy
(log-probs of the reference given), less the gradients it returns. The bound is the workspace, and what plan() names
beside it; `max`: with max_extra_bytes as large as the workspace.
`time` is the median over the same step at the first workspace, run in turn in this process.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpref import linear_preference_loss, plan
from fastpref.benchmarks._inputs import Batch, Shape, batch
from fastpref.benchmarks._losses import BETA, dpo_of_sums
from fastpref.benchmarks._measure import MIB, Row, Table, against, or_reason, resident
from fastpref.benchmarks._peers import PACKAGES, gradients, naive_logps

COLUMNS = (
    ("resident MiB", "resident_MiB", ".0f"),
    ("planned MiB", "planned_MiB", ".0f"),
    ("chunk", "chunk_MiB", ".0f"),
    ("accumulator", "accumulator_MiB", ".0f"),
    ("passes", "passes", "d"),
    ("step s", "seconds", ".3f"),
    ("time", "ratio", ".2f"),
)


def reference(inputs: Batch) -> Tensor:
    """(2B,) sums under some reference: which one does not matter to memory."""
    return torch.linspace(-9.0, -8.0, inputs.hidden.shape[0])


def fused(inputs: Batch, **options: Any) -> Tensor:
    options |= {"beta": BETA, "ref_logps": reference(inputs)}
    return linear_preference_loss(inputs.hidden, inputs.weight, inputs.targets, **options).loss


def naive(inputs: Batch) -> Tensor:
    return dpo_of_sums(naive_logps(inputs.hidden, inputs.weight, inputs.targets).sum(-1), reference(inputs))


def prepare(
    step: Callable[[Batch], Tensor], make: Callable[[], Batch], trained: bool
) -> tuple[Callable[[], object], Callable[[], object]]:
    inputs, few = make(), batch(Shape(64, 512), 1, 4, torch.bfloat16)
    return partial(gradients, step, few, trained), partial(gradients, step, inputs, trained)


def contenders(workspaces: Sequence[int]) -> dict[str, Callable[[Batch], Tensor]]:
    found: dict[str, Callable[[Batch], Tensor]] = {}
    for size in workspaces:
        found[f"fastpref {size}"] = partial(fused, workspace=size * MIB)
    least = min(workspaces)
    found[f"fastpref {least} max"] = partial(fused, workspace=least * MIB, max_extra_bytes=least * MIB)
    return found | {"naive": naive}


def measure(
    step: Callable[[Batch], Tensor], inputs: Batch, make: Callable[[], Batch], trained: bool, first: Any, rounds: int
) -> Row:
    call = partial(gradients, step, inputs, trained)
    returned = sum(x.nbytes for x in call()[1])
    row: Row = {"resident_MiB": (resident(prepare, step, make, trained) - returned) / MIB}
    row |= against(first, call, rounds)
    if isinstance(step, partial):
        sizes = {"dtype": inputs.weight.dtype, "trainable_head": trained, "couples": "pair", **step.keywords}
        planned = plan(len(inputs.live), *reversed(inputs.weight.shape), **sizes)
        row |= {"planned_MiB": planned.peak_bytes / MIB, "chunk_MiB": planned.chunk_bytes / MIB}
        row |= {"accumulator_MiB": planned.accumulator_bytes / MIB, "passes": planned.passes}
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=Shape.parse, default=Shape(896, 151_936))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--workspace", type=int, nargs="+", default=[256, 32], help="MiB")
    parser.add_argument("--head", nargs="+", choices=["trained", "frozen"], default=["trained", "frozen"])
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="of a sequence; the first half is prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    table = Table("memory_cpu", COLUMNS, PACKAGES[:1], chosen.json)
    make = partial(batch, chosen.shape, chosen.pairs, chosen.length, getattr(torch, chosen.dtype))
    inputs = make()
    for head in chosen.head:
        steps = contenders(chosen.workspace)
        first = partial(gradients, next(iter(steps.values())), inputs, head == "trained")
        returned = sum(x.nbytes for x in first()[1]) / MIB
        table.heading(
            f"dpo, {head} head, H {chosen.shape.hidden}, V {chosen.shape.vocab:,}, {chosen.dtype}; "
            f"{len(inputs.live):,} tokens; gradients of {returned:.0f} MiB are not counted; fastpref W: workspace, MiB"
        )
        about = {"head": head, "H": chosen.shape.hidden, "V": chosen.shape.vocab, "dtype": chosen.dtype}
        for name, step in steps.items():
            row = or_reason(name, partial(measure, step, inputs, make, head == "trained", first, chosen.rounds))
            table.add({"contender": name, **about, "tokens": len(inputs.live), **row})


if __name__ == "__main__":
    main()
