"""Regressions of the fused head, on pytest-benchmark: pytest benchmarks/bench_head.py --benchmark-autosave.

--benchmark-compare then shows what a change did on this machine. The bound is in head.py; the bare products are a row.
"""

from functools import partial
from typing import Any

import pytest
import torch

from fastpref.benchmarks._inputs import Shape, batch
from fastpref.benchmarks._losses import LOSSES
from fastpref.benchmarks._measure import bare_products
from fastpref.benchmarks._peers import gradients, load, value

SHAPE, PAIRS, LENGTH = Shape.parse("SmolLM2-135M"), 2, 128
DTYPES = [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", ["trained", "frozen"])
@pytest.mark.parametrize("loss", LOSSES)
def test_fastpref(benchmark: Any, loss: str, head: str, dtype: torch.dtype) -> None:
    benchmark.group = f"{loss}, {head}, {dtype}"
    inputs = batch(SHAPE, PAIRS, LENGTH, dtype, sampled=True)
    step = load("fastpref").step(loss)
    if LOSSES[loss].couples is None:
        benchmark(value, step, inputs)
    else:
        benchmark(gradients, step, inputs, head == "trained")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bare_products(benchmark: Any, dtype: torch.dtype) -> None:
    """Three: logits, d_hidden, d_weight."""
    benchmark.group = f"bare products, {dtype}"
    benchmark(partial(bare_products, PAIRS * LENGTH, *SHAPE, True, False)(dtype))
