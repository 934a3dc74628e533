"""Before the first step: processes and devices, where to start, the model, its optimizer groups, a held-out part."""

import ctypes
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs, set_seed
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from fastpref import fused_lm_head
from fastpref.kernels import memory
from fastpref.trainer import checkpoint
from fastpref.trainer.data_files import load_rows
from fastpref.trainer.options import CausalOptions, TrainOptions
from fastpref.trainer.packing import enable_packing
from fastpref.trainer.pretrained import from_pretrained, is_adapter

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
aten = torch.ops.aten
PRODUCTS = [
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
]
# whose settings a launcher hands to the first Accelerator
PLUGGED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
# around each recipe's `train`: a step's memory is highest outside of the head, where a buffer that stays adds to it
lean = memory.keep_at_most(0)
Item = TypeVar("Item")
Rows = Any  # of a file, or a hub dataset


def start(options: TrainOptions) -> Accelerator:
    """The processes and devices of this run, its precision and its tracker.

    Raises:
        ValueError: the tracker is not installed, or the launcher asks for more than DDP
            and FSDP2.
    """
    o = options
    if o.report_to != "none" and find_spec(o.report_to) is None:
        raise ValueError(f"{o.recipe}: report_to {o.report_to} needs: pip install {o.report_to}")
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    precision = "bf16" if o.bf16 else "fp16" if o.fp16 else launched
    tracker = None if o.report_to == "none" else o.report_to
    earlier = AcceleratorState._shared_state
    if earlier.get("distributed_type") not in PLUGGED and earlier.get("_mixed_precision", precision) != precision:
        # an earlier run of this Python process; the processes themselves, which are PartialState's, stay
        AcceleratorState._reset_state()
    keep_freed_memory()
    # a weight's 16-bit copy is used once a pass: kept until the pass ends, they would be half as much as the weights
    handlers = [AutocastKwargs(cache_enabled=False)]
    accelerator = Accelerator(
        mixed_precision=precision, log_with=tracker, project_dir=o.output_dir, kwargs_handlers=handlers
    )
    if accelerator.distributed_type in PLUGGED and not accelerator.is_fsdp2:
        raise ValueError(
            f"{o.recipe}: the recipes run in one process, under DDP or under FSDP2 (accelerate launch --use_fsdp "
            f"--fsdp_version 2); got {accelerator.distributed_type.value}"
        )
    accelerator.gradient_accumulation_steps = 1  # `accelerate launch` may set it, and backward() would divide by it
    set_seed(o.seed)
    return accelerator


def keep_freed_memory() -> None:
    """Freed CPU memory stays with the process, for the next layer and the next step.

    By default glibc gives the end of its heap back to the system, and taking it again costs a page fault every 4 KB,
    which on a virtual machine can be more than the arithmetic. Does nothing without glibc.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        # the most that glibc allows: blocks above 32 MB come and go on their own, for aligned ones leave holes
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def where_to_start(accelerator: Accelerator, options: TrainOptions) -> Path | None:
    """The checkpoint to go on from; None: from the beginning.

    resume_from_checkpoint: true: the last whole checkpoint of output_dir, those broken being passed over aloud; or the
    path of one of its own. Without it an earlier run there is a ValueError, or removed under overwrite_output_dir; and
    so is with `true` a finished run that has no whole checkpoint.
    """
    folder, resume = Path(options.output_dir), options.resume_from_checkpoint
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):  # now, not after the reference has scored
        why = "may not be written" if there.is_dir() else "is not a folder"
        raise ValueError(f"{options.recipe}: output_dir {folder} cannot be made or filled: {there} {why}")
    if isinstance(resume, str):
        if Path(resume).resolve().parent != folder.resolve():
            raise ValueError(
                f"{options.recipe}: resume_from_checkpoint must be a checkpoint in output_dir {folder}; got {resume}"
            )
        if reason := checkpoint.why_broken(Path(resume)):
            raise ValueError(f"{options.recipe}: resume_from_checkpoint {resume} is not a whole checkpoint: {reason}")
        return Path(resume)
    if resume and (found := checkpoint.last_whole(folder, accelerator.print)):
        return found
    with accelerator.main_process_first():  # the others look when the first has cleared up
        finished = [*folder.glob("model")]  # which a run that was killed before its first checkpoint has not
        earlier = [*checkpoint.checkpoints(folder), *finished]
        if finished and resume and not options.overwrite_output_dir:
            raise ValueError(
                f"{options.recipe}: output_dir {folder} holds a finished run (model) and no whole checkpoint to go on "
                "from. To replace it: --overwrite_output_dir; or choose another --output_dir"
            )
        if earlier and not resume and not options.overwrite_output_dir:
            raise ValueError(
                f"{options.recipe}: output_dir {folder} holds a run ({earlier[-1].name}). To go on with it: "
                "--resume_from_checkpoint; to replace it: --overwrite_output_dir; or choose another --output_dir"
            )
        for path in earlier if options.overwrite_output_dir else []:
            checkpoint.remove(path)
    if resume:
        accelerator.print(f"no whole checkpoint in {folder}: starting from the beginning")
    return None


def causal_lm(options: CausalOptions, name: str, resumed: Path | None) -> Any:
    """The causal LM with a fused head, as `load_model` prepares it; padding_free: reading packed rows if it can."""
    model = fused_lm_head(load_model(AutoModelForCausalLM, options, name, resumed, task="CAUSAL_LM"))
    asked = options.attn_implementation not in (None, "sdpa") and f"attention is to be {options.attn_implementation}"
    if options.padding_free and (reason := asked or enable_packing(model)):
        PartialState().print(f"padding   rows are padded, and prompts read once for each completion: {reason}")
    return model


def load_model(auto: Any, options: TrainOptions, name: str, resumed: Path | None, *, task: str, **config: Any) -> Any:
    """A transformers model, with disable_dropout without any of its own; with use_peft, frozen under an adapter.

    Args:
        auto: AutoModelForCausalLM or another of transformers' classes that choose one.
        name: a folder or hub name, for `from_pretrained`.
        resumed: the checkpoint whose weights, or with use_peft whose adapter, it gets.
        task: peft's name for the kind of model.
        config: what to set in the model's configuration.
    Raises:
        ValueError: name is the folder of an adapter, or of no model.
    """
    if is_adapter(name):  # the reference would be its base, and so would KL
        raise ValueError(
            f"{options.recipe}: model_name_or_path must be a whole model; {name} is an adapter. Merge it: "
            "peft.AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...)"
        )
    source = name if resumed is None or options.use_peft else resumed
    how = {"dtype": options.dtype, "trust_remote_code": options.trust_remote_code, **config}
    if options.attn_implementation is not None:
        how["attn_implementation"] = options.attn_implementation
    model: Any = from_pretrained(auto, str(source), options.recipe, **how)
    if options.disable_dropout:
        without_dropout(model)
    if options.gradient_checkpointing:
        # two names of one method: the first is new in transformers 5, the second leaves in 6
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        selective = options.gradient_checkpointing == "selective"
        enable({"use_reentrant": False, **({"context_fn": keep_products} if selective else {})})
    if options.use_peft and resumed:
        model = PeftModel.from_pretrained(model, resumed, is_trainable=True)
    elif options.use_peft:
        model = with_lora(model, options, task)
    return model


def with_lora(model: Any, options: TrainOptions, task: str) -> Any:
    """The model under a new adapter; a ValueError names its matrices where none can be adapted."""
    targets = options.lora_target_modules
    if isinstance(targets, str) and targets.isidentifier():
        targets = [targets]  # peft takes a text for a pattern of a module's whole path, which a bare name is not
    lora = LoraConfig(
        task_type=task,
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=targets,
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        matrices = (path for path, weight in model.named_parameters() if weight.ndim == 2 and path.endswith(".weight"))
        names = ", ".join(sorted({path.split(".")[-2] for path in matrices}))
        raise ValueError(
            f"{options.recipe}: no adapter for lora_target_modules {targets} ({str(error).rstrip('.')}). "
            f"The model's matrices are {names}; all-linear takes all but embeddings and head"
        ) from error


def without_dropout(model: nn.Module) -> None:
    """Sets to 0 what modules drop with: p of nn.Dropout, and the shares that OPT and others hand to functions.

    In training dropout is a difference between policy and reference that no preference caused.
    """
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or (name == "p" and isinstance(module, nn.Dropout))):
                setattr(module, name, 0.0)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The pad token, else EOS, else 0: what pads is never read."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def keep_products() -> Any:
    """For torch.utils.checkpoint: matrix products and attention are kept, what is cheap is recomputed."""
    return create_selective_checkpoint_contexts(PRODUCTS)


def load_items(
    options: TrainOptions,
    say: Callable[[str], None],
    *,
    columns: Callable[[Sequence[str]], str | None],
    tokenize: Callable[[Rows], tuple[list[Item], Any]],
    demo: Callable[[int], tuple[Rows, Rows]],
) -> tuple[list[Item], list[Item]]:
    """(items to train on, held-out items) as token ids; what was cut or dropped is said.

    Args:
        columns: given the names of a row's columns, None if they will do, else what is wanted.
        tokenize: rows to items, and a report of what was cut or dropped.
        demo: given the number to hold out, the rows (to train on, held out) where no dataset was named.
    """
    size = options.test_split_size
    test_rows: Rows = None
    if options.dataset_name is None:
        rows, drawn = demo(0 if size < 1 else int(size))  # of a fraction, that of what is kept is drawn below
        test_rows = drawn or None
    else:
        read = partial(load_rows, options.dataset_name, config=options.dataset_config, columns=columns)
        rows = read(split=options.dataset_train_split)
        if options.dataset_test_split:
            test_rows = read(split=options.dataset_test_split)
    items, told = tokenize(rows)
    say(f"training  {told}")
    if test_rows is None:
        return split_by_prompt(items, round(size * len(items)) if size < 1 else int(size), options.seed, say)
    held_out, told = tokenize(test_rows)
    say(f"held out  {told}")
    return items, held_out


def split_by_prompt(
    items: Sequence[Any], size: int, seed: int, say: Callable[[str], None] = print
) -> tuple[list[Any], list[Any]]:
    """(the rest, at least `size` held-out items): no prompt on both sides, or the held-out metrics would flatter.

    Where whole prompts would be more than twice `size`, or all there is, `size` items are drawn whatever their prompts,
    and that is said.

    items: with prompt_ids each; one without a prompt stands for itself.
    Raises:
        ValueError: nothing would be left to train on.
    """
    n = len(items)
    if size >= n:
        raise ValueError(
            f"split_by_prompt: {size} held-out examples leave nothing to train on: there are {n}. Give "
            "dataset_test_split, or test_split_size 0"
        )
    prompt_of = [tuple(item.prompt_ids) or (-1 - i,) for i, item in enumerate(items)]
    count = Counter(prompt_of)
    prompts = sorted(count)
    draw = random.Random(seed)
    draw.shuffle(prompts)
    drawn: set[tuple[int, ...]] = set()
    taken = 0
    while prompts and taken < size:
        if taken + count[prompts[-1]] <= 2 * size:
            drawn.add(prompts[-1])
            taken += count[prompts[-1]]
        prompts.pop()
    chosen = {i for i, prompt in enumerate(prompt_of) if prompt in drawn}
    if taken < size or taken == n:
        say(
            f"held out  {size} of {n} drawn one by one, for their {len(count)} prompts are too few to be held out whole"
        )
        chosen = {*draw.sample(range(n), size)}
    sides: tuple[list[Any], list[Any]] = ([], [])
    for i, item in enumerate(items):
        sides[i in chosen].append(item)
    return sides
