"""What the checks under the interpreter share: tiles small enough that a small problem has several of each."""

import importlib.util
from pathlib import Path

import torch

import tests.triton_gates.interpreter  # noqa: F401
from fastpref.kernels.triton import configs, head

SMALL = configs.Config(
    configs.Score(rows=32, columns=128, depth=16, tiles=2, warps=4, stages=2, fresh=2),
    configs.Product(rows=32, columns=32, depth=64, warps=4, stages=2),
    configs.Product(rows=64, columns=64, depth=16, warps=4, stages=2),
    library=False,
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def broken(kernels, folder, monkeypatch, right, wrong):
    """Puts a copy of a kernel module, with `wrong` for `right`, in the place of its kernels in the launchers."""
    source = Path(kernels.__file__).read_text()
    assert source.count(right) >= 1, f"{kernels.__name__} has no {right!r}"
    path = folder / "broken.py"
    path.write_text(source.replace(right, wrong, 1))
    spec = importlib.util.spec_from_file_location("broken", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in vars(head):
        if name.endswith("_kernel") and hasattr(module, name):
            monkeypatch.setattr(head, name, getattr(module, name))
