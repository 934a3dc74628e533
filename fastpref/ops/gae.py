"""Generalised advantage estimation as an op."""

import torch
from torch import Tensor

from fastpref import kernels
from fastpref.ops import _check
from fastpref.ops.masked_whiten import whitened_


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

    def flags(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else rows(tensor) if tensor.dtype == torch.bool else rows(tensor) != 0

    live = flags(mask)
    (advantages, returns), sums = _op(
        rows(rewards),
        rows(values),
        live,
        flags(dones),
        None if bootstrap is None else rows(bootstrap),
        gamma,
        lam,
        whiten,
    )
    if whiten:
        count, summed, summed_sq = sums.sum(0)
        mean = summed / count.clamp(min=1)
        # fp64 sums of fp32 numbers: what cancels here is below the rounding of A itself
        spread = (summed_sq - summed * mean).clamp(min=0)
        advantages = whitened_(advantages, live, count, mean, spread)
    return (advantages, returns) if rewards.dim() == 2 else (advantages[0], returns[0])


def _run(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    moments: bool,
) -> tuple[Tensor, Tensor]:
    return kernels.choose("gae", rewards.device.type).gae(rewards, values, mask, dones, bootstrap, gamma, lam, moments)


# defined by hand: torch.library.custom_op adds 11 us to a call that takes 50
_library = torch.library.Library("fastpref", "FRAGMENT")
_library.define("gae" + torch.library.infer_schema(_run, mutates_args=()))
_library.impl("gae", _run, "CompositeExplicitAutograd")
_op = torch.ops.fastpref.gae.default


@torch.library.register_fake("fastpref::gae")
def _(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    moments: bool,
) -> tuple[Tensor, Tensor]:
    results = rewards.new_empty((2, *rewards.shape), dtype=torch.float32)
    return results, rewards.new_empty((rewards.shape[0], 3), dtype=torch.float64)
