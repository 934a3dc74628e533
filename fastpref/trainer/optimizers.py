"""Optimizers by transformers' names: adamw_torch_fused, adamw_torch, adafactor, adamw_bnb_8bit, sgd, ..."""

import difflib
from types import SimpleNamespace
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer

# those that need no more than gradients and a step: no projections of chosen layers, no mode for evaluation
NAMES = (
    "adamw_torch_fused adamw_torch adafactor sgd adagrad rmsprop "
    "adamw_torch_8bit adamw_torch_4bit "  # torchao
    "adamw_bnb_8bit adamw_8bit paged_adamw_8bit paged_adamw_32bit lion_8bit lion_32bit ademamix ademamix_8bit "
    "stable_adamw"  # torch-optimi
).split()


def make_optimizer(
    model: nn.Module,
    name: str,
    *,
    learning_rate: float,
    weight_decay: float,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.999,
    adam_epsilon: float = 1e-8,
    optim_args: str | None = None,
) -> Optimizer:
    """The optimizer that transformers' Trainer makes for `--optim name`, of the parameters that are trained.

    Weight decay is for matrices: biases and norms are not pulled to zero.

    Args:
        optim_args: the optimizer's own options, "name=value,name=value", where transformers reads them.
    Raises:
        ValueError: an unknown name.
        ImportError: its package is not installed.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; one of {', '.join(NAMES)}"
        raise ValueError(f"make_optimizer: unknown optim {name!r}{hint}")
    # what the factory reads of TrainingArguments, which would set up devices and processes of its own
    arguments: Any = SimpleNamespace(
        optim=name,
        optim_args=optim_args,
        optim_target_modules=None,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        adam_beta1=adam_beta1,
        adam_beta2=adam_beta2,
        adam_epsilon=adam_epsilon,
    )
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    except ImportError as error:
        raise ImportError(f"make_optimizer: optim {name}: {error}") from error
    return kind(decay_groups(model, weight_decay), **options)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trained parameters, matrices apart."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    others = [parameter for parameter in trained if parameter.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
