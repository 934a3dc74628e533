"""What a step costs as tokens (N), vocabulary (V) and the length of a sequence (T) grow; the slope in log-log.

By hand all three slopes are 1 in FLOPs: 2 n H V a product. Below it means that something else is paid once, such as
reading the head for few tokens; above it, that something no longer fits. N: PPO, whose tokens are independent; V: PPO;
T: DPO of one pair, which must be seen whole before its weight is known.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from fastpref.benchmarks._inputs import Shape, batch
from fastpref.benchmarks._losses import LOSSES
from fastpref.benchmarks._measure import MIB, Row, Table, against, allocated, bare_products, fastest_products, or_reason
from fastpref.benchmarks._peers import PACKAGES, gradients, load
from fastpref.benchmarks._settings import Settings

COLUMNS = (
    ("tokens", "tokens", "d"),
    ("V", "V", ",d"),
    ("T", "length", "d"),
    ("step s", "seconds", ".4f"),
    ("ratio", "ratio", ".2f"),
    ("extra MiB", "extra_MiB", ".0f"),
    ("slope", "slope", ".2f"),
)


def points(shape: Shape, quick: bool) -> Iterator[tuple[str, str, list[tuple[Shape, int, int]]]]:
    """(what grows, loss, [(shape, pairs, length)])."""
    steps = range(3) if quick else range(5)
    yield "N", "ppo", [(shape, 2**i, 128) for i in steps]
    vocabs = [Shape(shape.hidden, shape.vocab * 2**i // 8 + 8 * i + 3) for i in range(0, 5, 2 if quick else 1)]
    yield "V", "ppo", [(s, 2, 128) for s in vocabs]
    yield "T", "dpo", [(shape, 1, 128 * 2**i) for i in steps]


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of log y over log x, least squares."""
    u, v = ([math.log(value) for value in values] for values in (x, y))
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    return sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / sum((a - mean_u) ** 2 for a in u)


def run(settings: Settings) -> list[Row]:
    """The first shape and dtype; contenders: naive and fastpref, unless told."""
    table = Table("scaling", COLUMNS, PACKAGES, settings.json)
    shape, dtype = settings.shapes[0], settings.dtypes[0]
    for grows, loss, cases in points(shape, settings.quick):
        table.heading(f"{loss}, trained head, {shape.model}, {str(dtype).removeprefix('torch.')}: {grows} grows")
        for name in settings.contenders or ("fastpref", "naive"):
            rows: list[Row] = []
            for one in cases:
                about = {"contender": name, "grows": grows, "loss": loss, "model": shape.model, "H": shape.hidden}
                about |= {"V": one[0].vocab, "length": one[2], "tokens": one[1] * one[2], "dtype": str(dtype)[6:]}
                rows.append(about | or_reason(name, partial(measure, name, loss, dtype, settings, *one)))
            timed = [row for row in rows if "seconds" in row]
            if len(timed) > 1:
                key = {"N": "tokens", "V": "V", "T": "length"}[grows]
                timed[-1]["slope"] = slope([row[key] for row in timed], [row["seconds"] for row in timed])
            for row in rows:
                table.add(row)
    return table.rows


def measure(name: str, loss: str, dtype: torch.dtype, settings: Settings, shape: Shape, pairs: int, length: int) -> Row:
    inputs = batch(shape, pairs, length, dtype, sampled=loss == "ppo").to(settings.device)
    products = partial(bare_products, len(inputs.live), *shape, True, LOSSES[loss].reference, device=settings.device)
    bare, _ = fastest_products(dtype, products)
    call = partial(gradients, load(name).step(loss), inputs, True)
    return against(bare, call, settings.rounds) | {"extra_MiB": allocated(call) / MIB}
