"""The options that every recipe has; a recipe's own dataclass adds its method's, and may give another default.

Names and defaults are those of TRL's ScriptArguments, ModelConfig and trainer configs and of transformers'
TrainingArguments, but for lr_scheduler_type (cosine here), bf16 (off here), padding_free (on here), dataset_test_split
(no split here) and output_dir. `test_split_size`, `overwrite_output_dir`, `skip_nonfinite`, `workspace`,
`max_extra_bytes` and gradient_checkpointing's "selective" are ours. An epoch ends with its last full optimizer step,
where transformers takes a smaller one; only data that do not fill a single step are one smaller step.
"""

import difflib
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim import SGD
from transformers import SchedulerType, get_scheduler

from fastpref.losses._protocol import Loss, Terms
from fastpref.trainer.config import option, settle

STEERED = ("reduce_lr_on_plateau", "greedy")  # by what the run measures, not by its number of steps
# an option of AdamW and its kin -> its default, and the optimizers that have none of the kind
OF_ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
NOT_ADAM = ("adafactor", "sgd", "adagrad", "rmsprop")


def check_schedule(recipe: str, name: str, options: dict[str, Any] | None) -> None:
    """A ValueError unless this is a schedule of transformers over the steps of a run, with these options of its own."""
    known = [kind.value for kind in SchedulerType if kind.value not in STEERED]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; one of {', '.join(known)}"
        raise ValueError(f"{recipe}: unknown lr_scheduler_type {name!r}{hint}")
    if options and name.startswith("constant"):  # which transformers would not read
        raise ValueError(f"{recipe}: lr_scheduler_type {name} has no options of its own; got {options}")
    try:  # on a trifle
        get_scheduler(name, SGD([torch.zeros(1)], lr=1.0), 1, 2, options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{recipe}: lr_scheduler_type {name} with lr_scheduler_kwargs {options}: {error}") from error


@dataclass(kw_only=True)
class TrainOptions:
    recipe: ClassVar[str] = "train"  # the command's name, which messages begin with

    model_name_or_path: str | None = option(
        None, "a model's folder or hub name; none: SmolLM2-135M-Instruct, fetched once"
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = option(
        "float32", "the weights' type; in 16 bits small updates are lost, but LoRA's are kept; auto: the checkpoint's"
    )
    trust_remote_code: bool = option(False, "run the Python code that a model brings along")
    attn_implementation: str | None = option(
        None, "transformers' name of an attention; only sdpa, which it mostly chooses itself, can be padding_free"
    )
    dataset_name: str | None = option(
        None,
        "a .jsonl, .json, .parquet or .csv file, a folder, or a hub name; none: film critics' quotes",
        alias="dataset",
    )
    dataset_config: str | None = option(None, "the hub dataset's configuration")
    dataset_train_split: str = option("train", "the split to train on")
    dataset_test_split: str | None = option(None, "the held-out split; none: test_split_size of the training split")
    test_split_size: float = option(
        0.05, "examples held out where there is no held-out split; below 1, a fraction; 0: none"
    )
    max_length: int | None = option(
        1024, "prompt + completion are cut to this many tokens, the start kept; none: no limit"
    )
    output_dir: str = option("runs/train", "where model, metrics, plot and checkpoints go")
    overwrite_output_dir: bool = option(False, "start anew where output_dir holds another run, and remove that run")

    per_device_train_batch_size: int = option(8, "examples a device sees at once")
    per_device_eval_batch_size: int = option(8, "the same without gradients: held-out and reference passes")
    gradient_accumulation_steps: int = option(1, "batches summed into an optimizer step")
    num_train_epochs: float = option(3.0, "passes over the training examples")
    max_steps: int = option(-1, "optimizer steps; above 0 this overrides num_train_epochs")
    learning_rate: float = option(5e-5, "the optimizer's learning rate at its peak")
    optim: str = option(
        "adamw_torch_fused", "transformers' name of an optimizer: adamw_torch, adafactor, adamw_8bit, ..."
    )
    optim_args: str | None = option(None, "options of the optimizer, where transformers reads them: name=value,...")
    adam_beta1: float = option(OF_ADAM["adam_beta1"], "AdamW's decay of the mean of gradients")
    adam_beta2: float = option(OF_ADAM["adam_beta2"], "AdamW's decay of the mean of their squares")
    adam_epsilon: float = option(OF_ADAM["adam_epsilon"], "what AdamW adds to the root of that")
    lr_scheduler_type: str = option("cosine", "a schedule of transformers: cosine, linear, constant_with_warmup, ...")
    lr_scheduler_kwargs: dict[str, Any] | None = option(
        None, 'options of the schedule\'s own, as JSON: {"min_lr_rate": 0.1} of cosine_with_min_lr'
    )
    warmup_steps: float = option(0, "steps of linear warm-up; below 1, a fraction of all steps")
    weight_decay: float = option(0.0, "decay of weight matrices; biases and norms have none")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0: not")
    skip_nonfinite: bool = option(False, "leave out a step whose loss or gradient is not finite; else stop there")
    bf16: bool = option(False, "compute in bfloat16, keeping the weights' own type")
    fp16: bool = option(False, "compute in float16 with loss scaling, keeping the weights' own type")
    gradient_checkpointing: bool | Literal["selective"] = option(
        True,
        "recompute activations in the backward pass: less memory, a third more time; selective: only what is cheap",
    )
    workspace: int | None = option(None, "MiB for the head's buffers; none: 256 on CPU, 1/32 of a GPU's memory")
    max_extra_bytes: int | None = option(
        None, "bytes the head's fp32 gradient may take beside them; with less it takes another pass; none: no limit"
    )
    seed: int = option(42, "seed of the data order, the held-out draw and dropout")
    disable_dropout: bool = option(True, "the model's own dropout is off, and so no difference to the reference")

    use_peft: bool = option(False, "train a LoRA adapter; the model itself stays as it is")
    lora_r: int = option(16, "rank of the adapter")
    lora_alpha: int = option(32, "the adapter's output is scaled by lora_alpha / lora_r")
    lora_dropout: float = option(0.05, "dropout before the adapter")
    lora_target_modules: str | list[str] | None = option(
        None, "layers that get an adapter; none: peft's choice for the model"
    )

    logging_steps: int = option(10, "steps averaged into a line of metrics")
    logging_first_step: bool = option(False, "a line for the first step, too")
    eval_strategy: Literal["no", "steps", "epoch"] = option(
        "no", "held-out metrics during training; before and after always"
    )
    eval_steps: int | None = option(None, "steps between them under eval_strategy steps; none: logging_steps")
    save_strategy: Literal["no", "steps", "epoch"] = option("steps", "checkpoints during training")
    save_steps: int = option(500, "steps between them under save_strategy steps")
    save_total_limit: int | None = option(None, "checkpoints kept; none: all")
    resume_from_checkpoint: bool | str = option(
        False, "true: go on from the last whole checkpoint of output_dir; or its path"
    )
    report_to: Literal["none", "tensorboard", "wandb"] = option("none", "where metrics go beside metrics.jsonl")
    run_name: str | None = option(None, "the run's name there; none: tensorboard's is fastpref-RECIPE, wandb's its own")

    def __post_init__(self) -> None:
        settle(self)
        check_schedule(self.recipe, self.lr_scheduler_type, self.lr_scheduler_kwargs)
        for name, default in OF_ADAM.items():
            if self.optim in NOT_ADAM and getattr(self, name) != default:
                raise ValueError(f"{self.recipe}: {name} is AdamW's, and optim {self.optim} has no such option")
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{self.recipe}: {name} must be in [0, 1); got {getattr(self, name)}")
        counts = "logging_steps eval_steps save_steps save_total_limit gradient_accumulation_steps lora_r workspace"
        for name in [*counts.split(), "max_length", "per_device_train_batch_size", "per_device_eval_batch_size"]:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{self.recipe}: {name} must be at least 1; got {getattr(self, name)}")
        amounts = "learning_rate weight_decay max_grad_norm warmup_steps test_split_size lora_dropout max_extra_bytes"
        for name in amounts.split():
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{self.recipe}: {name} must be 0 or more; got {getattr(self, name)}")
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise ValueError(
                f"{self.recipe}: num_train_epochs must be above 0 without max_steps; got {self.num_train_epochs}"
            )
        if self.bf16 and self.fp16:
            raise ValueError(f"{self.recipe}: bf16 and fp16 exclude each other; got both")

    def items_per_step(self, processes: int) -> int:
        """Items of an optimizer step, over all processes and accumulated batches."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * processes

    @property
    def new_tokens(self) -> int:
        """Tokens of the longest completion that is drawn."""
        return 0

    @property
    def head_options(self) -> dict[str, int]:
        """What of these the fused head takes, in its units."""
        given = {"workspace": self.workspace and self.workspace << 20, "max_extra_bytes": self.max_extra_bytes}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(kw_only=True)
class CausalOptions(TrainOptions):
    """Of the recipes that train a causal LM."""

    padding_free: bool = option(
        True, "read batches without padding, a prompt once for all its completions, where the model can"
    )


def check_ranges(recipe: str, terms: Terms, known: Collection[Loss], like: Tensor, *args: Any, **kwargs: Any) -> None:
    """Refuses an option that is out of its loss's range: the loss alone knows it, and is called on a trifle.

    known: the losses to call; a function of the user's is not among them. args, kwargs: what those take.
    """
    for term in terms.terms:
        if term.loss in known:
            try:
                term(recipe, like, *args, **kwargs)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{recipe}: {error}") from error
