"""GAE by csrc/gae.cu: one launch, a block a row."""

import torch
from torch import Tensor

import fastpref._cuda as _cuda
from fastpref.kernels.cuda import _launch


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
    """(2, B, T) float32, advantages and returns, and (B, 3) float64: live steps, the sums of A and A^2 over them."""
    # named, not passed inline: a converted copy must live until the launch is on the stream
    rewards, values = rewards.float().contiguous(), values.float().contiguous()
    mask = None if mask is None else mask.contiguous()
    dones = None if dones is None else dones.contiguous()
    bootstrap = None if bootstrap is None else bootstrap.float().contiguous()
    results = rewards.new_empty((2, *rewards.shape))
    sums = torch.empty(len(rewards), 3, dtype=torch.float64, device=rewards.device)
    tensors = (rewards, values, mask, dones, bootstrap, *results, sums if moments else None)
    _launch.launch(_cuda.gae, tensors, *rewards.shape, gamma, lam)
    return results, sums
