"""`fastpref bench --check`: has a ratio become worse than baseline.json says?

A ratio is a step over the bare products timed in the same rounds, so it holds across machines better than seconds do;
still it belongs to a processor's kernel (avx2, avx512, avx512bf16, amx) and a number of threads, and each has its own
rows; what has none fails, so that nothing passes for being unknown. `--update` (of
python -m fastpref.benchmarks.check) writes what the committed rows of `fastpref bench head` say, and measures nothing.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from fastpref.benchmarks import head, readme
from fastpref.benchmarks._measure import Row
from fastpref.benchmarks._settings import Settings

BASELINE = Path(__file__).with_name("baseline.json")
TOLERANCE = 0.25  # of the ratio: rounds of one machine differ by a tenth
WHAT = Settings(losses=("dpo", "ppo"), contenders=("fastpref",), dtypes=(torch.bfloat16, torch.float32), rounds=7)


def key(row: Row) -> str:
    return " ".join(str(row[name]) for name in ("kernel", "threads", "loss", "head", "model", "dtype"))


def measured() -> dict[str, float]:
    """Of the committed rows of what is checked, the last of each."""
    shapes, dtypes = [shape.model for shape in WHAT.shapes], [str(dtype)[6:] for dtype in WHAT.dtypes]
    return {
        key(row): round(row["ratio"], 3)
        for row in readme.committed()
        if row["benchmark"] == "head" and row["contender"] == "fastpref" and "gpu" not in row and "ratio" in row
        if row["loss"] in WHAT.losses and row["model"] in shapes and row["dtype"] in dtypes
        if row.get("inputs") != "real"
    }


def worse(rows: Sequence[Row], baseline: dict[str, float], tolerance: float = TOLERANCE) -> list[str]:
    """A line for each row whose ratio is above its baseline by more than `tolerance`."""
    return [
        f"{key(row)}: {row['ratio']:.2f}, was {baseline[key(row)]:.2f}, more than {tolerance:.0%} worse"
        for row in rows
        if key(row) in baseline and row["ratio"] > baseline[key(row)] * (1 + tolerance)
    ]


def main(arguments: Sequence[str] = ()) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the committed rows' ratios to baseline.json")
    if parser.parse_args(arguments).update:
        BASELINE.write_text(json.dumps(dict(sorted(measured().items())), indent=1) + "\n")
        return 0
    rows, baseline = head.run(WHAT), json.loads(BASELINE.read_text())
    lines = [f"{key(row)}: has no baseline" for row in rows if key(row) not in baseline] + worse(rows, baseline)
    print(f"\n{len(lines)} of {len(rows)} ratios are without a baseline here, or more than {TOLERANCE:.0%} above it")
    print("\n".join(lines))
    return 1 if lines else 0


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
