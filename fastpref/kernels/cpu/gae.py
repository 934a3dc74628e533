"""GAE by csrc/gae*.cpp: one pass from right to left over each row, a vector of steps at a time, rows over threads."""

import torch
from torch import Tensor

import fastpref._cpu as _cpu
from fastpref.kernels.cpu._isa import isa


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    moments: bool = False,
) -> tuple[Tensor, Tensor]:
    """(2, B, T) float32, advantages and returns, and (B, 3) float64: live steps, the sums of A and A^2 over them.

    The sums are 0 without `moments`. One tensor for both: two of a megabyte each go back to the system when
    they are freed, and the page faults of the next call take longer than the rest of it.
    """
    # named, not passed inline: a converted copy must live until the kernel has read it
    rewards, values = rewards.float().contiguous(), values.float().contiguous()
    mask = None if mask is None else mask.contiguous()
    dones = None if dones is None else dones.contiguous()
    bootstrap = None if bootstrap is None else bootstrap.float().contiguous()
    results = rewards.new_empty((2, *rewards.shape))
    sums = rewards.new_zeros(len(rewards), 3, dtype=torch.float64)
    _cpu.gae(
        isa(),
        rewards.data_ptr(),
        values.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        0 if dones is None else dones.data_ptr(),
        0 if bootstrap is None else bootstrap.data_ptr(),
        results[0].data_ptr(),
        results[1].data_ptr(),
        sums.data_ptr() if moments else 0,
        *rewards.shape,
        gamma,
        lam,
        torch.get_num_threads(),
    )
    return results, sums
