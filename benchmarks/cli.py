"""`fastpref bench`: the head and GAE against what else there is, on this machine.

    fastpref bench --quick                       DPO head, selective, gae, accuracy: under two minutes on two cores
    fastpref bench head --shape Llama-3-8B       one suite, on the head of a model: its H and V, as many tokens as fit
    fastpref bench head --loss dpo ppo --head frozen --dtype bfloat16 --json rows.jsonl --plot plot.png
    fastpref bench --check                       ratios against the baseline: has something become slower?

Suites: head (log-probs, SFT, DPO, KTO, PPO and GRPO), selective (log-probs from logits that exist), gae, accuracy
(against float64), memory (the longest sequence that fits), scaling (cost as N, V and T grow), ablation (each
optimisation off), trainer (whole DPO steps beside TRL's; fetches a model). Every contender's answer is checked before
it is timed. Peers that are not installed are named as such; pip install 'fastpref[bench]' has most of them.
benchmarks/run_cpu.sh makes the committed figures of head and GAE on a CPU, README's table and the plot.

Inputs are peaked, as a model's are, and half of each sequence is prompt: random hidden states make every softmax flat,
and then whoever skips small probabilities skips everything. --inputs real takes hidden states of SmolLM2-135M over
film critics' pairs, which are fetched; so does the accuracy suite without --quick.
"""

import argparse
import importlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from fastpref.benchmarks._inputs import MODELS, Shape
from fastpref.benchmarks._losses import LOSSES
from fastpref.benchmarks._measure import Row
from fastpref.benchmarks._settings import Settings

SUITES = ("head", "selective", "gae", "accuracy", "memory", "scaling", "ablation", "trainer")
MODULES = {"trainer": "trainer_trl"}  # of a suite that is not called as its module is
DEFAULT = ("head", "selective", "gae", "accuracy")


def parser() -> argparse.ArgumentParser:
    from fastpref.benchmarks._peers import CONTENDERS

    found = argparse.ArgumentParser(
        prog="fastpref bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; none: {', '.join(DEFAULT)}")
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--shape", nargs="+", default=["SmolLM2-135M"], help=f"HxV, or of {', '.join(MODELS)}")
    found.add_argument("--dtype", nargs="+", choices=["bfloat16", "float16", "float32"], default=None)
    found.add_argument("--loss", nargs="+", choices=list(LOSSES), help="of the head suite")
    found.add_argument("--head", nargs="+", choices=["trained", "frozen"], default=["trained", "frozen"])
    found.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), metavar="NAME", help="of the head's suites")
    found.add_argument("--pairs", type=int, help="sequences are twice as many; none: what fits")
    found.add_argument("--length", type=int, help="of a sequence, the first half prompt; none: what fits")
    found.add_argument("--rounds", type=int, help="of timing; 5, or 3 with --quick")
    found.add_argument(
        "--longest", type=float, help="seconds for all rounds of one contender of the head suite; 60, or 3"
    )
    found.add_argument("--memory-gib", type=float, default=1.0, help="of the memory suite")
    found.add_argument("--inputs", choices=["peaked", "real"], default="peaked", help="of the head suite")
    found.add_argument("--quick", action="store_true", help="smaller, bfloat16 only, less of everything")
    found.add_argument("--json", type=Path, help="rows are appended to this file, a line each")
    found.add_argument("--plot", type=Path, help="a picture of the rows, .png or .svg")
    found.add_argument("--check", action="store_true", help="compare ratios with baseline.json; 1 if one is worse")
    return found


def main(argv: Sequence[str]) -> int:
    """`fastpref bench ARGV...`."""
    chosen = parser().parse_args(argv)
    unknown = [name for name in chosen.suites if name not in SUITES]
    if unknown:
        raise ValueError(f"bench: suites must be of {', '.join(SUITES)}; got {unknown[0]!r}")
    if chosen.plot and find_spec("matplotlib") is None:
        raise ImportError("bench: --plot needs matplotlib: pip install 'fastpref[bench]'")
    if chosen.check:
        from fastpref.benchmarks import check

        return check.main()
    settings = settings_of(chosen)
    rows: list[Row] = []
    for name in chosen.suites or DEFAULT:
        rows += importlib.import_module(f"fastpref.benchmarks.{MODULES.get(name, name)}").run(settings)
    if chosen.plot:
        from fastpref.benchmarks.plot import draw

        draw(rows, chosen.plot)
        print(f"\n{chosen.plot}")
    return 0


def settings_of(chosen: argparse.Namespace) -> Settings:
    dtypes = chosen.dtype or (["bfloat16"] if chosen.quick else ["bfloat16", "float32"])
    losses = chosen.loss or (["dpo"] if chosen.quick else list(LOSSES))
    if chosen.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"bench: device {chosen.device} was asked for; PyTorch sees no CUDA device")
    shapes = [Shape.parse(text) for text in chosen.shape]
    if chosen.inputs == "real" and [shape.model for shape in shapes] != ["SmolLM2-135M"]:
        raise ValueError(f"bench: inputs real are of SmolLM2-135M alone; got shape {' '.join(chosen.shape)}")
    return Settings(
        device=chosen.device,
        shapes=shapes,
        dtypes=[getattr(torch, name) for name in dtypes],
        losses=losses,
        heads=chosen.head,
        contenders=chosen.contenders,
        rounds=chosen.rounds or (3 if chosen.quick else 5),
        longest=chosen.longest or (3.0 if chosen.quick else 60.0),
        pairs=chosen.pairs,
        length=chosen.length,
        memory_gib=chosen.memory_gib,
        quick=chosen.quick,
        real=chosen.inputs == "real",
        json=chosen.json,
    )
