"""Metrics of a run: exact means, and where they go: `metrics.jsonl`, the terminal, a tracker."""

import json
import math
import os
import sys
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

Sums = dict[str, list[float]]  # metric -> [weighted sum, weight]


class Tally:
    """Weighted sums of the metrics of some batches, kept on the device until `reduced`.

    A mean of the means of unequal batches is not the mean, so each metric is weighed by what it is a mean over: pairs,
    scored tokens, or the chosen (rejected) ones among them.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._values: list[Tensor] = []  # 0-d
        self._weights: list[float] = []

    def add(self, metrics: Mapping[str, Tensor], weight: float, **weights: float) -> None:
        """Adds the metrics of a batch, means over `weight` items but for those that `weights` names."""
        for name, value in metrics.items():
            self._names.append(name)
            self._values.append(value.detach().float())
            self._weights.append(weights.get(name, weight))

    def reduced(self) -> Sums:
        """The sums over all batches and processes. Every process calls this; the host waits for the device once."""
        values = torch.stack(self._values).tolist() if self._values else []
        mine: Sums = {}
        for name, value, weight in zip(self._names, values, self._weights, strict=True):
            mine = merged(mine, {name: [value * weight, weight]})
        # objects and not tensors: a process that had no batch has no names either
        return reduce(merged, gather_object([mine]))


def merged(a: Sums, b: Sums) -> Sums:
    """The sums of both."""
    zero = [0.0, 0.0]
    return {name: [x + y for x, y in zip(a.get(name, zero), b.get(name, zero), strict=True)] for name in {**a, **b}}


def means(sums: Sums) -> dict[str, float]:
    """Metric name to weighted mean; rewards/margins, of unpaired data, is the difference of the two means."""
    found = {name: total / weight for name, (total, weight) in sums.items() if weight}
    if "rewards/chosen" in found and "rewards/rejected" in found:
        found.setdefault("rewards/margins", found["rewards/chosen"] - found["rewards/rejected"])
    return found


class MetricsLog:
    """A run's lines of metrics. Every process may call it; the main one writes.

    `metrics.jsonl` holds one JSON object a line, in the order of the steps. After a resumption it holds what an
    uninterrupted run would have written.
    """

    def __init__(
        self, accelerator: Accelerator, path: Path, *, steps: int, steps_per_epoch: int, keep_through: int | None
    ) -> None:
        """Starts the file anew, or keeps its lines through step `keep_through`: what came later happens again."""
        self._accelerator, self._steps, self._steps_per_epoch = accelerator, steps, steps_per_epoch
        self.path, self._main = path, accelerator.is_main_process
        # off a terminal no bar is drawn (None: tqdm looks), and the printed lines remain
        self._bar = tqdm(total=steps, initial=keep_through or 0, unit="step", disable=None if self._main else True)
        if self._main:
            through = -1 if keep_through is None else keep_through
            there = read_metrics(path) if through >= 0 and path.exists() else []
            kept = [line for line in there if line["step"] <= through]
            aside = path.with_suffix(".partial")
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            os.replace(aside, path)
            self._file = path.open("a", encoding="utf-8")

    def __call__(self, step: int, values: Mapping[str, float | None]) -> None:
        """Appends a line, shows its main figures and passes it to the tracker."""
        line = {"step": step, "epoch": step / self._steps_per_epoch, **values}
        self._accelerator.log(line, step=step)
        if self._main:
            # JSON has no word for what is not finite (a gradient norm under float16)
            sound = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
            try:
                self._file.write(json.dumps(sound) + "\n")
                self._file.flush()
            except OSError as error:
                # a line cut short by a full disk is left out by the next resumption
                raise OSError(f"MetricsLog: could not write {self.path}: {error}") from error
            self._bar.write(shown(line, self._steps))
            sys.stdout.flush()  # into a log file too

    def advance(self) -> None:
        """Moves the progress bar by a step."""
        self._bar.update()

    def sync(self) -> None:
        """Returns when every line is on the disk: before a checkpoint that promises them."""
        if self._main:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Ends the progress bar, the trackers and the file."""
        self._bar.close()
        # not end_training(), which also destroys the process group: under a living DDP model that can deadlock (gloo)
        for tracker in self._accelerator.trackers:
            tracker.finish()
        if self._main:
            self._file.close()


# What the terminal shows of a line, where it is there: metric, its name there, its format
HEADLINE = {
    "loss": ("loss", ".4f"),
    "rewards/margins": ("margin", "+.4f"),
    "margin": ("margin", "+.4f"),
    "rewards/accuracies": ("accuracy", "5.3f"),
    "accuracy": ("accuracy", "5.3f"),
    "mean_token_accuracy": ("token accuracy", "5.3f"),
    "kl": ("kl", ".3f"),
    "objective/scores": ("score", ".4f"),
    "reward": ("reward", ".4f"),
    "objective/kl": ("kl", ".3f"),
}


def shown(line: Mapping[str, Any], steps: int) -> str:
    """`step  10/60  training  loss 0.6911  margin 0.0042  accuracy 0.525 ...`, for the terminal."""
    kind = "" if "grad_norm" in line else "eval_"
    paired = f"{kind}rewards/accuracies" in line  # whose token accuracy is a side issue
    figures = []
    for metric, (label, form) in HEADLINE.items():
        if kind + metric in line and not (paired and metric == "mean_token_accuracy"):
            value = line[kind + metric]
            # + 0.0: no -0.0000
            figures.append(f"{label} {'  ties' if value is None else format(round(value, 4) + 0.0, form)}")
    if not kind:
        figures += [f"grad {line['grad_norm']:.3g}", f"lr {line['learning_rate']:.2e}"]
    where = f"step {line['step']:{len(str(steps))}}/{steps}"
    return "  ".join([where, "held out" if kind else "training", *figures])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without a last one that a kill cut short; damage elsewhere is a ValueError."""
    *lines, _ = path.read_text(encoding="utf-8").split("\n")  # past the last newline: nothing, or a line never finished
    return [json.loads(line) for line in lines]
