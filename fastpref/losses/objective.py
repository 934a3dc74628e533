"""What a policy loss adds up, on log-probs or on the fused head.

    loss = sum over live tokens of c_t (w_t s_t + kl_coef kl_t - entropy_coef H_t)

s_t is the surrogate's term (losses/surrogates.py), w_t the token's weight, H_t the entropy of the policy there, and c_t
what `reduction` makes of it: 1 over a count that follows from the mask alone, so that it couples no tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastpref.losses._protocol import Loss, Terms, resolve, trait
from fastpref.losses._sums import Place, lengths_of
from fastpref.losses.kl import kl_estimator_named
from fastpref.losses.surrogates import POLICY_LOSSES, Rollout
from fastpref.ops import _check

REDUCTIONS = ("mean", "sum", "none", "sequence_mean", "sequence_sum", "constant")
LEVELS = ("token", "sequence")


@dataclass(frozen=True)
class Objective:
    """The loss as a function of what the policy gives, for all tokens of a call or for some; (N,) each, detached."""

    fn: str
    terms: Terms
    level: str
    kl: Callable[[Tensor, Tensor], Tensor]
    kl_coef: float
    use_bias_correction_kl: bool
    entropy_coef: float
    reduction: str
    mask: Tensor
    sequence: Tensor
    n_sequences: int
    advantages: Tensor
    shares: Tensor  # what a token's term is multiplied by
    old_logps: Tensor | None
    ref_logps: Tensor | None
    token_weights: Tensor | None

    @property
    def couples(self) -> str:
        declared = self.terms.couples
        return "sequence" if declared == "token" and self.level == "sequence" else declared

    def at(self, index: Tensor, first: int, last: int) -> "Objective":
        """For the live tokens at `index`, of the groups first to last - 1: sequences, or tokens."""
        token = self.couples == "token"

        def some(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[index]

        return replace(
            self,
            mask=self.mask[index],
            sequence=torch.arange(index.numel(), device=index.device) if token else self.sequence[index] - first,
            n_sequences=index.numel() if token else last - first,
            advantages=self.advantages[index],
            shares=self.shares[index],
            old_logps=some(self.old_logps),
            ref_logps=some(self.ref_logps),
            token_weights=some(self.token_weights),
        )

    def losses(self, logps: Tensor, entropy: Tensor | None) -> Tensor:
        """(N,) each live token's share of the loss, 0 elsewhere."""
        rollout = self._rollout(logps)
        losses = self.terms(self.fn, rollout.logps, rollout)
        if self.token_weights is not None:
            losses = losses * self.token_weights
        if self.kl_coef:
            losses = losses + self.kl_coef * self._kl(rollout)
        if self.entropy_coef and entropy is not None:
            losses = losses - self.entropy_coef * self._live(entropy)
        return self._live(losses * self.shares)

    def metrics(self, logps: Tensor, entropy: Tensor | None) -> dict[str, Tensor]:
        """Detached and 0-d, under TRL's names."""
        rollout = self._rollout(logps.detach())
        found: dict[str, Tensor] = {}
        for term in self.terms.terms:
            measure = trait(term.loss, "metrics")
            found.update(measure(rollout, **term.options) if measure else {})

        def mean(x: Tensor) -> Tensor:
            return self._live(x).sum() / self.mask.sum().clamp(min=1)

        found["policy/approxkl_avg"] = 0.5 * mean(rollout.log_ratios.square())
        if self.ref_logps is not None:
            found["kl"] = mean(self._kl(rollout))
        if entropy is not None:
            found["entropy"] = mean(entropy.detach())
        return found

    def _live(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, x, 0.0)

    def _rollout(self, logps: Tensor) -> Rollout:
        logps = self._live(logps)
        old_logps = logps.detach() if self.old_logps is None else self.old_logps
        return Rollout(logps, old_logps, self.advantages, self.mask, self.sequence, self.n_sequences, self.level)

    def _kl(self, rollout: Rollout) -> Tensor:
        assert self.ref_logps is not None
        kl = self.kl(rollout.logps, self.ref_logps)
        return kl * rollout.ratios if self.use_bias_correction_kl else kl


def objective(
    fn: str,
    mask: Tensor,
    where: Place,
    dtype: torch.dtype,
    *,
    advantages: Tensor,
    old_logps: Tensor | None,
    loss_type: str | Loss | Sequence[str | Loss],
    loss_weights: Sequence[float] | None,
    importance_sampling_level: str,
    token_weights: Tensor | None,
    ref_logps: Tensor | None,
    kl_coef: float,
    kl_estimator: str,
    use_bias_correction_kl: bool,
    entropy_coef: float,
    reduction: str | None,
    num_items: float | Tensor | None,
    max_length: int | None,
    options: dict[str, Any],
) -> Objective:
    """The checked call; `mask` (N,) bool."""
    given = {"advantages": advantages, "old_logps": old_logps, "token_weights": token_weights, "ref_logps": ref_logps}
    _check.tensors(fn, **given)
    _check.same_device(fn, mask=mask, **given)
    _check.floating(fn, _check.WIDE_FLOATS, **given)
    _check.number(fn, kl_coef=kl_coef)
    _check.finite(fn, entropy_coef=entropy_coef)
    _check.flag(fn, use_bias_correction_kl=use_bias_correction_kl)
    if not 0 <= kl_coef < float("inf"):
        raise ValueError(f"{fn}: kl_coef must be >= 0 and finite; got {kl_coef}")
    if kl_coef and ref_logps is None:
        raise ValueError(f"{fn}: kl_coef = {kl_coef} needs ref_logps, and got none")
    if importance_sampling_level not in LEVELS:
        raise ValueError(
            f"{fn}: importance_sampling_level must be one of {', '.join(LEVELS)}; got {importance_sampling_level!r}"
        )
    terms = resolve(fn, POLICY_LOSSES, loss_type, loss_weights, options, given=())

    def flat(name: str, by_sequence: bool = False) -> Tensor | None:
        x = given[name]
        if x is None:
            return None
        if by_sequence and x.shape == (where.n_sequences,) and x.shape != where.shape:
            x = x[where.sequence]
        elif x.shape != where.shape:
            a_sequence = f"({where.n_sequences},), one a sequence, or " if by_sequence else ""
            raise ValueError(
                f"{fn}: {name} must be {a_sequence}{tuple(where.shape)}, one a token; got {tuple(x.shape)}"
            )
        return torch.where(mask, x.detach().reshape(-1).to(dtype), 0.0)

    every_advantage = flat("advantages", by_sequence=True)
    assert every_advantage is not None
    reduction = _reduction(fn, terms) if reduction is None else reduction
    return Objective(
        fn,
        terms,
        importance_sampling_level,
        kl_estimator_named(fn, kl_estimator),
        kl_coef,
        use_bias_correction_kl,
        entropy_coef,
        reduction,
        mask,
        where.sequence,
        where.n_sequences,
        every_advantage,
        _shares(fn, reduction, num_items, max_length, mask, where, dtype),
        flat("old_logps"),
        flat("ref_logps"),
        flat("token_weights", by_sequence=True),
    )


def _reduction(fn: str, terms: Terms) -> str:
    """That of the papers."""
    wanted = {trait(term.loss, "reduction") for term in terms.terms}
    if len(wanted) > 1:
        raise ValueError(f"{fn}: reduction must be given, as the losses differ in theirs: {', '.join(sorted(wanted))}")
    return wanted.pop()


def _shares(
    fn: str,
    reduction: str,
    num_items: float | Tensor | None,
    max_length: int | None,
    mask: Tensor,
    where: Place,
    dtype: torch.dtype,
) -> Tensor:
    """(N,) what each token's term is multiplied by."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{fn}: reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if reduction == "constant" and max_length is None:
        raise ValueError(f"{fn}: reduction='constant' needs max_length, and got none")
    if reduction != "constant" and max_length is not None:
        raise ValueError(f"{fn}: max_length is for reduction='constant'; got {max_length} and {reduction!r}")
    if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
        raise ValueError(f"{fn}: max_length must be an int >= 1; got {max_length!r}")
    items: float | Tensor = mask.sum().clamp(min=1) if reduction == "mean" else max(where.n_sequences, 1)
    if num_items is not None:
        if reduction in ("sum", "none"):
            raise ValueError(f"{fn}: num_items and reduction={reduction!r} were both given; choose one")
        items = _check.num_items(fn, num_items)
    shares = torch.ones_like(mask, dtype=dtype)
    if reduction in ("sum", "none"):
        return shares
    if reduction == "sequence_mean":
        shares = shares / lengths_of(where.sequence, mask, where.n_sequences).clamp(min=1)[where.sequence]
    return shares / items / (1 if max_length is None else max_length)
