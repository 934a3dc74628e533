"""Regressions of selective_logps, on pytest-benchmark: pytest benchmarks/bench_selective.py; the bound is a copy."""

from typing import Any

import pytest
import torch

from fastpref.benchmarks._inputs import Shape
from fastpref.benchmarks._settings import Settings
from fastpref.benchmarks.selective import CONTENDERS, copy_of, inputs, step

SHAPE = Shape.parse("Qwen2.5-0.5B")


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["fastpref", "fastpref-inplace", "copy"])
def test_selective_logps(benchmark: Any, name: str, dtype: torch.dtype, backward: bool) -> None:
    benchmark.group = f"{dtype}, backward {backward}"
    logits, targets, upstream = inputs(SHAPE, dtype, Settings(quick=True))
    if name == "copy":
        benchmark(copy_of(logits.nbytes * (3 if backward else 1), "cpu"))
    else:
        benchmark(step, CONTENDERS[name](), logits, targets, upstream if backward else None)
