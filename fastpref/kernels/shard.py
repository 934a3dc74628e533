"""A vocabulary in parts, one a process: what a sweep over it has to tell the other processes.

Every process has all rows of hidden, and of the weight its own rows, in the order of the ranks. Two things are told:
each label's logit, which one process can form, before the sums, and the sums after them. Both are gathered and added in
the order of the ranks, so that all processes have the same bits, in every run.
"""

import functools
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

UNBOUNDED = 2**62  # bytes; None as processes tell it to each other


class Shard(NamedTuple):
    """Which rows of the vocabulary this process holds, and who holds the others."""

    group: str  # the name of the process group, which the arguments of an op can hold
    bounds: list[int]  # (W + 1,) where each process's rows start, and V
    all_sums: bool  # False: log-probs are all that is asked for, and only their sum is told

    @property
    def process_group(self) -> dist.ProcessGroup:
        return dist.distributed_c10d._resolve_process_group(self.group)  # type: ignore[arg-type]

    @property
    def vocab_size(self) -> int:
        return self.bounds[-1]

    def own(self, targets: Tensor) -> Tensor:
        """Targets as rows of this process's weight; -1 where another one holds the row."""
        rank = dist.get_rank(self.process_group)
        first, last = self.bounds[rank : rank + 2]
        return torch.where((targets >= first) & (targets < last), targets - first, -1)

    def gather(self, x: Tensor) -> Tensor:
        """(W, ...): x of each process."""
        out = x.new_empty(len(self.bounds) - 1, *x.shape)
        # flat on both sides, as every backend takes it
        dist.all_gather_into_tensor(out.view(-1), x.reshape(-1).contiguous(), group=self.process_group)
        return out

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over the processes."""
        return in_order(self.gather(x))

    def add_over_ranks(self, x: Tensor) -> None:
        """x becomes its sum over the processes: for gradients of hidden, of which W copies would take too much room."""
        dist.all_reduce(x, group=self.process_group)


def in_order(parts: Tensor) -> Tensor:
    """Sum over the first dimension, from the first to the last."""
    return functools.reduce(torch.add, parts.unbind(0))


def agree(
    fn: str,
    group: dist.ProcessGroup,
    hidden: Tensor,
    weight: Tensor,
    n_targets: int,
    workspace: int,
    max_extra_bytes: int | None = None,
) -> tuple[list[int], int, int | None]:
    """(the bounds of each process's rows, the smallest workspace, the smallest max_extra_bytes).

    All must size their chunks by them alike, and take the same passes.

    Raises:
        ValueError: this process is not in the group, or what should be replicated differs between processes.
    """
    if dist.get_rank(group) < 0:
        raise ValueError(f"{fn}: process_group must include this process")
    names = "rows of weight", "workspace", "max_extra_bytes", "rows of hidden", "hidden size", "targets"
    extra = UNBOUNDED if max_extra_bytes is None else min(max_extra_bytes, UNBOUNDED)
    same_everywhere = *hidden.flatten(0, -2).shape, n_targets
    mine = torch.tensor([weight.shape[0], workspace, extra, *same_everywhere], device=hidden.device)
    found = mine.new_empty(dist.get_world_size(group) * len(names))
    dist.all_gather_into_tensor(found, mine, group=group)
    rows, workspaces, extras, *same = zip(*found.view(-1, len(names)).tolist(), strict=True)
    for name, numbers in zip(names[3:], same, strict=True):
        if len(set(numbers)) > 1:
            raise ValueError(f"{fn}: {name} must be as many on every process of process_group; got {list(numbers)}")
    bounds = [0]
    for count in rows:
        bounds.append(bounds[-1] + count)
    return bounds, min(workspaces), None if min(extras) == UNBOUNDED else min(extras)
