"""Before the first step: processes and devices, where to start, the model, its optimizer groups, a held-out part."""

import os
import random
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import set_seed
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from fastpref import fused_lm_head
from fastpref.trainer import checkpoint
from fastpref.trainer.data import Pair


def start(*, bf16: bool, fp16: bool, report_to: str, output_dir: Path, seed: int) -> Accelerator:
    """The processes and devices of this run, its precision and its tracker.

    Raises:
        ValueError: the tracker is not installed, or the launcher asks for more than DDP.
    """
    if report_to != "none" and find_spec(report_to) is None:
        raise ValueError(f"start: report_to {report_to} needs: pip install {report_to}")
    # said outright: accelerate keeps the precision of an earlier run in this Python process unless told one
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    precision = "bf16" if bf16 else "fp16" if fp16 else launched
    tracker = None if report_to == "none" else report_to
    accelerator = Accelerator(mixed_precision=precision, log_with=tracker, project_dir=output_dir)
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"start: this recipe runs in one process or under DDP; got {accelerator.distributed_type.value}"
        )
    accelerator.gradient_accumulation_steps = 1  # `accelerate launch` may set it, and backward() would divide by it
    set_seed(seed)
    return accelerator


def where_to_start(accelerator: Accelerator, folder: Path, resume: bool | str, overwrite: bool) -> Path | None:
    """The checkpoint to go on from; None: from the beginning.

    Args:
        folder: the run's output_dir.
        resume: true: its last whole checkpoint, those broken being passed over aloud; or the path of one of its own.
        overwrite: an earlier run in the folder is removed. Else, and without resume, it is a ValueError.
    """
    if isinstance(resume, str):
        if Path(resume).resolve().parent != folder.resolve():
            raise ValueError(
                f"where_to_start: resume_from_checkpoint must be a checkpoint in output_dir {folder}; got {resume}"
            )
        if reason := checkpoint.why_broken(Path(resume)):
            raise ValueError(f"where_to_start: resume_from_checkpoint {resume} is not a whole checkpoint: {reason}")
        return Path(resume)
    if resume:
        found = checkpoint.last_whole(folder, accelerator.print)
        if found is None:
            accelerator.print(f"no whole checkpoint in {folder}: starting from the beginning")
        return found
    with accelerator.main_process_first():  # the others look when the first has cleared up
        earlier = [*checkpoint.checkpoints(folder), *folder.glob("model")]
        if earlier and not overwrite:
            raise ValueError(
                f"where_to_start: output_dir {folder} holds a run ({earlier[-1].name}). To go on with it: "
                "--resume_from_checkpoint; to replace it: --overwrite_output_dir; or choose another --output_dir"
            )
        for path in earlier:
            checkpoint.remove(path)
    return None


def load_model(
    name: str, *, dtype: str, gradient_checkpointing: bool, lora: LoraConfig | None, resumed: Path | None
) -> Any:
    """The causal LM with a fused head and without dropout of its own; with `lora`, frozen under an adapter.

    Args:
        name: a folder or hub name, for `from_pretrained`.
        dtype: the name of the torch dtype in which the weights are kept.
        resumed: the checkpoint whose weights, or with `lora` whose adapter, it gets.
    """
    source = resumed if resumed and lora is None else name
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # a difference between policy and reference that no preference caused; TRL does the same
    if gradient_checkpointing:
        # two names of one method: the first is new in transformers 5, the second leaves in 6
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if lora is not None and resumed:
        model = PeftModel.from_pretrained(model, resumed, is_trainable=True)
    elif lora is not None:
        model = get_peft_model(model, lora)
    return fused_lm_head(model)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trained parameters, matrices apart: biases and norms are not pulled to zero."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    others = [parameter for parameter in trained if parameter.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def split_by_prompt(pairs: Sequence[Pair], size: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(the rest, at least `size` held-out pairs): no prompt on both sides, or the held-out metrics would flatter.

    Raises:
        ValueError: nothing would be left to train on.
    """
    count = Counter(tuple(pair.prompt_ids) for pair in pairs)
    prompts = sorted(count)
    random.Random(seed).shuffle(prompts)
    drawn: set[tuple[int, ...]] = set()
    taken = 0
    while prompts and taken < size:
        drawn.add(prompts[-1])
        taken += count[prompts.pop()]
    if not prompts:
        raise ValueError(
            f"split_by_prompt: {size} held-out pairs leave nothing to train on: there are {len(pairs)} pairs of "
            f"{len(count)} prompts, and those of a prompt stay together. Give dataset_test_split, or test_split_size 0"
        )
    sides: tuple[list[Pair], list[Pair]] = ([], [])
    for pair in pairs:
        sides[tuple(pair.prompt_ids) in drawn].append(pair)
    return sides
