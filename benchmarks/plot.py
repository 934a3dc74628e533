"""A picture of the rows of `fastpref bench`: a step's time and memory by contender, and cost against size."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastpref.benchmarks._measure import Row

TABLE = ("loss", "head", "model", "dtype")  # what a table of the head suite is known by
OURS, OTHER = "#0b6e4f", "#9aa5b1"
GROWS = {
    "N": ("tokens", "tokens of a step (PPO)"),
    "V": ("V", "vocabulary (PPO)"),
    "T": ("length", "tokens (a DPO pair)"),
}


def draw(rows: Sequence[Row], file: Path) -> None:
    """One row of panels for what there is: times, memory, longest sequences, growth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = panels(rows)
    if not found:
        raise ValueError("bench: --plot needs rows of the head, memory or scaling suite")
    across = min(len(found), 3)
    down = -(-len(found) // across)
    figure, grid = pyplot.subplots(down, across, figsize=(5.2 * across, 3.8 * down), squeeze=False)
    for axes in grid.flat[len(found) :]:
        axes.axis("off")
    for axes, panel in zip(grid.flat, found, strict=False):
        panel(axes)
        axes.spines[["top", "right"]].set_visible(False)
    about, commits = rows[0], ", ".join(dict.fromkeys(str(row["commit"]) for row in rows))
    where = f"{about.get('gpu', about['device'])}, {about['threads']} threads, torch {about['torch']}, {commits}"
    figure.suptitle(where, fontsize=9)
    figure.tight_layout(h_pad=2.0)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def panels(rows: Sequence[Row]) -> list[Callable[[Any], None]]:
    """A function of axes each."""
    found: list[Callable[[Any], None]] = []
    timed = [row for row in rows if "ratio" in row]
    steps = [row for row in timed if row["benchmark"] == "head"]
    tables = list(dict.fromkeys(tuple(row[name] for name in TABLE) for row in steps))
    for table in [table for table in tables if table[:2] == ("dpo", "trained")][:2]:
        latest = {row["contender"]: row for row in steps if table == tuple(row[name] for name in TABLE)}
        some, (_, _, model, dtype) = list(latest.values()), table
        where = f"{model}, {dtype}, {some[0]['tokens']:,} tokens"
        found.append(bars(some, "ratio", f"DPO step, times its bare products\n{where}", ".2f", 1.0))
        found.append(bars(some, "extra_MiB", f"DPO step, MiB beyond inputs\n{where}", ".0f"))
    longest = [
        {**row, "tokens": row.get("length", row.get("at_least"))} for row in rows if row["benchmark"] == "memory"
    ]
    if longest := [row for row in longest if row["tokens"]]:
        title = f"longest sequence in {longest[0]['memory_GiB']:g} GiB\n{longest[0]['model']}, {longest[0]['dtype']}"
        found.append(bars(longest, "tokens", title, ",d"))
    for grows in GROWS:
        if some := [row for row in timed if row["benchmark"] == "scaling" and row["grows"] == grows]:
            found.append(lines(some, grows))
    return found


def bars(rows: Sequence[Row], key: str, title: str, form: str, mark: float | None = None) -> Callable[[Any], None]:
    """Horizontal, from zero, the best on top; `mark` is a line. One that would dwarf the others is cut, and says so."""

    def panel(axes: Any) -> None:
        ordered = sorted(rows, key=lambda row: row[key], reverse=key != "tokens")  # drawn from the bottom
        names, values = [row["contender"] for row in ordered], [row[key] for row in ordered]
        *_, second, largest = 0, *sorted(values)
        end = 1.5 * second if key != "tokens" and largest > 2 * second > 0 else largest
        colors = [OURS if name.startswith("fastpref") else OTHER for name in names]
        drawn = axes.barh(names, [min(value, end) for value in values], color=colors)
        at_least = ["≥ " if row.get("at_least") else "" for row in ordered]
        labels = [
            f"{sign}{value:{form}}{' (bar cut)' if value > end else ''}"
            for sign, value in zip(at_least, values, strict=True)
        ]
        axes.bar_label(drawn, labels, padding=3, fontsize=8)
        axes.set_xlim(0, 1.25 * end)
        axes.set_xticks([])
        if mark is not None:
            axes.axvline(mark, color="black", linewidth=0.8, linestyle=":")
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8)

    return panel


def lines(rows: Sequence[Row], grows: str) -> Callable[[Any], None]:
    """Seconds against what grows, log-log, the slope in the legend; dotted: the bare products."""
    from matplotlib.ticker import LogLocator, NullFormatter

    key, label = GROWS[grows]

    def panel(axes: Any) -> None:
        for name in dict.fromkeys(row["contender"] for row in rows):
            some = [row for row in rows if row["contender"] == name]
            slope = next((row["slope"] for row in some if "slope" in row), float("nan"))
            color = OURS if name.startswith("fastpref") else OTHER
            x = [row[key] for row in some]
            axes.plot(x, [row["seconds"] for row in some], "o-", color=color, label=f"{name}, slope {slope:.2f}")
            if color == OURS:
                axes.plot(x, [row["bare_s"] for row in some], ":", color="black", label="bare products")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(label, fontsize=8)
        axes.set_ylabel("seconds a step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=8, frameon=False)

    return panel
