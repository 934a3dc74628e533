"""Fixtures of the checks under Triton's interpreter. Triton is imported late: it need not be installed here."""

import pytest


@pytest.fixture
def small_tiles(monkeypatch):
    from fastpref.kernels.triton import configs, head
    from tests.triton_gates.cases import SMALL

    monkeypatch.setattr(configs, "lookup", lambda *_: SMALL)
    monkeypatch.setattr(head, "ALIGNED", 8)  # less than a tile: what is stored past V leaves its row


@pytest.fixture
def checked(small_tiles):
    """Every launch of the test under the sanitizer."""
    from tests.triton_gates.sanitizer import sanitized

    with sanitized():
        yield
