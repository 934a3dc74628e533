"""One step of the head on a CPU, DPO or PPO, as a multiple of the matrix products it cannot avoid; errors and memory.

    python benchmarks/head_cpu.py [--shapes 576x49152 ...] [--dtype bfloat16 float32] [--loss dpo ppo]
                                  [--head trained frozen] [--peers fastpref naive ...] [--json FILE]

A DPO step is the policy's forward and backward and the reference's forward; a PPO step the policy's forward and
backward under the clipped loss, old log-probs given. The bound: 2 n H V FLOPs a product, n completion tokens (prompt
tokens need none), for logits, d_hidden, d_weight unless the head is frozen, and the reference's logits. It is timed as
torch.mm into outputs that exist, in the faster of the inputs' dtype and fp32, right before every timed step: `ratio` is
the median of step over products. Errors are against float64 on the same rounded inputs, Frobenius and relative for
gradients. `extra MiB`: torch's allocations alive at once beyond the inputs, the returned gradients among them.
--peers measures some rows only and --json appends, so that a long table can be made in parts.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastpref import plan
from fastpref.benchmarks._inputs import Batch, Exact, Shape, batch, exact, exact_logps, relative_error
from fastpref.benchmarks._losses import clipped_of_tokens, dpo_of_sums
from fastpref.benchmarks._measure import MIB, Row, Table, against, allocated, bare_products, fastest_products, or_reason
from fastpref.benchmarks._peers import CONTENDERS, PACKAGES, gradients, load

SHAPES = ("576x49152", "896x151936", "2048x32000")
COLUMNS = (
    ("step s", "seconds", ".3f"),
    ("ratio", "ratio", ".2f"),
    ("lowest", "ratio_min", ".2f"),
    ("highest", "ratio_max", ".2f"),
    ("extra MiB", "extra_MiB", ".0f"),
    ("loss error", "loss_error", ".1e"),
    ("d_hidden", "d_hidden_error", ".1e"),
    ("d_weight", "d_weight_error", ".1e"),
    ("positions", "positions", "d"),
)


def truth(loss: str, inputs: Batch) -> Exact:
    if loss == "ppo":
        return exact(inputs.hidden, inputs.weight, inputs.targets, lambda logps: clipped_of_tokens(logps, inputs))
    ref = exact_logps(inputs.ref_hidden, inputs.ref_weight, inputs.targets).sum(-1)
    return exact(inputs.hidden, inputs.weight, inputs.targets, lambda logps: dpo_of_sums(logps.sum(-1), ref))


def errors(got: tuple[float, list[Tensor]], true: Exact | None, live: Tensor) -> Row:
    if true is None:
        return {}
    loss, (d_hidden, *d_weight) = got
    row = {
        "loss_error": abs(loss - true.loss),
        "d_hidden_error": relative_error([d_hidden.flatten(0, -2)[live]], [true.d_hidden]),
    }
    return row | ({"d_weight_error": relative_error(d_weight, [true.d_weight])} if d_weight else {})


@dataclass(frozen=True)
class Case:
    """What all rows of one table share."""

    loss: str
    trained: bool
    inputs: Batch
    true: Exact | None
    bare: Callable[[], None]
    rounds: int


def measure(name: str, case: Case) -> Row:
    contender = load(name)
    call = partial(gradients, contender.step(case.loss), case.inputs, case.trained)
    row = errors(call(), case.true, case.inputs.live)
    row |= against(case.bare, call, case.rounds)
    row["positions"] = case.inputs.targets.numel() if contender.all_positions else len(case.inputs.live)
    return row | {"extra_MiB": allocated(call) / MIB}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, default=[Shape.parse(text) for text in SHAPES])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--loss", nargs="+", choices=["dpo", "ppo"], default=["dpo", "ppo"])
    parser.add_argument("--head", nargs="+", choices=["trained", "frozen"], default=["trained", "frozen"])
    parser.add_argument("--peers", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="of a sequence; the first half is prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-errors", action="store_true", help="leave out the float64 truth, which takes a while")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    table = Table("head_cpu", COLUMNS, PACKAGES, chosen.json)
    for shape in chosen.shapes:
        for dtype in chosen.dtype:
            inputs = batch(shape, chosen.pairs, chosen.length, getattr(torch, dtype), sampled="ppo" in chosen.loss)
            for loss in chosen.loss:
                true = None if chosen.no_errors else truth(loss, inputs)
                for head in chosen.head:
                    trained = head == "trained"
                    products = partial(
                        bare_products, len(inputs.live), shape.hidden, shape.vocab, trained, loss == "dpo"
                    )
                    bare, bare_dtype = fastest_products(inputs.weight.dtype, products)
                    case = Case(loss, trained, inputs, true, bare, chosen.rounds)
                    fill(table, case, bare_dtype, chosen.peers)


def fill(table: Table, case: Case, bare_dtype: str, peers: Sequence[str]) -> None:
    """One table: a row for each peer."""
    weight, n = case.inputs.weight, len(case.inputs.live)
    (vocab, hidden), dtype = weight.shape, weight.dtype
    couples = "pair" if case.loss == "dpo" else "token"
    planned = plan(n, hidden, vocab, dtype=dtype, trainable_head=case.trained, couples=couples)
    about: Row = {
        "loss": case.loss,
        "head": "trained" if case.trained else "frozen",
        "H": hidden,
        "V": vocab,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": n,
        "bare_products": 2 + case.trained + (case.loss == "dpo"),
        "bare_dtype": bare_dtype,
        "passes_planned": planned.passes,
    }
    title = "{loss}, {head} head, H {H}, V {V:,}, {dtype}, {tokens:,} completion tokens\nbare products: {bare_products}"
    title += ", in {bare_dtype}; fastpref plans {passes_planned} passes for the policy"
    if case.true is not None:
        about |= {"entropy": case.true.entropy, "gap": case.true.gap}
        title += "; entropy {entropy:.1f} nats, targets up to {gap:.0f} below the maximum"
    table.heading(title.format(**about))
    for name in peers:
        table.add({"contender": name, **about, **or_reason(name, partial(measure, name, case))})


if __name__ == "__main__":
    main()
