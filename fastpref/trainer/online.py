"""What the online recipes share: options, samples of a step from every process, minibatches, an update of the roles."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch import Tensor

from fastpref import linear_logps
from fastpref.trainer.batches import my_batches
from fastpref.trainer.collate import IGNORE_INDEX, PromptAndCompletion
from fastpref.trainer.config import option
from fastpref.trainer.forward import through_head
from fastpref.trainer.metrics import Tally, merged, read_metrics
from fastpref.trainer.options import CausalOptions
from fastpref.trainer.packing import packs
from fastpref.trainer.prompts import Prompt, load_prompts
from fastpref.trainer.rewards import Rewards, text_of
from fastpref.trainer.roles import Roles, is_adapter_of
from fastpref.trainer.rollout import (
    Sample,
    Sampling,
    batches,
    check_sampling,
    drawn,
    score_tokens,
    seed_of,
    stop_ids_of,
)
from fastpref.trainer.run import Metrics, Run, State, Update, open_run, take
from fastpref.trainer.start import causal_lm, padding_id

SHOWN = 2  # rollouts in the report, and a line of metrics' worth of rollouts.jsonl


@dataclass(kw_only=True)
class OnlineOptions(CausalOptions):
    test_split_size: float = option(0.0, "prompts held out where there is no held-out split; below 1, a fraction")
    lora_dropout: float = option(0.0, "dropout before the adapter; above 0 the first ratios are not 1")

    reward_funcs: list[str | Callable[..., Any]] | None = option(
        None, "rewards: module:function, with TRL's signature, or folders of reward models; their sum counts"
    )
    reward_weights: list[float] | None = option(None, "weights of several rewards; none: 1 each")
    temperature: float = option(1.0, "of sampling, and of all log-probabilities")
    top_p: float = option(1.0, "draw from the likeliest tokens that together have this probability")
    top_k: int = option(0, "draw from so many of the likeliest tokens; 0: all")
    min_p: float | None = option(None, "draw from tokens at least this times as likely as the likeliest; none: all")
    beta: float = option(0.0, "weight of the KL to the reference in the loss")
    kl_coef: float = option(0.0, "weight of the KL to the reference in the reward; one of the two is 0")
    kl_estimator: Literal["k1", "k2", "k3"] | None = option(None, "none: k1 in the reward, k3 in the loss")
    entropy_coef: float = option(0.0, "weight of the policy's entropy in the loss: a bonus")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sampling(self.recipe, self.temperature, self.top_p, self.top_k, self.min_p)
        if min(self.beta, self.kl_coef) < 0 or (self.beta and self.kl_coef):
            raise ValueError(
                f"{self.recipe}: the KL counts in the loss (beta) or in the reward (kl_coef), not in both, and neither "
                f"is below 0; got beta {self.beta} and kl_coef {self.kl_coef}"
            )

    @property
    def rollout_batch(self) -> int:
        """Completions a device draws or scores at once."""
        raise NotImplementedError

    @property
    def updates(self) -> int:
        """Optimizer updates a step."""
        raise NotImplementedError

    @property
    def has_critic(self) -> bool:
        return False

    @property
    def has_reference(self) -> bool:
        return self.beta > 0 or self.kl_coef > 0

    @property
    def reward_model(self) -> str | None:
        """A reward model's folder or hub name."""
        return None

    def stop_ids(self, tokenizer: Any, model: Any) -> tuple[int, ...]:
        """The tokens that end a completion."""
        return stop_ids_of(tokenizer, model)


def open_online(options: OnlineOptions) -> tuple[Run, Rewards]:
    """The run, whose model is its Roles, and its rewards."""
    load = partial(load_prompts, new_tokens=options.new_tokens)
    run = open_run(options, unit="prompts", load=load, build=roles_of, updates=options.updates, ddp=False)
    o, sources = options, list[Any](options.reward_funcs or [])
    if o.reward_model is not None:
        shared = "reward" in run.bare_model.heads
        sources.insert(0, ("reward_model", partial(shared_scores, run)) if shared else o.reward_model)
    rewards = Rewards(sources, o.reward_weights, run.tokenizer, run.accelerator.device, o.rollout_batch)
    rewards.trainer_state.max_steps = run.steps
    return run, rewards


def roles_of(options: OnlineOptions, name: str, resumed: Path | None) -> Roles:
    """The roles of a run, as the checkpoint left them if there is one."""
    o, reward = options, None
    if o.use_peft and o.reward_model is not None and is_adapter_of(o.reward_model, name):
        reward = o.reward_model
    reference = causal_lm(o, name, None) if o.has_reference and not o.use_peft else None
    roles = Roles(causal_lm(o, name, resumed), critic=o.has_critic, reference=reference, reward=reward)
    if resumed and o.has_critic:
        roles.load_critic(resumed)
    return roles


@torch.no_grad()
def shared_scores(run: Run, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> list[float]:
    """The reward adapter's score of each sample, where AutoModelForSequenceClassification reads it."""
    found, pad = [0.0] * len(samples), sampling(run).pad_id

    def last_of(sample: Sample) -> int:
        # the last token that is not the padding's, which where EOS pads is the one before EOS
        return max(t for t, token in enumerate(sample.prompt_ids + sample.ids) if token != pad)

    with run.bare_model.playing("reward"):
        for batch in batches(range(len(samples)), run.options.rollout_batch, lambda i: samples[i].n_tokens):
            last = torch.tensor([last_of(samples[i]) for i in batch], device=run.accelerator.device)

            def head(hidden: Tensor, *_: Any, rows: Tensor | None = None, last: Tensor = last, **places: Any) -> Tensor:
                if rows is None:
                    return run.bare_model.apply_head(hidden[torch.arange(len(last), device=last.device), last])
                # the first token of each predicts its first target
                return run.bare_model.apply_head(hidden[rows[places["cu_seqlens"][:-1].long()] + last])

            read: list[PromptAndCompletion] = [([], samples[i].prompt_ids + samples[i].ids) for i in batch]
            scores = through_head(run, run.bare_model, read, head)[0]
            for i, score in zip(batch, scores.tolist(), strict=True):
                found[i] = score
    return found


def sequences_of(samples: Sequence[Sample]) -> list[PromptAndCompletion]:
    return [(sample.prompt_ids, sample.ids) for sample in samples]


def sampling(run: Run) -> Sampling:
    o, tokenizer = run.options, run.tokenizer
    own: dict[str, Any] = {"top_p": o.top_p, "top_k": o.top_k, "min_p": o.min_p}
    stop = o.stop_ids(tokenizer, run.bare_model.actor)
    return Sampling(o.new_tokens, o.temperature, stop, padding_id(tokenizer), o.rollout_batch, **own)


def draw(
    run: Run,
    rewards: Rewards,
    prompts: Sequence[Prompt],
    wanted: Sequence[tuple[int, int]],
    step: int,
    facts: Callable[[list[Sample]], dict[str, Tensor]],
) -> list[Sample]:
    """The step's samples, of all processes and on each of them, in the order in which they are wanted.

    Args:
        wanted: (index of a prompt, how many of its completions come before).
        step: the number of the training step; 0: for held-out metrics or to be read.
        facts: what to keep of the tokens, as `score_tokens` takes it.
    """
    accelerator, how = run.accelerator, sampling(run)
    if step:
        rewards.trainer_state.global_step = step - 1
    mine = list(wanted)[accelerator.process_index :: accelerator.num_processes]
    run.bare_model.eval()
    with accelerator.autocast():
        samples = drawn(run.bare_model.actor, prompts, mine, how, run.options.seed, step)
    score_tokens(samples, how.batch_size, facts, keep_order=packs(run.bare_model))
    rewards([prompts[i] for i, _ in mine], samples)
    rewards.logged = reduce(merged, gather_object([rewards.logged]))
    found = dict(zip(gather_object(mine), gather_object(samples), strict=True))
    return [found[one] for one in wanted]


def logps_of(run: Run, role: str, samples: list[Sample]) -> Tensor:
    """(M,) log-probabilities of the samples' tokens under the actor or the reference, at the rollout's temperature."""

    def head(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
        logps = linear_logps(hidden, weight, targets, temperature=run.options.temperature, **options)
        return logps[targets != IGNORE_INDEX]

    with run.bare_model.playing(role):
        return through_head(run, run.bare_model, sequences_of(samples), head)[0]


def values_of(run: Run, samples: list[Sample]) -> Tensor:
    """(M,) the critic's V before each of the samples' tokens."""
    with run.bare_model.playing("critic"):
        return through_head(run, run.bare_model, sequences_of(samples), partial(of_states, run))[0]


def of_states(run: Run, hidden: Tensor, _: Tensor, targets: Tensor, *, rows: Tensor | None = None, **__: Any) -> Tensor:
    """(M,) what the playing role's head makes of the states that predict the M targets; a head for `through_head`."""
    return run.bare_model.apply_head(hidden[targets != IGNORE_INDEX] if rows is None else hidden[rows])


def minibatches(n: int, epochs: int, parts: int, *seed: int) -> Iterator[list[int]]:
    """The indices of n samples, in `parts` minibatches an epoch, in another order each epoch."""
    for epoch in range(epochs):
        order = random.Random(seed_of(*seed, epoch)).sample(range(n), n)
        for part in range(parts):
            yield order[part * n // parts : (part + 1) * n // parts]


def update_roles(run: Run, step: int, minibatch: Sequence[int], backward: Callable[[list[int], Tally], None]) -> Update:
    """One optimizer update on a minibatch of all processes.

    backward: given a batch and a tally for its metrics, "loss" among them, adds to the gradients of the roles.
    """
    run.bare_model.train()
    if run.bare_model.shared:  # small; made among the activations each would split a hole that the next role needs
        for weight in run.bare_model.trained:
            weight.grad = torch.zeros_like(weight)
    tally = Tally()
    share = -(-len(minibatch) // run.accelerator.num_processes)
    # those of a prompt together, to share it; which batch of an update a sample is in does not matter
    for batch, _ in my_batches(run.accelerator, sorted(minibatch), min(share, run.options.per_device_train_batch_size)):
        backward(batch, tally)
    if run.accelerator.num_processes > 1:
        # by hand: DDP counts on one forward and one backward of all that it wraps, and here two roles take turns
        for weight in run.bare_model.trained:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            dist.all_reduce(weight.grad)
    return take(run, step, tally)


def evaluate(run: Run, _: State, rewards: Rewards) -> Metrics:
    """Means over the held-out prompts of reward, length and KL, each prompt completed with the same random numbers."""
    wanted = [(i, 0) for i in range(len(run.held_out))]
    samples = draw(run, rewards, run.held_out, wanted, 0, partial(facts_of, run))
    found: Metrics = {"eval_reward": float(rewards.totals(samples).nanmean())}
    found["eval_completions/mean_length"] = sum(len(sample.ids) for sample in samples) / len(samples)
    if run.options.has_reference:
        found["eval_kl"] = sum(float((s.tokens["logps"] - s.tokens["ref_logps"]).sum()) for s in samples) / len(samples)
    return found


def facts_of(run: Run, samples: list[Sample]) -> dict[str, Tensor]:
    """What a step keeps of its samples' tokens: logps, those of the reference, and values, where the run has them."""
    found = {"logps": logps_of(run, "actor", samples)}
    if run.options.has_reference:
        found["ref_logps"] = logps_of(run, "reference", samples)
    if run.options.has_critic:
        found["values"] = values_of(run, samples)
    return found


def answers(run: Run, rewards: Rewards) -> list[list[str]]:
    """[prompt, completion and its reward] of two prompts, for the report; every process may call it."""
    prompts = (run.held_out or run.items)[:SHOWN]
    samples = draw(run, rewards, prompts, [(i, 0) for i in range(len(prompts))], 0, lambda some: {})
    totals = rewards.totals(samples).tolist()
    return [
        [str(run.tokenizer.decode(sample.prompt_ids, skip_special_tokens=True)), f"{text} [reward {total:.3g}]"]
        for sample, text, total in zip(samples, (text_of(run.tokenizer, s) for s in samples), totals, strict=True)
    ]


class RolloutLog:
    """`rollouts.jsonl`: prompts, completions and rewards to read, a few at each line of metrics."""

    def __init__(self, run: Run, rewards: Rewards, keep_through: int) -> None:
        """Keeps what there is through this step: what came later happens again."""
        self._run, self._rewards, self.path = run, rewards, run.folder / "rollouts.jsonl"
        if run.accelerator.is_main_process:
            there = read_metrics(self.path) if keep_through and self.path.exists() else []
            kept = [json.dumps(line) + "\n" for line in there if line["step"] <= keep_through]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(kept), encoding="utf-8")

    def __call__(self, step: int, samples: Sequence[Sample]) -> None:
        """Every process may call it; the main one writes."""
        o, main = self._run.options, self._run.accelerator.is_main_process
        if not main or (step % o.logging_steps and step != self._run.steps):
            return
        some = samples[:SHOWN]
        with self.path.open("a", encoding="utf-8") as file:
            for sample, total in zip(some, self._rewards.totals(some).tolist(), strict=True):
                line = {"step": step, "prompt": self._run.tokenizer.decode(sample.prompt_ids)}
                line |= {"completion": self._run.tokenizer.decode(sample.ids), "reward": total}
                each = dict(zip(self._rewards.names, sample.rewards, strict=True)) if len(sample.rewards) > 1 else {}
                file.write(json.dumps(line | ({"rewards": each} if each else {}), ensure_ascii=False) + "\n")
