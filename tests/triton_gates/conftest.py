"""Fixtures of the checks that run under Triton's interpreter."""

import pytest

from tests.triton_gates.sanitizer import sanitized


@pytest.fixture
def small_tiles(monkeypatch):
    from fastpref.kernels.triton import configs, head
    from tests.triton_gates.cases import SMALL

    monkeypatch.setattr(configs, "lookup", lambda *_: SMALL)
    monkeypatch.setattr(head, "ALIGNED", 8)  # less than a tile: what is stored past V leaves its row


@pytest.fixture
def checked(small_tiles):
    """Every launch of the test under the sanitizer."""
    with sanitized():
        yield
