"""Preference losses by csrc/dpo_row.cu: losses, slopes, rewards and metrics of all pairs in one launch."""

import torch
from torch import Tensor

import fastpref._cuda as _cuda
from fastpref.kernels.cuda import _launch

LOSSES = ("sigmoid", "robust", "hinge", "ipo")  # csrc/dpo_row.h, in its order
METRICS = 6


def dpo_row(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    loss: str,
    beta: float,
    smoothing: float,
    weight: float,
) -> tuple[Tensor, Tensor]:
    """((5, B), (METRICS,)), float32, of float32 sums and int64 lengths, (B,) each.

    The rows are losses, their slopes in chosen and in rejected, chosen rewards and rejected rewards.
    """
    inputs = [
        None if x is None else x.contiguous()
        for x in (chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths)
    ]
    rows = torch.empty(5, chosen.numel(), dtype=torch.float32, device=chosen.device)
    metrics = rows.new_empty(METRICS)
    options = LOSSES.index(loss), beta, smoothing, weight
    _launch.launch(_cuda.dpo_row, (*inputs, *rows, metrics), chosen.numel(), *options)
    return rows, metrics
