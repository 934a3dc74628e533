"""What a preference loss is given: B pairs of summed log-probabilities, and the tokens they are sums of."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastpref.losses._f_divergence import score
from fastpref.losses._protocol import Missing
from fastpref.losses._sums import lengths_of, sums_of


@dataclass(frozen=True)
class Tokens:
    """The completion tokens of some sequences: (N,) each, prompt and padding left out or masked."""

    logps: Tensor
    ref_logps: Tensor | None  # where the reference is known per token
    mask: Tensor  # bool: the token counts
    sequence: Tensor  # which one; of 2B, pair i is i (chosen) and i + B (rejected)
    outputs: dict[str, Tensor] = field(default_factory=dict)  # entropy, log_sum_sq_probs, ...; detached

    def sums(self, x: Tensor, n_sequences: int) -> Tensor:
        """(n_sequences,) of x (N,) over the tokens that count."""
        total = sums_of(self.sequence, torch.where(self.mask, x, 0.0), n_sequences)
        return total.to(torch.promote_types(x.dtype, torch.float32))

    def lengths(self, n_sequences: int) -> Tensor:
        return lengths_of(self.sequence, self.mask, n_sequences)

    def positions(self, n_sequences: int) -> Tensor:
        """(N,) how many tokens that count come before this one in its sequence."""
        order = torch.argsort(self.sequence, stable=True)
        live = self.mask[order].long()
        lengths = self.lengths(n_sequences)
        first = lengths.cumsum(0) - lengths
        before = live.cumsum(0) - live - first[self.sequence[order]]
        return torch.zeros_like(before).scatter(0, order, before)


@dataclass(frozen=True)
class Pairs:
    """B pairs of sums over completion tokens, nats. None: not given."""

    chosen_logps: Tensor  # (B,) under the policy
    rejected_logps: Tensor
    ref_chosen_logps: Tensor | None = None  # (B,) under the reference; zeros if the call is reference_free
    ref_rejected_logps: Tensor | None = None
    chosen_lengths: Tensor | None = None  # (B,) completion tokens
    rejected_lengths: Tensor | None = None
    tokens: Tokens | None = None  # of 2B sequences; dpo_loss has them if they are given
    caller: str = "dpo_loss"
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    whole: "Pairs | None" = None  # where ld_alpha discounted the log-probs: what they were

    @property
    def chosen_logratios(self) -> Tensor:
        """(B,) log pi(y_w) - log ref(y_w). Raises where there is no reference."""
        return self.chosen_logps - self.need("ref_chosen_logps")

    @property
    def rejected_logratios(self) -> Tensor:
        return self.rejected_logps - self.need("ref_rejected_logps")

    @property
    def chosen_scores(self) -> Tensor:
        """(B,) the log-ratio, or what f_divergence_type puts in its place."""
        return score(self.chosen_logratios, self.f_divergence_type, self.f_alpha_divergence_coef)

    @property
    def rejected_scores(self) -> Tensor:
        return score(self.rejected_logratios, self.f_divergence_type, self.f_alpha_divergence_coef)

    @property
    def margins(self) -> Tensor:
        """(B,) what a loss of reward differences multiplies by beta."""
        return self.chosen_scores - self.rejected_scores

    @property
    def chosen_nll(self) -> Tensor:
        """(B,) negative log-likelihood of a chosen token, averaged over each completion, each token counted whole."""
        pairs = self.whole or self
        return -per_token(pairs.chosen_logps, pairs.need("chosen_lengths"))

    def need(self, name: str) -> Any:
        """The field of this name; raises if it was not given."""
        return needed(getattr(self, name), name, self.caller)


def needed(value: Any, name: str, caller: str) -> Any:
    """value; raises if it was not given, with the names that the arguments of the caller have."""
    if value is not None:
        return value
    if not name.startswith("ref_"):
        raise Missing(name)
    of_sums = name if caller == "dpo_loss" else "ref_logps"
    hidden = " (or ref_hidden and ref_weight)" if caller.startswith("linear_") else ""
    raise Missing(f"{of_sums}{hidden}, or reference_free=True")


def per_token(x: Tensor, lengths: Tensor) -> Tensor:
    """x / lengths; 0 / 0 of a completion of no tokens is 0."""
    return x / lengths.clamp(min=1)
