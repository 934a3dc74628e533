"""GAE by csrc/gae.cu: one launch, one block a row, a scan from right to left over affine maps."""

import torch
from torch import Tensor

import fastpref._cuda as _cuda


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
    results = torch.empty((2, *rewards.shape), device=rewards.device)
    sums = torch.empty(len(rewards), 3, dtype=torch.float64, device=rewards.device)
    with torch.cuda.device(rewards.device):
        _cuda.gae(
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
            torch.cuda.current_stream().cuda_stream,
        )
    return results, sums
