"""benchmarks/results/README.md: every committed row, as the tables that the suites and scripts print.

Written by python -m fastpref.benchmarks.readme. Of two rows for the same thing the later one counts.
"""

import importlib
from collections.abc import Sequence
from typing import Any

from fastpref.benchmarks._measure import Row

GROUPS = {  # what a table of the suite is known by; a module of that name has its columns
    "head": ("loss", "head", "model", "dtype", "inputs"),
    "memory": ("model", "dtype", "memory_GiB"),
    "memory_cpu": ("head", "H", "V", "dtype"),
    "memory_ppo": ("completions", "length", "optim"),
    "scaling": ("grows", "loss", "model", "dtype"),
    "ablation": (),
    "selective": ("pass", "model", "dtype"),
    "gae": ("shape", "mask", "on"),
    "accuracy": ("inputs", "dtype"),
    "smollm2_head": ("dtype",),
    "trainer_trl": ("dtype",),
    "integration_trl": ("trainer", "dtype"),
}
POINT = ("contender", "tokens", "V", "length")  # of a row in its table
Columns = Sequence[tuple[str, str, str]]


def page(rows: Sequence[Row]) -> str:
    parts = ["# Results", "Every row, whoever wins; the lines of JSON beside this page have more. Units as in README."]
    for name in GROUPS:
        if some := [row for row in rows if row["benchmark"] == name]:
            parts += suite(name, some)
    return "\n\n".join(parts) + "\n"


def suite(name: str, rows: Sequence[Row]) -> list[str]:
    """A heading, the module's own words, its tables."""
    module = importlib.import_module(f"fastpref.benchmarks.{name}")
    assert module.__doc__ is not None
    parts = [f"## {name}", module.__doc__.split("\n\n")[0]]
    tables: dict[tuple[Any, ...], dict[tuple[Any, ...], Row]] = {}
    for row in rows:
        table = tables.setdefault((row.get("gpu", row["device"]), *(row.get(key) for key in GROUPS[name])), {})
        table[tuple(row.get(key) for key in POINT)] = row
    for about, table in tables.items():
        found = list(table.values())
        commits = ", ".join(dict.fromkeys(row["commit"] for row in found))
        known = zip(GROUPS[name], about[1:], strict=True)
        what = ", ".join(f"{key} {value}" for key, value in known if value is not None)
        threads = f", {found[0]['threads']} threads" if "threads" in found[0] else ""
        where = f"{about[0]}{threads}, torch {found[0]['torch']}, {commits}"
        parts += [f"**{what}**; {where}" if what else where, markdown(found, module.COLUMNS)]
    return parts


def markdown(rows: Sequence[Row], columns: Columns) -> str:
    """Columns that no row has are left out."""
    shown = [column for column in columns if any(column[1] in row for row in rows if "reason" not in row)]
    lines = [["", *(heading for heading, _, _ in shown)], ["---"] * (1 + len(shown))]
    for row in rows:
        cells = [format(row[key], form) if key in row else "" for _, key, form in shown]
        if "reason" in row:
            cells = [row["reason"], *[""] * (len(shown) - 1)][: len(shown)]
        lines.append([row["contender"], *cells])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
