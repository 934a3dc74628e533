"""The loss of a reward model trained on pairs."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpref.ops import _check


def reward_loss(
    chosen: Tensor, rejected: Tensor, *, margin: float | Tensor | None = None, center_coef: float = 0.0
) -> Tensor:
    """(B,) -log sigmoid(chosen - rejected - margin) + center_coef (chosen + rejected)^2, not reduced.

    Bradley-Terry, as in Ouyang et al. 2022, arXiv:2203.02155, eq. 1; the margin of Touvron et al. 2023 (Llama 2),
    arXiv:2307.09288, eq. 2; centring of Eisenstein et al. 2023, arXiv:2312.09244, which holds down a constant that
    the first term does not see. `.mean()` is the loss of TRL's RewardTrainer, whose center_rewards_coefficient is
    center_coef.

    Args:
        chosen, rejected: (B,) the rewards of a pair's two completions.
        margin: how much better the chosen one is, in units of reward: a number or (B,). No gradient.
        center_coef: >= 0; the paper's is 0.01.
    Returns:
        (B,) float32 (float64 for float64), differentiable in chosen and rejected.
    Raises:
        ValueError: shapes or devices differ, or center_coef is negative.
        TypeError: dtypes differ or are not floating.
    """
    fn = "reward_loss"
    both = {"chosen": chosen, "rejected": rejected}
    of_pairs = margin if isinstance(margin, Tensor) else None
    _check.tensors(fn, **both)
    _check.floating(fn, _check.WIDE_FLOATS, **both)
    _check.rank(fn, (1,), chosen=chosen)
    _check.same_shape(fn, **both, margin=of_pairs)
    _check.same_dtype(fn, **both)
    _check.same_device(fn, **both, margin=of_pairs)
    if margin is not None and of_pairs is None:
        _check.finite(fn, margin=margin)  # type: ignore[arg-type]
    _check.number(fn, center_coef=center_coef)
    if not 0 <= center_coef < float("inf"):
        raise ValueError(f"{fn}: center_coef must be >= 0 and finite; got {center_coef}")
    wide = torch.promote_types(chosen.dtype, torch.float32)
    chosen, rejected = chosen.to(wide), rejected.to(wide)
    apart = chosen - rejected
    if margin is not None:
        apart = apart - (margin.detach().to(wide) if isinstance(margin, Tensor) else margin)
    losses = -F.logsigmoid(apart)
    return losses + center_coef * (chosen + rejected).square() if center_coef else losses
