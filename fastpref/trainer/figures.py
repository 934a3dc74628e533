"""Means of what a model was judged by, each with its standard error: how they come about, and how they are shown."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Figure:
    """A mean, its standard error, and over how many it is."""

    mean: float
    error: float
    n: int

    @classmethod
    def of(cls, values: Tensor) -> "Figure":
        """Of independent values (n,); NaN where there is none, and no error of a single one."""
        n = values.numel()
        error = float(values.double().std() / math.sqrt(n)) if n > 1 else math.nan
        return cls(float(values.double().mean()), error, n)

    def __format__(self, form: str) -> str:
        error = "" if math.isnan(self.error) else f" ± {self.error:.4f}"
        return format(f"{self.mean:.4f}{error}", form)


Figures = dict[str, Figure]


def of_scores(scores: Tensor) -> Figures:
    """The mean score, and that of the best of 2, 4, 8, ... samples; scores (prompts, n), NaN where none is known."""
    whole = scores[~scores.isnan().any(1)]
    ks = [2**i for i in range(scores.shape[1].bit_length()) if 2**i <= scores.shape[1]]
    return {"score" if k == 1 else f"best_of_{k}": Figure.of(best_of(whole, k)) for k in ks}


def best_of(scores: Tensor, k: int) -> Tensor:
    """(prompts,) the expected highest of k of a prompt's n scores, drawn without replacement.

    Of the sorted scores the i-th of n is the highest of k in C(i - 1, k - 1) of C(n, k) draws: unbiased for k fresh
    samples, as pass@k of Chen et al. 2021, arXiv:2107.03374.
    """
    n = scores.shape[1]
    shares = [math.comb(i, k - 1) / math.comb(n, k) for i in range(n)]
    return scores.double().sort(1).values @ torch.tensor(shares, dtype=torch.float64)


def win_rates(policy: Tensor, reference: Tensor) -> Tensor:
    """(prompts,) the share of (policy sample, reference sample) that the policy wins, half of the ties included.

    Scores (prompts, n); a prompt with a score that is not known is left out.
    """
    known = ~(policy.isnan().any(1) | reference.isnan().any(1))
    ours, theirs = policy[known, :, None], reference[known, None, :]
    return ((ours > theirs).double() + 0.5 * (ours == theirs).double()).mean((1, 2))


NAMES = {
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "reward margin",
    "logps/accuracies": "accuracy of log p",
    "score": "score",
    "win_rate": "win rate",
    "kl": "KL to the reference",
    "tokens": "tokens",
}


def table(found: Mapping[str, Figures]) -> str:
    """The figures as lines: policy and reference, each with its standard error."""
    keys = list(dict.fromkeys(key for side in found.values() for key in side))
    order = sorted(keys, key=lambda key: list(NAMES).index(key) if key in NAMES else list(NAMES).index("score") + 0.5)
    lines = [f"{'':22}{'model':>20}{'reference':>20}{'of':>8}"]
    for key in order:
        cells = [side.get(key) for side in (found["policy"], found["reference"])]
        n = next(figure.n for figure in cells if figure is not None)
        shown = "".join(f"{'' if figure is None else figure:>20}" for figure in cells)
        lines.append(f"{NAMES.get(key, key.replace('_', ' ')):22}{shown}{n:>8}")
    return "\n".join(lines)


def write(path: Path, options: Mapping[str, Any], found: Mapping[str, Figures]) -> None:
    """The figures and the options as JSON, which has no NaN: null where there is no figure."""

    def sound(figure: Figure) -> dict[str, float | None]:
        return {name: value if math.isfinite(value) else None for name, value in vars(figure).items()}

    figures = {side: {key: sound(figure) for key, figure in of.items()} for side, of in found.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**figures, "options": options}, indent=1) + "\n", encoding="utf-8")
