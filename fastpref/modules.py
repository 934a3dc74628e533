"""The losses on the fused head as modules: they hold options, and have neither parameters nor state.

    loss = LinearDPOLoss("ipo", beta=0.3)
    loss(hidden, weight, targets, ref_logps=ref_logps).loss.backward()

A module is a function with some of its keywords given; the rest come with the call. Each of the other losses is a
loss_type of one of them: LinearDPOLoss("simpo", beta=2.0), LinearKTOLoss("apo_zero_unpaired"), LinearPPOLoss("grpo").
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from fastpref.heads.policy import linear_policy_loss
from fastpref.heads.preference import PreferenceOutput, linear_preference_loss
from fastpref.heads.unpaired import UnpairedOutput, linear_unpaired_loss
from fastpref.losses._protocol import Loss, resolve
from fastpref.losses.policy import PolicyOutput
from fastpref.losses.preference import PREFERENCE_LOSSES
from fastpref.losses.surrogates import POLICY_LOSSES
from fastpref.losses.unpaired import UNPAIRED_LOSSES

LossType = str | Loss | Sequence[str | Loss]


class _LinearLoss(nn.Module):
    function: ClassVar[Callable[..., Any]]
    table: ClassVar[dict[str, Loss]]
    given: ClassVar[tuple[str, ...]] = ("beta",)  # keywords that every loss of the table gets

    def __init__(self, loss_type: LossType, options: dict[str, Any]) -> None:
        super().__init__()
        name, keywords = type(self).__name__, inspect.signature(self.function).parameters
        for option, value in options.items():
            if isinstance(value, Tensor):
                raise TypeError(f"{name}: {option} must be no tensor, which belongs to a batch: give it with each call")
        own = {option: value for option, value in options.items() if option not in keywords}
        resolve(name, self.table, loss_type, options.get("loss_weights"), own, self.given)
        self.options = {"loss_type": loss_type, **options}

    def _call(self, *tensors: Tensor, **given: Any) -> Any:
        twice = sorted(self.options.keys() & given.keys())
        if twice:
            raise TypeError(f"{type(self).__name__}: {twice[0]} was given at construction and again in the call")
        return type(self).function(*tensors, **self.options, **given)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={_shown(value)}" for name, value in self.options.items())


class LinearDPOLoss(_LinearLoss):
    """`linear_preference_loss` with its options held: any loss of pairs, by its loss_type.

    Raises:
        ValueError: an unknown loss.
        TypeError: an option that neither the function nor the loss has, or a tensor.
    """

    function = staticmethod(linear_preference_loss)
    table = PREFERENCE_LOSSES

    def __init__(self, loss_type: LossType = "sigmoid", *, beta: float = 0.1, **options: Any) -> None:
        super().__init__(loss_type, {"beta": beta, **options})

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, **given: Any) -> PreferenceOutput:
        return self._call(hidden, weight, targets, **given)


class LinearKTOLoss(_LinearLoss):
    """`linear_unpaired_loss` with its options held. Raises as LinearDPOLoss does."""

    function = staticmethod(linear_unpaired_loss)
    table = UNPAIRED_LOSSES

    def __init__(self, loss_type: LossType = "kto", *, beta: float = 0.1, **options: Any) -> None:
        super().__init__(loss_type, {"beta": beta, **options})

    def forward(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, desirable: Tensor, **given: Any
    ) -> UnpairedOutput:
        return self._call(hidden, weight, targets, desirable, **given)


class LinearPPOLoss(_LinearLoss):
    """`linear_policy_loss` with its options held: PPO, or any loss of sampled tokens. Raises as LinearDPOLoss does."""

    function = staticmethod(linear_policy_loss)
    table = POLICY_LOSSES
    given = ()

    def __init__(self, loss_type: LossType = "ppo", **options: Any) -> None:
        super().__init__(loss_type, options)

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, **given: Any) -> PolicyOutput:
        return self._call(hidden, weight, targets, **given)


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return getattr(value, "__name__", repr(value)) if callable(value) else repr(value)
