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
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both (B, T) float32."""
    # named, not passed inline: a converted copy must live until the launch is on the stream
    rewards, values = rewards.float().contiguous(), values.float().contiguous()
    mask = None if mask is None else mask.contiguous()
    dones = None if dones is None else dones.contiguous()
    bootstrap = None if bootstrap is None else bootstrap.float().contiguous()
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    with torch.cuda.device(rewards.device):
        _cuda.gae(
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
            torch.cuda.current_stream().cuda_stream,
        )
    return advantages, returns
