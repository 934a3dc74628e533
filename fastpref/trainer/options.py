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

from torch import Tensor

from fastpref.losses._protocol import Loss, Terms
from fastpref.trainer.config import option, settle

# of transformers: those that follow from the numbers of steps and of warm-up steps, and those that want more
SCHEDULES = "linear cosine cosine_with_restarts polynomial constant constant_with_warmup inverse_sqrt".split()
DEMANDING = "reduce_lr_on_plateau cosine_with_min_lr cosine_warmup_with_min_lr warmup_stable_decay greedy".split()


def check_schedule(recipe: str, name: str) -> None:
    """A ValueError unless this is a schedule of transformers that needs no options of its own."""
    if name in SCHEDULES:
        return
    if name in DEMANDING:
        raise ValueError(f"{recipe}: lr_scheduler_type {name} wants options of its own; one of {', '.join(SCHEDULES)}")
    near = difflib.get_close_matches(name, SCHEDULES, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; one of {', '.join(SCHEDULES)}"
    raise ValueError(f"{recipe}: unknown lr_scheduler_type {name!r}{hint}")


@dataclass(kw_only=True)
class TrainOptions:
    recipe: ClassVar[str] = "train"  # the command's name, which messages begin with

    model_name_or_path: str | None = option(
        None, "a model's folder or hub name; none: SmolLM2-135M-Instruct, fetched once"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "the weights' type; in 16 bits small updates are lost, but LoRA's are kept"
    )
    dataset_name: str | None = option(
        None,
        "a .jsonl, .json or .parquet file, a folder, or a hub name; none: film critics' quotes",
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
    lr_scheduler_type: str = option("cosine", "a schedule of transformers: cosine, linear, constant_with_warmup, ...")
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

    use_peft: bool = option(False, "train a LoRA adapter; the model itself stays as it is")
    lora_r: int = option(16, "rank of the adapter")
    lora_alpha: int = option(32, "the adapter's output is scaled by lora_alpha / lora_r")
    lora_dropout: float = option(0.05, "dropout before the adapter")
    lora_target_modules: str | list[str] | None = option(
        None, "layers that get an adapter; none: peft's choice for the model"
    )

    logging_steps: int = option(10, "steps averaged into a line of metrics")
    eval_strategy: Literal["no", "steps", "epoch"] = option(
        "no", "held-out metrics during training; before and after always"
    )
    eval_steps: int | None = option(None, "steps between them under eval_strategy steps; none: logging_steps")
    save_steps: int = option(500, "steps between checkpoints")
    save_total_limit: int | None = option(None, "checkpoints kept; none: all")
    resume_from_checkpoint: bool | str = option(
        False, "true: go on from the last whole checkpoint of output_dir; or its path"
    )
    report_to: Literal["none", "tensorboard", "wandb"] = option("none", "where metrics go beside metrics.jsonl")

    def __post_init__(self) -> None:
        settle(self)
        check_schedule(self.recipe, self.lr_scheduler_type)
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
