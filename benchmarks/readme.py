"""README's table of measurements, from the committed rows: python -m fastpref.benchmarks.readme [README.md].

It stands between two comments in README.md and is never typed. Rows are read from results/bench_*.jsonl, which
`fastpref bench --json` appends to; of two rows for the same thing the later one counts.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fastpref.benchmarks._measure import Row

RESULTS = Path(__file__).with_name("results")
BEGIN, END = "<!-- bench:begin, written by python -m fastpref.benchmarks.readme -->", "<!-- bench:end -->"
MODEL, DTYPE = "SmolLM2-135M", "bfloat16"
NAMES = {
    "fastpref": "**fastpref**",
    "naive": "eager PyTorch",
    "naive-compiled": "eager, torch.compile",
    "liger": "Liger, fused losses",
    "liger-whole": "Liger, one chunk",
    "liger-logps": "Liger, scaled CE",
    "liger-ce": "Liger, CE",
    "trl": "TRL's kernel",
    "torch-lce": "torch linear_cross_entropy",
    "torch-lce-chunked": "the same, chunked",
    "cce": "Cut Cross-Entropy",
    "cce-exact": "the same, exact",
    "quack": "QuACK",
    "verl-torch": "verl, torch",
    "verl-triton": "verl, Triton",
}
HEADINGS = (
    "",
    "DPO step, s",
    "x bound",
    "tokens/s",
    "MiB",
    "gradient error",
    "frozen head",
    "PPO",
    "SFT",
    "longest pair",
)


def committed() -> list[Row]:
    """All rows, in the order of their files' names."""
    return [
        json.loads(line) for file in sorted(RESULTS.glob("bench_*.jsonl")) for line in file.read_text().splitlines()
    ]


def section(rows: Sequence[Row]) -> str:
    """What stands between the two comments."""
    of_cpu, of_gpu = ([row for row in rows if ("gpu" in row) == gpu] for gpu in (False, True))
    parts = [part for some in (of_cpu, of_gpu) if (part := table(some))]
    if not any(row["benchmark"] == "head" for row in of_gpu):
        parts.append("On a GPU: not measured.")
    return "\n\n".join(parts)


def table(rows: Sequence[Row]) -> str:
    """Of one machine; "" without rows of the head."""
    steps: dict[tuple[str, str, str], Row] = {}
    longest: dict[str, Row] = {}
    for row in rows:
        if row.get("model") != MODEL or row.get("dtype") != DTYPE or row.get("inputs") == "real":
            continue
        if row["benchmark"] == "head":
            steps[row["loss"], row["head"], row["contender"]] = row
        elif row["benchmark"] == "memory":
            longest[row["contender"]] = row
    measured = [steps["dpo", "trained", name] for name in NAMES if "seconds" in steps.get(("dpo", "trained", name), {})]
    if not measured:
        return ""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    for row in sorted(measured, key=lambda row: row["ratio"]):
        name = row["contender"]
        others = [steps.get((*what, name), {}) for what in (("dpo", "frozen"), ("ppo", "trained"), ("sft", "trained"))]
        cells = [NAMES[name], f"{row['seconds']:.3f}", f"{row['ratio']:.2f}", f"{row['tokens_per_s']:,.0f}"]
        cells += [f"{row['extra_MiB']:,.0f}", f"{row['d_weight_error']:.1e}"]
        cells += [f"{other['ratio']:.2f}" if "ratio" in other else "" for other in others]
        cells.append(length(longest.get(name, {})))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *words(measured, [row for row in steps.values() if "reason" in row])])


def length(row: Row) -> str:
    """Of a row of the memory suite."""
    if "at_least" in row:
        return f"over {row['at_least']:,}"
    return f"{row['length']:,}" if "length" in row else "none" if "reason" in row else ""


def words(measured: Sequence[Row], absent: Sequence[Row]) -> list[str]:
    """What the columns are, who is missing, where it was measured."""
    row = measured[0]
    about = (
        f"One step of the head of {MODEL} (H {row['H']}, V {row['V']:,}) in {DTYPE}, {row['tokens']:,} scored tokens "
        "after as many prompt tokens, logits as peaked as a model's: forward and backward of the policy, forward of "
        f"the reference. Bound: the {row['bare_products']} matrix products alone, {row['bare_flops']:.2g} FLOP, "
        f"{row['bare_s']:.3f} s, timed before every step. MiB: beyond the inputs, returned gradients among them. "
        "The error is that of the head's gradient, against float64. The next three columns are steps over their own "
        "bounds: DPO with a frozen head, PPO, SFT. Longest pair: tokens a sequence, of two whose step fits 1 GiB."
    )
    reasons = dict.fromkeys(f"{NAMES.get(row['contender'], row['contender'])} ({row['reason']})" for row in absent)
    missing = ["Absent here: " + "; ".join(reasons).replace("not measured: ", "") + "."] if reasons else []
    versions = ", ".join(
        f"{name} {row[name]}" for name in ("torch", "trl", "liger-kernel", "cut-cross-entropy", "verl")
    )
    commits = ", ".join(dict.fromkeys(row["commit"] for row in measured))
    where = f"{row.get('gpu', row['device'])}, {row['threads']} threads; {versions}; commit {commits}. "
    where += "Again on your machine: `fastpref bench --quick`, or `fastpref bench head memory` for these figures."
    return [about, *missing, where]


def replaced(readme: str) -> str:
    """README with the section written anew."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"readme: README.md must hold {BEGIN} and {END}")
    return f"{before}{begin}\n{section(committed())}\n{end}{after}"


def main(arguments: Sequence[str]) -> None:
    file = Path(arguments[0] if arguments else "README.md")
    file.write_text(replaced(file.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
