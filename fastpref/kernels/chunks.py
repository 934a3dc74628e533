"""How much of a head is worked on at a time, and in which dtypes it is added up and stored."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

# columns of a register tile of the C++ kernels, and of one of its vectors: a chunk is padded to the latter
ROW_BLOCK, SMALL_BLOCK = 48, 16
MIB = 2**20


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def chunk_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype.itemsize == 2 else dtype


def most_rows(bounds: list[int]) -> int:
    return max(last - first for first, last in pairwise(bounds))


def default_workspace(device: torch.device) -> int:
    """Bytes for the buffers of one chunk."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 32
    return 256 * MIB


def chunk_tokens(hidden_size: int, vocab_size: int, dtype: torch.dtype, workspace: int, extra: int = 0) -> int:
    """Rows of a stored chunk, in `extra` bytes and 3/4 of `workspace`, whose rest is for temporaries."""
    row = vocab_size * chunk_dtype(dtype).itemsize + _beside(hidden_size, vocab_size)
    rows = (workspace * 3 // 4 + extra) // row
    block = ROW_BLOCK if rows >= ROW_BLOCK else SMALL_BLOCK
    return max(SMALL_BLOCK, rows // block * block)


def score_tokens(hidden_size: int, vocab_size: int, workspace: int) -> int:
    """Rows scored at once where no chunk is stored."""
    rows = workspace * 3 // 4 // _beside(hidden_size, vocab_size)
    return min(4096, max(ROW_BLOCK, rows // ROW_BLOCK * ROW_BLOCK))


def smallest_workspace(vocab_size: int, dtype: torch.dtype) -> int:
    """Bytes that a chunk of SMALL_BLOCK rows takes."""
    return SMALL_BLOCK * vocab_size * chunk_dtype(dtype).itemsize


def _beside(hidden_size: int, vocab_size: int) -> int:
    """Bytes a row takes beside its stored chunk: partial sums (40 every 480 columns), and copies of itself."""
    return vocab_size // 12 + 16 * hidden_size + 64


def split(index: Tensor, size: int) -> Iterator[Tensor]:
    """Chunks of `size` and a rest."""
    if index.numel():
        yield from index.split(size)


def evenly(index: Tensor, size: int) -> tuple[Tensor, ...]:
    """As few chunks of at most `size`, with as many rows in each: few cost as much as many."""
    count = -(-index.numel() // size)
    return index.tensor_split(count) if count else ()
