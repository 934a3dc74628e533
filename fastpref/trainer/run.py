"""What every recipe does around its loss: it opens a run, takes steps, logs, evaluates, saves, resumes, reports.

    run = open_run(options, unit="pairs", load=load_pairs)            # processes, data, model, optimizer
    state, log = begin(run, first_state, evaluate)                    # from the beginning, or from a checkpoint
    for step, indices in steps_to_do(run, state):
        done = update(run, step, my_batches(run.accelerator, indices, size), loss)
        after_step(run, state, log, step, done, evaluate, tokens=sum(run.items[i].n_tokens for i in indices))
    return finish(run, state, log)

`state` is a dict that the steps change: with `run.parts` and the random generators, all that the next step depends on.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, get_scheduler

from fastpref.trainer import report
from fastpref.trainer.batches import items_of_step
from fastpref.trainer.checkpoint import last_whole, load_state, save_state, write_whole
from fastpref.trainer.demo import demo_model
from fastpref.trainer.identity import differences, identity
from fastpref.trainer.metrics import MetricsLog, Sums, Tally, means, merged, read_metrics
from fastpref.trainer.optimizers import make_optimizer
from fastpref.trainer.options import OF_ADAM, TrainOptions
from fastpref.trainer.pretrained import check_positions, check_vocabulary, from_pretrained
from fastpref.trainer.sharded import WholeOptimizer, whole_weights
from fastpref.trainer.start import causal_lm, start, where_to_start

State = dict[str, Any]
Metrics = dict[str, float | None]


@dataclass(frozen=True)
class Outcome:
    """Held-out metrics before and after (empty without held-out items), and the folder of the tuned model."""

    before: Metrics
    after: Metrics
    model_dir: Path


@dataclass(frozen=True)
class Run:
    """What the parts of a recipe share."""

    options: Any  # the recipe's, a TrainOptions
    unit: str  # what an item is called: pairs, examples, prompts
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    items: list[Any]
    held_out: list[Any]
    model: Any  # as accelerate prepared it: on its device, under autocast and DDP where asked for
    optimizer: Any
    scheduler: Any
    resumed: Path | None  # the checkpoint to go on from
    per_step: int  # items of an optimizer step, over all processes and accumulated batches

    @property
    def folder(self) -> Path:
        return Path(self.options.output_dir)

    @property
    def bare_model(self) -> Any:
        """Without DDP, whose forward every process must call equally often."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def steps_per_epoch(self) -> int:
        """An epoch ends with its last full step."""
        return len(self.items) // self.per_step

    @property
    def steps(self) -> int:
        return steps_of(self.options, self.steps_per_epoch)

    @property
    def parts(self) -> dict[str, Any]:
        """What has a state_dict, beside the model."""
        scaler = self.accelerator.scaler
        optimizer = WholeOptimizer(self.optimizer) if self.accelerator.is_fsdp2 else self.optimizer
        return {"optimizer": optimizer, "scheduler": self.scheduler, **({"scaler": scaler} if scaler else {})}

    def say(self, message: str) -> None:
        self.accelerator.print(message, flush=True)  # into a log file too, line by line

    def saver(self) -> Callable[[Path], None]:
        """What writes the model into a folder. Every process calls this, the main one what it returns."""
        weights = whole_weights(self.accelerator, self.model)

        def save(folder: Path) -> None:
            self.bare_model.save_pretrained(folder, **({} if weights is None else {"state_dict": weights}))
            self.tokenizer.save_pretrained(folder)

        return save


def steps_of(options: TrainOptions, steps_per_epoch: int) -> int:
    return options.max_steps if options.max_steps > 0 else math.ceil(options.num_train_epochs * steps_per_epoch)


def open_run(
    options: TrainOptions,
    *,
    unit: str,
    load: Callable[[Any, PreTrainedTokenizerBase, Callable[[str], None]], tuple[list[Any], list[Any]]],
    build: Callable[[Any, str, Path | None], Any] = causal_lm,
    updates: int = 1,
    ddp: bool = True,
) -> Run:
    """Everything before the first step.

    Args:
        unit: what an item is called.
        load: given options, tokenizer and a way to say things: (items to train on, held-out items), which have
            `prompt_ids`, `n_tokens` and `longest`.
        build: given options, the model's name and the checkpoint to go on from or None: the model.
        updates: optimizer updates a step, which the schedule counts.
        ddp: False: no DDP and no FSDP2; the recipe adds up the gradients of several processes itself.
    Raises:
        ValueError: the items do not fill a step of several processes or of an online recipe, or are longer than the
            model's table of positions; what `start` and `where_to_start` refuse.
    """
    o = options
    accelerator = start(o)
    say = partial(accelerator.print, flush=True)
    resumed = where_to_start(accelerator, o)
    if o.model_name_or_path is None:
        say("no model given, so SmolLM2-135M-Instruct")
    if o.dataset_name is None:
        say("no dataset given, so film critics' quotes")
    with accelerator.main_process_first():
        name = o.model_name_or_path or demo_model()
        tokenizer = from_pretrained(AutoTokenizer, name, o.recipe, trust_remote_code=o.trust_remote_code)
        items, held_out = load(o, tokenizer, say)
    per_step = o.items_per_step(accelerator.num_processes)
    if ddp and accelerator.num_processes == 1:  # which alone can take any number of them
        per_step = min(per_step, len(items))
    if len(items) < per_step:
        raise ValueError(
            f"{o.recipe}: {len(items)} training {unit} do not fill one optimizer step of {per_step} {unit}"
        )
    model = build(o, name, resumed)
    check_vocabulary(o.recipe, model, [*items, *held_out])
    check_positions(o.recipe, model, max(item.longest for item in [*items, *held_out]), o.new_tokens)
    adam = {name: getattr(o, name) for name in OF_ADAM}
    optimizer = make_optimizer(
        model, o.optim, learning_rate=o.learning_rate, weight_decay=o.weight_decay, optim_args=o.optim_args, **adam
    )
    if ddp:
        model, optimizer = accelerator.prepare(model, optimizer)
    elif accelerator.is_fsdp2:
        raise ValueError(f"{o.recipe}: runs in one process or under DDP; got FSDP2")
    else:
        model = accelerator.prepare_model(model, evaluation_mode=True)  # which is what leaves out DDP
        optimizer = accelerator.prepare(optimizer)
    total = updates * steps_of(o, len(items) // per_step)
    warmup = math.ceil(o.warmup_steps * total) if o.warmup_steps < 1 else int(o.warmup_steps)
    scheduler = get_scheduler(o.lr_scheduler_type, optimizer, warmup, total, o.lr_scheduler_kwargs)
    run = Run(o, unit, accelerator, tokenizer, items, held_out, model, optimizer, scheduler, resumed, per_step)
    say(report.heading(name, model, accelerator.device, o.output_dir))
    say(f"run       {run.steps} steps of {per_step} {unit}; {len(items)} to train on, {len(held_out)} held out")
    return run


def begin(
    run: Run,
    first: Callable[[Run], State],
    evaluate: Callable[[Run, State], Metrics],
    sample: Callable[[Run], list[list[str]]] = lambda run: continuations(run),
) -> tuple[State, MetricsLog]:
    """(the state before the next step, the log of metrics).

    Args:
        first: what the recipe itself keeps in the state from the beginning; tensors, numbers, texts, lists and dicts.
        evaluate: the metrics of the held-out items, named eval_...; called where there are any.
        sample: [heading, text] of some of the model's answers, for the report.
    """
    o = run.options
    own = identity(o, [run.items, run.held_out], run.accelerator.num_processes)
    if run.resumed:
        state = load_state(run.accelerator, run.resumed, run.parts, partial(differences, own))
        run.say(f"resuming  after step {state['step']}, from {run.resumed}")
    else:
        # window: sums of metrics since the last line of them
        state = {"step": 0, "num_tokens": 0, "window": {}, "identity": own, **first(run)}
        state["before"] = state["after"] = evaluate(run, state) if run.held_out else {}
        state["samples"] = sample(run)
    if o.report_to != "none":
        # what an interrupted run logged past its checkpoint is logged again
        again = {"purge_step": state["step"] + 1} if run.resumed else {}
        shown = {field.name: str(getattr(o, field.name)) for field in fields(o)}
        project = o.run_name if o.run_name and o.report_to == "tensorboard" else f"fastpref-{o.recipe}"
        run.accelerator.init_trackers(project, shown, {"tensorboard": again, "wandb": {"name": o.run_name}})
    log = MetricsLog(
        run.accelerator,
        run.folder / "metrics.jsonl",
        steps=run.steps,
        steps_per_epoch=run.steps_per_epoch,
        keep_through=state["step"] if run.resumed else None,
    )
    if not run.resumed and state["before"]:
        log(0, state["before"])
    return state, log


def steps_to_do(run: Run, state: State) -> Iterator[tuple[int, list[int]]]:
    """(step, its items' indices) of the steps after `state["step"]`."""
    for step in range(state["step"] + 1, run.steps + 1):
        yield step, items_of_step(step, len(run.items), run.per_step, run.options.seed)


class Update(NamedTuple):
    """What an optimizer update leaves: the sums of its metrics over all processes, and figures."""

    sums: Sums
    grad_norm: float
    learning_rate: float

    @property
    def loss(self) -> float:
        """0 over no item at all, as where all completions are masked."""
        return means(self.sums).get("loss", 0.0)


def update(run: Run, step: int, batches: Iterable[tuple[Any, bool]], loss: Callable[[Any, Tally], Tensor]) -> Update:
    """One optimizer update.

    Args:
        batches: (a batch of this process, whether it is its last); every process has equally many.
        loss: given a batch and a tally for its metrics, "loss" among them: this batch's share of the step's loss, the
            sum over its items divided by a number that counts all batches and processes.
    Raises:
        FloatingPointError: loss or gradient are not finite, before the weights took it up; without skip_nonfinite.
    """
    accelerator = run.accelerator
    run.model.train()
    tally = Tally()
    for batch, is_last in batches:
        # processes exchange gradients once a step, after the last of its batches
        with nullcontext() if is_last else accelerator.no_sync(run.model):
            # DDP averages over processes, and the loss is already this batch's share of the mean over all
            accelerator.backward(loss(batch, tally) * accelerator.num_processes)
    return take(run, step, tally)


def take(run: Run, step: int, tally: Tally) -> Update:
    """The optimizer's part of an update, once the gradients are there; raises as `update` does."""
    o, accelerator, sums = run.options, run.accelerator, tally.reduced()
    total_norm = accelerator.clip_grad_norm_(run.model.parameters(), o.max_grad_norm or math.inf)
    norm = float(total_norm.full_tensor() if isinstance(total_norm, DTensor) else total_norm)
    done = Update(sums, norm, run.scheduler.get_last_lr()[0])
    if not finite(run, done):
        if not o.skip_nonfinite:
            raise FloatingPointError(nonfinite(run, step, done))
        run.say(f"step {step} left out: loss {done.loss}, gradient norm {norm}")
        run.optimizer.zero_grad()
        run.scheduler.step()  # which counts this step, too: it is to end with the run
        return done._replace(sums={})
    run.optimizer.step()
    run.optimizer.zero_grad()
    if not accelerator.optimizer_step_was_skipped:  # as under float16 when its loss scale was too high
        run.scheduler.step()
    return done


def finite(run: Run, done: Update) -> bool:
    """Under float16 an infinite norm may pass: the loss scale is found so."""
    return math.isfinite(done.loss) and (math.isfinite(done.grad_norm) or run.options.fp16)


def nonfinite(run: Run, step: int, done: Update) -> str:
    last = last_whole(run.folder, run.accelerator.print)
    return (
        f"{run.options.recipe}: loss {done.loss} and gradient norm {done.grad_norm} at step {step}; "
        f"stopped before the weights took it up. Last whole checkpoint: {last or 'none yet'}. A lower learning_rate or "
        "float32 may help; --skip_nonfinite leaves such a step out"
    )


def after_step(
    run: Run,
    state: State,
    log: MetricsLog,
    step: int,
    done: Update,
    evaluate: Callable[[Run, State], Metrics],
    *,
    tokens: int,
    figures: Mapping[str, float] | None = None,
) -> None:
    """Takes the step into the state; logs, evaluates and saves where they are due.

    tokens: how many the step read, over all processes; figures: more for this step's line of metrics.
    """
    o = run.options
    state["step"] = step
    state["num_tokens"] += tokens
    state["window"] = merged(state["window"], done.sums)
    if step % o.logging_steps == 0 or step == run.steps or (o.logging_first_step and step == 1):
        more = {"grad_norm": done.grad_norm, "learning_rate": done.learning_rate, "num_tokens": state["num_tokens"]}
        log(step, {**means(state["window"]), **more, **(figures or {})})
        state["window"] = {}

    def due(strategy: str, steps: int) -> bool:
        return strategy != "no" and step % (steps if strategy == "steps" else run.steps_per_epoch) == 0

    if run.held_out and (step == run.steps or due(o.eval_strategy, o.eval_steps or o.logging_steps)):
        state["after"] = evaluate(run, state)
        log(step, state["after"])
    if due(o.save_strategy, o.save_steps):
        log.sync()
        save_state(run.accelerator, run.folder, state, run.parts, run.saver(), o.save_total_limit)
    log.advance()


def finish(
    run: Run,
    state: State,
    log: MetricsLog,
    *,
    title: str = "",
    sample: Callable[[Run], list[list[str]]] = lambda run: continuations(run),
) -> Outcome:
    """Saves the tuned model, plots the metrics, and shows what the training changed."""
    log.close()
    o, folder = run.options, run.folder
    after, save = sample(run), run.saver()
    if run.accelerator.is_main_process:
        write_whole(folder / "model", save)
        settings = f"learning rate {o.learning_rate:g}, {run.per_step} {run.unit} a step"
        lines = read_metrics(folder / "metrics.jsonl")
        report.plot(lines, folder / "training.png", title=f"{title or o.recipe}: {settings}", samples=after)
        print()
        if run.held_out:
            print(report.before_after(state["before"], state["after"], count=f"{len(run.held_out)} {run.unit}"))
            print()
        print(report.samples(state["samples"], after))
        for label, name in {"model": "model", "metrics": "metrics.jsonl", "plot": "training.png"}.items():
            print(f"{label:<10}{folder / name}")
    run.accelerator.wait_for_everyone()
    return Outcome(state["before"], state["after"], folder / "model")


def continuations(run: Run) -> list[list[str]]:
    """[prompt, continuation] of two prompts. Every process calls this: under FSDP2 each holds a part of the model."""
    prompts = [item.prompt_ids for item in run.held_out or run.items]
    return report.continuations(run.bare_model, run.tokenizer, prompts)
