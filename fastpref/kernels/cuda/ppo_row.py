"""The clipped policy loss by csrc/ppo_row.cu: losses, slopes and metrics of all tokens."""

import torch
from torch import Tensor

import fastpref._cuda as _cuda
from fastpref.kernels.cuda import _launch

KL_ESTIMATORS = ("k1", "k2", "k3")  # csrc/ppo_row.h, in its order
METRICS, SUMS = 8, 6


def ppo_row(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    shares: Tensor,
    token_weights: Tensor | None,
    ref_logps: Tensor | None,
    entropy: Tensor | None,
    mask: Tensor,
    bounds: Tensor | None,
    low: float,
    high: float,
    delta: float,
    weight: float,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
) -> tuple[Tensor, Tensor | None]:
    """((3, N), (METRICS,)), float32: losses and their slopes in logps and entropy; no metrics without bounds.

    Of (N,) float32 tensors, a bool mask, and int64 `bounds` (S + 1,), where each sequence starts, and the end. Without
    an entropy its slopes are not written.
    """
    inputs = [
        None if x is None else x.contiguous()
        for x in (logps, old_logps, advantages, shares, token_weights, ref_logps, entropy, mask, bounds)
    ]
    n, sequences = logps.numel(), 0 if bounds is None else bounds.numel() - 1
    rows = torch.empty(3, n, dtype=torch.float32, device=logps.device)
    sums = metrics = None
    if bounds is not None:
        sums = rows.new_empty((sequences, _cuda.ppo_row_parts(n, sequences), SUMS), dtype=torch.float64)
        metrics = rows.new_empty(METRICS)
    outputs = rows[0], rows[1], None if entropy is None else rows[2], sums, metrics
    options = low, high, delta, weight, kl_coef, KL_ESTIMATORS.index(kl_estimator), entropy_coef
    _launch.launch(_cuda.ppo_row, (*inputs, *outputs), n, sequences, *options)
    return rows, metrics
