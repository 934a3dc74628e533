"""PPO: tune a model on a reward, by sampling, judging and small clipped steps.

Each step draws a completion of every prompt of its batch, and then takes several small steps on them:

    R_t = -kl_coef (log pi(y_t) - log pi_ref(y_t)), and at the last token the reward besides
    A_t by GAE from R_t and the critic's V_t, whitened over the batch
    loss = -min(r A, clip(r, 1 - e, 1 + e) A) + vf_coef 0.5 max((V - G)^2, (clip(V) - G)^2),   r = pi / pi_old

Schulman et al. 2017, arXiv:1707.06347; on language models Ziegler et al. 2019, arXiv:1909.08593, Stiennon et al. 2020,
arXiv:2009.01325. Actor, critic, reward and reference share one frozen base under LoRA (trainer/roles.py).

    fastpref ppo --model_name_or_path MODEL --dataset prompts.jsonl --reward_model_path REWARD
    train(PPOOptions(model_name_or_path=MODEL, dataset_name="prompts.jsonl", reward_funcs=["my_rewards:brevity"]))

Option names and defaults are those TRL's PPOConfig had (1.9 was the last with PPO), but for use_peft (on here),
stop_token (eos here: a completion ends where the model ends it), bf16 (off here), target_kl, adaptive_kl_target and
adaptive_kl_horizon, which are ours. A step is one batch of completions, of num_ppo_epochs * num_mini_batches updates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastpref import (
    AdaptiveKL,
    gae,
    linear_policy_loss,
    masked_whiten,
    shape_rewards,
    update_kl_coef,
    value_loss,
)
from fastpref.trainer.collate import IGNORE_INDEX
from fastpref.trainer.command import run_command
from fastpref.trainer.config import option
from fastpref.trainer.forward import placed, tallied, through_head
from fastpref.trainer.metrics import Sums, Tally, means, merged
from fastpref.trainer.online import (
    OnlineOptions,
    RolloutLog,
    answers,
    draw,
    evaluate,
    facts_of,
    minibatches,
    of_states,
    open_online,
    sequences_of,
    update_roles,
)
from fastpref.trainer.rollout import Sample
from fastpref.trainer.run import Outcome, Run, State, Update, after_step, begin, finish, steps_to_do
from fastpref.trainer.start import lean


@dataclass(kw_only=True)
class PPOOptions(OnlineOptions):
    recipe: ClassVar[str] = "ppo"

    output_dir: str = option("runs/ppo", "where model, metrics, rollouts, plot and checkpoints go")
    use_peft: bool = option(True, "four roles as LoRA adapters on one base; false: every role a model of its own")

    reward_model_path: str | None = option(None, "a trained reward model; its LoRA adapter shares the base")
    response_length: int = option(53, "tokens of the longest completion")
    temperature: float = option(0.7, "of sampling, and of all log-probabilities")
    stop_token: Literal["eos"] | None = option("eos", "eos ends a completion; none: it always has response_length")
    stop_token_id: int | None = option(None, "a token that ends it in place of eos")
    missing_eos_penalty: float | None = option(None, "taken from the reward of a completion that no stop token ended")
    local_rollout_forward_batch_size: int = option(64, "completions a device draws or scores at once")

    num_ppo_epochs: int = option(4, "passes over the completions of a step")
    num_mini_batches: int = option(1, "optimizer updates a pass")
    kl_coef: float = option(0.05, "weight of the KL to the reference in the reward")
    adaptive_kl_target: float | None = option(None, "kl_coef is steered so that a completion's KL is this, nats")
    adaptive_kl_horizon: int = option(10_000, "completions in which it would change by a factor of e^0.2 at most")
    target_kl: float | None = option(None, "a step ends early once half the mean squared log-ratio exceeds 1.5 of it")
    whiten_rewards: bool = option(False, "scale the rewards of a batch to a deviation of 1 around their own mean")
    gamma: float = option(1.0, "discount of later rewards")
    lam: float = option(0.95, "GAE's lambda")
    cliprange: float = option(0.2, "the ratio counts within 1 +- this")
    vf_coef: float = option(0.1, "weight of the critic's loss")
    cliprange_value: float = option(0.2, "V counts within +- this of what it was when the completions were drawn")

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = "response_length local_rollout_forward_batch_size num_ppo_epochs num_mini_batches adaptive_kl_horizon"
        for name in counts.split():
            if getattr(self, name) < 1:
                raise ValueError(f"ppo: {name} must be at least 1; got {getattr(self, name)}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"ppo: {name} must be in [0, 1]; got {getattr(self, name)}")
        for name in ("cliprange", "cliprange_value", "vf_coef"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"ppo: {name} must be 0 or more; got {getattr(self, name)}")
        for name in ("missing_eos_penalty", "target_kl"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"ppo: {name} must be above 0; got {getattr(self, name)}")
        if self.adaptive_kl_target is not None and not (self.adaptive_kl_target > 0 and self.kl_coef > 0):
            raise ValueError(
                "ppo: adaptive_kl_target steers kl_coef, and both must be above 0; "
                f"got {self.adaptive_kl_target} and {self.kl_coef}"
            )
        if self.missing_eos_penalty is not None and not self.stop_token and self.stop_token_id is None:
            raise ValueError("ppo: missing_eos_penalty needs a stop token; got stop_token none and no stop_token_id")

    def items_per_step(self, processes: int) -> int:
        completions = super().items_per_step(processes)
        if self.num_mini_batches > completions:
            raise ValueError(
                f"ppo: num_mini_batches must be at most the completions of a step, {completions}; "
                f"got {self.num_mini_batches}"
            )
        return completions

    @property
    def new_tokens(self) -> int:
        return self.response_length

    @property
    def rollout_batch(self) -> int:
        return self.local_rollout_forward_batch_size

    @property
    def updates(self) -> int:
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def has_critic(self) -> bool:
        return True

    @property
    def has_reference(self) -> bool:
        return True  # its KL is what one watches, whether it counts or not

    @property
    def reward_model(self) -> str | None:
        return self.reward_model_path

    def stop_ids(self, tokenizer: Any, model: Any) -> tuple[int, ...]:
        if self.stop_token_id is not None:
            return (self.stop_token_id,)
        return super().stop_ids(tokenizer, model) if self.stop_token else ()


def main(argv: Sequence[str]) -> int:
    """`fastpref ppo ARGV...`."""
    return run_command(PPOOptions, train, argv, description=__doc__ or "")


@lean
def train(options: PPOOptions) -> Outcome:
    """Tunes the model and returns what that changed. Everything it leaves is in `output_dir`."""
    run, rewards = open_online(options)
    sample, held_out = partial(answers, rewards=rewards), partial(evaluate, rewards=rewards)
    state, log = begin(run, lambda _: {"kl_coef": options.kl_coef}, held_out, sample)
    rollouts = RolloutLog(run, rewards, state["step"])
    for step, indices in steps_to_do(run, state):
        samples = draw(run, rewards, run.items, [(i, 0) for i in indices], step, partial(facts_of, run))
        batch, sums = judged(options, rewards.totals(samples), samples, state)
        done = several_updates(run, step, batch)
        rollouts(step, samples)
        tokens = sum(sample.n_tokens for sample in samples)
        done = done._replace(sums=merged(done.sums, {**rewards.logged, **sums}))
        after_step(run, state, log, step, done, held_out, tokens=tokens)
    return finish(run, state, log, sample=sample)


@dataclass(frozen=True)
class Batch:
    """The completions of a step, and what the updates need of their tokens: (N, L) each, on the CPU, 0 past the end."""

    samples: list[Sample]
    mask: Tensor
    logps: Tensor
    ref_logps: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


def judged(o: PPOOptions, scores: Tensor, samples: list[Sample], state: State) -> tuple[Batch, Sums]:
    """The batch with its advantages, and the metrics of its completions; `state["kl_coef"]` is steered."""
    if scores.isnan().any():
        raise ValueError("ppo: every completion needs a reward; a reward function could not tell one's")
    stopped = torch.tensor([sample.stopped for sample in samples])
    if o.missing_eos_penalty is not None:
        scores = torch.where(stopped, scores, scores - o.missing_eos_penalty)
    names = ("logps", "ref_logps", "values")
    logps, ref_logps, values = (pad_sequence([s.tokens[n] for s in samples], batch_first=True) for n in names)
    lengths = torch.tensor([len(sample.ids) for sample in samples])
    mask = torch.arange(logps.shape[1]) < lengths[:, None]

    how = {"kl_coef": state["kl_coef"], "kl_estimator": o.kl_estimator or "k1"}
    rewards = shape_rewards(scores, logps, ref_logps, mask, **how)
    non_score = rewards.sum(1) - scores
    if o.whiten_rewards:  # (r - mean) / deviation + mean, as TRL has it: the mean stays, a reward's sign may not
        mean = rewards[mask].mean()
        rewards = torch.where(mask, masked_whiten(rewards, mask) + mean, 0.0)
    advantages, returns = gae(rewards, values, mask=mask, gamma=o.gamma, lam=o.lam, whiten=True)

    kl = (logps - ref_logps).sum(1)
    found = {
        "objective/kl": kl,
        "objective/entropy": -logps.sum(1),
        "objective/non_score_reward": non_score,
        "objective/rlhf_reward": non_score + scores,
        "objective/scores": scores,
        "completions/mean_length": lengths.float(),
    }
    n = len(samples)
    sums = {name: [float(values.double().sum()), float(n)] for name, values in found.items()}
    sums["val/num_eos_tokens"] = [float(stopped.sum()), 1.0]
    sums["objective/kl_coef"] = [state["kl_coef"], 1.0]
    if o.adaptive_kl_target is not None:
        controller = AdaptiveKL(state["kl_coef"], o.adaptive_kl_target, gain=n / o.adaptive_kl_horizon)
        state["kl_coef"] = update_kl_coef(controller, float(kl.mean())).coef
    return Batch(samples, mask, logps, ref_logps, values, advantages, returns), sums


def several_updates(run: Run, step: int, batch: Batch) -> Update:
    """The step's passes over its completions, fewer where target_kl ends it; the schedule goes on as if none had."""
    o, sums, ratios = run.options, Sums(), []
    parts = minibatches(len(batch.samples), o.num_ppo_epochs, o.num_mini_batches, o.seed, step)
    for minibatch in parts:
        backward = partial(backward_of_batch, run, batch, int(batch.mask[minibatch].sum()))
        done = update_roles(run, step, minibatch, backward)
        sums = merged(sums, done.sums)
        if not done.sums:  # left out, as it was not finite
            continue
        ratios.append(means(done.sums)["val/ratio"])
        if o.target_kl is not None and means(done.sums)["policy/approxkl_avg"] > 1.5 * o.target_kl:
            break
    for _ in parts:  # those that were left out
        run.scheduler.step()
    sums["val/ratio_var"] = [float(torch.tensor(ratios).var()) if len(ratios) > 1 else 0.0, 1.0]
    sums["val/num_updates"] = [float(len(ratios)), 1.0]
    return done._replace(sums=sums)


def backward_of_batch(run: Run, batch: Batch, num_items: int, indices: list[int], tally: Tally) -> None:
    """Adds the gradients of actor and critic; num_items: tokens of the minibatch, over all processes."""
    o, roles = run.options, run.bare_model
    sequences = sequences_of([batch.samples[i] for i in indices])
    counts = batch.mask[indices].sum(1).tolist()
    weight, share = sum(counts), sum(counts) / num_items

    def in_place(values: Tensor, targets: Tensor) -> Tensor:
        return placed(values[indices].to(targets.device), counts, targets)

    def policy(hidden: Tensor, head: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        old_logps, live = in_place(batch.logps, targets), targets != IGNORE_INDEX
        out = linear_policy_loss(
            hidden,
            head,
            targets,
            advantages=in_place(batch.advantages, targets),
            old_logps=old_logps,
            epsilon=o.cliprange,
            ref_logps=in_place(batch.ref_logps, targets) if o.beta else None,
            kl_coef=o.beta,
            kl_estimator=o.kl_estimator or "k3",
            entropy_coef=o.entropy_coef,
            temperature=o.temperature,
            num_items=num_items,
            **options,
        )
        ratio = torch.where(live, (out.logps.detach() - old_logps).exp(), 0.0).sum() / live.sum()
        metrics = {
            "loss/policy_avg": out.loss.detach() / share,
            "policy/approxkl_avg": out.metrics["policy/approxkl_avg"],
            "policy/clipfrac_avg": out.metrics["clip_ratio/region_mean"],
            "policy/entropy_avg": out.metrics["entropy"],
            "val/ratio": ratio,
        }
        return out.loss, metrics

    def value(hidden: Tensor, head: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        values = of_states(run, hidden, head, targets, **options)
        old, returns = (x[indices][batch.mask[indices]].to(values.device) for x in (batch.values, batch.returns))
        every = torch.ones_like(values)
        return value_loss(values, old, returns, every, epsilon=o.cliprange_value, num_items=num_items)

    with roles.playing("actor"):
        (loss, metrics), aux_loss = through_head(run, roles, sequences, policy)
        run.accelerator.backward(tallied(run, tally, loss, metrics, aux_loss, share=share, weight=weight))
    with roles.playing("critic"):
        loss, clipped = through_head(run, roles, sequences, value)[0]
        run.accelerator.backward(o.vf_coef * loss)
    tally.add({"loss/value_avg": loss.detach() / share, "val/clipfrac_avg": clipped}, weight)
