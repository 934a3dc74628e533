"""What takes the place of a log-ratio where the pull to the reference is another divergence than the reverse KL.

    score(r) = f'(exp r), up to a constant that cancels between chosen and rejected
    f the divergence's generator: D_f(pi, ref) = E_ref f(pi / ref)         Wang et al. 2023, arXiv:2309.16240, section 4

    reverse_kl        r                                    f(t) = t log t
    forward_kl        1 - exp(-r)                          f(t) = -log t
    js_divergence     log 2 + log sigmoid(r)
    alpha_divergence  (exp((a - 1) r) - 1) / (a - 1)       a = 1: reverse_kl, a = 0: forward_kl

alpha is TRL 1.16's: 1 minus the paper's, alike at the default 0.5.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpref.ops import _check

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
STEEPEST = 30.0  # nats; above it exp goes on as its tangent: squares of scores stay in fp32, and keep a gradient


def score(logratios: Tensor, kind: str, alpha: float) -> Tensor:
    if kind == "js_divergence":
        return math.log(2) + F.logsigmoid(logratios)
    power = {"reverse_kl": 0.0, "forward_kl": 1.0, "alpha_divergence": 1 - alpha}[kind]
    return -_expm1(-power * logratios) / power if power else logratios


def _expm1(x: Tensor) -> Tensor:
    return torch.expm1(x.clamp(max=STEEPEST)) + math.exp(STEEPEST) * torch.relu(x - STEEPEST)


def check(fn: str, kind: str, alpha: float | None) -> float:
    """The coefficient to use."""
    if kind not in F_DIVERGENCES:
        raise ValueError(f"{fn}: f_divergence_type must be one of {', '.join(F_DIVERGENCES)}; got {kind!r}")
    if alpha is None:
        return 0.5
    if kind != "alpha_divergence":
        raise ValueError(f"{fn}: f_alpha_divergence_coef belongs to alpha_divergence; got f_divergence_type={kind!r}")
    # above 1 f' is bounded below: a policy may then give a completion no mass at all, and the paper's theorem fails
    _check.between(fn, 0, 1, f_alpha_divergence_coef=alpha)
    return alpha
