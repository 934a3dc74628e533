"""What a loss is: a pure function of log-probabilities that says what its terms depend on.

    @couples("pair")
    def sigmoid(pairs: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Tensor: ...   # (B,)

Nothing is reduced, nothing is kept, nothing has a side effect. A loss's options are its own keywords: one given to a
loss that does not own it is an error. `couples` tells the fused head which log-probs must be at hand together:
"token", "sequence", "pair" (the term of pair i depends on pair i alone) or "batch". Undeclared means "batch". What else
is to be known of a loss is declared with it, as one of TRAITS.
"""

import difflib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from fastpref.ops import _check

COUPLINGS = ("token", "sequence", "pair", "batch")
Loss = Callable[..., Tensor]
F = TypeVar("F", bound=Loss)
# what a loss may declare, and what holds where it does not
TRAITS: dict[str, Any] = {
    "couples": "batch",  # what its terms depend on
    "reference": True,  # of pairs: the reference enters, so that ld_alpha has something to discount
    "f_divergence": False,  # of pairs: it sees chosen_scores and rejected_scores, which f_divergence_type changes
    "mean_rewards": False,  # of pairs: its reward is beta log pi(y) / |y|
    "reduction": "mean",  # of policies: where the caller does not say
    "metrics": None,  # of policies: (rollout, the loss's options) -> what measures it
}


def couples(what: str, **traits: Any) -> Callable[[F], F]:
    """Declares what a term of the loss depends on, and its traits."""
    if what not in COUPLINGS:
        raise ValueError(f"couples: must be one of {', '.join(COUPLINGS)}; got {what!r}")
    others = [name for name in TRAITS if name != "couples"]
    if unknown := sorted(traits.keys() - set(others)):
        raise TypeError(f"couples: a trait must be one of {', '.join(others)}; got {unknown[0]!r}")

    def declare(loss: F) -> F:
        for name, value in {"couples": what, **traits}.items():
            setattr(loss, name, value)
        return loss

    return declare


def trait(loss: Loss, name: str) -> Any:
    return getattr(loss, name, TRAITS[name])


class Missing(ValueError):
    """What a loss needs and was not given, as the caller's argument is called."""


@dataclass(frozen=True)
class Term:
    """One loss of a weighted sum, with its options bound."""

    loss: Loss
    weight: float
    options: dict[str, Any]

    def __call__(self, fn: str, like: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        try:
            losses = self.loss(*args, **kwargs, **self.options)
        except Missing as missing:
            raise ValueError(f"{fn}: {_name(self.loss)} needs {missing}; got None") from None
        if not isinstance(losses, Tensor) or losses.shape != like.shape:
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"{fn}: {_name(self.loss)} must return a tensor of shape {tuple(like.shape)}; got {got}")
        return self.weight * losses


@dataclass(frozen=True)
class Terms:
    """A weighted sum of losses."""

    terms: tuple[Term, ...]

    @property
    def couples(self) -> str:
        return COUPLINGS[max([COUPLINGS.index(trait(term.loss, "couples")) for term in self.terms])]

    def __call__(self, fn: str, like: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The sum, each loss shaped as `like`; what a loss returns that is not raises, in the name of `fn`."""
        first, *others = (term(fn, like, *args, **kwargs) for term in self.terms)
        return sum(others, first)


def resolve(
    fn: str,
    table: dict[str, Loss],
    loss_type: str | Loss | Sequence[str | Loss],
    loss_weights: Sequence[float] | None,
    options: dict[str, Any],
    given: tuple[str, ...] = ("beta",),
) -> Terms:
    """The losses that `loss_type` names, each with the options it owns; `given` are the keywords every loss gets.

    Raises:
        ValueError: an unknown loss, or weights that do not fit.
        TypeError: an option that none of the losses owns.
    """
    if not isinstance(loss_type, Sequence) and not callable(loss_type):
        raise TypeError(f"{fn}: loss_type must be a name, a function or a list of them; got {loss_type!r}")
    wanted = [loss_type] if isinstance(loss_type, str) or callable(loss_type) else list(loss_type)
    if loss_weights is not None and not isinstance(loss_weights, Sequence):
        raise TypeError(f"{fn}: loss_weights must be a list of numbers; got {loss_weights!r}")
    if not wanted:
        raise ValueError(f"{fn}: loss_type must name at least one loss; got an empty list")
    weights = [1.0] * len(wanted) if loss_weights is None else list(loss_weights)
    for weight in weights:
        _check.finite(fn, loss_weights=weight)
    if len(weights) != len(wanted):
        raise ValueError(f"{fn}: loss_weights must have one weight for each loss, {len(wanted)}; got {len(weights)}")
    losses = [_look_up(fn, table, one) for one in wanted]
    owned = [_options(loss, given) for loss in losses]
    unknown = sorted(set(options) - {name for names in owned for name in names})
    if unknown:
        named = ", ".join(map(_name, losses))
        allowed = sorted({name for names in owned for name in names}) or ["none"]
        raise TypeError(
            f"{fn}: {unknown[0]!r} is no option of {named}, whose options (keyword-only) are: {', '.join(allowed)}"
        )
    bound = [{name: options[name] for name in names if name in options} for names in owned]
    return Terms(tuple(map(Term, losses, weights, bound)))


def _look_up(fn: str, table: dict[str, Loss], loss: str | Loss) -> Loss:
    if callable(loss):
        return loss
    if not isinstance(loss, str) or loss not in table:
        near = difflib.get_close_matches(str(loss), table, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{fn}: loss_type must be a function or one of {', '.join(table)}; got {loss!r}{hint}")
    return table[loss]


def _name(loss: Loss) -> str:
    return getattr(loss, "__name__", repr(loss))


def _options(loss: Loss, given: tuple[str, ...]) -> list[str]:
    if inspect.isfunction(loss) and not hasattr(loss, "__wrapped__"):
        # no signature: it reads the defaults, which torch.compile(dynamic=True) then takes for tensors
        code = loss.__code__
        names = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
        return [name for name in names if name not in given]
    parameters = inspect.signature(loss).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in given]
