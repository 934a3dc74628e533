"""Regressions of gae, on pytest-benchmark: pytest benchmarks/bench_gae.py; the bound is in gae.py."""

from typing import Any

import pytest

from fastpref.benchmarks.gae import CONTENDERS, MASKS, SHAPES, case


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [name for name in CONTENDERS if name.startswith("fastpref")])
def test_gae(benchmark: Any, name: str, shape: tuple[int, int], masks: str) -> None:
    benchmark.group = f"{shape}, {masks}"
    benchmark(CONTENDERS[name](*case(*shape, masks, "cpu")))
