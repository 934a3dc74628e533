"""Losses of preference pairs: one pure function each, on sums of log-probabilities in nats; `dpo_loss` calls them.

The contract of each: `pairs` and `beta` in, (B,) out, one loss a pair, not reduced (losses/_protocol.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpref.losses._protocol import Loss, couples, resolve
from fastpref.ops import _check


@dataclass(frozen=True)
class Tokens:
    """The completion tokens of 2B sequences, chosen first: (N,) each, prompt and padding left out or masked."""

    logps: Tensor
    ref_logps: Tensor | None
    mask: Tensor  # bool: the token counts
    sequence: Tensor  # in [0, 2B): pair i is sequences i and i + B
    outputs: dict[str, Tensor] = field(default_factory=dict)  # entropy, log_sum_sq_probs, ...; detached


@dataclass(frozen=True)
class Pairs:
    """B pairs of sums over completion tokens, nats. None: not given."""

    chosen_logps: Tensor  # (B,) under the policy
    rejected_logps: Tensor
    ref_chosen_logps: Tensor | None = None  # (B,) under the reference; zeros if the call is reference_free
    ref_rejected_logps: Tensor | None = None
    chosen_lengths: Tensor | None = None  # (B,) completion tokens
    rejected_lengths: Tensor | None = None
    tokens: Tokens | None = None  # None in dpo_loss
    caller: str = "dpo_loss"

    @property
    def chosen_logratios(self) -> Tensor:
        """(B,) log pi(y_w) - log ref(y_w). Raises where there is no reference."""
        return self.chosen_logps - self.need("ref_chosen_logps")

    @property
    def rejected_logratios(self) -> Tensor:
        return self.rejected_logps - self.need("ref_rejected_logps")

    def need(self, name: str) -> Any:
        """The field of this name; raises if it was not given."""
        value = getattr(self, name)
        if value is None:
            way_out = ", or reference_free=True" if name.startswith("ref_") else ""
            raise ValueError(f"{self.caller}: this loss needs {name} and has none: give it{way_out}")
        return value


@couples("pair")
def sigmoid(pairs: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO: -log sigmoid(beta (r_w - r_l)), r the log-ratios. Rafailov et al. 2023, arXiv:2305.18290, eq. 7.

    label_smoothing: the probability that a label is flipped, in [0, 0.5); above 0 this is conservative DPO
    (Mitchell 2023, "A note on DPO with noisy preferences", eq. 3).
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"sigmoid: label_smoothing must be in [0, 0.5); got {label_smoothing}")
    z = beta * (pairs.chosen_logratios - pairs.rejected_logratios)
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


@couples("pair")
def hinge(pairs: Pairs, *, beta: float) -> Tensor:
    """SLiC as a loss on log-ratios: max(0, 1 - beta (r_w - r_l)). Zhao et al. 2023, arXiv:2305.10425, eq. 2;
    Liu et al. 2024, arXiv:2309.06657, table 1."""
    return torch.relu(1 - beta * (pairs.chosen_logratios - pairs.rejected_logratios))


@couples("pair")
def ipo(pairs: Pairs, *, beta: float) -> Tensor:
    """IPO: (r_w / |y_w| - r_l / |y_l| - 1 / (2 beta))^2, beta the paper's tau.

    Azar et al. 2023, arXiv:2310.12036, eq. 17. Departs from the equation as printed, and agrees with TRL: the
    log-ratios are means over tokens, as the paper's authors advised for language models.
    """
    # a completion of no tokens has a log-ratio of 0: it must not become 0 / 0
    chosen = pairs.chosen_logratios / pairs.need("chosen_lengths").clamp(min=1)
    rejected = pairs.rejected_logratios / pairs.need("rejected_lengths").clamp(min=1)
    return (chosen - rejected - 1 / (2 * beta)).square()


PREFERENCE_LOSSES: dict[str, Loss] = {f.__name__: f for f in (sigmoid, hinge, ipo)}


def rewards(pairs: Pairs, beta: float) -> tuple[Tensor, Tensor]:
    """(chosen, rejected), (B,) each, detached: beta times the log-ratio, the reference 0 where there is none."""
    chosen, rejected = pairs.chosen_logps, pairs.rejected_logps
    if pairs.ref_chosen_logps is not None and pairs.ref_rejected_logps is not None:
        chosen, rejected = chosen - pairs.ref_chosen_logps, rejected - pairs.ref_rejected_logps
    return beta * chosen.detach(), beta * rejected.detach()


def check_beta(fn: str, beta: float) -> None:
    _check.number(fn, beta=beta)
    if not 0 < beta < float("inf"):
        raise ValueError(f"{fn}: beta must be > 0 and finite; got {beta}")


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None,
    *,
    loss_type: str | Loss | Sequence[str | Loss] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    reference_free: bool = False,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, chosen_rewards, rejected_rewards) of B pairs; sigmoid: -log sigmoid(beta (r_w - r_l)).

    Rafailov et al. 2023, arXiv:2305.18290, eq. 7; the other types cite their papers.
    Args:
        policy_chosen_logps, policy_rejected_logps: (B,) log-probability of each completion: a sum over tokens, nats.
        ref_chosen_logps, ref_rejected_logps: (B,) the same under the reference. None with reference_free.
        loss_type: a name in PREFERENCE_LOSSES, a function f(pairs, *, beta, ...) -> (B,), or a list of them.
        loss_weights: one number for each of a list. None: 1 each.
        beta: strength of the pull to the reference, > 0.
        reference_free: the reference counts as uniform: its log-ratios are 0.
        chosen_lengths, rejected_lengths: (B,) completion tokens, for the losses that divide by them (ipo).
        options: the loss's own keywords, as `label_smoothing` of sigmoid.
    Returns:
        (B,) float32 each (float64 for float64). losses is differentiable, rewards are detached.
    Raises:
        ValueError: shapes, an unknown loss, beta, or a reference or lengths that the loss needs and has not.
        TypeError: an option that the loss does not own.
    """
    fn = "dpo_loss"
    _check.tensors(
        fn,
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
    every = {
        "policy_chosen_logps": policy_chosen_logps,
        "policy_rejected_logps": policy_rejected_logps,
        "ref_chosen_logps": ref_chosen_logps,
        "ref_rejected_logps": ref_rejected_logps,
    }
    _check.floating(fn, (*_check.FLOATS, torch.float64), **every)
    lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    _check.rank(fn, (1,), policy_chosen_logps=policy_chosen_logps)
    _check.same_shape(fn, **every, **lengths)
    _check.same_dtype(fn, **every)
    _check.same_device(fn, **every, **lengths)
    check_beta(fn, beta)
    if (ref_chosen_logps is None) != (ref_rejected_logps is None):
        raise ValueError(f"{fn}: ref_chosen_logps and ref_rejected_logps go together; got only one")
    if reference_free and ref_chosen_logps is not None:
        raise ValueError(f"{fn}: reference_free=True and reference log-probs were both given; choose one")
    terms = resolve(fn, PREFERENCE_LOSSES, loss_type, loss_weights, options)

    def widen(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(torch.promote_types(x.dtype, torch.float32))

    chosen, rejected = widen(policy_chosen_logps), widen(policy_rejected_logps)
    assert chosen is not None and rejected is not None
    ref_chosen, ref_rejected = widen(ref_chosen_logps), widen(ref_rejected_logps)
    if reference_free:
        ref_chosen, ref_rejected = torch.zeros_like(chosen), torch.zeros_like(rejected)
    pairs = Pairs(chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, None, fn)
    return terms(fn, chosen, pairs, beta=beta), *rewards(pairs, beta)
