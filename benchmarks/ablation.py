"""Each optimisation of the head turned off by its switch, and the factor it costs beside the one that was predicted.

passes      max_extra_bytes=0 forbids the fp32 gradient that lets PPO over several chunks form its gradients in forward:
            plan() says 4 passes for 3
rows        prompt targets scored instead of ignored, as many as completion targets; their upstream gradient is 0, so
            they still leave the two products of the backward: (2 + 1 + 1) / 3
rows, all   the same with an upstream gradient of 1e-20, which keeps them in every product: 6 / 3
exponentials  backend="torch": the same products in fp32, exponentials and sums by separate operations. Predicted from
            the products' own time: what both backends take on a head of H = 8, where next to nothing but the
            exponentials is left, added and taken off
packing     a padded batch in place of a packed one, a third of it padding: the head skips padding, so nothing. What
            packing saves is the backbone's, and the trainer's benchmark shows it

`on` and `off` run in turn; `factor` is the median of their ratio.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref import linear_logps, linear_policy_loss, plan
from fastpref.benchmarks._inputs import IGNORE, Batch, Shape, batch
from fastpref.benchmarks._measure import MIB, Row, Table, against
from fastpref.benchmarks._settings import Settings

COLUMNS = (
    ("on s", "bare_s", ".4f"),
    ("off s", "seconds", ".4f"),
    ("predicted", "predicted", ".2f"),
    ("factor", "ratio", ".2f"),
    ("lowest", "ratio_min", ".2f"),
    ("highest", "ratio_max", ".2f"),
)


class Switch(NamedTuple):
    name: str
    dtype: torch.dtype
    predicted: Callable[[], float]
    on: Callable[[], object]
    off: Callable[[], object]


def run(settings: Settings) -> list[Row]:
    """The first shape; bf16, and fp32 for the exponentials, so that both backends multiply the same way."""
    table = Table("ablation", COLUMNS, ("torch",), settings.json)
    shape = settings.shapes[0]
    table.heading(f"one optimisation off at a time, trained head, {shape.model}")
    pairs, length = (2, 128) if settings.quick else (4, 256)
    for switch in switches(shape, pairs, length, settings):
        about = {
            "contender": switch.name,
            "model": shape.model,
            "H": shape.hidden,
            "V": shape.vocab,
            "tokens": pairs * length,
            "dtype": str(switch.dtype).removeprefix("torch."),
        }
        measured = against(switch.on, switch.off, settings.rounds)
        table.add({**about, "predicted": switch.predicted(), **measured})
    return table.rows


def switches(shape: Shape, pairs: int, length: int, settings: Settings) -> Iterator[Switch]:
    half = torch.bfloat16
    inputs = batch(shape, pairs, length, half, sampled=True).to(settings.device)
    n = len(inputs.live)
    workspace = max(2 * n * shape.vocab, 128 * MIB) // 2  # the chunk does not hold all tokens
    sizes: dict[str, Any] = {"dtype": half, "trainable_head": True, "couples": "token", "workspace": workspace}
    passes = [plan(n, *shape, **sizes, max_extra_bytes=limit).passes for limit in (None, 0)]
    saving = partial(ppo, inputs, workspace=workspace)
    yield Switch("passes", half, lambda: passes[1] / passes[0], saving, partial(saving, max_extra_bytes=0))

    every = inputs.targets.where(inputs.targets != IGNORE, inputs.targets.roll(length // 2, dims=1))
    weighted = inputs.upstream.where(inputs.targets != IGNORE, 0.0)
    skipping = partial(logps, inputs.hidden, inputs.weight, inputs.targets, weighted)
    zeros = partial(logps, inputs.hidden, inputs.weight, every, weighted)
    yield Switch("rows", half, lambda: 4 / 3, skipping, zeros)
    tiny = weighted.where(weighted != 0, 1e-20)
    yield Switch("rows, all", half, lambda: 2.0, skipping, partial(logps, inputs.hidden, inputs.weight, every, tiny))

    wide = batch(shape, pairs, length, torch.float32).to(settings.device)
    fused = partial(logps, wide.hidden, wide.weight, wide.targets, weighted)
    eager = partial(fused, backend="torch")
    yield Switch("exponentials", torch.float32, partial(eager_exponentials, shape, fused, wide), fused, eager)

    padded, packed = padding(inputs, length)
    yield Switch("packing", half, lambda: 1.0, packed, padded)


def ppo(inputs: Batch, **options: Any) -> None:
    hidden, weight = inputs.hidden.detach().requires_grad_(), inputs.weight.detach().requires_grad_()
    old: dict[str, Any] = {"advantages": inputs.advantages, "old_logps": inputs.old_logps}
    linear_policy_loss(hidden, weight, inputs.targets, **old, **options).loss.backward()


def logps(hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor, **options: Any) -> None:
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    torch.autograd.grad(linear_logps(*leaves, targets, **options), leaves, upstream)


def eager_exponentials(shape: Shape, fused: Callable[[], object], wide: Batch) -> float:
    """1 + (what eager exponentials take more than fused ones) / (a fused step)."""
    narrow = wide.hidden[..., :8].contiguous(), wide.weight[:, :8].contiguous()
    step = partial(logps, *narrow, wide.targets, wide.upstream)
    extra = against(step, partial(step, backend="torch"), 3)
    return 1 + (extra["seconds"] - extra["bare_s"]) / against(fused, fused, 3)["bare_s"]


def padding(inputs: Batch, length: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """(a padded step, the same packed): sequences from a third of `length` to all of it, two thirds on average."""
    n = len(inputs.targets)
    lengths = torch.linspace(length / 3, length, n, device=inputs.targets.device).long()
    inside = torch.arange(length, device=lengths.device) < lengths[:, None]
    targets = inputs.targets.where(inside, IGNORE)
    padded = partial(logps, inputs.hidden, inputs.weight, targets, inputs.upstream)
    packed = partial(logps, inputs.hidden[inside], inputs.weight, targets[inside], inputs.upstream[inside])
    return padded, packed
