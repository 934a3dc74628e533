"""dlogp/dhidden of a frozen head, in the pass that scores: an upstream gradient only scales its rows.

    dlogp/dx = (S' / S) slope_y scale w_y - (scale / S) sum over v of F_v w_v

F is anchored at the label's logit, which is known before S is. So the vocabulary can be walked in slabs, each of which
gives its part of both sums while it is in a cache. A row that has to be anchored elsewhere goes, once more, through a
chunk of the whole vocabulary, as all do where the kernels have no slabs.
"""

import torch
from torch import Tensor

from fastpref.kernels.chunks import MIB, chunk_tokens, split
from fastpref.kernels.head import Kernels, Problem, Scores, Sums, finish, label_anchor, score, wants_maximum
from fastpref.kernels.head_gradients import Gradients, Upstream, add_gradients, add_label_to_hidden, part_of
from fastpref.kernels.memory import recycled

SLAB = 3840  # rows of the vocabulary: whole blocks of the C++ kernels' sums, 480, and of their products, 256
WORKSPACE = 64 * MIB  # more rows at once than fit it with a slab would not stay in a cache


def unit_tile(hidden_size: int, vocab_size: int, dtype: torch.dtype, workspace: int, *, slabs: bool) -> tuple[int, int]:
    """(rows of the vocabulary, rows of hidden) whose exponentials are stored together."""
    if slabs:
        vocab_size, workspace = min(vocab_size, SLAB), min(workspace, WORKSPACE)
    return vocab_size, chunk_tokens(hidden_size, vocab_size, dtype, workspace)


def unit_scores(kernels: Kernels, problem: Problem) -> tuple[Scores, Tensor]:
    """(scores, dlogp/dhidden (n, H)) of all rows, as many as `unit_tile` says."""
    every = torch.arange(problem.targets.numel(), device=problem.targets.device)
    if not kernels.SLABS or problem.head.shard is not None:
        return _by_rows(kernels, problem, every)
    scores, unit, again = _by_slabs(kernels, problem, every)
    head, hidden = problem.head, problem.hidden
    for few in split(again, chunk_tokens(hidden.shape[1], head.vocab_size, hidden.dtype, head.workspace)):
        found, unit[few] = _by_rows(kernels, problem, few)
        for whole, part in zip(scores, found, strict=True):
            whole[few] = part
    return scores, unit


def _by_rows(kernels: Kernels, problem: Problem, index: Tensor) -> tuple[Scores, Tensor]:
    head, hidden = problem.head, problem.hidden
    chunk = recycled(kernels.new_chunk(index.numel(), head.weight, hidden.dtype))
    scores = score(kernels, head, problem.gather(index), chunk)
    found = Gradients.begun(problem, (True, False, False))
    add_gradients(kernels, problem, index, scores, _ones(scores), found, chunk)
    assert found.hidden is not None
    return scores, found.hidden[index]


def _by_slabs(kernels: Kernels, problem: Problem, index: Tensor) -> tuple[Scores, Tensor, Tensor]:
    """(scores, dlogp/dhidden, index of the rows in which neither holds)."""
    head, rows = problem.head, problem.gather(index)
    z_y, anchor = label_anchor(kernels, head, rows)
    f = recycled(kernels.new_chunk(index.numel(), head.weight[:SLAB], rows.x.dtype))
    unit = anchor.new_zeros(rows.x.shape)
    sums: Sums | None = None
    for first in range(0, head.vocab_size, SLAB):
        slab = head.rows(first, first + SLAB)
        size = slab.weight.shape[0]
        inside = (rows.targets >= first) & (rows.targets < first + size)
        targets = torch.where(inside, rows.targets - first, -1)
        sums = kernels.score(rows.x, slab, targets, anchor, rows.inv_temperature, f[:size], None, before=sums)
        kernels.add_d_hidden(f[:size], slab.weight, rows.x.dtype, unit)
    assert sums is not None
    scores = finish(anchor, z_y - anchor.double(), sums, head.vocab_size)
    part = part_of(kernels, problem, index, scores, _ones(scores))
    unit.mul_(part.factor[:, None])
    add_label_to_hidden(kernels, problem, part, unit)
    return scores, unit, wants_maximum(sums, z_y)


def _ones(scores: Scores) -> Upstream:
    return Upstream(torch.ones_like(scores.logps), None)
