"""A preference loss with its options bound, and `dpo_loss`, which applies it to sums of log-probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastpref.losses import _f_divergence
from fastpref.losses._protocol import Loss, Terms, resolve, trait
from fastpref.losses.pairs import Pairs, Tokens, per_token
from fastpref.losses.preference import PREFERENCE_LOSSES, mean_logps, sft
from fastpref.ops import _check


@dataclass(frozen=True)
class PairLoss:
    """(B,) losses of B pairs: the weighted sum of `terms`, and what acts on each of them alike."""

    fn: str
    terms: Terms
    beta: float
    f_divergence_type: str
    f_alpha_divergence_coef: float
    ld_alpha: float | None
    use_weighting: bool

    def __call__(self, pairs: Pairs) -> Tensor:
        losses = self.terms(self.fn, pairs.chosen_logps, self._seen(pairs), beta=self.beta)
        return losses * _weights(pairs) if self.use_weighting else losses

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """(chosen, rejected), (B,) each, detached: beta times the log-ratio, the reference 0 where there is none.

        SimPO's and ORPO's: beta times the mean log-prob of a token.
        """
        pairs = self._seen(pairs)
        chosen, rejected = pairs.chosen_logps, pairs.rejected_logps
        if any(trait(term.loss, "mean_rewards") for term in self.terms.terms):
            chosen, rejected = mean_logps(pairs)
        elif pairs.ref_chosen_logps is not None and pairs.ref_rejected_logps is not None:
            chosen, rejected = pairs.chosen_logratios, pairs.rejected_logratios
        return self.beta * chosen.detach(), self.beta * rejected.detach()

    def _seen(self, pairs: Pairs) -> Pairs:
        """The pairs as the losses see them."""
        pairs = pairs if self.ld_alpha is None else _discounted(pairs, self.ld_alpha)
        kind, alpha = self.f_divergence_type, self.f_alpha_divergence_coef
        return replace(pairs, f_divergence_type=kind, f_alpha_divergence_coef=alpha)


def bind(
    fn: str,
    loss_type: str | Loss | Sequence[str | Loss],
    loss_weights: Sequence[float] | None,
    beta: float,
    f_divergence_type: str,
    f_alpha_divergence_coef: float | None,
    ld_alpha: float | None,
    use_weighting: bool,
    options: dict[str, Any],
) -> PairLoss:
    """The loss that these arguments of `fn` describe.

    Raises:
        ValueError: an unknown loss, a value out of its range, or an option that a loss does not go with.
        TypeError: an option that no loss owns, or of the wrong type.
    """
    check_beta(fn, beta)
    terms = resolve(fn, PREFERENCE_LOSSES, loss_type, loss_weights, options)
    coefficient = _f_divergence.check(fn, f_divergence_type, f_alpha_divergence_coef)
    if f_divergence_type != "reverse_kl":
        _refuse_others(fn, f"f_divergence_type={f_divergence_type!r}", terms, "f_divergence")
    if ld_alpha is not None:
        _check.between(fn, 0, 1, ld_alpha=ld_alpha)
        _refuse_others(fn, "ld_alpha", terms, "reference")
    _check.flag(fn, use_weighting=use_weighting)
    if use_weighting and terms.couples == "batch":
        raise ValueError(
            f"{fn}: use_weighting weighs pairs, and a loss that couples the batch has no term of one pair: "
            'not with aot, aot_unpaired, or a function without fastpref.couples("pair")'
        )
    return PairLoss(fn, terms, beta, f_divergence_type, coefficient, ld_alpha, use_weighting)


def _refuse_others(fn: str, what: str, terms: Terms, wanted: str) -> None:
    """Refuses a named loss that `what` does not change, for want of a trait; sft may stand beside one that it does."""
    losses, allowed = [term.loss for term in terms.terms], [f for f in PREFERENCE_LOSSES.values() if trait(f, wanted)]
    foreign = [loss for loss in losses if loss in PREFERENCE_LOSSES.values() and loss not in (*allowed, sft)]
    if foreign or all(loss is sft for loss in losses):
        names = ", ".join(loss.__name__ for loss in allowed)
        got = ", ".join(getattr(loss, "__name__", repr(loss)) for loss in foreign or losses)
        raise ValueError(f"{fn}: {what} goes with {names}, alone or beside sft; got loss_type {got}")


def check_beta(fn: str, beta: float) -> None:
    _check.number(fn, beta=beta)
    if not 0 < beta < float("inf"):
        raise ValueError(f"{fn}: beta must be > 0 and finite; got {beta}")


def _discounted(pairs: Pairs, ld_alpha: float) -> Pairs:
    """LD-DPO: tokens beyond the length of the shorter answer count by ld_alpha. Liu et al. 2024, arXiv:2409.06411."""
    tokens, n_pairs = _tokens(pairs, "ld_alpha"), pairs.chosen_logps.shape[0]
    if tokens.ref_logps is None:
        raise ValueError(
            f"{pairs.caller}: ld_alpha needs the reference per token, and has sums: "
            + ("give tokens.ref_logps" if pairs.caller == "dpo_loss" else "give ref_token_logps, or ref_hidden")
        )
    lengths = tokens.lengths(2 * n_pairs)
    shared = torch.minimum(lengths[:n_pairs], lengths[n_pairs:]).repeat(2)
    tail = tokens.mask & (tokens.positions(2 * n_pairs) >= shared[tokens.sequence])

    def taken(logps: Tensor) -> Tensor:
        return (1 - ld_alpha) * tokens.sums(torch.where(tail, logps, 0.0), 2 * n_pairs)

    policy, reference = taken(tokens.logps), taken(tokens.ref_logps)
    return replace(
        pairs,
        chosen_logps=pairs.chosen_logps - policy[:n_pairs],
        rejected_logps=pairs.rejected_logps - policy[n_pairs:],
        ref_chosen_logps=None if pairs.ref_chosen_logps is None else pairs.ref_chosen_logps - reference[:n_pairs],
        ref_rejected_logps=None if pairs.ref_rejected_logps is None else pairs.ref_rejected_logps - reference[n_pairs:],
        whole=pairs,
    )


def _weights(pairs: Pairs) -> Tensor:
    """WPO: (B,) exp of the mean over y_w, plus that over y_l, of log p_t - log sum_v p_v^2; no gradient.

    Zhou et al. 2024, arXiv:2406.11827, eq. 2 and its alignment by the expected probability of a sampled token.
    """
    tokens, n_pairs = _tokens(pairs, "use_weighting"), pairs.chosen_logps.shape[0]
    if "log_sum_sq_probs" not in tokens.outputs:
        raise ValueError(f"{pairs.caller}: use_weighting needs log_sum_sq_probs among the outputs of tokens")
    aligned = tokens.logps.detach() - tokens.outputs["log_sum_sq_probs"]
    means = per_token(tokens.sums(aligned, 2 * n_pairs), tokens.lengths(2 * n_pairs))
    return torch.exp(means[:n_pairs] + means[n_pairs:])


def _tokens(pairs: Pairs, option: str) -> Tokens:
    if pairs.tokens is None:
        raise ValueError(f"{pairs.caller}: {option} needs log-probs per token: give tokens")
    return pairs.tokens


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    loss_type: str | Loss | Sequence[str | Loss] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    reference_free: bool = False,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    tokens: Tokens | None = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float | None = None,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, chosen_rewards, rejected_rewards) of B pairs; sigmoid: -log sigmoid(beta (r_w - r_l)).

    Rafailov et al. 2023, arXiv:2305.18290, eq. 7; the other types cite their papers.
    Args:
        policy_chosen_logps, policy_rejected_logps: (B,) log-probability of each completion: a sum over tokens, nats.
        ref_chosen_logps, ref_rejected_logps: (B,) the same under the reference. None with reference_free, and for the
            losses that need none.
        loss_type: a name in PREFERENCE_LOSSES, a function f(pairs, *, beta, ...) -> (B,), or a list of them.
        loss_weights: one number for each of a list. None: 1 each.
        beta: strength of the pull to the reference, > 0.
        reference_free: the reference counts as uniform: its log-ratios are 0.
        chosen_lengths, rejected_lengths: (B,) completion tokens, for the losses that divide by them. Or
        tokens: what the sums are sums of, for what looks at each: ld_alpha, use_weighting, unlikelihood, your own
            function. Its lengths are used.
        f_divergence_type, f_alpha_divergence_coef, ld_alpha, use_weighting: as in linear_preference_loss.
        options: the loss's own keywords, as `label_smoothing` of sigmoid.
    Returns:
        (B,) float32 each (float64 for float64). losses is differentiable, rewards are detached.
    Raises:
        ValueError: shapes, an unknown loss, beta, a reference, lengths or tokens that the loss needs and has not, or
            an option that it does not go with.
        TypeError: an option that the loss does not own.
    """
    fn = "dpo_loss"
    every = {
        "policy_chosen_logps": policy_chosen_logps,
        "policy_rejected_logps": policy_rejected_logps,
        "ref_chosen_logps": ref_chosen_logps,
        "ref_rejected_logps": ref_rejected_logps,
    }
    lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    _check.tensors(fn, **every, **lengths)
    _check.floating(fn, _check.WIDE_FLOATS, **every)
    _check.rank(fn, (1,), policy_chosen_logps=policy_chosen_logps)
    _check.same_shape(fn, **every, **lengths)
    _check.same_dtype(fn, **every)
    _check.same_device(fn, **every, **lengths)
    if (ref_chosen_logps is None) != (ref_rejected_logps is None):
        raise ValueError(f"{fn}: ref_chosen_logps and ref_rejected_logps go together; got only one")
    _check.flag(fn, reference_free=reference_free)
    if reference_free and ref_chosen_logps is not None:
        raise ValueError(f"{fn}: reference_free=True and reference log-probs were both given; choose one")
    changes = (f_divergence_type, f_alpha_divergence_coef, ld_alpha, use_weighting)
    loss = bind(fn, loss_type, loss_weights, beta, *changes, options)

    def widen(x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float32))

    chosen, rejected = widen(policy_chosen_logps), widen(policy_rejected_logps)
    ref_chosen = None if ref_chosen_logps is None else widen(ref_chosen_logps)
    ref_rejected = None if ref_rejected_logps is None else widen(ref_rejected_logps)
    if reference_free:
        ref_chosen, ref_rejected = torch.zeros_like(chosen), torch.zeros_like(rejected)
    if tokens is not None:
        tokens = _checked(fn, tokens, policy_chosen_logps, lengths)
        if reference_free:
            tokens = replace(tokens, ref_logps=torch.zeros_like(tokens.logps))
        n_pairs = chosen.shape[0]
        both = tokens.lengths(2 * n_pairs)
        chosen_lengths, rejected_lengths = both[:n_pairs], both[n_pairs:]
    pairs = Pairs(chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, tokens, fn)
    return loss(pairs), *loss.rewards(pairs)


def _checked(fn: str, tokens: Tokens, logps: Tensor, lengths: dict[str, Tensor | None]) -> Tokens:
    """The tokens, in the dtype of the computation."""
    if not isinstance(tokens, Tokens):
        raise TypeError(f"{fn}: tokens must be fastpref.Tokens; got {type(tokens).__name__}")
    if any(x is not None for x in lengths.values()):
        raise ValueError(f"{fn}: tokens and lengths were both given; choose one")
    every = {"logps": tokens.logps, "ref_logps": tokens.ref_logps, **tokens.outputs}
    of_tokens = {f"tokens.{name}": x for name, x in {**every, "mask": tokens.mask, "sequence": tokens.sequence}.items()}
    _check.tensors(fn, **of_tokens)
    _check.rank(fn, (1,), **{"tokens.logps": tokens.logps})
    _check.same_shape(fn, **of_tokens)
    _check.same_device(fn, policy_chosen_logps=logps, **of_tokens)
    _check.integer(fn, **{"tokens.sequence": tokens.sequence})
    if tokens.mask.dtype != torch.bool:
        raise TypeError(f"{fn}: tokens.mask must be bool; got {str(tokens.mask.dtype).removeprefix('torch.')}")
    wide = torch.promote_types(tokens.logps.dtype, torch.float32)
    reference = None if tokens.ref_logps is None else tokens.ref_logps.to(wide)
    return replace(tokens, logps=tokens.logps.to(wide), ref_logps=reference, sequence=tokens.sequence.long())
