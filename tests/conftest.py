"""Fresh memory is NaN (or the largest integer); at most two threads, or as many as OMP_NUM_THREADS says."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    # fill_uninitialized_memory alone does nothing: it acts under deterministic algorithms only
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def two_threads() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))
