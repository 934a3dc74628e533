"""What became of the rows of a dataset."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class DataReport:
    """What was kept, cut and dropped; `str()` is one paragraph for the user."""

    rows: int = 0
    kept: int = 0
    truncated: int = 0  # kept, with a completion cut at max_length
    shifted: int = 0  # kept, with a completion that starts before the end of the tokenized prompt
    dropped: dict[str, list[int]] = field(default_factory=dict)  # reason -> row indices
    tokens: dict[str, float] = field(default_factory=dict)  # means over the kept: prompt, completion, ...
    desirable: int | None = None  # of the kept, where they are labelled

    def drop(self, index: int, reason: str) -> None:
        self.dropped.setdefault(reason, []).append(index)

    def close(self, kept: Sequence[Any], wanted: str, *parts: str) -> None:
        """Takes down the items kept, with `prompt_ids` for the part prompt; with none, `wanted` is a ValueError."""
        self.kept = len(kept)
        if not kept:
            raise ValueError(f"{wanted}; {self}")
        self.tokens = {part: sum(len(getattr(one, f"{part}_ids")) for one in kept) / len(kept) for part in parts}

    def __str__(self) -> str:
        means = ", ".join(f"{part} {mean:.1f}" for part, mean in self.tokens.items())
        said = [f"{self.kept} of {self.rows} rows kept" + (f"; mean tokens: {means}." if means else ".")]
        if self.desirable is not None:
            said.append(f"{self.desirable} desirable, {self.kept - self.desirable} undesirable.")
        if self.truncated:
            said.append(f"{self.truncated} cut to max_length.")
        if self.shifted:
            said.append(
                f"In {self.shifted} the last tokens of the prompt differ once a completion follows "
                "(they merge, or the chat template renders them differently) and count as completion."
            )
        said += [f"{len(rows)} dropped: {why} (first: row {rows[0]})." for why, rows in sorted(self.dropped.items())]
        return " ".join(said)
