"""What the launchers of all C++ kernels hand over: the instruction set, and dtypes by number."""

import os

import torch

from fastpref import _cpu

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype of csrc/head.h


def isa() -> str:
    """The instruction set in use: the best of this processor, or FASTPREF_CPU_ISA."""
    return os.environ.get("FASTPREF_CPU_ISA") or _cpu.isas()[0]
