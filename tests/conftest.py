"""Fresh memory is NaN (or the largest integer); at most two threads, or as many as OMP_NUM_THREADS says.

Under `pytest -n` one thread a worker, its child processes included: threads that wait by spinning starve each other.
"""

import os
from collections.abc import Iterator

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    # fill_uninitialized_memory alone does nothing: it acts under deterministic algorithms only
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def any_algorithms(fresh_memory_is_nan: None) -> None:
    """As users run: for tests of the same bits, which PyTorch's deterministic variants would otherwise give."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def two_threads() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))
