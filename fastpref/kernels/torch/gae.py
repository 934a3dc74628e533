"""GAE in about log2(T) passes of eager PyTorch: every step is an affine map, and a scan composes them.

With G = V + lam A:   A_t = r_t - V_t + gamma G_next,   G_t = V_t + lam (r_t - V_t) + gamma lam G_next.
A masked step is the identity, a terminal one has slope 0; bootstrap is a last step of its own. Slopes and
offsets are combined at distance 1, 2, 4, ... (Hillis and Steele 1986).
"""

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
    """(2, B, T) float32, advantages and returns, and (B, 3) float64: live steps, the sums of A and A^2 over them."""
    rewards, values = rewards.float(), values.float()
    live = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    terminal = torch.zeros_like(live) if dones is None else dones & live
    last = rewards.new_zeros(len(rewards)) if bootstrap is None else bootstrap.float()

    slope = torch.where(terminal, 0.0, torch.where(live, gamma * lam, 1.0))
    offset = torch.where(live, values + lam * (rewards - values), 0.0)
    slope = torch.cat((slope, torch.zeros_like(last)[:, None]), dim=1)
    offset = torch.cat((offset, last[:, None]), dim=1)
    distance = 1
    while distance < offset.shape[1]:
        # where, not a product: a NaN after a terminal step must not cross it
        near, far = slope[:, :-distance], slope[:, distance:]
        reached = torch.where(near == 0, offset[:, :-distance], offset[:, :-distance] + near * offset[:, distance:])
        offset = torch.cat((reached, offset[:, -distance:]), dim=1)
        slope = torch.cat((near * far, slope[:, -distance:]), dim=1)
        distance *= 2

    later = torch.where(terminal, 0.0, gamma * offset[:, 1:])
    advantages = torch.where(live, rewards - values + later, 0.0)
    sums = rewards.new_empty((len(rewards), 3), dtype=torch.float64)
    if moments:
        wide = advantages.double()
        sums = torch.stack((live.sum(1).double(), wide.sum(1), wide.square().sum(1)), dim=1)
    return torch.stack((advantages, torch.where(live, rewards + later, 0.0))), sums
