"""Generalised advantage estimation as an op."""

import torch
from torch import Tensor

from fastpref import kernels
from fastpref.ops import _check


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None = None,
    dones: Tensor | None = None,
    bootstrap: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten: bool = False,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) of each step: A_t = delta_t + gamma lam A_next, returns = A_t + V_t.

    delta_t = r_t + gamma V_next - V_t. Schulman et al. 2016, arXiv:1506.02438, eq. 16. A masked step is passed
    over, as in verl: "next" is the next live step of the row, so tool output or padding inside a row is no
    boundary, and a score belongs on the last live step. What stands at masked steps is never read, NaN allowed.

    Args:
        rewards: (B, T) or (T,), in units of reward; bfloat16, float16 or float32.
        values: V(s_t), like rewards.
        mask: like rewards, any dtype; nonzero where a step is live. None: all are.
        dones: like rewards, any dtype; nonzero where s_(t+1) is terminal: nothing after it counts, bootstrap
            included. Ignored at masked steps. None: nowhere.
        bootstrap: (B,), or () for a (T,) row: V after the last live step. None: 0.
        gamma, lam: in [0, 1].
        whiten: shift and scale the advantages to mean 0 and variance 1 over the live steps of all rows (unbiased
            variance, 1e-8 added to it). A single live step becomes 0. Returns are not whitened.
    Returns:
        (advantages, returns), shaped like rewards, float32, 0 at masked steps. Neither is differentiable: the
        inputs are detached.
    Raises:
        ValueError: shapes or devices differ, or gamma or lam is outside [0, 1].
        TypeError: an argument is no tensor, or a dtype is not one of those above, or they differ.
    """
    _check.tensors("gae", rewards=rewards, values=values, mask=mask, dones=dones, bootstrap=bootstrap)
    _check.floating("gae", rewards=rewards)
    _check.rank("gae", (1, 2), rewards=rewards)
    _check.same_shape("gae", rewards=rewards, values=values, mask=mask, dones=dones)
    _check.same_dtype("gae", rewards=rewards, values=values, bootstrap=bootstrap)
    _check.same_device("gae", rewards=rewards, values=values, mask=mask, dones=dones, bootstrap=bootstrap)
    if bootstrap is not None and bootstrap.shape != rewards.shape[:-1]:
        wanted, got = tuple(rewards.shape[:-1]), tuple(bootstrap.shape)
        raise ValueError(f"gae: bootstrap must have the shape of rewards less the last dimension, {wanted}; got {got}")
    _check.between("gae", 0, 1, gamma=gamma, lam=lam)

    def rows(tensor: Tensor) -> Tensor:
        return tensor.detach() if rewards.dim() == 2 else tensor.detach()[None]

    live = None if mask is None else rows(mask) != 0
    advantages, returns = _op(
        rows(rewards),
        rows(values),
        live,
        None if dones is None else rows(dones) != 0,
        None if bootstrap is None else rows(bootstrap),
        gamma,
        lam,
    )
    if whiten:
        advantages = _whiten(advantages, live)
    return advantages.reshape(rewards.shape), returns.reshape(rewards.shape)


def _whiten(x: Tensor, live: Tensor | None) -> Tensor:
    """x less its mean and over its standard deviation, of the live entries; 0 at the others, which are 0 in x."""
    if live is None:
        live = torch.ones_like(x, dtype=torch.bool)
    count = live.sum()
    mean = x.sum() / count.clamp(min=1)
    centred = torch.where(live, x - mean, 0.0)
    variance = centred.square().sum() / (count - 1).clamp(min=1)
    return centred * torch.rsqrt(variance + 1e-8)


@torch.library.custom_op("fastpref::gae", mutates_args=())
def _op(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    return kernels.choose("gae", rewards.device.type).gae(rewards, values, mask, dones, bootstrap, gamma, lam)


@_op.register_fake
def _(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    advantages = rewards.new_empty(rewards.shape, dtype=torch.float32)
    return advantages, torch.empty_like(advantages)
