"""Which sequence each token is of, and sums by it."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.ops import _check


class Place(NamedTuple):
    """Where the tokens are."""

    shape: torch.Size  # of what is given per token
    sequence: Tensor  # (N,) the sequence of each token
    n_sequences: int


def place(fn: str, name: str, tokens: Tensor, cu_seqlens: Tensor | None) -> Place:
    """Of tensors like `tokens`: (B, T), or packed (N,) with cu_seqlens."""
    _check.rank(fn, (1, 2), **{name: tokens})
    if tokens.dim() == 2:
        if cu_seqlens is not None:
            raise ValueError(f"{fn}: cu_seqlens wants packed {name} (N,); got {tuple(tokens.shape)}")
        n = tokens.shape[0]
        sequence = torch.arange(n, device=tokens.device)[:, None].expand(tokens.shape).reshape(-1)
        return Place(tokens.shape, sequence, n)
    if cu_seqlens is None:
        raise ValueError(f"{fn}: packed {name} (N,) needs cu_seqlens, (S + 1,) int32")
    _check.cu_seqlens(fn, cu_seqlens, tokens.shape[0], name)
    index = torch.arange(tokens.shape[0], device=tokens.device)
    sequence = torch.searchsorted(cu_seqlens.long()[1:], index, right=True)
    return Place(tokens.shape, sequence, cu_seqlens.shape[0] - 1)


def sums_of(sequence: Tensor, x: Tensor, n_sequences: int) -> Tensor:
    """(n_sequences,) float64: of x (N,) by sequence (N,), the same bits every time.

    A sum of 1,024 log-probs is off by 4e-3 nats if it is kept in fp32.
    """
    total = torch.zeros(n_sequences, dtype=torch.float64, device=x.device)
    # not index_add: on CUDA it adds by atomics, in any order, where index_put sorts first; on a CPU index_put adds fp64
    # one after the other, and fp32 by atomics
    return total.index_put((sequence,), x.double(), accumulate=True)


def lengths_of(sequence: Tensor, mask: Tensor, n_sequences: int) -> Tensor:
    """(n_sequences,) int64: tokens that count."""
    return sequence.new_zeros(n_sequences).index_add(0, sequence, mask.long())
