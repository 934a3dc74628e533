"""README's tables and plot of measurements, from the committed rows: python -m fastpref.benchmarks.readme [README.md].

It stands between two comments in README.md and is never typed; all tables stand in results/README.md. Rows are those of
`fastpref bench --json` in results/; of two rows for the same thing the later one counts.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fastpref.benchmarks import paragraphs, tables
from fastpref.benchmarks._measure import Row
from fastpref.benchmarks.paragraphs import grid, made_at
from fastpref.benchmarks.plot import draw

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
    "torch-lce-chunked": "torch's, chunked",
    "cce": "Cut Cross-Entropy",
    "cce-exact": "Cut Cross-Entropy, exact",
    "quack": "QuACK",
    "verl-torch": "verl, torch",
    "verl-triton": "verl, Triton",
}
OTHERS = {  # heading: (loss, head), what the words say
    "frozen head": (("dpo", "frozen"), "DPO with a frozen head"),
    "PPO": (("ppo", "trained"), "PPO"),
    "SFT": (("sft", "trained"), "SFT"),
}
STEPS = {  # of the table of other heads: (loss, head)
    "DPO": ("dpo", "trained"),
    "DPO, frozen head": ("dpo", "frozen"),
    "PPO": ("ppo", "trained"),
    "PPO, frozen head": ("ppo", "frozen"),
}
LONGEST, PLOT = "longest pair", "bench_cpu.png"
AGAIN = "Again on your machine: `fastpref bench --quick`; `bash benchmarks/run_cpu.sh head losses longest` for these."


def committed() -> list[Row]:
    """All rows of what tables.GROUPS names, in the order of their files' names."""
    files = sorted(RESULTS.rglob("*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [row for row in rows if row["benchmark"] in tables.GROUPS]


def section(rows: Sequence[Row]) -> str:
    """What stands between the two comments."""
    of_cpu, of_gpu = ([row for row in rows if ("gpu" in row) == gpu] for gpu in (False, True))
    parts = [part for some in (of_cpu, of_gpu) for make in (table, elsewhere, accuracy) if (part := make(some))]
    if (RESULTS / PLOT).exists():
        alt = "The same steps: time and memory; the longest pair; cost as tokens and vocabulary grow"
        parts.append(f"![{alt}](benchmarks/results/{PLOT})")
    parts += paragraphs.all_of(of_cpu)
    return "\n\n".join(parts if of_gpu else [*parts, "On a GPU: not measured."])


def table(rows: Sequence[Row]) -> str:
    """Of one machine; "" without rows of the head."""
    steps: dict[tuple[str, str, str], Row] = {}
    longest: dict[str, Row] = {}
    for row in rows:
        if row.get("model") != MODEL or row.get("dtype") != DTYPE or row.get("inputs") == "real":
            continue
        if row["benchmark"] == "memory":
            longest[row["contender"]] = row
        elif row["benchmark"] == "head":
            steps[row["loss"], row["head"], row["contender"]] = row
    measured = [steps["dpo", "trained", name] for name in NAMES if "seconds" in steps.get(("dpo", "trained", name), {})]
    if not measured:
        return ""
    lines = []
    for row in sorted(measured, key=lambda row: row["ratio"]):
        others = {heading: steps.get((*what, row["contender"]), {}) for heading, (what, _) in OTHERS.items()}
        lines.append(
            {
                "": NAMES[row["contender"]],
                "DPO step, s": f"{row['seconds']:.3f}",
                "x bound": f"{row['ratio']:.2f}",
                "tokens/s": f"{row['tokens_per_s']:,.0f}",
                "MiB": f"{row['extra_MiB']:,.0f}",
                "gradient error": f"{row['d_weight_error']:.1e}",
                **{heading: f"{other['ratio']:.2f}" if "ratio" in other else "" for heading, other in others.items()},
                LONGEST: length(longest.get(row["contender"], {})),
            }
        )
    shown = [heading for heading in lines[0] if any(line[heading] for line in lines)]
    drawn = grid([shown, *([line[heading] for heading in shown] for line in lines)])
    of_others = [steps.get((*what, row["contender"]), {}) for what, _ in OTHERS.values() for row in measured]
    fitting = [longest.get(row["contender"], {}) for row in measured]
    made = made_at([row for row in (*measured, *of_others, *fitting) if "seconds" in row])
    return "\n".join([drawn, "", *words(measured, [row for row in steps.values() if "reason" in row], shown, made)])


def elsewhere(rows: Sequence[Row]) -> str:
    """Times the bound on other heads and in other dtypes: ours, the best peer's and eager's; "" without such rows."""
    ratios: dict[tuple[str, str, str, str], dict[str, float]] = {}
    heads: dict[tuple[str, str], Row] = {}
    for row in rows:
        what, on = (row.get("loss", ""), row.get("head", "")), (row.get("model", ""), row.get("dtype", ""))
        if row["benchmark"] != "head" or what not in STEPS.values() or on == (MODEL, DTYPE):
            continue
        if "ratio" in row and row.get("inputs") != "real":
            ratios.setdefault((*on, *what), {})[row["contender"]] = row["ratio"]
            heads[on] = row
    if not heads:
        return ""
    cells = [["x bound", *STEPS]]
    for on, row in heads.items():
        found = [ratios.get((*on, *what), {}) for what in STEPS.values()]
        name = on[0] if on[0] == f"{row['H']}x{row['V']}" else f"{on[0]}, {row['H']}x{row['V']}"
        cells.append([f"{name}, {on[1]}", *(beside(step) for step in found)])
    tokens = ", ".join(f"{n:,}" for n in dict.fromkeys(row["tokens"] for row in heads.values()))
    about = f"Other heads and dtypes, {tokens} scored tokens: fastpref, the best peer, eager PyTorch"
    return f"{grid(cells)}\n\n{about}; {made_at(list(heads.values()))}."


def beside(step: dict[str, float]) -> str:
    """ "**0.98**, Cut Cross-Entropy 1.10, eager 2.50"; "" where we were not measured."""
    if "fastpref" not in step:
        return ""
    peers = {name: ratio for name, ratio in step.items() if name not in ("fastpref", "naive")}
    best = min(peers, key=lambda name: peers[name], default=None)
    parts = [f"**{step['fastpref']:.2f}**", *([f"{NAMES[best]} {peers[best]:.2f}"] if best else [])]
    return ", ".join([*parts, *([f"eager {step['naive']:.2f}"] if "naive" in step else [])])


def accuracy(rows: Sequence[Row]) -> str:
    """Errors on a real model's hidden states, of one machine; "" without rows of that suite."""
    found = {
        (row["contender"], row["dtype"]): row
        for row in rows
        if row["benchmark"] == "accuracy" and row["inputs"] == "real" and "rms" in row
    }
    names = [name for name in NAMES if (name, "bfloat16") in found and (name, "float32") in found]
    if not names:
        return ""
    columns = {"log-prob, rms": "rms", "sum of 1,024": "sum", "d_weight": "d_weight_error"}
    dtypes = {"bfloat16": "bf16", "float32": "fp32"}
    head = ["", *(f"{short}: {heading}" for short in dtypes.values() for heading in columns)]
    lines = [
        [NAMES[name], *(f"{found[name, dtype][key]:.1e}" for dtype in dtypes for key in columns.values())]
        for name in sorted(names, key=lambda name: found[name, "bfloat16"]["rms"])
    ]
    shown = [found[name, dtype] for dtype in dtypes for name in names]
    about = (
        f"How far log-probs (nats) and the head's gradient (relative) are from float64 on the same rounded inputs: "
        f"{shown[0]['tokens']:,} tokens of film criticism through {MODEL}; `fastpref bench accuracy`, "
        f"{made_at(shown)}. Synthetic rows with labels up to 100 nats below the maximum stand in "
        "`benchmarks/results/` too."
    )
    return f"{grid([head, *lines])}\n\n{about}"


def length(row: Row) -> str:
    """Of a row of the memory suite."""
    if "at_least" in row:
        return f"over {row['at_least']:,}"
    return f"{row['length']:,}" if "length" in row else "none" if "reason" in row else ""


def words(measured: Sequence[Row], absent: Sequence[Row], shown: Sequence[str], made: str) -> list[str]:
    """What the columns are, who is missing, where it was measured."""
    row = measured[0]
    about = (
        f"One step of the head of {MODEL} (H {row['H']}, V {row['V']:,}) in {DTYPE}, {row['tokens']:,} scored tokens "
        "after as many prompt tokens, logits as peaked as a model's: forward and backward of the policy, forward of "
        f"the reference. Bound: the {row['bare_products']} matrix products alone, {row['bare_flops']:.2g} FLOP, "
        f"{row['bare_s']:.3f} s, timed before every step. MiB: beyond the inputs, returned gradients among them. "
        "The error is that of the head's gradient, against float64."
    )
    if others := [what for heading, (_, what) in OTHERS.items() if heading in shown]:
        about += f" Then steps of other losses over their own bounds: {', '.join(others)}."
    if LONGEST in shown:
        about += " Longest pair: tokens of a sequence, of two whose step fits 1 GiB."
    reasons = dict.fromkeys(f"{NAMES.get(row['contender'], row['contender'])} ({row['reason']})" for row in absent)
    missing = ["Absent here: " + "; ".join(reasons).replace("not measured: ", "") + "."] if reasons else []
    packages = ("torch", "trl", "liger-kernel", "cut-cross-entropy", "verl")
    versions = ", ".join(f"{name} {row[name]}" for name in packages if row.get(name))
    return [
        about,
        *missing,
        f"{row.get('gpu', row['device'])}, {row['threads']} threads; {versions}; {made}. {AGAIN}",
    ]


def replaced(readme: str) -> str:
    """README with the section written anew."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"readme: README.md must hold {BEGIN} and {END}")
    return f"{before}{begin}\n{section(committed())}\n{end}{after}"


def main(arguments: Sequence[str]) -> None:
    file = Path(arguments[0] if arguments else "README.md")
    rows = committed()
    draw([r for r in rows if "gpu" not in r and (r.get("model"), r.get("dtype")) == (MODEL, DTYPE)], RESULTS / PLOT)
    (RESULTS / "README.md").write_text(tables.page(rows))
    file.write_text(replaced(file.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
