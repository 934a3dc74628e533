"""GAE and the kernels of losses on a GPU: device time of a captured call, and time of a call from Python.

    python -m fastpref.benchmarks.gae_gpu [--shapes 512x4096 ...] [--rounds 20] [--json FILE.jsonl]

GAE reads rewards, values, mask and dones and writes advantages and returns: 18 bytes a step. The bound is a copy that
reads and writes as many bytes, on buffers in rotation that together are larger than any L2. Device time: replays of a
CUDA graph of many calls, each on a buffer of its own, over their number; it holds no work of the host. Call time: the
public function in a loop, one synchronisation at the end; what Python takes is in it. `torch` is fastpref's fallback in
eager PyTorch. DPO and PPO rows: the kernel beside the functions of fastpref.losses that it repeats, forward and
backward.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpref import gae, kernels
from fastpref.benchmarks._measure import Row, Table, or_reason
from fastpref.heads import _rows
from fastpref.kernels.reference import gae as reference
from fastpref.losses._sums import place
from fastpref.losses.dpo import bind
from fastpref.losses.objective import objective
from fastpref.losses.pairs import Pairs

SHAPES = ("8x512", "512x4096", "64x32768", "1x1000000", "16384x128")  # the second is the yardstick, at most 20 us
ROTATED = 512 * 2**20  # bytes that a graph's calls touch together, at least
BYTES = 18
COLUMNS = (
    ("device us", "device_us", ",.1f"),
    ("call us", "call_us", ",.1f"),
    ("x copy", "ratio", ",.2f"),
    ("GB/s", "gb_per_s", ",.0f"),
    ("error", "error", ".1e"),
)
Call = Callable[[], Any]


def milliseconds(call: Call, times: int) -> float:
    """Of `times` calls, by events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def device_us(calls: Sequence[Call], rounds: int) -> float:
    """Median over replays of a graph of all calls, of one call."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return statistics.median(milliseconds(graph.replay, 1) for _ in range(rounds)) * 1e3 / len(calls)


def call_us(call: Call, rounds: int) -> float:
    call()
    return statistics.median(milliseconds(call, 50) for _ in range(rounds)) * 1e3 / 50


def copies(n_bytes: int, n: int) -> list[Call]:
    """That read and write n_bytes together."""
    pairs = [torch.randn(2, max(n_bytes // 8, 1), device="cuda") for _ in range(n)]
    return [partial(pair[0].copy_, pair[1]) for pair in pairs]


def gae_inputs(rows: int, steps: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw() -> Tensor:
        return torch.rand(rows, steps, generator=generator, device="cuda")

    return {"rewards": draw() - 0.5, "values": draw(), "mask": draw() < 0.8, "dones": draw() < 0.01}


def gae_rows(table: Table, shape: str, rounds: int) -> None:
    rows, steps = map(int, shape.split("x"))
    n_bytes = BYTES * rows * steps
    n = max(2, min(64, -(-ROTATED // n_bytes)))
    every = [gae_inputs(rows, steps, seed) for seed in range(n)]
    options: dict[str, Any] = {"gamma": 0.99, "lam": 0.95}
    ours: Any = gae
    few = {name: x[:4, -4096:].cpu() for name, x in every[0].items()}
    exact = {name: x.double() if x.is_floating_point() else x for name, x in few.items()}
    plain: Any = reference
    truth = plain.gae(*exact.values(), None, 0.99, 0.95)[0]
    copy_us = device_us(copies(n_bytes, n), rounds)

    def measured(call: Callable[..., Any], captured: bool = True) -> Row:
        here = {name: x.cuda() for name, x in few.items()}
        got = torch.stack([x.cpu().double() for x in call(**here)[:2]])
        row = {
            "error": float((got - truth).abs().max() / truth.abs().max()),
            "call_us": call_us(partial(call, **every[0]), rounds),
        }
        if not row["error"] <= 1e-5:
            raise ValueError(f"error {row['error']:.1e}")
        if captured:
            us = device_us([partial(call, **given) for given in every], rounds)
            row |= {"device_us": us, "ratio": us / copy_us, "gb_per_s": n_bytes / us / 1e3}
        return row

    fallback: Any = kernels.choose("gae", "cuda", "torch")
    contenders: dict[str, Callable[[], Row]] = {
        "copy": lambda: {"device_us": copy_us, "ratio": 1.0, "gb_per_s": n_bytes / copy_us / 1e3},
        "fastpref": partial(measured, partial(ours, **options)),
        "fastpref, moments": partial(measured, lambda **given: _moments(**given)),
        "torch": partial(measured, lambda **given: fallback.gae(*given.values(), None, 0.99, 0.95)[0]),
    }
    table.heading(f"gae, {rows:,} rows of {steps:,} steps, {n_bytes / 1e6:,.1f} MB")
    for name, measure in contenders.items():
        table.add({"contender": name, "op": "gae", "shape": shape, "bytes": n_bytes, **or_reason(name, measure)})
    # the same with the whitening itself, which is a launch each for mean, scale and mask; another answer, so no error
    whitened = [partial(ours, **given, **options, whiten=True) for given in every]
    us = device_us(whitened, rounds)
    row = {"device_us": us, "call_us": call_us(whitened[0], rounds), "ratio": us / copy_us}
    table.add({"contender": "fastpref, whitened", "op": "gae", "shape": shape, "bytes": n_bytes, **row})


def _moments(rewards: Tensor, values: Tensor, mask: Tensor, dones: Tensor) -> Tensor:
    run: Any = kernels.choose("gae", "cuda")
    return run.gae(rewards, values, mask, dones, None, 0.99, 0.95, True)[0]


def pair_call(n: int) -> Call:
    sums = [torch.randn(n, device="cuda") * 5 - 30 for _ in range(4)]
    leaves = [x.requires_grad_() for x in sums[:2]]
    pairs, loss = (
        Pairs(leaves[0], leaves[1], sums[2], sums[3]),
        bind("bench", "sigmoid", None, 0.1, "reverse_kl", None, None, False, {}),
    )

    def run() -> list[Tensor]:
        rows = _rows.pair_rows(loss, pairs)
        losses = loss(pairs) if rows is None else rows.losses
        rewards = loss.rewards(pairs) if rows is None else (rows.chosen_rewards, rows.rejected_rewards)
        return [losses.detach(), *rewards, *torch.autograd.grad(losses.mean(), leaves)]

    return run


def token_call(n: int) -> Call:
    logps, old, ref, advantages = (torch.randn(n, device="cuda") * 0.3 for _ in range(4))
    entropy, mask = torch.rand(n, device="cuda"), torch.rand(n, device="cuda") < 0.9
    bounds = torch.arange(9, device="cuda") * (n // 8)
    bounds[-1] = n
    goal = objective(
        *("bench", mask, place("bench", "logps", logps, bounds.int()), torch.float32),
        advantages=advantages,
        old_logps=old,
        ref_logps=ref,
        loss_type="ppo",
        loss_weights=None,
        importance_sampling_level="token",
        token_weights=None,
        kl_coef=0.05,
        kl_estimator="k3",
        use_bias_correction_kl=False,
        entropy_coef=0.01,
        reduction=None,
        num_items=None,
        max_length=None,
        options={},
    )
    leaves = logps.requires_grad_(), entropy.requires_grad_()

    def run() -> list[Tensor]:
        rows = _rows.token_rows(goal, *leaves, bounds)
        losses = goal.losses(*leaves) if rows is None else rows.losses
        metrics = goal.metrics(*leaves) if rows is None else rows.metrics
        return [losses.detach(), *torch.autograd.grad(losses.sum(), leaves), *metrics.values()]

    return run


def loss_rows(table: Table, op: str, n: int, make: Callable[[int], Call], rounds: int) -> None:
    table.heading(f"{op}, {n:,} rows: losses, slopes, metrics")
    call, answers = make(n), {}
    for name in ("fastpref", "functions"):
        real = _rows._on_cuda
        if name == "functions":
            _rows._on_cuda = lambda x: False
        try:
            answers[name] = call()
            row = {"device_us": device_us([call] * 20, rounds), "call_us": call_us(call, rounds)}
        finally:
            _rows._on_cuda = real
        if name == "functions":
            pairs = zip(answers["fastpref"], answers["functions"], strict=True)
            row["error"] = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in pairs)
        table.add({"contender": name, "op": op, "rows": n, **row})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="appends a line a row")
    given = parser.parse_args(arguments)
    if reason := kernels.why_not("cuda"):
        print(f"gae_gpu: fastpref._cuda is not usable here: {reason}", file=sys.stderr)
        return 1
    table = Table("gae_gpu", COLUMNS, ("torch",), given.json)
    for shape in given.shapes:
        gae_rows(table, shape, given.rounds)
    for n in (4, 4096):
        loss_rows(table, "dpo_row", n, pair_call, given.rounds)
    for n in (8192, 262_144):
        loss_rows(table, "ppo_row", n, token_call, given.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
