"""Losses of policy optimisation: one pure function each, on the log-probs of sampled tokens.

The contract of each: a `Rollout` in, (N,) out, one loss a token, not reduced; what comes out at masked tokens is
dropped. losses/objective.py weighs, adds KL and entropy, and reduces by the loss's `reduction`. Below, r is pi / pi_old
of a token (or of its sequence, with importance_sampling_level="sequence"), A its advantage, |y| the tokens of its
sequence. How advantages are formed (GAE, groups, leave-one-out) is the caller's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastpref.losses._protocol import Loss, couples
from fastpref.losses._sums import lengths_of, sums_of
from fastpref.losses.kl import bounded_exp
from fastpref.ops import _check

EPSILON = 0.2
CISPO_EPSILON_HIGH = 4.0
VESPO = {"vespo_k_pos": 2.0, "vespo_k_neg": 3.0, "vespo_lambda_pos": 3.0, "vespo_lambda_neg": 2.0}
Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Rollout:
    """Sampled tokens laid flat, (N,) each, finite everywhere; at masked tokens what stands there means nothing."""

    logps: Tensor  # under the policy being trained; alone has a gradient
    old_logps: Tensor  # under the policy that sampled them; on-policy: logps, detached
    advantages: Tensor
    mask: Tensor  # bool: the token counts
    sequence: Tensor  # in [0, n_sequences)
    n_sequences: int
    importance_sampling_level: str = "token"

    @property
    def log_ratios(self) -> Tensor:
        """(N,) log pi - log pi_old."""
        return self.logps - self.old_logps

    @property
    def ratios(self) -> Tensor:
        """(N,) pi / pi_old of the token, or with importance_sampling_level "sequence" `sequence_ratios`."""
        if self.importance_sampling_level == "sequence":
            return self.sequence_ratios
        return bounded_exp(self.log_ratios)

    @property
    def sequence_ratios(self) -> Tensor:
        """(N,) of the token's sequence, (pi / pi_old)^(1 / |y|)."""
        return bounded_exp(self.means(self.log_ratios))[self.sequence]

    @property
    def lengths(self) -> Tensor:
        """(S,) tokens that count."""
        return lengths_of(self.sequence, self.mask, self.n_sequences)

    def sums(self, x: Tensor) -> Tensor:
        """(S,) over the tokens of each sequence that count."""
        return sums_of(self.sequence, torch.where(self.mask, x, 0.0), self.n_sequences).to(x.dtype)

    def means(self, x: Tensor) -> Tensor:
        """(S,) over the tokens of each sequence that count; 0 where there are none."""
        return self.sums(x) / self.lengths.clamp(min=1)


def _share(rollout: Rollout, x: Tensor, by_sequence: bool) -> Tensor:
    """Mean of x over the tokens that count, or over sequences, where a sequence has one ratio."""
    if by_sequence:
        return rollout.means(x).sum() / max(rollout.n_sequences, 1)
    return torch.where(rollout.mask, x, 0.0).sum() / rollout.mask.sum().clamp(min=1)


def _clip_metrics(ratios_of: Callable[[Rollout], Tensor], by_sequence: bool = False) -> Callable[..., Metrics]:
    """Shares of tokens, or of sequences, whose gradient the clip range cuts off; TRL's names."""

    def measure(
        rollout: Rollout, *, epsilon: float = EPSILON, epsilon_high: float | None = None, **_: Any
    ) -> dict[str, Tensor]:
        ratios, high = ratios_of(rollout), epsilon if epsilon_high is None else epsilon_high
        low_clipped = ((ratios < 1 - epsilon) & (rollout.advantages < 0)).to(ratios.dtype)
        high_clipped = ((ratios > 1 + high) & (rollout.advantages > 0)).to(ratios.dtype)
        sequences = by_sequence or rollout.importance_sampling_level == "sequence"
        some = rollout.lengths > 0
        least = torch.where(some, rollout.means(low_clipped), 1.0)
        most = torch.where(some, rollout.means(high_clipped), 0.0)
        return {
            "clip_ratio/low_mean": _share(rollout, low_clipped, sequences),
            "clip_ratio/low_min": torch.where(some.any(), torch.cat((least, least.new_ones(1))).amin(), 0.0),
            "clip_ratio/high_mean": _share(rollout, high_clipped, sequences),
            "clip_ratio/high_max": torch.cat((most, most.new_zeros(1))).amax(),
            "clip_ratio/region_mean": _share(rollout, low_clipped + high_clipped, sequences),
        }

    return measure


def _clipped(
    fn: str, ratios: Tensor, rollout: Rollout, epsilon: float, epsilon_high: float | None, delta: float | None
) -> Tensor:
    """-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A), and where A < 0 never above -delta A.

    The second bound is the dual clip of Ye et al. 2020, arXiv:1912.09729, also known as two-sided clipping. A ratio
    that is cut off has a gradient of exactly 0.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    _check.number(fn, epsilon=epsilon, epsilon_high=high)
    if not epsilon >= 0 or not high >= 0:
        raise ValueError(f"{fn}: epsilon and epsilon_high must be >= 0; got {epsilon} and {high}")
    advantages = rollout.advantages
    objective = torch.minimum(ratios * advantages, ratios.clamp(1 - epsilon, 1 + high) * advantages)
    if delta is not None:
        _check.number(fn, delta=delta)
        if not delta > 1:
            raise ValueError(f"{fn}: delta must be > 1, or None; got {delta}")
        objective = torch.where((advantages < 0) & (ratios > delta), delta * advantages, objective)
    return -objective


def _of_tokens(rollout: Rollout) -> Tensor:
    return rollout.ratios


def _of_sequences(rollout: Rollout) -> Tensor:
    return rollout.sequence_ratios


def _of_whole_sequences(rollout: Rollout) -> Tensor:
    return bounded_exp(rollout.sums(rollout.log_ratios))[rollout.sequence]


@couples("token", reduction="mean", metrics=_clip_metrics(_of_tokens))
def ppo(
    rollout: Rollout, *, epsilon: float = EPSILON, epsilon_high: float | None = None, delta: float | None = None
) -> Tensor:
    """PPO: -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A). Schulman et al. 2017, arXiv:1707.06347, eq. 7.

    epsilon_high: None: epsilon. delta: where A < 0 the loss stops growing at r = delta (dual clip, Ye et al. 2020,
    arXiv:1912.09729); None: never. Reduced over all tokens alike, as PPO averages time steps.
    """
    return _clipped("ppo", rollout.ratios, rollout, epsilon, epsilon_high, delta)


@couples("token", reduction="sequence_mean", metrics=_clip_metrics(_of_tokens))
def grpo(
    rollout: Rollout, *, epsilon: float = EPSILON, epsilon_high: float | None = None, delta: float | None = None
) -> Tensor:
    """GRPO: PPO's loss averaged within each sequence, then over sequences. Shao et al. 2024, arXiv:2402.03300, eq. 3.

    Its KL term is kl_coef > 0 with kl_estimator "k3". Per-sequence means favour short right answers and long wrong
    ones: see dr_grpo and dapo.
    """
    return _clipped("grpo", rollout.ratios, rollout, epsilon, epsilon_high, delta)


@couples("token", reduction="constant", metrics=_clip_metrics(_of_tokens))
def dr_grpo(
    rollout: Rollout, *, epsilon: float = EPSILON, epsilon_high: float | None = None, delta: float | None = None
) -> Tensor:
    """Dr. GRPO: PPO's loss summed within each sequence, over max_length, which is the same for all.

    Liu et al. 2025, arXiv:2503.20783, section 3.2. Its advantages are not divided by the group's standard deviation.
    """
    return _clipped("dr_grpo", rollout.ratios, rollout, epsilon, epsilon_high, delta)


@couples("token", reduction="mean", metrics=_clip_metrics(_of_tokens))
def bnpo(
    rollout: Rollout, *, epsilon: float = EPSILON, epsilon_high: float | None = None, delta: float | None = None
) -> Tensor:
    """PPO's loss averaged over the tokens of the batch: what TRL calls bnpo.

    The name is from Xiao et al. 2025, arXiv:2506.02864, whose own contribution, advantages normalised by a beta
    distribution, is the caller's.
    """
    return _clipped("bnpo", rollout.ratios, rollout, epsilon, epsilon_high, delta)


@couples("token", reduction="mean", metrics=_clip_metrics(_of_tokens))
def dapo(
    rollout: Rollout, *, epsilon: float = EPSILON, epsilon_high: float | None = None, delta: float | None = None
) -> Tensor:
    """DAPO: PPO's loss over all tokens of all sequences alike. Yu et al. 2025, arXiv:2503.14476, eq. 8.

    The paper clips at epsilon 0.2 and epsilon_high 0.28; here epsilon_high defaults to epsilon, as everywhere. Its
    overlong filtering is a target of ignore_index (or a mask) at the tokens of truncated answers.
    """
    return _clipped("dapo", rollout.ratios, rollout, epsilon, epsilon_high, delta)


def _sequence_gradient_by_token(rollout: Rollout) -> Tensor:
    """s, the sequence's ratio, with the gradient of log pi of the token alone."""
    drift = rollout.logps - rollout.logps.detach()
    return bounded_exp(rollout.means(rollout.log_ratios.detach())[rollout.sequence] + drift)


@couples("sequence", reduction="sequence_mean", metrics=_clip_metrics(_of_sequences, by_sequence=True))
def gspo(
    rollout: Rollout, *, epsilon: float = EPSILON, epsilon_high: float | None = None, delta: float | None = None
) -> Tensor:
    """GSPO: -min(s A, clip(s, 1 - epsilon, 1 + epsilon_high) A), s = (pi / pi_old)^(1 / |y|) of the whole sequence.

    Zheng et al. 2025, arXiv:2507.18071, eq. 5 and 7, in the form of eq. 13 and 14 (GSPO-token): the same gradient where
    A is one number a sequence, and where it is not, each token moves by its own A. The paper clips at 3e-4 and 4e-4.
    """
    return _clipped("gspo", _sequence_gradient_by_token(rollout), rollout, epsilon, epsilon_high, delta)


@couples("sequence", reduction="sequence_sum", metrics=_clip_metrics(_of_sequences, by_sequence=True))
def luspo(
    rollout: Rollout, *, epsilon: float = EPSILON, epsilon_high: float | None = None, delta: float | None = None
) -> Tensor:
    """LUSPO: GSPO's loss of a sequence times |y|, averaged over sequences. Liu et al. 2026, arXiv:2602.05261."""
    return _clipped("luspo", _sequence_gradient_by_token(rollout), rollout, epsilon, epsilon_high, delta)


@couples("sequence", reduction="sequence_mean", metrics=_clip_metrics(_of_whole_sequences, by_sequence=True))
def rloo(
    rollout: Rollout, *, epsilon: float = EPSILON, epsilon_high: float | None = None, delta: float | None = None
) -> Tensor:
    """RLOO: the whole answer is one action, of ratio r = pi(y) / pi_old(y); PPO's clip around it.

    Ahmadian et al. 2024, arXiv:2402.14740: on-policy the gradient is that of -A log pi(y), as in their REINFORCE
    estimator with leave-one-out advantages. The clip, for when the batch is used again, is TRL's.
    """
    return _clipped("rloo", _of_whole_sequences(rollout), rollout, epsilon, epsilon_high, delta)


@couples("token", reduction="sequence_sum")
def reinforce(rollout: Rollout) -> Tensor:
    """REINFORCE: -A log pi, summed over the tokens of a sequence. Williams 1992, Machine Learning 8, eq. 11.

    For tokens drawn by the policy itself: old_logps enter the metrics only.
    """
    return -rollout.advantages * rollout.logps


def _cispo_metrics(
    rollout: Rollout, *, epsilon_high: float = CISPO_EPSILON_HIGH, epsilon: float | None = None
) -> Metrics:
    cut = ((rollout.ratios > 1 + epsilon_high) & (rollout.advantages > 0)).to(rollout.logps.dtype)
    return {"cispo_clip_ratio": _share(rollout, cut, rollout.importance_sampling_level == "sequence")}


@couples("token", reduction="mean", metrics=_cispo_metrics)
def cispo(rollout: Rollout, *, epsilon_high: float = CISPO_EPSILON_HIGH, epsilon: float | None = None) -> Tensor:
    """CISPO: -sg(clip(r, 1 - epsilon, 1 + epsilon_high)) A log pi, sg: no gradient. Clips weights, drops no token.

    Chen et al. 2025 (MiniMax-M1), arXiv:2506.13585, eq. 4 and 5. epsilon None: no lower bound, as they ran it.
    epsilon_high: their eq. 5; the cap is 1 + epsilon_high, by default the 5 that Khatri et al. 2025, arXiv:2510.13786,
    found to work. (TRL's epsilon_high for this loss is the cap itself.)
    """
    _check.number("cispo", epsilon_high=epsilon_high, **({} if epsilon is None else {"epsilon": epsilon}))
    low = 0.0 if epsilon is None else 1 - epsilon
    if not epsilon_high >= 0 or not low <= 1:
        raise ValueError(f"cispo: epsilon and epsilon_high must be >= 0; got {epsilon} and {epsilon_high}")
    return -rollout.ratios.detach().clamp(low, 1 + epsilon_high) * rollout.advantages * rollout.logps


def _by_sign(rollout: Rollout, positive: float, other: float) -> Tensor:
    """(N,) positive where A > 0, other elsewhere."""
    above = (rollout.advantages > 0).to(rollout.logps.dtype)
    return positive * above + other * (1 - above)


@couples("token", reduction="sequence_mean")
def sapo(rollout: Rollout, *, sapo_temperature_pos: float = 1.0, sapo_temperature_neg: float = 1.05) -> Tensor:
    """SAPO: -(4 / tau) sigmoid(tau (r - 1)) A, a soft gate in place of the clip.

    Gao et al. 2025, arXiv:2511.20347, eqs. 5 and 6.
    tau is sapo_temperature_pos where A > 0 and sapo_temperature_neg elsewhere: the larger, the sooner a token that has
    moved stops counting.
    """
    _check.number("sapo", sapo_temperature_pos=sapo_temperature_pos, sapo_temperature_neg=sapo_temperature_neg)
    if not (0 < sapo_temperature_pos < float("inf") and 0 < sapo_temperature_neg < float("inf")):
        got = f"{sapo_temperature_pos} and {sapo_temperature_neg}"
        raise ValueError(f"sapo: temperatures must be > 0 and finite; got {got}")
    tau = _by_sign(rollout, sapo_temperature_pos, sapo_temperature_neg)
    return -4 / tau * torch.sigmoid(tau * (rollout.ratios - 1)) * rollout.advantages


def _gamma_weights(rollout: Rollout, **options: float) -> Tensor:
    """(N,) w^k e^(lambda (1 - w)) of the token's sequence, without gradient; options: of VESPO."""
    o = {**VESPO, **options}
    k = _by_sign(rollout, o["vespo_k_pos"], o["vespo_k_neg"])
    rate = _by_sign(rollout, o["vespo_lambda_pos"], o["vespo_lambda_neg"])
    log_w = rollout.sums(rollout.log_ratios.detach())[rollout.sequence]
    return torch.exp(k * log_w - rate * torch.expm1(log_w))


def _vespo_metrics(rollout: Rollout, **options: float) -> Metrics:
    return {"vespo/phi_seq_mean": _share(rollout, _gamma_weights(rollout, **options), by_sequence=True)}


@couples("sequence", reduction="mean", metrics=_vespo_metrics)
def vespo(
    rollout: Rollout,
    *,
    vespo_k_pos: float = VESPO["vespo_k_pos"],
    vespo_k_neg: float = VESPO["vespo_k_neg"],
    vespo_lambda_pos: float = VESPO["vespo_lambda_pos"],
    vespo_lambda_neg: float = VESPO["vespo_lambda_neg"],
) -> Tensor:
    """VESPO: -sg(phi(w)) A log pi, phi(w) = w^k e^(lambda (1 - w)), w = pi(y) / pi_old(y) of the whole answer.

    arXiv:2602.10693. Answers that have become much likelier or unlikelier count for less, without an edge: phi is 1 at
    w = 1, highest at k / lambda, and falls to 0 on both sides. k and lambda are the _pos ones where A > 0, the _neg
    ones elsewhere; names and defaults are TRL's. (TRL multiplies a sampler's correction into w; here token_weights
    scale the loss.)
    """
    powers = {"vespo_k_pos": vespo_k_pos, "vespo_k_neg": vespo_k_neg}
    rates = {"vespo_lambda_pos": vespo_lambda_pos, "vespo_lambda_neg": vespo_lambda_neg}
    _check.number("vespo", **powers, **rates)
    found = (*powers.values(), *rates.values())
    if not all(0 <= x < float("inf") for x in found) or not all(rates.values()):
        raise ValueError(f"vespo: both k must be >= 0 and both lambda > 0, all finite; got {found}")
    return -_gamma_weights(rollout, **powers, **rates) * rollout.advantages * rollout.logps


POLICY_LOSSES: dict[str, Loss] = {
    f.__name__: f for f in (ppo, grpo, dr_grpo, bnpo, dapo, gspo, cispo, sapo, vespo, luspo, rloo, reinforce)
}
