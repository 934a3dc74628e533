"""Losses of rows by a CUDA kernel, for exactly the options it covers; elsewhere the functions of fastpref.losses."""

import torch
from torch import Tensor

from fastpref import kernels
from fastpref.losses import preference, surrogates
from fastpref.losses.dpo import PairLoss
from fastpref.losses.objective import Objective
from fastpref.losses.pairs import Pairs
from fastpref.ops.dpo_row import PairRows, dpo_row
from fastpref.ops.ppo_row import TokenRows, ppo_row

OF_PAIRS = (preference.sigmoid, preference.robust, preference.hinge, preference.ipo)
OF_TOKENS = (surrogates.ppo, surrogates.grpo, surrogates.dr_grpo, surrogates.bnpo, surrogates.dapo)


def pair_rows(loss: PairLoss, pairs: Pairs) -> PairRows | None:
    """What the kernel gives; None: it is no case of the kernel, or one that the function refuses."""
    if not _on_cuda(pairs.chosen_logps) or loss.ld_alpha is not None or loss.use_weighting:
        return None
    if len(loss.terms.terms) > 1 or loss.f_divergence_type != "reverse_kl":
        return None
    term = loss.terms.terms[0]
    smoothing = term.options.get("label_smoothing", 0.0)
    if not _numbers(smoothing):
        return None
    ref_chosen, ref_rejected = pairs.ref_chosen_logps, pairs.ref_rejected_logps
    if term.loss not in OF_PAIRS or not 0 <= smoothing < 0.5 or ref_chosen is None or ref_rejected is None:
        return None
    lengths = pairs.chosen_lengths, pairs.rejected_lengths
    if term.loss is preference.ipo and any(x is None for x in lengths):
        return None
    logps = pairs.chosen_logps, pairs.rejected_logps, ref_chosen, ref_rejected
    name = term.loss.__name__
    return dpo_row(*logps, *lengths, loss=name, beta=loss.beta, smoothing=smoothing, weight=term.weight)


def token_rows(
    goal: Objective, logps: Tensor, entropy: Tensor | None, bounds: Tensor | None = None
) -> TokenRows | None:
    """What the kernel gives, metrics with `bounds` alone (S + 1,): where each sequence starts, and the end."""
    if not _on_cuda(logps) or goal.level != "token" or goal.use_bias_correction_kl or len(goal.terms.terms) > 1:
        return None
    term = goal.terms.terms[0]
    epsilon = term.options.get("epsilon", surrogates.EPSILON)
    high = term.options.get("epsilon_high")
    high = epsilon if high is None else high
    delta = term.options.get("delta")
    delta = float("inf") if delta is None else delta
    if not _numbers(epsilon, high, delta):
        return None
    if term.loss not in OF_TOKENS or not epsilon >= 0 or not high >= 0 or not delta > 1:
        return None
    return ppo_row(
        logps,
        goal.old_logps,
        goal.advantages,
        goal.shares,
        goal.token_weights,
        goal.ref_logps,
        entropy,
        goal.mask,
        bounds,
        low=1 - epsilon,
        high=1 + high,
        delta=delta,
        weight=term.weight,
        kl_coef=goal.kl_coef,
        kl_estimator=goal.kl.__name__,
        entropy_coef=goal.entropy_coef,
    )


def _numbers(*options: object) -> bool:
    return all(isinstance(x, int | float) and not isinstance(x, bool) for x in options)


def _on_cuda(x: Tensor) -> bool:
    compiling = torch.compiler.is_compiling()
    return x.is_cuda and x.dtype == torch.float32 and not compiling and kernels.why_not("cuda") is None
