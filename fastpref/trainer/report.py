"""What a run shows: the table before and after, sample continuations, a plot of its metrics."""

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

PANELS = {"loss": "loss", "rewards/margins": "reward margin, chosen - rejected", "rewards/accuracies": "accuracy"}
TRAIN, HELD_OUT = "#9db4d0", "#c0392b"
SAMPLES, SAMPLE_TOKENS = 2, 40  # continuations shown


def before_after(before: Mapping[str, float | None], after: Mapping[str, float | None], *, pairs: int) -> str:
    """A table of held-out metrics; an accuracy of None means that every margin was 0."""
    rows = [f"held out ({pairs} pairs)     before     after"]
    for name, key in {
        "loss": "eval_loss",
        "accuracy": "eval_rewards/accuracies",
        "reward margin": "eval_rewards/margins",
    }.items():
        cells = "".join(
            f"{'ties' if (x := side[key]) is None else format(round(x, 4) + 0.0, '.4f'):>10}"
            for side in (before, after)
        )
        rows.append(f"{name:<{len(rows[0]) - 20}}{cells}")
    if before["eval_rewards/accuracies"] is None:
        rows.append(
            "(accuracy: share of pairs with chosen > rejected. Before, the policy is the reference: all margins are 0)"
        )
    return "\n".join(rows)


def heading(name: str, model: nn.Module, device: torch.device, output_dir: str) -> str:
    """The model, where it runs and where the results go, in two lines."""
    total = sum(p.numel() for p in model.parameters()) / 1e6
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    share = "all trained" if trained == total else f"{trained:.2f} M of them trained"
    return f"model     {name}: {total:.1f} M parameters, {share}, {dtype} on {device}\noutput    {output_dir}"


@torch.no_grad()
def continuations(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]]) -> list[list[str]]:
    """[prompt, greedy continuation], as text, of the first distinct prompts that are not empty."""
    model.eval()
    found = []
    for prompt in list(dict.fromkeys(tuple(ids) for ids in prompts if ids))[:SAMPLES]:
        ids = torch.tensor([prompt], device=model.device)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": SAMPLE_TOKENS, "do_sample": False}
        whole = model.generate(ids, **options, pad_token_id=tokenizer.eos_token_id)  # no padding: not used
        parts = (ids[0], whole[0, len(prompt) :])
        found.append([str(tokenizer.decode(part, skip_special_tokens=True)) for part in parts])
    return found


def samples(before: Sequence[Sequence[str]], after: Sequence[Sequence[str]]) -> str:
    """Each prompt with its two continuations, wrapped to the terminal; before and after hold [prompt, continuation]."""
    width = min(shutil.get_terminal_size().columns, 110)
    lines = []
    for (prompt, old), (_, new) in zip(before, after, strict=True):
        for label, text in (("prompt", prompt), ("before", old), ("after", new)):
            flat = " ".join(text.split()) or "(nothing)"
            lines.append(textwrap.fill(flat, width, initial_indent=f"{label:<10}", subsequent_indent=" " * 10))
        lines.append("")
    return "\n".join(lines)


def plot(lines: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Writes a PNG of loss, margin and accuracy over the steps, training and held-out, from a run's metric lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # no pyplot: it would pick a display, and keep the figure alive
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    for axes, (key, label) in zip(figure.subplots(1, len(PANELS), sharex=True), PANELS.items(), strict=True):
        train = [(line["step"], line[key]) for line in lines if key in line]
        held_out = [(line["step"], line[f"eval_{key}"]) for line in lines if line.get(f"eval_{key}") is not None]
        if train:
            axes.plot(*zip(*train, strict=True), color=TRAIN, linewidth=1.4, label="training")
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o:", color=HELD_OUT, markersize=5, linewidth=1, label="held out")
        if key == "rewards/accuracies":
            axes.axhline(0.5, color="0.75", linewidth=0.8, linestyle=":", zorder=0)
            axes.set_ylim(-0.03, 1.03)
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    figure.savefig(path, dpi=140)
