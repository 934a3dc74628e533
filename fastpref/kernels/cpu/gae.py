"""GAE by csrc/gae.cpp: one pass from right to left over each row, rows over torch's threads, sums in double."""

import torch
from torch import Tensor

import fastpref._cpu as _cpu


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both (B, T) float32."""
    # named, not passed inline: a converted copy must live until the kernel has read it
    rewards, values = rewards.float().contiguous(), values.float().contiguous()
    mask = None if mask is None else mask.contiguous()
    dones = None if dones is None else dones.contiguous()
    bootstrap = None if bootstrap is None else bootstrap.float().contiguous()
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    _cpu.gae(
        rewards.data_ptr(),
        values.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        0 if dones is None else dones.data_ptr(),
        0 if bootstrap is None else bootstrap.data_ptr(),
        advantages.data_ptr(),
        returns.data_ptr(),
        *rewards.shape,
        gamma,
        lam,
        torch.get_num_threads(),
    )
    return advantages, returns
