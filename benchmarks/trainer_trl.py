"""A DPO step of the trainer beside TRL's DPOTrainer: seconds, peak memory and the loss curve; then, what saves what.

    python benchmarks/trainer_trl.py [--steps 4] [--dtype float32 bfloat16] [--contenders trl fastpref] [--json FILE]
    python benchmarks/trainer_trl.py --steps 2 --dtype bfloat16 --contenders fastpref padded checkpoint-all ...

SmolLM2-135M on the first real chat pairs, 2 pairs a step, at most 1,024 tokens a sequence, AdamW, the same pairs in the
same order, each contender in a process of its own. TRL runs at its defaults, which here are ours too: fused LM head,
activation checkpointing, weights in float32, `bfloat16` by autocast; its reference is a second model in memory, read
in every step. Ours is read once, before the first step: `reference s` is that time divided by the steps, which are all
of one epoch, and `step + ref` is the figure to hold beside TRL's step.

The bound: 2 FLOPs per parameter and token for a pass. TRL reads the prompts twice, padded to the longest sequence of
the batch: 5 passes (reference, forward, recomputation, 2 of backward) over `tokens`. Ours reads each prompt once,
without padding. Memory that nobody can avoid: 16 bytes a parameter in float32 (weight, gradient, two moments), 2.15 GB.
`speed`, `memory` and `loss diff.` are beside the first contender named.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastpref.benchmarks._chat_pairs import chat_pairs
from fastpref.benchmarks._measure import Row, Table
from fastpref.benchmarks._settings import Settings

PAIRS, LENGTH = 2, 1024
LEARNING_RATE = 2e-5  # at which a few steps move the loss: equal curves then say something
COLUMNS = (
    ("dtype", "dtype", "s"),
    ("step s", "step_s", ".2f"),
    ("reference s", "reference_s", ".2f"),
    ("step + ref", "whole_step_s", ".2f"),
    ("peak GB", "peak_GB", ".2f"),
    ("tokens", "tokens", "d"),
    ("last loss", "last_loss", ".5f"),
    ("speed", "speed", ".2f"),
    ("memory", "memory", ".2f"),
    ("loss diff.", "loss_difference", ".1e"),
)
# what a contender changes of fastpref's defaults; `change` does what is no option
VARIANTS: dict[str, dict[str, Any]] = {
    "fastpref": {},
    "selective": {"gradient_checkpointing": "selective"},
    "no-checkpoints": {"gradient_checkpointing": False},
    "known-reference": {"cache_ref_log_probs": True},  # by an earlier run
    "prompts-twice": {},
    "padded": {"padding_free": False},
    "prompts-in-head": {"padding_free": False},  # learned, too: the loss is another one
    "logits": {"padding_free": False},  # eager PyTorch for the head
    "adafactor": {"optim": "adafactor"},
}


def rows_to_train_on(steps: int) -> list[dict[str, Any]]:
    """The first pairs with a token to learn on both sides."""
    from transformers import AutoTokenizer

    from fastpref.trainer.data import tokenize_pairs
    from fastpref.trainer.demo import demo_model

    rows = chat_pairs()
    _, report = tokenize_pairs(rows, AutoTokenizer.from_pretrained(demo_model()), max_length=LENGTH)
    dropped = {index for indices in report.dropped.values() for index in indices}
    return [row for i, row in enumerate(rows) if i not in dropped][: PAIRS * steps]


def peak_bytes() -> int:
    """The resident set of this process at its highest; Linux."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


class Timed:
    """Calls a function and keeps the seconds each call takes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.seconds = function, list[float]()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        found = self.function(*arguments, **options)
        self.seconds.append(time.perf_counter() - start)
        return found


def run_trl(steps: int, dtype: str, folder: Path) -> Row:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from fastpref.trainer.demo import demo_model

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.seconds, self.peak, self.tokens = list[float](), 0, list[int]()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.start)
            self.peak = peak_bytes()

    config = DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=PAIRS,
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        max_length=LENGTH,
        bf16=dtype == "bfloat16",
        use_cpu=True,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    watch = Watch()
    rows = Dataset.from_list(rows_to_train_on(steps))
    trainer = DPOTrainer(model=demo_model(), args=config, train_dataset=rows, callbacks=[watch])
    collate = trainer.data_collator

    def counted(examples: list[Any]) -> Any:
        batch = collate(examples)
        watch.tokens.append(batch["input_ids"].numel())
        return batch

    trainer.data_collator = counted
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"seconds": watch.seconds, "reference_s": 0.0, "peak": watch.peak, "losses": losses, "tokens": watch.tokens}


def run_fastpref(variant: str, steps: int, dtype: str, folder: Path) -> Row:
    from fastpref.trainer import dpo, forward
    from fastpref.trainer.batches import items_of_step
    from fastpref.trainer.metrics import read_metrics

    options: dict[str, Any] = {"seed": 42, "cache_ref_log_probs": False, **VARIANTS[variant]}
    rows = rows_to_train_on(steps)
    # the recipe draws its order: put the rows where it will look for them
    order = [i for step in range(1, steps + 1) for i in items_of_step(step, len(rows), PAIRS, options["seed"])]
    placed = sorted(zip(order, rows, strict=True), key=lambda pair: pair[0])
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for _, row in placed))
    tokens: list[int] = []
    change(variant, forward, dpo, tokens)
    steps_taken = Timed(dpo.update)
    references = Timed(dpo.references)
    if options["cache_ref_log_probs"]:
        options["cache_ref_log_probs"] = str(folder)
        first = dpo.references

        def again(run: Any) -> Any:
            first(run)
            return references(run)

        dpo.references = again
    else:
        dpo.references = references
    dpo.update = steps_taken
    peaks: list[int] = []
    after_step = dpo.after_step

    def noted(*arguments: Any, **more: Any) -> None:
        peaks.append(peak_bytes())
        after_step(*arguments, **more)

    dpo.after_step = noted
    dpo.train(
        dpo.DPOOptions(
            dataset_name=str(data),
            output_dir=str(folder / "run"),
            test_split_size=0,
            per_device_train_batch_size=PAIRS,
            per_device_eval_batch_size=PAIRS,
            max_steps=steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="linear",
            max_length=LENGTH,
            bf16=dtype == "bfloat16",
            logging_steps=1,
            **options,
        )
    )
    losses = [line["loss"] for line in read_metrics(folder / "run" / "metrics.jsonl")]
    reference = references.seconds[0] / steps
    return {
        "seconds": steps_taken.seconds,
        "reference_s": reference,
        "peak": peaks[-1],
        "losses": losses,
        "tokens": tokens[-steps:],
    }


def change(variant: str, forward: Any, dpo: Any, tokens: list[int]) -> None:
    """Takes one saving out of the recipe's code, and counts the positions that the model reads."""
    collate, pack = forward.collate, forward.pack
    if variant == "prompts-twice":
        pack = partial(pack, share=False)
    if variant == "prompts-in-head":
        plain = collate
        collate = lambda sequences, pad: plain([([], p + c) for p, c in sequences], pad)  # noqa: E731
        dpo.scored = lambda prompt, completion: len(prompt) + len(completion) - 1
    if variant == "logits":
        dpo.DPOOptions.head_options = property(lambda _: {"backend": "reference"})

    def counted(make: Callable[..., Any], size: Callable[[Any], int], *arguments: Any) -> Any:
        batch = make(*arguments)
        tokens.append(size(batch))
        return batch

    forward.collate = partial(counted, collate, lambda batch: batch["input_ids"].numel())
    forward.pack = partial(counted, pack, lambda batch: batch.inputs["input_ids"].numel())


def alone(contender: str, steps: int, dtype: str) -> Row:
    """The row of a contender, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        line = [sys.executable, __file__, "--alone", contender, "--steps", str(steps), "--dtype", dtype]
        done = subprocess.run([*line, "--json", str(result)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{contender}: {done.stderr[-2000:]}")
        return json.loads(result.read_text())


def table_row(contender: str, dtype: str, found: Row, trl: Row | None) -> Row:
    step = statistics.median(found["seconds"])
    row = {
        "contender": contender,
        "dtype": dtype,
        "step_s": step,
        "reference_s": found["reference_s"],
        "whole_step_s": step + found["reference_s"],
        "peak_GB": found["peak"] / 1e9,
        "tokens": round(statistics.mean(found["tokens"])),
        "last_loss": found["losses"][-1],
        "losses": found["losses"],
        "seconds": found["seconds"],
    }
    if trl is not None:
        row["speed"] = trl["whole_step_s"] / row["whole_step_s"]
        row["memory"] = row["peak_GB"] / trl["peak_GB"]
        row["loss_difference"] = max(abs(a - b) for a, b in zip(row["losses"], trl["losses"], strict=True))
    return row


def tabulate(steps: int, dtypes: Sequence[str], contenders: Sequence[str], file: Path | None) -> list[Row]:
    table = Table("trainer_trl", COLUMNS, ("torch", "transformers", "trl"), file)
    table.heading(f"SmolLM2-135M, {PAIRS} chat pairs a step, {steps} steps")
    for dtype in dtypes:
        first: Row | None = None
        for contender in contenders:
            row = table_row(contender, dtype, alone(contender, steps, dtype), first)
            table.add(row)
            first = first or row
    return table.rows


def run(settings: Settings) -> list[Row]:
    """The suite of `fastpref bench`: two steps; needs the train extra and trl."""
    return tabulate(
        2, [str(dtype).removeprefix("torch.") for dtype in settings.dtypes], ("trl", "fastpref"), settings.json
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--contenders", nargs="+", default=["trl", "fastpref"], choices=["trl", *VARIANTS])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        run = run_trl if arguments.alone == "trl" else partial(run_fastpref, arguments.alone)
        found = run(arguments.steps, arguments.dtype[0], arguments.json.parent)
        arguments.json.write_text(json.dumps(found))
        return
    tabulate(arguments.steps, arguments.dtype, arguments.contenders, arguments.json)


if __name__ == "__main__":
    main()
