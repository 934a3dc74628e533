"""DPO: tune a model on preference pairs, no reward model in between.

    loss = -log sigmoid(beta [(log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected))])

Rafailov et al. 2023, arXiv:2305.18290, eq. 7; `loss_type` names its relatives. p_ref is the model before training: its
log-probabilities of the pairs are computed once, up front, and kept. The logits are never stored: the fused head works
inside the model's own forward.

    fastpref dpo --model_name_or_path MODEL --dataset pairs.jsonl
    train(DPOOptions(model_name_or_path=MODEL, dataset_name="pairs.jsonl"))

Option names and defaults are those of TRL's DPOConfig, ScriptArguments and ModelConfig, and of transformers'
TrainingArguments, but for lr_scheduler_type (cosine here) and dataset_test_split (no split here).
"""

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from accelerate import Accelerator, PartialState
from peft import LoraConfig
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, get_scheduler

from fastpref import linear_logps, linear_preference_loss
from fastpref.integrations.transformers import HeadOutput
from fastpref.trainer import report
from fastpref.trainer.batches import length, logps_of_all, my_batches, pairs_of_step
from fastpref.trainer.checkpoint import last_whole, load_state, save_state, write_whole
from fastpref.trainer.config import as_command, given_options, option
from fastpref.trainer.data import Pair, PairCollator, load_preferences, tokenize_pairs
from fastpref.trainer.demo import demo_model, demo_pairs
from fastpref.trainer.metrics import MetricsLog, Tally, means, merged, read_metrics
from fastpref.trainer.start import decay_groups, load_model, split_by_prompt, start, where_to_start


@dataclass(kw_only=True)
class DPOOptions:
    model_name_or_path: str | None = option(
        None, "a model's folder or hub name; none: SmolLM2-135M-Instruct, fetched once"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "the weights' type; in 16 bits small updates are lost, but LoRA's are kept"
    )
    dataset_name: str | None = option(
        None,
        "a .jsonl, .json or .parquet file of pairs, a folder, or a hub name; none: film critics' quotes",
        alias="dataset",
    )
    dataset_config: str | None = option(None, "the hub dataset's configuration")
    dataset_train_split: str = option("train", "the split to train on")
    dataset_test_split: str | None = option(None, "the held-out split; none: test_split_size of the training split")
    test_split_size: float = option(
        0.05, "pairs held out where there is no held-out split; below 1, a fraction; 0: none"
    )
    max_length: int | None = option(
        1024, "prompt + completion are cut to this many tokens, the start kept; none: no limit"
    )
    output_dir: str = option("runs/dpo", "where model, metrics, plot and checkpoints go")
    overwrite_output_dir: bool = option(False, "start anew where output_dir holds another run, and remove that run")

    beta: float = option(0.1, "how strongly the reference holds the policy; higher: closer to it")
    loss_type: str | list[str] | Callable[..., Tensor] = option("sigmoid", "a preference loss, or several to be summed")
    loss_weights: list[float] | None = option(None, "weights of several losses; none: 1 each")
    label_smoothing: float = option(0.0, "probability that a label is flipped, for the losses that take it")
    reference_free: bool = option(False, "compare with a uniform reference, not with the model before training")

    per_device_train_batch_size: int = option(8, "pairs a device sees at once")
    per_device_eval_batch_size: int = option(8, "the same without gradients: held-out and reference passes")
    gradient_accumulation_steps: int = option(1, "batches summed into an optimizer step")
    num_train_epochs: float = option(3.0, "passes over the training pairs")
    max_steps: int = option(-1, "optimizer steps; above 0 this overrides num_train_epochs")
    learning_rate: float = option(1e-6, "AdamW's learning rate at its peak")
    lr_scheduler_type: str = option("cosine", "a schedule of transformers: cosine, linear, constant_with_warmup, ...")
    warmup_steps: float = option(0, "steps of linear warm-up; below 1, a fraction of all steps")
    weight_decay: float = option(0.0, "AdamW's decay of weight matrices; biases and norms have none")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0: not")
    bf16: bool = option(False, "compute in bfloat16, keeping the weights' own type")
    fp16: bool = option(False, "compute in float16 with loss scaling, keeping the weights' own type")
    gradient_checkpointing: bool = option(
        True, "recompute activations in the backward pass: less memory, a third more time"
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
        counts = "logging_steps eval_steps save_steps save_total_limit gradient_accumulation_steps lora_r"
        for name in [*counts.split(), "per_device_train_batch_size", "per_device_eval_batch_size"]:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"dpo: {name} must be at least 1; got {getattr(self, name)}")
        for name in "learning_rate weight_decay max_grad_norm warmup_steps test_split_size lora_dropout".split():
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"dpo: {name} must be 0 or more; got {getattr(self, name)}")
        if not self.beta > 0:
            raise ValueError(f"dpo: beta must be above 0; got {self.beta}")
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise ValueError(f"dpo: num_train_epochs must be above 0 without max_steps; got {self.num_train_epochs}")
        if self.bf16 and self.fp16:
            raise ValueError("dpo: bf16 and fp16 exclude each other; got both")

    @property
    def loss_names(self) -> list[str]:
        losses = self.loss_type if isinstance(self.loss_type, list) else [self.loss_type]
        return [loss if isinstance(loss, str) else loss.__name__ for loss in losses]


# What `fastpref dpo` does with neither a model nor a dataset: minutes on two cores, and the held-out loss falls
DEMO: dict[str, Any] = {
    "max_steps": 60,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-5,
    "max_length": 128,
    "gradient_checkpointing": False,
    "test_split_size": 96,
    "logging_steps": 5,
    "save_steps": 20,
    "save_total_limit": 1,
}
# What may differ between a run and its resumption: where it goes and who watches, not what it computes
MAY_CHANGE = "output_dir overwrite_output_dir resume_from_checkpoint save_steps save_total_limit report_to".split()


def main(argv: Sequence[str]) -> int:
    """`fastpref dpo ARGV...`."""
    given = given_options(DPOOptions, argv, prog="fastpref dpo", description=(__doc__ or "").partition("\n")[0])
    if given.keys() & {"model_name_or_path", "dataset_name"}:
        options = DPOOptions(**given)
    else:
        options = DPOOptions(**{**DEMO, **given})
        PartialState().print(f"demo      {as_command('fastpref dpo', options)}")
    transformers.utils.logging.disable_progress_bar()  # ours is the one to watch
    train(options)
    return 0


@dataclass(frozen=True)
class Outcome:
    """Held-out metrics before and after (empty without held-out pairs), and the folder of the tuned model."""

    before: dict[str, float | None]
    after: dict[str, float | None]
    model_dir: Path


@dataclass(frozen=True)
class Run:
    """What the parts of the recipe share."""

    options: DPOOptions
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    pairs: list[Pair]
    held_out: list[Pair]
    model: Any  # as accelerate prepared it: on its device, under autocast and DDP where asked for

    @property
    def bare_model(self) -> Any:
        """Without DDP, whose forward every process must call equally often."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def per_step(self) -> int:
        """Pairs of an optimizer step, over all processes and accumulated batches."""
        o = self.options
        return o.per_device_train_batch_size * o.gradient_accumulation_steps * self.accelerator.num_processes

    @property
    def steps_per_epoch(self) -> int:
        """An epoch ends with its last full step."""
        return len(self.pairs) // self.per_step

    @property
    def steps(self) -> int:
        o = self.options
        return o.max_steps if o.max_steps > 0 else math.ceil(o.num_train_epochs * self.steps_per_epoch)

    @property
    def warmup_steps(self) -> int:
        given = self.options.warmup_steps
        return math.ceil(given * self.steps) if given < 1 else int(given)

    def collated(self, pairs: list[Pair]) -> tuple[dict[str, Tensor], Tensor]:
        """(what the model reads, targets) of a batch, on the device."""
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        batch = PairCollator(eos if pad is None else pad)(pairs)
        inputs = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
        return inputs, inputs.pop("targets")

    def save_model(self, folder: Path) -> None:
        self.bare_model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def continuations(self) -> list[list[str]]:
        """[prompt, continuation] of two prompts, of the main process; the others return none."""
        pairs = self.held_out or self.pairs
        if not self.accelerator.is_main_process:
            return []
        return report.continuations(self.bare_model, self.tokenizer, [pair.prompt_ids for pair in pairs])


def train(options: DPOOptions) -> Outcome:
    """Tunes the model and returns what that changed. Everything it leaves is in `output_dir`."""
    o, folder = options, Path(options.output_dir)
    accelerator = start(bf16=o.bf16, fp16=o.fp16, report_to=o.report_to, output_dir=folder, seed=o.seed)
    say = partial(accelerator.print, flush=True)  # into a log file too, line by line
    resumed = where_to_start(accelerator, folder, o.resume_from_checkpoint, o.overwrite_output_dir)

    if o.model_name_or_path is None:
        say("no model given, so SmolLM2-135M-Instruct")
    if o.dataset_name is None:
        say("no dataset given, so film critics' quotes on the same film: fresh is preferred to rotten")
    with accelerator.main_process_first():
        name = o.model_name_or_path or demo_model()
        tokenizer = AutoTokenizer.from_pretrained(name)
        pairs, held_out = load_pairs(o, tokenizer, say)
    lora = lora_config(o) if o.use_peft else None
    model = load_model(name, dtype=o.dtype, gradient_checkpointing=o.gradient_checkpointing, lora=lora, resumed=resumed)
    optimizer = torch.optim.AdamW(decay_groups(model, o.weight_decay), lr=o.learning_rate, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    run = Run(o, accelerator, tokenizer, pairs, held_out, model)
    if run.steps_per_epoch == 0:
        raise ValueError(f"dpo: {len(pairs)} training pairs do not fill one optimizer step of {run.per_step} pairs")
    scheduler = get_scheduler(o.lr_scheduler_type, optimizer, run.warmup_steps, run.steps)
    say(report.heading(name, model, accelerator.device, o.output_dir))
    say(f"run       {run.steps} steps of {run.per_step} pairs; {len(pairs)} to train on, {len(held_out)} held out")

    # `state` is what the steps change; with these parts and the random generators, all that the next step depends on
    parts = {"optimizer": optimizer, "scheduler": scheduler, **({"scaler": s} if (s := accelerator.scaler) else {})}
    if resumed:
        state = load_state(accelerator, resumed, parts, partial(differences, identity(run)))
        say(f"resuming  after step {state['step']}, from {resumed}")
    else:
        state = first_state(run)
    if o.report_to != "none":
        # what an interrupted run logged past its checkpoint is logged again
        again = {"tensorboard": {"purge_step": state["step"] + 1}} if resumed else {}
        accelerator.init_trackers("fastpref-dpo", {key: str(value) for key, value in asdict(o).items()}, again)
    log = MetricsLog(
        accelerator,
        folder / "metrics.jsonl",
        steps=run.steps,
        steps_per_epoch=run.steps_per_epoch,
        keep_through=state["step"] if resumed else None,
    )
    if not resumed and held_out:
        log(0, state["before"])

    for step in range(state["step"] + 1, run.steps + 1):
        model.train()
        tally = Tally()
        indices = pairs_of_step(step, len(pairs), run.per_step, o.seed)
        for batch, is_last in my_batches(accelerator, indices, o.per_device_train_batch_size):
            # processes exchange gradients once a step, after the last of its batches
            with nullcontext() if is_last else accelerator.no_sync(model):
                reference = None if o.reference_free else state["reference"][batch]
                loss, _ = forward(run, model, [pairs[i] for i in batch], reference, tally, num_items=run.per_step)
                # DDP averages over processes, and the loss is already this batch's share of the mean over all
                accelerator.backward(loss * accelerator.num_processes)
        sums = tally.reduced()
        norm = float(accelerator.clip_grad_norm_(model.parameters(), o.max_grad_norm or math.inf))
        refuse_nonfinite(run, step, means(sums)["loss"], norm)
        learning_rate = scheduler.get_last_lr()[0]
        optimizer.step()
        optimizer.zero_grad()
        if not accelerator.optimizer_step_was_skipped:  # as under float16 when its loss scale was too high
            scheduler.step()

        state["step"] = step
        state["num_tokens"] += sum(length(pairs[i]) for i in indices)
        state["window"] = merged(state["window"], sums)
        if step % o.logging_steps == 0 or step == run.steps:
            more = {"grad_norm": norm, "learning_rate": learning_rate, "num_tokens": state["num_tokens"]}
            log(step, {**means(state["window"]), **more})
            state["window"] = {}
        if held_out and (step == run.steps or evaluation_due(run, step)):
            state["after"], _ = evaluate(run, state["held_out_reference"])
            log(step, state["after"])
        if step % o.save_steps == 0:
            log.sync()
            save_state(accelerator, folder, state, parts, run.save_model, o.save_total_limit)
        log.advance()
    log.close()
    return finish(run, state)


def load_pairs(
    options: DPOOptions, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]
) -> tuple[list[Pair], list[Pair]]:
    """(pairs to train on, held-out pairs) as token ids; what was cut or dropped is said."""
    size = options.test_split_size
    test_rows: Any = None
    if options.dataset_name is None:
        rows, test_rows = demo_pairs(seed=options.seed, held_out=int(size) if size >= 1 else 128)
    else:
        load = partial(load_preferences, options.dataset_name, config=options.dataset_config)
        rows = load(split=options.dataset_train_split)
        test_rows = load(split=options.dataset_test_split) if options.dataset_test_split else None
    pairs, told = tokenize_pairs(rows, tokenizer, max_length=options.max_length)
    say(f"training  {told}")
    if test_rows is None:
        return split_by_prompt(pairs, round(size * len(pairs)) if size < 1 else int(size), options.seed)
    held_out, told = tokenize_pairs(test_rows, tokenizer, max_length=options.max_length)
    say(f"held out  {told}")
    return pairs, held_out


def lora_config(options: DPOOptions) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=options.lora_target_modules,
    )


def identity(run: Run) -> dict[str, Any]:
    """What must be equal for a resumed run to go on as if nothing had happened."""
    options = {key: value for key, value in asdict(run.options).items() if key not in MAY_CHANGE}
    options["loss_type"] = run.options.loss_names
    data = f"{zlib.crc32(repr([run.pairs, run.held_out]).encode()):08x}"
    return {**options, "processes": run.accelerator.num_processes, "data checksum": data}


def differences(now: dict[str, Any], state: dict[str, Any]) -> list[str]:
    then = state["identity"]
    return [f"{key} {then.get(key)} (now {value})" for key, value in now.items() if then.get(key) != value]


def first_state(run: Run) -> dict[str, Any]:
    """The state before step 1: the reference's view of the held-out pairs and of those that the run will visit."""
    n, seed, referenced = len(run.pairs), run.options.seed, not run.options.reference_free
    visited = {i for step in range(1, run.steps + 1) for i in pairs_of_step(step, n, run.per_step, seed)}
    if referenced:
        run.accelerator.print(f"reference scores {len(visited) + len(run.held_out)} pairs, once", flush=True)
    before, held_out_logps = evaluate(run, None) if run.held_out else ({}, None)
    return {
        "step": 0,
        "num_tokens": 0,
        "window": {},  # sums of metrics since the last line of them
        "before": before,
        "after": before,
        "held_out_reference": held_out_logps if referenced else None,
        "reference": reference_logps(run, visited) if referenced else None,
        "samples": run.continuations(),
        "identity": identity(run),
    }


def forward(
    run: Run, model: Any, pairs: list[Pair], reference: Tensor | None, tally: Tally, num_items: int | None = None
) -> tuple[Tensor, Tensor]:
    """(loss, summed log-probabilities (B, 2) of chosen and rejected) of a batch of B pairs; metrics go to the tally.

    Args:
        reference: (B, 2), the same under the reference; None: the policy is still the reference, or there is none.
        num_items: the loss is the sum over the batch divided by this; None: the mean.
    """
    o = run.options
    loss_options: dict[str, Any] = {"label_smoothing": o.label_smoothing} if o.label_smoothing else {}
    inputs, targets = run.collated(pairs)

    def head(hidden: Tensor, weight: Tensor, **head_options: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        ref_logps = None if reference is None else reference.T.flatten().to(hidden.device)
        if ref_logps is None and not o.reference_free:
            ref_logps = linear_logps(hidden, weight, targets, **head_options).sum(-1)
        out = linear_preference_loss(
            hidden,
            weight,
            targets,
            loss_type=o.loss_type,
            loss_weights=o.loss_weights,
            beta=o.beta,
            ref_logps=ref_logps,
            reference_free=o.reference_free,
            num_items=num_items,
            **head_options,
            **loss_options,
        )
        return out.loss, torch.stack([out.chosen_logps, out.rejected_logps], dim=1).detach(), out.metrics

    (loss, logps, metrics), aux_loss = through_head(model, inputs, head)
    share = 1.0 if num_items is None else len(pairs) / num_items
    if aux_loss is not None:
        loss = loss + share * run.bare_model.config.get_text_config().router_aux_loss_coef * aux_loss
        metrics = {**metrics, "aux_loss": aux_loss}
    tally.add({"loss": loss / share, **metrics}, targets)
    return loss, logps


def through_head(model: Any, inputs: dict[str, Tensor], head: Callable[..., Any]) -> tuple[Any, Tensor | None]:
    """(what `head` returned, the router loss of a mixture of experts whose config asks for it, else None)."""
    found = model(**inputs, head=head)
    return (found.result, found.aux_loss) if isinstance(found, HeadOutput) else (found, None)


@torch.no_grad()
def reference_logps(run: Run, visited: Iterable[int]) -> Tensor:
    """(pairs, 2) summed log-probabilities of chosen and rejected before training; NaN where a pair is never visited."""

    def logps(pairs: list[Pair], _: list[int]) -> Tensor:
        inputs, targets = run.collated(pairs)

        def head(hidden: Tensor, weight: Tensor, **head_options: Any) -> Tensor:
            return linear_logps(hidden, weight, targets, **head_options).sum(-1)

        return through_head(run.bare_model, inputs, head)[0].view(2, -1).T

    run.model.eval()
    size = run.options.per_device_eval_batch_size
    return logps_of_all(run.accelerator, run.pairs, visited, size, logps, "reference")


@torch.no_grad()
def evaluate(run: Run, reference: Tensor | None) -> tuple[dict[str, float | None], Tensor]:
    """(mean metrics of the held-out pairs, named eval_...; their summed log-probabilities (pairs, 2)).

    reference: (pairs, 2). None: before training, where the policy is the reference, every margin is 0, a tie, and
    accuracy is None.
    """
    tally = Tally()

    def logps(pairs: list[Pair], batch: list[int]) -> Tensor:
        return forward(run, run.bare_model, pairs, None if reference is None else reference[batch], tally)[1]

    run.model.eval()
    held_out, size = run.held_out, run.options.per_device_eval_batch_size
    found = logps_of_all(run.accelerator, held_out, range(len(held_out)), size, logps, "held out")
    metrics: dict[str, float | None] = {f"eval_{name}": mean for name, mean in means(tally.reduced()).items()}
    if reference is None and not run.options.reference_free:
        metrics["eval_rewards/accuracies"] = None
    return metrics, found


def evaluation_due(run: Run, step: int) -> bool:
    o = run.options
    every = {"no": 0, "steps": o.eval_steps or o.logging_steps, "epoch": run.steps_per_epoch}[o.eval_strategy]
    return every > 0 and step % every == 0


def refuse_nonfinite(run: Run, step: int, loss: float, norm: float) -> None:
    """Stops before the weights take it up. Under float16 an infinite norm may pass: the loss scale is found so."""
    if math.isfinite(loss) and (math.isfinite(norm) or run.options.fp16):
        return
    last = last_whole(Path(run.options.output_dir), run.accelerator.print)
    raise FloatingPointError(
        f"dpo: loss {loss} and gradient norm {norm} at step {step}; stopped before the weights took it up. "
        f"Last whole checkpoint: {last or 'none yet'}. A lower learning_rate or float32 may help"
    )


def finish(run: Run, state: dict[str, Any]) -> Outcome:
    """Saves the tuned model, plots the metrics, and shows what the training changed."""
    o, folder = run.options, Path(run.options.output_dir)
    after = run.continuations()
    if run.accelerator.is_main_process:
        write_whole(folder / "model", run.save_model)
        settings = f"beta {o.beta:g}, learning rate {o.learning_rate:g}, {run.per_step} pairs a step"
        lines = read_metrics(folder / "metrics.jsonl")
        report.plot(lines, folder / "training.png", title=f"{' + '.join(o.loss_names)}: {settings}")
        print()
        if run.held_out:
            print(report.before_after(state["before"], state["after"], pairs=len(run.held_out)), end="\n\n")
        print(report.samples(state["samples"], after))
        for label, name in {"model": "model", "metrics": "metrics.jsonl", "plot": "training.png"}.items():
            print(f"{label:<10}{folder / name}")
    run.accelerator.wait_for_everyone()
    return Outcome(state["before"], state["after"], folder / "model")
