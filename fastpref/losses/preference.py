"""Losses of preference pairs: one pure function each, on sums of log-probabilities in nats; `dpo_loss` calls them.

The contract of each: `pairs` and `beta` in, (B,) out, one loss a pair, not reduced (losses/_protocol.py). y_w is the
chosen completion, y_l the rejected, |y| its tokens; r the log-ratio log pi(y) - log ref(y). Where f_divergence_type
may put another score in its place, s stands for r.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpref.losses import _stable
from fastpref.losses._protocol import Loss, couples
from fastpref.losses.pairs import Pairs, per_token
from fastpref.ops import _check


@couples("pair", f_divergence=True)
def sigmoid(pairs: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO: -log sigmoid(beta (s_w - s_l)). Rafailov et al. 2023, arXiv:2305.18290, eq. 7.

    label_smoothing: the probability that a label is flipped, in [0, 0.5); above 0 this is conservative DPO
    (Mitchell 2023, "A note on DPO with noisy preferences", eq. 3). TRL 1.16 takes it and ignores it here.
    """
    return _logistic("sigmoid", beta * pairs.margins, label_smoothing)


@couples("pair", f_divergence=True)
def robust(pairs: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """rDPO: (-(1 - e) log sigmoid(z) + e log sigmoid(-z)) / (1 - 2 e), z = beta (s_w - s_l), e = label_smoothing.

    Unbiased if a share e of the labels is flipped, 0 <= e < 0.5. Chowdhury et al. 2024, arXiv:2403.00409,
    section 3.1.
    """
    _smoothing("robust", label_smoothing)
    z = beta * pairs.margins
    clean, flipped = F.logsigmoid(z), F.logsigmoid(-z)
    return (label_smoothing * flipped - (1 - label_smoothing) * clean) / (1 - 2 * label_smoothing)


@couples("pair", f_divergence=True)
def hinge(pairs: Pairs, *, beta: float) -> Tensor:
    """SLiC as a loss on log-ratios: max(0, 1 - beta (s_w - s_l)). Zhao et al. 2023, arXiv:2305.10425, eq. 2;
    Liu et al. 2024, arXiv:2309.06657, table 1."""
    return torch.relu(1 - beta * pairs.margins)


@couples("pair", f_divergence=True)
def ipo(pairs: Pairs, *, beta: float) -> Tensor:
    """IPO: (s_w / |y_w| - s_l / |y_l| - 1 / (2 beta))^2, beta the paper's tau.

    Azar et al. 2023, arXiv:2310.12036, eq. 17. Departs from the equation as printed, and agrees with TRL: the
    log-ratios are means over tokens, as the paper's authors advised for language models.
    """
    return (_mean_margins(pairs) - 1 / (2 * beta)).square()


@couples("pair", f_divergence=True)
def exo_pair(pairs: Pairs, *, beta: float, label_smoothing: float = 1e-3) -> Tensor:
    """EXO: KL(sigmoid(+-z) || labels), z = beta (s_w - s_l): the reverse of the direction that DPO minimises.

    sigmoid(z) (log sigmoid(z) - log(1 - e)) + sigmoid(-z) (log sigmoid(-z) - log e), e = label_smoothing, in
    (0, 0.5). Ji et al. 2024, arXiv:2402.00856, eq. 16, and its e = 1e-3; TRL has no default.
    """
    _smoothing("exo_pair", label_smoothing)
    if label_smoothing == 0:
        raise ValueError("exo_pair: label_smoothing must be > 0, or the loss is infinite; got 0")
    z = beta * pairs.margins
    right = _stable.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-label_smoothing))
    return right + _stable.sigmoid(-z) * (F.logsigmoid(-z) - math.log(label_smoothing))


@couples("pair")
def nca_pair(pairs: Pairs, *, beta: float) -> Tensor:
    """NCA of two completions: -log sigmoid(z_w) - (log sigmoid(-z_w) + log sigmoid(-z_l)) / 2, z = beta r.

    Chen et al. 2024, arXiv:2402.05369, section 4.1.
    """
    chosen, rejected = beta * pairs.chosen_logratios, beta * pairs.rejected_logratios
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


@couples("pair")
def bco_pair(pairs: Pairs, *, beta: float, delta: float | Tensor = 0.0) -> Tensor:
    """BCO: -log sigmoid(beta r_w - delta) - log sigmoid(-(beta r_l - delta)).

    Jung et al. 2024, arXiv:2404.04656, section 4.
    delta: the paper's reward shift, a running mean of all rewards. A loss keeps no state: average the rewards that
    come back and give the mean, a number or a 0-d tensor. 0, as in TRL 1.16, leaves it out.
    """
    if isinstance(delta, Tensor):
        if delta.dim() or delta.requires_grad:
            raise ValueError(f"bco_pair: delta must be a number or a detached 0-d tensor; got {tuple(delta.shape)}")
    else:
        _check.finite("bco_pair", delta=delta)
    chosen, rejected = beta * pairs.chosen_logratios, beta * pairs.rejected_logratios
    return -F.logsigmoid(chosen - delta) - F.logsigmoid(delta - rejected)


@couples("pair")
def sppo_hard(pairs: Pairs, *, beta: float) -> Tensor:
    """SPPO with a win probability of 1 and 0: (r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2, beta the paper's 1/eta.

    Wu et al. 2024, arXiv:2405.00675, eq. 4.7.
    """
    half = 1 / (2 * beta)
    return (pairs.chosen_logratios - half).square() + (pairs.rejected_logratios + half).square()


@couples("batch")
def aot(pairs: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT: -log sigmoid(beta (m_(k) - n_(k))), m_(k) the k-th smallest policy margin log pi(y_w) - log pi(y_l) of the
    call, n_(k) the reference's. Term k is of quantile k, not of pair k. Melnyk et al. 2024, arXiv:2406.05882,
    section 3."""
    policy = pairs.chosen_logps - pairs.rejected_logps
    reference = pairs.need("ref_chosen_logps") - pairs.need("ref_rejected_logps")
    return _logistic("aot", beta * (policy.sort().values - reference.sort().values), label_smoothing)


@couples("batch")
def aot_unpaired(pairs: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT of unpaired data: -log sigmoid(beta (r_w(k) - r_l(k))), each sorted over the call on its own.

    Melnyk et al. 2024, arXiv:2406.05882, section 3.
    """
    chosen, rejected = pairs.chosen_logratios.sort().values, pairs.rejected_logratios.sort().values
    return _logistic("aot_unpaired", beta * (chosen - rejected), label_smoothing)


@couples("pair")
def apo_zero(pairs: Pairs, *, beta: float) -> Tensor:
    """APO-zero: sigmoid(-beta r_w) + sigmoid(beta r_l): raises the chosen, lowers the rejected.

    D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7, plus 1.
    """
    return _stable.sigmoid(-beta * pairs.chosen_logratios) + _stable.sigmoid(beta * pairs.rejected_logratios)


@couples("pair")
def apo_down(pairs: Pairs, *, beta: float) -> Tensor:
    """APO-down: sigmoid(beta r_w) + sigmoid(-beta (r_w - r_l)): lowers both, the rejected more.

    D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8, plus 1.
    """
    chosen, rejected = pairs.chosen_logratios, pairs.rejected_logratios
    return _stable.sigmoid(beta * chosen) + _stable.sigmoid(-beta * (chosen - rejected))


@couples("pair", f_divergence=True)
def discopop(pairs: Pairs, *, beta: float, discopop_tau: float = 0.05) -> Tensor:
    """DiscoPOP: -(1 - m) log sigmoid(z) + m exp(-z), m = sigmoid(z / tau), z = beta (s_w - s_l).

    Lu et al. 2024, arXiv:2406.08414, eq. 5. tau in (0, 1]: above 1 the loss would grow exponentially in -z.
    """
    _check.number("discopop", discopop_tau=discopop_tau)
    if not 0 < discopop_tau <= 1:
        raise ValueError(f"discopop: discopop_tau must be in (0, 1]; got {discopop_tau}")
    z = beta * pairs.margins
    # m exp(-z) as one exponential: apart, 0 times infinity at z << 0
    return -_stable.sigmoid(-z / discopop_tau) * F.logsigmoid(z) + torch.exp(F.logsigmoid(z / discopop_tau) - z)


@couples("pair", f_divergence=True)
def sigmoid_norm(pairs: Pairs, *, beta: float) -> Tensor:
    """Length-normalised DPO: -log sigmoid(beta (s_w / |y_w| - s_l / |y_l|)). Lambert et al. 2024 (Tulu 3),
    arXiv:2411.15124, section 5.1; there beta is 5, not 0.1."""
    return -F.logsigmoid(beta * _mean_margins(pairs))


@couples("pair", reference=False)
def sft(pairs: Pairs, *, beta: float) -> Tensor:
    """Preferred-FT: -log pi(y_w) / |y_w|; beta has no part. Rafailov et al. 2023, arXiv:2305.18290, section 6.

    Departs from TRL where lengths differ: TRL averages tokens over the local batch, so that what a pair weighs
    depends on the others that it is drawn with, and on gradient accumulation. Here each completion weighs alike.
    """
    return pairs.chosen_nll


@couples("pair", reference=False)
def cpo(pairs: Pairs, *, beta: float, cpo_alpha: float = 1.0, label_smoothing: float = 0.0) -> Tensor:
    """CPO: -log sigmoid(beta (log pi(y_w) - log pi(y_l))) - cpo_alpha log pi(y_w) / |y_w|. No reference.

    Xu et al. 2024, arXiv:2401.08417, eq. 3. The second term is `sft`: a mean over tokens, where the paper writes a sum
    and both its authors' code and TRL average.
    """
    _not_negative("cpo", cpo_alpha=cpo_alpha)
    loss = _logistic("cpo", beta * (pairs.chosen_logps - pairs.rejected_logps), label_smoothing)
    return loss + cpo_alpha * pairs.chosen_nll if cpo_alpha else loss


@couples("pair", reference=False, mean_rewards=True)
def simpo(pairs: Pairs, *, beta: float, simpo_gamma: float = 0.5, label_smoothing: float = 0.0) -> Tensor:
    """SimPO: -log sigmoid(beta (log pi(y_w) / |y_w| - log pi(y_l) / |y_l|) - gamma). No reference.

    Meng et al. 2024, arXiv:2405.14734, eq. 6; there beta is 2 to 10, not 0.1, and gamma 0.3 to 1.6. TRL adds the loss
    `sft` unless its cpo_alpha is 0: here that is loss_type=["simpo", "sft"].
    """
    _check.finite("simpo", simpo_gamma=simpo_gamma)
    chosen, rejected = mean_logps(pairs)
    return _logistic("simpo", beta * (chosen - rejected) - simpo_gamma, label_smoothing)


@couples("pair", reference=False, mean_rewards=True)
def orpo(pairs: Pairs, *, beta: float) -> Tensor:
    """ORPO: -log p_w - beta log sigmoid(log odds_w - log odds_l), log p = log pi(y) / |y|, odds = p / (1 - p).

    Hong et al. 2024, arXiv:2403.07691, eqs. 3 to 7, beta its lambda. No reference. TRL's first term averages tokens
    over the local batch, the prompt's too; here, as in eq. 3, over each completion.
    """
    chosen, rejected = mean_logps(pairs)
    log_odds = (chosen - rejected) - (_stable.log1mexp(chosen) - _stable.log1mexp(rejected))
    return pairs.chosen_nll - beta * F.logsigmoid(log_odds)


@couples("pair")
def dpop(pairs: Pairs, *, beta: float, dpop_lambda: float = 50.0) -> Tensor:
    """DPO-positive: -log sigmoid(beta (r_w - r_l - lambda max(0, -r_w))): the chosen must not lose probability.

    Pal et al. 2024 (Smaug), arXiv:2402.13228, eq. 3; its lambda is 50, its beta 0.3.
    """
    _not_negative("dpop", dpop_lambda=dpop_lambda)
    chosen, rejected = pairs.chosen_logratios, pairs.rejected_logratios
    return -F.logsigmoid(beta * (chosen - rejected - dpop_lambda * torch.relu(-chosen)))


@couples("pair", reference=False)
def unlikelihood(pairs: Pairs, *, beta: float, unlikelihood_alpha: float = 1.0) -> Tensor:
    """-log pi(y_w) / |y_w| - (alpha / |y_l|) sum_t log(1 - p(y_l,t)), over the tokens of y_l. No reference, no beta.

    Welleck et al. 2019, arXiv:1908.04319, eqs. 2 and 4, as the baseline of Rafailov et al. 2023, section 6, with its
    alpha. Both terms are means over tokens. It needs log-probs per token.
    """
    _not_negative("unlikelihood", unlikelihood_alpha=unlikelihood_alpha)
    tokens, n_pairs = pairs.need("tokens"), pairs.chosen_logps.shape[0]
    rejected = tokens.mask & (tokens.sequence >= n_pairs)
    absent = torch.where(rejected, -_stable.log1mexp(torch.where(rejected, tokens.logps, -1.0)), 0.0)
    sums, lengths = tokens.sums(absent, 2 * n_pairs), pairs.need("rejected_lengths")
    return pairs.chosen_nll + unlikelihood_alpha * per_token(sums[n_pairs:], lengths)


PREFERENCE_LOSSES: dict[str, Loss] = {
    f.__name__: f
    for f in (
        *(sigmoid, robust, hinge, ipo, exo_pair, nca_pair, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down),
        *(discopop, sigmoid_norm, sft, cpo, simpo, orpo, dpop, unlikelihood),
    )
}


def mean_logps(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """(chosen, rejected), (B,) each: log pi(y) / |y|."""
    return (
        per_token(pairs.chosen_logps, pairs.need("chosen_lengths")),
        per_token(pairs.rejected_logps, pairs.need("rejected_lengths")),
    )


def _mean_margins(pairs: Pairs) -> Tensor:
    chosen = per_token(pairs.chosen_scores, pairs.need("chosen_lengths"))
    return chosen - per_token(pairs.rejected_scores, pairs.need("rejected_lengths"))


def _logistic(loss: str, z: Tensor, label_smoothing: float) -> Tensor:
    _smoothing(loss, label_smoothing)
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def _smoothing(loss: str, label_smoothing: float) -> None:
    _check.number(loss, label_smoothing=label_smoothing)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"{loss}: label_smoothing must be in [0, 0.5); got {label_smoothing}")


def _not_negative(loss: str, **options: float) -> None:
    _check.number(loss, **options)
    for name, value in options.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{loss}: {name} must be >= 0 and finite; got {value}")
