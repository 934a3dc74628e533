"""What a run shows: the table before and after, sample continuations, a plot of its metrics."""

import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

PANELS = {  # title: the metrics drawn, those that a run has
    "loss": ["loss"],
    "score of samples": ["objective/scores", "reward"],
    "KL to the reference, nats": ["kl", "objective/kl"],
    "tokens of a sample": ["completions/mean_length"],
    "rewards": ["rewards/chosen", "rewards/rejected"],
    "reward margin, chosen - rejected": ["rewards/margins", "margin"],
    "accuracy": ["rewards/accuracies", "accuracy"],
    "token accuracy": ["mean_token_accuracy"],
    "entropy of a token, nats": ["entropy"],
    "log-probability of an answer, nats": ["logps/chosen", "logps/rejected"],
    "gradient norm": ["grad_norm"],
}
COLOURS = [("#9db4d0", "#c0392b"), ("#b5cf9c", "#8e6bb0"), ("#d9c28a", "#555555")]  # training, held out
SAMPLES, SAMPLE_TOKENS = 2, 40  # continuations shown


# What the table of held-out metrics shows, where it is there
TABLE = {
    "eval_loss": "loss",
    "eval_rewards/accuracies": "accuracy",
    "eval_accuracy": "accuracy",
    "eval_rewards/margins": "reward margin",
    "eval_margin": "reward margin",
    "eval_kl": "KL",
    "eval_reward": "reward",
    "eval_completions/mean_length": "tokens",
    "eval_mean_token_accuracy": "token accuracy",
}
TIES = "(accuracy: share of pairs with chosen > rejected. Before, the policy is the reference: all margins are 0)"


def before_after(before: Mapping[str, float | None], after: Mapping[str, float | None], *, count: str) -> str:
    """A table of held-out metrics; an accuracy of None means that every margin was 0."""
    rows = [f"held out ({count})     before     after"]
    for key, name in TABLE.items():
        if key in before and key in after:
            cells = "".join(
                f"{'ties' if (x := side[key]) is None else format(round(x, 4) + 0.0, '.4f'):>10}"
                for side in (before, after)
            )
            rows.append(f"{name:<{len(rows[0]) - 20}}{cells}")
    return "\n".join([*rows, TIES] if before.get("eval_rewards/accuracies", 0.0) is None else rows)


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
    # a table of positions ends somewhere: of a prompt that leaves no room in it, the end is read
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    new = min(SAMPLE_TOKENS, positions // 2)
    found = []
    for whole_prompt in list(dict.fromkeys(tuple(ids) for ids in prompts if ids))[:SAMPLES]:
        prompt = whole_prompt[max(len(whole_prompt) - (positions - new), 0) :]
        ids = torch.tensor([prompt], device=model.device)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "do_sample": False}
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


def plot(
    lines: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    title: str,
    samples: Sequence[Sequence[str]] = (),
    panels: Mapping[str, Sequence[str]] = PANELS,
) -> None:
    """Writes a PNG of a run's metric lines over its steps, training and held-out; panels without a figure are left out.

    samples: [heading, text], printed below. panels: label -> the metrics drawn in it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    there = {name for line in lines for name, value in line.items() if isinstance(value, float | int)}
    drawn = {label: [m for m in metrics if {m, f"eval_{m}"} & there] for label, metrics in panels.items()}
    drawn = {label: metrics for label, metrics in drawn.items() if metrics}
    n_columns = min(len(drawn), 4)
    n_rows = -(-len(drawn) // n_columns)
    text = "\n".join(textwrap.fill(" ".join(f"{head}: {body}".split()), 60 * n_columns) for head, body in samples)
    n_text = text.count("\n") + 1 if text else 0
    # no pyplot: it would pick a display, and keep the figure alive
    figure = Figure(figsize=(3.4 * n_columns, 2.9 * n_rows + 0.4 + 0.16 * n_text), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(n_rows, n_columns, sharex=True, squeeze=False).flatten()
    for axes in grid[len(drawn) :]:
        axes.set_axis_off()
    for axes, (label, metrics) in zip(grid, drawn.items(), strict=False):
        for metric, (train, held_out) in zip(metrics, COLOURS, strict=False):
            _curves(axes, lines, metric, train, held_out, label=f"{metric} " if len(metrics) > 1 else "")
        if "accuracy" in label:
            axes.axhline(0.5, color="0.75", linewidth=0.8, linestyle=":", zorder=0)
            axes.set_ylim(-0.03, 1.03)
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7)
    if text:
        figure.text(0.01, -0.01, text, fontsize=7, va="top", parse_math=False)
    figure.savefig(path, dpi=140, bbox_inches="tight")


def _curves(axes: Any, lines: Sequence[Mapping[str, Any]], metric: str, train: str, held_out: str, label: str) -> None:
    steps = [(line["step"], line[metric]) for line in lines if isinstance(line.get(metric), float | int)]
    points = [(line["step"], line[f"eval_{metric}"]) for line in lines if line.get(f"eval_{metric}") is not None]
    if steps:
        axes.plot(
            *zip(*steps, strict=True),
            color=train,
            linewidth=1.4,
            marker="." if len(steps) == 1 else "",
            label=f"{label}training",
        )
    if points:
        axes.plot(*zip(*points, strict=True), "o:", color=held_out, markersize=4, linewidth=1, label=f"{label}held out")
