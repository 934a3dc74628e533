"""GAE as in the paper, a loop over the steps. Schulman et al. 2016, arXiv:1506.02438, eq. 16."""

import torch
from torch import Tensor


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
    """(2, B, T), advantages and returns, in float64 for float64 inputs and float32 otherwise.

    And (B, 3) float64: live steps, and the sums of A and A^2 over them.
    """
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    rewards, values = rewards.to(dtype), values.to(dtype)
    live = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    terminal = torch.zeros_like(live) if dones is None else dones
    zero = rewards.new_zeros(())
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)

    next_value = rewards.new_zeros(len(rewards)) if bootstrap is None else bootstrap.to(dtype)
    next_advantage = torch.zeros_like(next_value)
    for t in reversed(range(rewards.shape[1])):
        # where, not a product: what follows a terminal step may be NaN
        delta = rewards[:, t] + gamma * torch.where(terminal[:, t], zero, next_value) - values[:, t]
        advantage = delta + gamma * lam * torch.where(terminal[:, t], zero, next_advantage)
        advantages[:, t] = torch.where(live[:, t], advantage, zero)
        returns[:, t] = torch.where(live[:, t], advantage + values[:, t], zero)
        next_value = torch.where(live[:, t], values[:, t], next_value)
        next_advantage = torch.where(live[:, t], advantage, next_advantage)
    wide = advantages.double()
    sums = torch.stack((live.sum(1).double(), wide.sum(1), wide.square().sum(1)), dim=1)
    return torch.stack((advantages, returns)), sums
