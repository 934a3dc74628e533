"""The longest sequence whose DPO step fits in a given memory, by bisection: the figure a user feels.

One pair, half prompt, a trained head. Fits: torch's allocations alive at once beyond the inputs, the gradients
returned among them, stay within `--memory-gib`. By hand, T tokens a sequence: eager holds 2 T V logits in the inputs'
dtype and two or three times in fp32, 14 bytes each; the fused head a workspace, 4 V H beside it and 6 N H. The
length is found to an eighth, or to the first step slower than SLOW seconds, and then it is "at least".
"""

from collections.abc import Callable
from functools import partial

import torch

from fastpref.benchmarks._inputs import Shape, batch
from fastpref.benchmarks._measure import MIB, Row, Table, allocated, or_reason, seconds
from fastpref.benchmarks._peers import CONTENDERS, LOSSES_ONLY, PACKAGES, gradients, load
from fastpref.benchmarks._settings import Settings

COLUMNS = (
    ("tokens", "length", "d"),
    ("at least", "at_least", "d"),
    ("extra MiB", "extra_MiB", ".0f"),
    ("step s", "seconds", ".2f"),
    ("tried", "tried", "d"),
)
SHORTEST = 64
QUICK = ("fastpref", "naive", "trl", "verl-torch")
SLOW = {"cpu": 10.0, "cuda": 2.0}


def run(settings: Settings) -> list[Row]:
    table = Table("memory", COLUMNS, PACKAGES, settings.json)
    slow = SLOW[settings.device.partition(":")[0]] / (4 if settings.quick else 1)
    for shape in settings.shapes:
        for dtype in settings.dtypes:
            about = {
                "model": shape.model,
                "H": shape.hidden,
                "V": shape.vocab,
                "dtype": str(dtype).removeprefix("torch."),
                "memory_GiB": settings.memory_gib,
            }
            table.heading(
                "longest sequence of a DPO pair in {memory_GiB} GiB beyond its inputs, {model}, {dtype}".format(**about)
            )
            for name in settings.contenders or CONTENDERS:
                if "dpo" not in LOSSES_ONLY.get(name, ("dpo",)) or (settings.quick and name not in QUICK):
                    continue
                row = partial(measure, name, shape, dtype, settings, slow)
                table.add({"contender": name, **about, **or_reason(name, row)})
    return table.rows


def measure(name: str, shape: Shape, dtype: torch.dtype, settings: Settings, slow: float) -> Row:
    step = load(name).step("dpo")
    found: dict[int, Row] = {}

    def fits(length: int) -> bool:
        inputs = batch(shape, 1, length, dtype).to(settings.device)
        call = partial(gradients, step, inputs, True)
        call()  # a first call may compile
        spent = seconds(call)
        found[length] = {"extra_MiB": allocated(call) / MIB, "seconds": spent}
        return found[length]["extra_MiB"] <= 1024 * settings.memory_gib

    length, bounded = longest(fits, lambda n: found[n]["seconds"] > slow)
    if length == 0:
        return {"reason": f"{SHORTEST} tokens take {found[SHORTEST]['extra_MiB']:.0f} MiB"}
    return {"at_least" if bounded else "length": length, **found[length], "tried": len(found)}


def longest(fits: Callable[[int], bool], slow: Callable[[int], bool]) -> tuple[int, bool]:
    """(the longest length that fits, to an eighth; whether longer ones were left untried). 0: not even the shortest."""
    low, high = 0, SHORTEST
    while fits(high):
        low = high
        if slow(high):
            return low, True
        high *= 2
    while low and high - low > max(low // 8, 1):
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low, False
