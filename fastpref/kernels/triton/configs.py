"""Which tiles a kernel is launched with: a row of `table.ROWS`, looked up by device, dtype and sizes.

A row depends on nothing else, so that the bits of a log-prob do not depend on how many rows are scored beside it.
benchmarks/tune_triton.py measures candidates and writes the rows.
"""

from functools import cache
from typing import NamedTuple

import torch


class Score(NamedTuple):
    """Of the forward sweep; see _score.py."""

    rows: int
    columns: int
    depth: int
    tiles: int  # of columns that a program walks through
    warps: int
    stages: int
    fresh: int  # tiles of depth an accumulator takes; 256 of H at most
    # operands through the tensor memory accelerator, where they are aligned for it: no row has it before it is measured
    # to be faster; tests and the tuner do
    descriptors: bool = False


class Product(NamedTuple):
    """Of a gradient's product; see _products.py."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


class Config(NamedTuple):
    score: Score
    d_hidden: Product
    d_weight: Product
    library: bool  # the products are the library's GEMMs, faster where no row is without a gradient


class Row(NamedTuple):
    """What fits H <= hidden_size and V <= vocab_size; 0: any. The first such row is taken."""

    arch: str
    bits: int  # of an element of hidden
    hidden_size: int
    vocab_size: int
    config: Config
    measured: str  # device and versions; empty: reasoned from the hardware's limits, not measured


@cache
def arch_of(device: torch.device) -> str:
    """The architecture of a row: the newest one whose limits this device keeps."""
    if device.type != "cuda":
        return "sm_90"  # the interpreter, which has no limits
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    # of compute capability 8.6, 8.9 and 12.x a block has 99 KiB of shared memory, and no wgmma or tcgen05
    return {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}.get((major, minor), "sm_86")


@cache
def lookup(arch: str, dtype: torch.dtype, hidden_size: int, vocab_size: int) -> Config:
    from fastpref.kernels.triton.table import ROWS  # which is made of the classes above

    bits = 8 * dtype.itemsize
    for row in ROWS:
        fits = (row.hidden_size == 0 or hidden_size <= row.hidden_size) and (
            row.vocab_size == 0 or vocab_size <= row.vocab_size
        )
        if (row.arch, row.bits) == (arch, bits) and fits:
            return row.config
    raise ValueError(f"lookup: the table has no row for {arch}, {dtype}, H {hidden_size}, V {vocab_size}")
