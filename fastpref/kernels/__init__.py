"""What runs where: operation x on backend b is fastpref.kernels.b.x.x, and `choose` alone picks b.

linear_logps alone is not: its kernels are `head`'s, the steps of a sweep over the vocabulary that label_margin and the
losses of heads/ share.

reference   eager PyTorch, any device and dtype, the oracle of every test; never chosen automatically
torch       eager PyTorch, vectorised, any device: the fallback, said aloud once
cpu         C++, csrc/*.cpp
triton      Triton; on CPU tensors only under its interpreter, TRITON_INTERPRET=1, which is for tests
cuda        csrc/*.cu
"""

import importlib
import os
import warnings
from functools import cache
from importlib.util import find_spec
from types import ModuleType

# by this name: importing the subpackage fastpref.kernels.torch binds `torch` in this module to it
from torch import version
from torch.cuda import get_device_capability
from torch.cuda import is_available as cuda_is_available

BACKENDS = ("reference", "torch", "cpu", "triton", "cuda")
FASTEST_FIRST = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")}  # by device type; elsewhere torch


@cache
def choose(op: str, device_type: str, backend: str | None = None) -> ModuleType:
    """The module that runs `op`: that of `backend` if one is named, else the fastest that this machine has.

    Raises:
        ValueError: no such backend, or it does not have this op, or it does not run on this device.
        RuntimeError: the backend is named and is not usable here; the message says why.
    """
    having = [name for name in BACKENDS if find_spec(f"fastpref.kernels.{name}.{op}")]
    if backend is None:
        wanted = [name for name in FASTEST_FIRST.get(device_type, ("torch",)) if name in having]
        backend = next(name for name in wanted if why_not(name) is None)
        if backend != wanted[0]:
            _say_fallback(wanted[0], str(why_not(wanted[0])))
        elif backend == "torch" and {"cpu", "triton", "cuda"}.intersection(having):
            _say_fallback(f"a {device_type} kernel", f"{op} has none yet")
    if backend not in having:
        raise ValueError(f"{op}: backend must be None or one of {having}; got {backend!r}")
    if backend in ("cpu", "triton", "cuda"):
        device = {"cpu": "cpu", "triton": "cpu" if _interpreted() else "cuda", "cuda": "cuda"}[backend]
        if device != device_type:
            raise ValueError(f"{op}: backend {backend!r} wants tensors on {device}; got {device_type}")
        if reason := why_not(backend):
            raise RuntimeError(f"{op}: backend {backend!r} is not usable here: {reason}")
    return importlib.import_module(f"fastpref.kernels.{backend}.{op}")


@cache
def why_not(backend: str) -> str | None:
    """Why a backend cannot be used here; None if it can."""
    if backend == "triton":
        return _why_not_triton()
    compilers = {"cpu": "a C++ compiler", "cuda": "nvcc and a C++ compiler"}
    if backend not in compilers:
        return None
    module = f"fastpref._{backend}"
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        return f"not built: fastpref was installed without {compilers[backend]}; with one, install it again"
    except ImportError as error:
        return f"built, but does not load: {error}"
    if backend == "cuda" and not cuda_is_available():
        return "built; PyTorch sees no CUDA device"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_not_triton() -> str | None:
    if find_spec("triton") is None:
        return "not installed: pip install 'fastpref[triton]'"
    if _interpreted():
        return None
    if not cuda_is_available():
        return "installed; PyTorch sees no CUDA device"
    if version.hip is None and get_device_capability() < (8, 0):
        return "installed; it wants compute capability 8.0 or newer"
    return None


@cache
def _say_fallback(missing: str, reason: str) -> None:
    warnings.warn(f"fastpref: the slower torch fallback runs in place of {missing} ({reason})", stacklevel=2)


def status() -> dict[str, str]:
    """Backend name -> "ready ...", or why it is not."""
    notes = {"reference": " (the tests' oracle; never chosen automatically)", "torch": " (the fallback)"}
    return {name: why_not(name) or f"ready{notes.get(name, '')}" for name in BACKENDS}
