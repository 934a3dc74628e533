"""GAE against the time torch.add takes to move the same bytes, and against the loops that RLHF code runs.

    python -m fastpref.benchmarks.gae [--shapes 256x1024] [--masks none completions random] [--device cpu]
                                      [--rounds 20] [--json FILE.jsonl]

The bound: rewards, values and mask are read, advantages and returns written, 17 bytes a step (16 without a mask).
torch.add of fp32 moves 12 an element, so it gets 17 / 12 as many elements, and an output that is there already.
`verl` and `OpenRLHF` are the loops over time of those projects, written again: compute_gae_advantage_return of verl's
core_algos.py, which whitens (ours beside it is "fastpref, whitened"), and get_advantages_and_returns of OpenRLHF's
experience_maker.py. `torchrl` is its vectorised estimate, which knows no mask. Every answer is compared with float64
before it is timed; one that is another by design says so.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpref import gae, kernels
from fastpref.benchmarks._measure import Absent, Row, Table, WrongAnswer, against, or_reason
from fastpref.benchmarks._settings import Settings
from fastpref.kernels.reference import gae as reference

GAMMA, LAM = 0.99, 0.95
MASKS = ("none", "completions", "random")
SHAPES = ((256, 1024), (32, 8192))  # in cache, but for the second's Python loops: as many steps, eight times as long
ALLOWED = 1e-5  # error over the largest result; fp32 sums of 8,192 steps
COLUMNS = (
    ("us", "us", ",.0f"),
    ("x torch.add", "ratio", ",.2f"),
    ("from", "ratio_min", ",.2f"),
    ("to", "ratio_max", ",.2f"),
    ("error", "error", ".1e"),
)
Answer = tuple[Tensor, Tensor]  # advantages and returns
Case = tuple[Tensor, Tensor, Tensor | None]  # rewards, values, mask


def case(rows: int, steps: int, masks: str, device: str) -> Case:
    """masks: "completions": one run of live steps a row, after a prompt, before padding; "random": 7 steps in 10."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, rows, steps, generator=generator).to(device)
    if masks == "none":
        return rewards, values, None
    if masks == "random":
        return rewards, values, (torch.rand(rows, steps, generator=generator) < 0.7).to(device)
    start = torch.randint(max(steps // 4, 1), (rows, 1), generator=generator)
    end = torch.randint(steps // 2, steps + 1, (rows, 1), generator=generator)
    position = torch.arange(steps)
    return rewards, values, ((position >= start) & (position < end)).to(device)


def _verl(rewards: Tensor, values: Tensor, mask: Tensor | None) -> Answer:
    live = torch.ones_like(rewards) if mask is None else mask.float()
    next_value, last, found = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0]), []
    for t in reversed(range(rewards.shape[1])):
        here = live[:, t]
        advantage = rewards[:, t] + GAMMA * next_value - values[:, t] + GAMMA * LAM * last
        next_value = values[:, t] * here + (1 - here) * next_value
        last = advantage * here + (1 - here) * last
        found.append(last)
    advantages = torch.stack(found[::-1], dim=1)
    returns, count = advantages + values, live.sum()
    mean = (advantages * live).sum() / count
    variance = ((advantages - mean).square() * live).sum() / count * count / (count - 1)
    return (advantages - mean) * torch.rsqrt(variance + 1e-8), returns


def _openrlhf(rewards: Tensor, values: Tensor, mask: Tensor | None) -> Answer:
    if mask is not None:
        rewards, values = rewards * mask, values * mask
    last, found = torch.zeros_like(rewards[:, 0]), []
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        last = rewards[:, t] + GAMMA * next_value - values[:, t] + GAMMA * LAM * last
        found.append(last)
    advantages = torch.stack(found[::-1], dim=1)
    return advantages, advantages + values


def _torchrl(rewards: Tensor, values: Tensor, mask: Tensor | None) -> Answer:
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    def column(x: Tensor) -> Tensor:
        return x[..., None]

    done = torch.zeros_like(rewards, dtype=torch.bool)
    next_values = torch.cat((values[:, 1:], torch.zeros_like(values[:, :1])), dim=1)
    advantages, returns = vec_generalized_advantage_estimate(
        GAMMA, LAM, column(values), column(next_values), column(rewards), column(done), column(done)
    )
    return advantages[..., 0], returns[..., 0]


def _fastpref(rewards: Tensor, values: Tensor, mask: Tensor | None, whiten: bool = False) -> Answer:
    return gae(rewards, values, mask=mask, gamma=GAMMA, lam=LAM, whiten=whiten)


def _torch(rewards: Tensor, values: Tensor, mask: Tensor | None) -> Answer:
    run: Any = kernels.choose("gae", rewards.device.type, "torch")
    advantages, returns = run.gae(rewards, values, mask, None, None, GAMMA, LAM)[0]
    return advantages, returns


WHITENED = ("fastpref, whitened", "verl")
CONTENDERS: dict[str, Callable[[Tensor, Tensor, Tensor | None], Answer]] = {
    "fastpref": _fastpref,
    "fastpref, whitened": partial(_fastpref, whiten=True),
    "fastpref's torch": _torch,
    "verl": _verl,
    "OpenRLHF": _openrlhf,
    "torchrl": _torchrl,
}
LOOPS = ("verl", "OpenRLHF")


def error(found: Answer, given: Case, whitened: bool) -> float:
    """Over the largest true one, at live steps: of advantages and of returns, the larger."""
    rewards, values, mask = given
    live = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    advantages, returns = reference.gae(rewards.double(), values.double(), mask, None, None, GAMMA, LAM)[0]
    if whitened:
        some = advantages[live]
        advantages = (advantages - some.mean()) / (some.var() + 1e-8).sqrt()
    return max(
        float((x - true)[live].abs().max() / true[live].abs().max())
        for x, true in zip(found, (advantages, returns), strict=True)
    )


def measure(name: str, given: Case, masks: str, rounds: int) -> Row:
    if name == "OpenRLHF" and masks == "random":
        raise Absent("a masked step inside a row counts as a step of reward and value 0")
    if name == "torchrl" and masks != "none":
        raise Absent("it knows no mask")
    call = partial(CONTENDERS[name], *given)
    off = error(call(), given, name in WHITENED)
    if not off <= ALLOWED:
        raise WrongAnswer(f"error {off:.1e}")
    n = given[0].numel()
    left, right, out = torch.randn(3, -(-(16 + (given[2] is not None)) * n // 12), device=given[0].device)
    # a call of a loop takes as long as hundreds of the others
    found = against(lambda: torch.add(left, right, out=out), call, max(rounds // 5, 2) if name in LOOPS else rounds)
    return {"error": off, "us": 1e6 * found["seconds"], **found}


def tabulate(
    shapes: Sequence[tuple[int, int]], masks: Sequence[str], device: str, rounds: int, json: Path | None
) -> list[Row]:
    table = Table("gae", COLUMNS, ("torch", "torchrl"), json)
    for rows, steps in shapes:
        for name in masks:
            table.heading(f"{rows} rows of {steps} steps, mask: {name}, on {device}")
            given = case(rows, steps, name, device)
            for contender in CONTENDERS:
                found = or_reason(contender, partial(measure, contender, given, name, rounds))
                table.add({"contender": contender, "shape": f"{rows}x{steps}", "mask": name, "on": device, **found})
    return table.rows


def run(settings: Settings) -> list[Row]:
    """The suite of `fastpref bench`."""
    shapes, masks, rounds = (SHAPES[:1], MASKS[1:2], 5) if settings.quick else (SHAPES, MASKS, 20)
    return tabulate(shapes, masks, settings.device, rounds, settings.json)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["x".join(map(str, shape)) for shape in SHAPES])
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="appends a line a row")
    given = parser.parse_args(arguments)
    shapes = [(int(rows), int(steps)) for rows, steps in (text.split("x") for text in given.shapes)]
    tabulate(shapes, given.masks, given.device, given.rounds, given.json)


if __name__ == "__main__":
    main()
