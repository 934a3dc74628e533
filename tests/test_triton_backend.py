"""When the Triton backend runs, and what is said where it cannot."""

import subprocess
import sys

import pytest
import torch

from fastpref import kernels, linear_logps


@pytest.fixture
def asked_anew(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for cached in (kernels.choose, kernels.why_not):
        cached.cache_clear()
    yield monkeypatch
    for cached in (kernels.choose, kernels.why_not):
        cached.cache_clear()


def test_not_installed(asked_anew):
    asked_anew.setattr(kernels, "find_spec", lambda name: None if name == "triton" else object())
    assert kernels.status()["triton"] == "not installed: pip install 'fastpref[triton]'"
    with pytest.raises(RuntimeError, match=r"^head: backend .triton. is not usable here: not installed: pip install"):
        kernels.choose("head", "cuda", "triton")


@pytest.mark.parametrize(
    ("available", "capability", "reason"),
    [
        (False, (9, 0), "installed; PyTorch sees no CUDA device"),
        (True, (7, 5), "installed; it wants compute capability 8.0 or newer"),
        (True, (8, 0), None),
    ],
)
def test_device(asked_anew, available, capability, reason):
    asked_anew.setattr(kernels, "find_spec", lambda name: object())
    asked_anew.setattr(kernels, "cuda_is_available", lambda: available)
    asked_anew.setattr(kernels, "get_device_capability", lambda: capability)
    assert kernels.why_not("triton") == reason


def test_refuses_tensors_of_the_cpu(asked_anew):
    with pytest.raises(ValueError, match=r"^head: backend .triton. wants tensors on cuda; got cpu$"):
        linear_logps(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2, dtype=torch.int64), backend="triton")


def test_import_of_fastpref_does_not_import_triton():
    code = "import sys, fastpref; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
