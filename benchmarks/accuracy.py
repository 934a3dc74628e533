"""How far log-probs and gradients of the head lie from float64 on the same rounded inputs.

real: hidden states and head of SmolLM2-135M-Instruct (H 576, V 49,152) over film critics' quotes, both fetched on
first use (see fastpref.trainer.demo). peaked: synthetic rows for a head of that size, one logit of each raised by up to
90, a third of the labels anywhere, so up to 100 nats below the maximum. Per token: rms and largest error of the
log-prob, nats; `sum 1024` the largest error of a sum over 1,024 tokens in a row. Gradients: of sum(g logp) with g
random, Frobenius, relative. The best of a column is marked *.
"""

from functools import partial

import torch
from torch import Tensor

from fastpref.benchmarks._inputs import Exact, Shape, exact, head_weight, peaked_rows, relative_error
from fastpref.benchmarks._measure import Row, Table, or_reason
from fastpref.benchmarks._peers import COMPILED, CONTENDERS, LOSSES_ONLY, PACKAGES, SECOND, load
from fastpref.benchmarks._real import running_text
from fastpref.benchmarks._settings import Settings

SUM = 1024
COLUMNS = tuple(
    (heading, key, ".1e")
    for heading, key in (
        ("rms", "rms"),
        ("largest", "largest"),
        ("sum 1024", "sum"),
        ("d_hidden", "d_hidden_error"),
        ("d_weight", "d_weight_error"),
    )
)


def real(n: int, _: Shape) -> tuple[Tensor, Tensor, Tensor]:
    return running_text(n, SUM)


def peaked(n: int, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = head_weight(shape, generator)
    hidden, targets = peaked_rows(weight, n, generator, top=90.0)
    return hidden.view(-1, min(SUM, n), shape.hidden), weight, targets.view(-1, min(SUM, n))


INPUTS = {"real": real, "peaked": peaked}


def weighted_sum(upstream: Tensor, logps: Tensor) -> Tensor:
    return (logps * upstream).sum()


def measure(name: str, inputs: tuple[Tensor, Tensor, Tensor], upstream: Tensor, true: Exact) -> Row:
    hidden, weight, targets = inputs
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    scores = load(name).logps
    assert scores is not None
    logps = scores(*leaves, targets)
    d_hidden, d_weight = torch.autograd.grad(weighted_sum(upstream, logps.float()), leaves)
    error = logps.detach().double() - true.logps
    return {
        "rms": float(error.square().mean().sqrt()),
        "largest": float(error.abs().max()),
        "sum": float(error.sum(-1).abs().max()),
        "d_hidden_error": relative_error([d_hidden.flatten(0, 1)], [true.d_hidden]),
        "d_weight_error": relative_error([d_weight], [true.d_weight]),
    }


def mark_best(rows: list[Row]) -> None:
    for _, key, _ in COLUMNS:
        found = [row for row in rows if key in row]
        if found:
            min(found, key=lambda row: row[key]).setdefault("best", []).append(key)


def run(settings: Settings) -> list[Row]:
    """Real inputs and peaked ones, in every dtype; --quick: 256 peaked ones, nobody who is compiled or slow."""
    table = Table("accuracy", COLUMNS, PACKAGES, settings.json)
    left_out = (*LOSSES_ONLY, *((*COMPILED, *SECOND) if settings.quick else ()))
    peers = [name for name in settings.contenders or CONTENDERS if name not in left_out]
    for kind in ("peaked",) if settings.quick else INPUTS:
        hidden, weight, targets = INPUTS[kind](256 if settings.quick else 8 * SUM, settings.shapes[0])
        upstream = torch.randn(targets.shape, generator=torch.Generator().manual_seed(1)).to(settings.device)
        for dtype in settings.dtypes:
            device = settings.device
            inputs = hidden.to(device, dtype), weight.to(device, dtype), targets.to(device)
            true = exact(*inputs, partial(weighted_sum, upstream))
            name = str(dtype).removeprefix("torch.")
            table.heading(
                f"{kind}, {name}; {targets.numel():,} tokens, H {weight.shape[1]}, V {weight.shape[0]:,}; entropy "
                f"{true.entropy:.1f} nats, targets up to {true.gap:.0f} below the maximum"
            )
            about = {"inputs": kind, "dtype": name, "tokens": targets.numel()}
            rows = [
                {"contender": peer, **about, **or_reason(peer, partial(measure, peer, inputs, upstream, true))}
                for peer in peers
            ]
            mark_best(rows)
            for row in rows:
                table.add(row)
    return table.rows
