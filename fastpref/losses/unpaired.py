"""Losses of single completions, each labelled desirable or not: pure functions, and `kto_loss`, which calls them.

The contract of each: `unpaired` and `beta` in, (S,) out, one loss a sequence, not reduced (losses/_protocol.py).
r is the log-ratio log pi(y) - log ref(y).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fastpref.losses import _stable
from fastpref.losses._protocol import Loss, Terms, couples, resolve, trait
from fastpref.losses.dpo import check_beta
from fastpref.losses.pairs import Tokens, needed
from fastpref.ops import _check


@dataclass(frozen=True)
class Unpaired:
    """S sequences with the sums of their completion tokens, nats. None: not given."""

    logps: Tensor  # (S,) under the policy
    desirable: Tensor  # (S,) bool
    ref_logps: Tensor | None = None  # (S,) under the reference; zeros if the call is reference_free
    kl: Tensor | None = None  # 0-d, detached: how far the policy is from the reference
    lengths: Tensor | None = None  # (S,) completion tokens; None in kto_loss, as are
    tokens: Tokens | None = None
    caller: str = "kto_loss"

    @property
    def logratios(self) -> Tensor:
        """(S,) log pi(y) - log ref(y). Raises where there is no reference."""
        return self.logps - self.need("ref_logps")

    def need(self, name: str) -> Any:
        """The field of this name; raises if it was not given."""
        return needed(getattr(self, name), name, self.caller)


@couples("sequence")
def kto(unpaired: Unpaired, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Tensor:
    """KTO: w_d (1 - sigmoid(beta (r - kl))) if desirable, else w_u (1 - sigmoid(beta (kl - r))).

    Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7, less its constant. kl comes from mismatched completions (`kto_kl`)
    and counts as a constant, as in the paper. w_d, w_u: weights of the two kinds, which should balance their numbers:
    the paper keeps w_d n_d / (w_u n_u) between 1 and 4 / 3.
    """
    above = beta * (unpaired.logratios - unpaired.need("kl"))
    return _of_both_kinds("kto", unpaired, above, desirable_weight, undesirable_weight)


@couples("sequence")
def apo_zero_unpaired(
    unpaired: Unpaired, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Tensor:
    """APO-zero without pairs: w_d sigmoid(-beta r) if desirable, else w_u sigmoid(beta r). It needs no kl.

    D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7 taken apart; KTO at kl = 0.
    """
    above = beta * unpaired.logratios
    return _of_both_kinds("apo_zero_unpaired", unpaired, above, desirable_weight, undesirable_weight)


UNPAIRED_LOSSES: dict[str, Loss] = {f.__name__: f for f in (kto, apo_zero_unpaired)}


def _of_both_kinds(
    loss: str, unpaired: Unpaired, above: Tensor, desirable_weight: float, undesirable_weight: float
) -> Tensor:
    """w_d sigmoid(-above) if desirable, else w_u sigmoid(above)."""
    for name, weight in {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}.items():
        _check.number(loss, **{name: weight})
        if not 0 <= weight < float("inf"):
            raise ValueError(f"{loss}: {name} must be >= 0 and finite; got {weight}")
    good, bad = desirable_weight * _stable.sigmoid(-above), undesirable_weight * _stable.sigmoid(above)
    return torch.where(unpaired.desirable, good, bad)


def kto_kl(policy_kl_logps: Tensor, ref_kl_logps: Tensor, *, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """0-d, detached: max(0, mean of policy - reference), over the sequences of all processes: KTO's estimate of the KL.

    Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1. The completions are those of other prompts of the batch
    (completion i after prompt i + 1, say), of which neither model knows the answer.

    Args:
        policy_kl_logps, ref_kl_logps: (S,) log-probs of the mismatched completions: sums over tokens, nats. Processes
            may hold different numbers of them; none at all gives 0.
        process_group: whose processes are averaged over, each of which must call. None: all, where torch.distributed is
            initialised, for the loss wants one kl on all of them (in masked_whiten None is this process alone).
    Raises:
        ValueError: shapes differ.
    """
    fn = "kto_kl"
    both = {"policy_kl_logps": policy_kl_logps, "ref_kl_logps": ref_kl_logps}
    _check.tensors(fn, **both)
    _check.rank(fn, (1,), **both)
    _check.floating(fn, _check.WIDE_FLOATS, **both)
    _check.same_shape(fn, **both)
    _check.same_device(fn, **both)
    wide = torch.promote_types(policy_kl_logps.dtype, torch.float32)
    apart = (policy_kl_logps.detach().to(wide) - ref_kl_logps.detach().to(wide)).double()
    total = torch.stack((apart.sum(), apart.new_tensor(apart.numel())))
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total, group=process_group)
    return (total[0] / total[1].clamp(min=1)).clamp(min=0).to(wide)


def kto_loss(
    policy_logps: Tensor,
    ref_logps: Tensor | None,
    desirable: Tensor,
    *,
    loss_type: str | Loss | Sequence[str | Loss] = "kto",
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    kl: float | Tensor | None = None,
    reference_free: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """(losses, rewards) of S completions; kto: 1 - sigmoid(+-beta (r - kl)), + for the desirable.

    Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7; the other types cite their papers.
    Args:
        policy_logps: (S,) log-probability of each completion: a sum over tokens, nats.
        ref_logps: (S,) the same under the reference. None with reference_free.
        desirable: (S,) bool.
        loss_type: a name in UNPAIRED_LOSSES, a function f(unpaired, *, beta, ...) -> (S,), or a list of them.
        loss_weights: one number for each of a list. None: 1 each.
        beta: strength of the pull to the reference, > 0.
        kl: a number or a 0-d tensor, >= 0, the same on all processes: `kto_kl`. Needed by kto.
        reference_free: the reference counts as uniform: its log-ratios are 0.
        options: the loss's own keywords: desirable_weight, undesirable_weight.
    Returns:
        (S,) float32 each (float64 for float64). losses is differentiable, rewards (beta r) are detached.
    Raises:
        ValueError: shapes, an unknown loss, beta, or a reference or kl that the loss needs and has not.
        TypeError: dtypes, or an option that the loss does not own.
    """
    fn = "kto_loss"
    both = {"policy_logps": policy_logps, "ref_logps": ref_logps}
    _check.tensors(fn, **both)
    _check.floating(fn, _check.WIDE_FLOATS, **both)
    _check.rank(fn, (1,), policy_logps=policy_logps)
    _check.same_shape(fn, **both)
    _check.same_dtype(fn, **both)
    _check.same_device(fn, **both)
    check_desirable(fn, desirable, policy_logps, policy_logps.shape[0])
    _check.flag(fn, reference_free=reference_free)
    if reference_free and ref_logps is not None:
        raise ValueError(f"{fn}: reference_free=True and ref_logps were both given; choose one")
    terms = bind(fn, loss_type, loss_weights, beta, options)
    logps = policy_logps.to(torch.promote_types(policy_logps.dtype, torch.float32))
    reference = torch.zeros_like(logps) if reference_free else None if ref_logps is None else ref_logps.to(logps.dtype)
    unpaired = Unpaired(logps, desirable, reference, checked_kl(fn, kl, logps), caller=fn)
    return terms(fn, logps, unpaired, beta=beta), rewards(unpaired, beta)


def bind(
    fn: str,
    loss_type: str | Loss | Sequence[str | Loss],
    loss_weights: Sequence[float] | None,
    beta: float,
    options: dict[str, Any],
) -> Terms:
    """The loss that these arguments of `fn` describe."""
    check_beta(fn, beta)
    terms = resolve(fn, UNPAIRED_LOSSES, loss_type, loss_weights, options)
    if any(trait(term.loss, "couples") == "pair" for term in terms.terms):
        raise ValueError(
            f'{fn}: loss_type must couple "token", "sequence" or "batch", there being no pairs; got "pair"'
        )
    return terms


def rewards(unpaired: Unpaired, beta: float) -> Tensor:
    """(S,), detached: beta times the log-ratio, the reference 0 where there is none."""
    return beta * (unpaired.logps if unpaired.ref_logps is None else unpaired.logratios).detach()


def check_desirable(fn: str, desirable: Tensor, like: Tensor, n_sequences: int) -> None:
    _check.tensors(fn, desirable=desirable)
    if desirable.dtype != torch.bool:
        raise TypeError(f"{fn}: desirable must be bool; got {str(desirable.dtype).removeprefix('torch.')}")
    if desirable.shape != (n_sequences,):
        raise ValueError(f"{fn}: desirable must be ({n_sequences},), one a sequence; got {tuple(desirable.shape)}")
    _check.same_device(fn, logps=like, desirable=desirable)


def checked_kl(fn: str, kl: float | Tensor | None, like: Tensor) -> Tensor | None:
    """A 0-d tensor like `like`: a (S,) one would broadcast, a learnable one would lose its gradient."""
    if kl is None:
        return None
    if isinstance(kl, Tensor):
        if kl.dim() or kl.requires_grad:
            got = "one that requires grad" if kl.requires_grad else f"shape {tuple(kl.shape)}"
            raise ValueError(f"{fn}: kl must be a number or a detached 0-d tensor (fastpref.kto_kl); got {got}")
        return kl.to(like)
    _check.number(fn, kl=kl)
    if not 0 <= kl < float("inf"):
        raise ValueError(f"{fn}: kl must be >= 0 and finite; got {kl}")
    return torch.tensor(kl, dtype=like.dtype, device=like.device)
