"""GAE against the time torch.add takes to move the same bytes, and against the loops that RLHF code runs.

    python -m fastpref.benchmarks.gae [--shapes 256x1024] [--masks none completions random] [--device cpu]
                                      [--rounds 20] [--json FILE.jsonl]

The bound: rewards, values and mask are read, advantages and returns written, 17 bytes a step (16 without a mask).
torch.add of fp32 moves 12 an element, so it gets 17 / 12 as many elements, and an output that is there already.
`verl` and `OpenRLHF` are the loops over time of those projects, written again: compute_gae_advantage_return of verl's
core_algos.py, which whitens (ours beside it is "fastpref, whitened"), and get_advantages_and_returns of OpenRLHF's
experience_maker.py. `torchrl` is its vectorised estimate, `rlox` its Rust scan of numpy arrays, `pufferlib` the C++
loop of its V-trace with every ratio 1, which reads the reward of step t at t + 1. The three know no mask; an episode
that ends with the last live step gives the same, but not where masked steps stand between live ones. What a peer wants
its inputs to look like is made before the clock starts. Every answer is compared with float64 before it is timed; one
that is another by design says so.
"""

import argparse
import importlib
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
Call = Callable[[], Answer]
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


def ends(rewards: Tensor, mask: Tensor | None) -> Tensor:
    """Where an episode ends, for who knows no mask: at the last live step of a row."""
    last = torch.zeros_like(rewards, dtype=torch.bool)
    if mask is None:
        last[:, -1] = True
        return last
    position = torch.arange(mask.shape[1], device=mask.device)
    return last.scatter(1, (position * mask).argmax(1, keepdim=True), True)


def _torchrl(rewards: Tensor, values: Tensor, mask: Tensor | None) -> Call:
    # torchrl 0.14.1, objectives/value/functional.py
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    next_values = torch.cat((values[:, 1:], torch.zeros_like(values[:, :1])), dim=1)
    done = ends(rewards, mask)
    columns = [x[..., None].contiguous() for x in (values, next_values, rewards, done, done)]

    def call() -> Answer:
        advantages, returns = vec_generalized_advantage_estimate(GAMMA, LAM, *columns)
        return advantages[..., 0], returns[..., 0]

    return call


def _rlox(rewards: Tensor, values: Tensor, mask: Tensor | None) -> Call:
    # rlox 1.2.0, compute_gae_batched_f32: rows one after the other
    _needs_cpu("rlox", rewards)
    from rlox import compute_gae_batched_f32

    rows, steps = rewards.shape
    flat = [x.float().flatten().numpy() for x in (rewards, values, ends(rewards, mask), rewards.new_zeros(rows))]

    def call() -> Answer:
        advantages, returns = compute_gae_batched_f32(*flat, steps, GAMMA, LAM)
        return torch.from_numpy(advantages).view(rows, steps), torch.from_numpy(returns).view(rows, steps)

    return call


def _pufferlib(rewards: Tensor, values: Tensor, mask: Tensor | None) -> Call:
    # pufferlib 3.0.0, extensions/pufferlib.cpp: advantages into a tensor that is there
    importlib.import_module("pufferlib._C")
    rows, steps = rewards.shape
    state, earned, done, out = rewards.new_zeros(4, rows, steps + 1)
    state[:, :-1], earned[:, 1:], done[:, 1:] = values, rewards, ends(rewards, mask)
    ratios = torch.ones_like(state)

    def call() -> Answer:
        torch.ops.pufferlib.compute_puff_advantage(state, earned, done, ratios, out, GAMMA, LAM, 1.0, 1.0)
        return out[:, :-1], out[:, :-1] + values

    return call


def _needs_cpu(name: str, given: Tensor) -> None:
    if given.device.type != "cpu":
        raise Absent(f"{name} works on numpy arrays")


def _fastpref(rewards: Tensor, values: Tensor, mask: Tensor | None, whiten: bool = False) -> Answer:
    return gae(rewards, values, mask=mask, gamma=GAMMA, lam=LAM, whiten=whiten)


def _torch(rewards: Tensor, values: Tensor, mask: Tensor | None) -> Answer:
    run: Any = kernels.choose("gae", rewards.device.type, "torch")
    advantages, returns = run.gae(rewards, values, mask, None, None, GAMMA, LAM)[0]
    return advantages, returns


WHITENED = ("fastpref, whitened", "verl")
# of a case: what the clock runs over
CONTENDERS: dict[str, Callable[[Tensor, Tensor, Tensor | None], Call]] = {
    "fastpref": partial(partial, _fastpref),
    "fastpref, whitened": partial(partial, _fastpref, whiten=True),
    "fastpref's torch": partial(partial, _torch),
    "verl": partial(partial, _verl),
    "OpenRLHF": partial(partial, _openrlhf),
    "torchrl": _torchrl,
    "rlox": _rlox,
    "pufferlib": _pufferlib,
}
LOOPS = ("verl", "OpenRLHF")
UNMASKED = ("torchrl", "rlox", "pufferlib")


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
    if name in UNMASKED and masks == "random":
        raise Absent("it knows no mask inside an episode")
    call = CONTENDERS[name](*given)
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
    table = Table("gae", COLUMNS, ("torch", "torchrl", "rlox", "pufferlib"), json)
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
    shapes, masks, rounds = (SHAPES[:1], MASKS[:2], 5) if settings.quick else (SHAPES, MASKS, 20)
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
