"""TRL's DPOTrainer and GRPOTrainer on SmolLM2-135M, with fastpref.integrations.trl and without: curves, time, memory.

    python benchmarks/integration_trl.py [--steps 4] [--json benchmarks/results/FILE.jsonl]

fp32, the trainers' own defaults, pairs of film critics' quotes; GRPO samples 8 answers a step and is rewarded for
brevity. Each run is a process of its own. The answer is checked first: with and without, every number that both log
agrees to 1e-4. Then seconds a step (the median without the first, sampling included) and what `train()` adds to the
resident set at its highest, the optimizer's 8 bytes a parameter included.

What TRL's kernel cannot avoid on a CPU: it scores every position, padding and prompt too, and its tile of up to 4,096
positions by 32,768 columns is in fp32 several times over.
"""

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastpref.benchmarks._measure import MIB, Row, Table, WrongAnswer

CONTENDERS = ("TRL", "TRL + fastpref")
COLUMNS = (
    ("trainer", "trainer", "s"),
    ("curves", "curve_error", ".1e"),
    ("loss 1", "first_loss", ".4f"),
    ("loss end", "last_loss", ".4f"),
    ("s a step", "seconds", ".2f"),
    ("added MiB", "added_MiB", ".0f"),
)
CLOCK = ("runtime", "per_second", "step_time", "flos")
SAME = 1e-4  # absolute and relative
PAIRS_A_STEP, PROMPTS_A_STEP, ANSWERS = 4, 2, 4


def brevity(completions: list[str], **_: Any) -> list[float]:
    return [-len(text) / 100 for text in completions]


def trainer_of(kind: str, steps: int, folder: str) -> Any:
    import datasets
    import transformers
    import trl

    from fastpref.trainer.demo import demo_model, demo_pairs

    rows = demo_pairs()[0][: 64 * PAIRS_A_STEP]
    common = {"max_steps": steps, "logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    common |= {"output_dir": folder, "use_cpu": True, "bf16": False, "seed": 0, "learning_rate": 5e-6}
    model = transformers.AutoModelForCausalLM.from_pretrained(demo_model())
    shared = {"processing_class": transformers.AutoTokenizer.from_pretrained(demo_model())}
    if kind == "DPO":
        args = trl.DPOConfig(**common, per_device_train_batch_size=PAIRS_A_STEP)
        return trl.DPOTrainer(model, args=args, train_dataset=datasets.Dataset.from_list(rows), **shared)
    prompts = datasets.Dataset.from_list([{"prompt": row["prompt"]} for row in rows])
    batch = {"per_device_train_batch_size": PROMPTS_A_STEP * ANSWERS, "num_generations": ANSWERS}
    args = trl.GRPOConfig(**common, **batch, max_completion_length=48, beta=0.04)
    return trl.GRPOTrainer(model, reward_funcs=brevity, args=args, train_dataset=prompts, **shared)


def one(kind: str, contender: str, steps: int) -> Row:
    """What one run logs, takes and adds; in this process."""
    import transformers

    import fastpref.integrations.trl

    stamps = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            stamps.append(time.perf_counter())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            stamps.append(time.perf_counter())

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

    with tempfile.TemporaryDirectory() as folder:
        run = trainer_of(kind, steps, folder)
        run.add_callback(Clock())
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to now
        before = status("VmRSS")
        with fastpref.integrations.trl.patched() if contender == CONTENDERS[1] else nullcontext():
            run.train()
        added = status("VmHWM") - before
    log = [
        {name: value for name, value in row.items() if not any(word in name for word in CLOCK)}
        for row in run.state.log_history
        if "loss" in row
    ]
    took = [after - at for at, after in pairwise(stamps)]
    return {"log": log, "seconds": statistics.median(took[1:]), "added_MiB": added / MIB}


def curve_error(theirs: list[Row], ours: list[Row]) -> float:
    """The largest difference of two logs, in units in which 1 is the whole of a number above 1."""
    if [row.keys() for row in theirs] != [row.keys() for row in ours]:
        raise WrongAnswer("the two log other things")
    pairs = [(a[name], b[name]) for a, b in zip(theirs, ours, strict=True) for name in a]
    return max(abs(a - b) / max(1.0, abs(a)) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        kind, contender = args.one
        print(json.dumps(one(kind, contender, args.steps)))
        return
    table = Table("integration_trl", COLUMNS, ("torch", "trl", "transformers"), args.json)
    for kind in ("DPO", "GRPO"):
        table.heading(f"{kind}Trainer, {args.steps} steps")
        found = []
        for contender in CONTENDERS:
            command = [sys.executable, __file__, "--steps", str(args.steps), "--one", kind, contender]
            said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            found.append(json.loads(said.splitlines()[-1]))
        error = curve_error(*(each["log"] for each in found))
        if error > SAME:
            raise WrongAnswer(f"{kind}: the curves differ by {error:.1e}, more than {SAME}")
        for contender, each in zip(CONTENDERS, found, strict=True):
            losses = [row["loss"] for row in each.pop("log")]
            ends = {"first_loss": losses[0], "last_loss": losses[-1], "losses": losses}
            about = {"contender": contender, "trainer": kind, "steps": args.steps, "dtype": "float32"}
            table.add({**about, "curve_error": error, **ends, **each})


if __name__ == "__main__":
    main()
