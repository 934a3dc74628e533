"""GRPO and its kin: tune a model on a reward without a critic; the completions of one prompt judge each other.

    A_i = (R_i - mean of the group's R) / their standard deviation
    loss: GRPO's, Dr. GRPO's, DAPO's, ..., over the tokens of completion i with advantage A_i    (losses/surrogates.py)

Shao et al. 2024, arXiv:2402.03300, eq. 3. With loss_type rloo the mean is that of the others in the group, undivided
(Ahmadian et al. 2024, arXiv:2402.14740, eq. 8); their KL counts in the reward: --kl_coef.

    fastpref grpo --model_name_or_path MODEL --dataset prompts.jsonl --reward_funcs my_rewards:brevity
    train(GRPOOptions(model_name_or_path=MODEL, dataset_name="prompts.jsonl", reward_funcs=[brevity]))

Option names and defaults are those of TRL's GRPOConfig, but for those that trainer/options.py names, scale_rewards
(what the loss's paper does) and lora_dropout (0). `max_length`, `kl_coef` and `kl_estimator` are ours. A step draws
per_device_train_batch_size * steps_per_generation completions a device and takes num_iterations passes over them. A
group whose rewards are equal has advantages of 0, and its tokens leave the head before its backward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastpref import linear_policy_loss
from fastpref.losses._protocol import resolve, trait
from fastpref.losses.kl import kl_estimator_named
from fastpref.losses.surrogates import POLICY_LOSSES, Rollout
from fastpref.trainer.collate import IGNORE_INDEX
from fastpref.trainer.command import run_command
from fastpref.trainer.config import name_of, option
from fastpref.trainer.forward import placed, tallied, through_head
from fastpref.trainer.metrics import Sums, Tally, merged
from fastpref.trainer.online import (
    OnlineOptions,
    RolloutLog,
    answers,
    draw,
    evaluate,
    facts_of,
    minibatches,
    open_online,
    sequences_of,
    update_roles,
)
from fastpref.trainer.options import check_ranges
from fastpref.trainer.rewards import Rewards
from fastpref.trainer.rollout import Sample
from fastpref.trainer.run import Outcome, Run, Update, after_step, begin, finish, steps_to_do
from fastpref.trainer.start import lean

UNSCALED = ("dr_grpo", "rloo", "reinforce")  # whose papers divide advantages by nothing


@dataclass(kw_only=True)
class GRPOOptions(OnlineOptions):
    recipe: ClassVar[str] = "grpo"

    output_dir: str = option("runs/grpo", "where model, metrics, rollouts, plot and checkpoints go")
    learning_rate: float = option(1e-6, "the optimizer's learning rate at its peak")
    disable_dropout: bool = option(False, "the model's own dropout is off, and so no difference to the reference")

    reward_model_name_or_path: str | None = option(None, "a trained reward model")
    num_generations: int = option(8, "completions of a prompt: a group")
    max_completion_length: int = option(512, "tokens of the longest completion")
    per_device_train_batch_size: int = option(8, "completions a device sees at once")
    steps_per_generation: int | None = option(
        None, "batches of completions drawn at once; none: gradient_accumulation_steps"
    )
    num_iterations: int = option(1, "passes over the completions of a step")

    loss_type: str | Callable[..., Tensor] = option(
        "dapo", "a policy loss: grpo, dr_grpo, dapo, bnpo, gspo, cispo, sapo, vespo, luspo, rloo, reinforce, ppo"
    )
    scale_rewards: bool | Literal["paper", "group", "batch", "none"] = option(
        "paper",
        "what divides advantages: the group's deviation (or true), the batch's, none (or false); paper: as the loss's",
    )
    epsilon: float | None = option(None, "the ratio counts within 1 - epsilon and 1 + epsilon_high; none: the loss's")
    epsilon_high: float | None = option(None, "none: epsilon, or the loss's own")
    delta: float | None = option(None, "a ratio counts up to this where the advantage is negative; none: without end")
    sapo_temperature_pos: float | None = option(None, "of loss_type sapo, where the advantage is positive; none: 1")
    sapo_temperature_neg: float | None = option(None, "of loss_type sapo, where it is negative; none: 1.05")
    vespo_k_pos: float | None = option(None, "of loss_type vespo: the power of the ratio, advantage positive; none: 2")
    vespo_k_neg: float | None = option(None, "the same where it is negative; none: 3")
    vespo_lambda_pos: float | None = option(None, "of loss_type vespo: the decay with it, advantage positive; none: 3")
    vespo_lambda_neg: float | None = option(None, "the same where it is negative; none: 2")
    importance_sampling_level: Literal["token", "sequence"] = option("token", "whose ratios: token or sequence")
    mask_truncated_completions: bool = option(False, "leave out completions that no stop token ended")
    use_bias_correction_kl: bool = option(True, "weigh the KL in the loss by the ratio")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in "max_completion_length num_iterations".split():
            if getattr(self, name) < 1:
                raise ValueError(f"grpo: {name} must be at least 1; got {getattr(self, name)}")
        if self.num_generations < 2:
            raise ValueError(f"grpo: num_generations must be at least 2, to be compared; got {self.num_generations}")
        if isinstance(self.scale_rewards, bool):  # as TRL takes it
            self.scale_rewards = "group" if self.scale_rewards else "none"
        terms = resolve("grpo", POLICY_LOSSES, self.loss_type, None, self.of_loss, given=())
        zero = torch.zeros(1)
        token = Rollout(zero, zero, zero, torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.long), 1)
        check_ranges("grpo", terms, POLICY_LOSSES.values(), zero, token)
        if self.batches % self.gradient_accumulation_steps:
            raise ValueError(
                "grpo: steps_per_generation must be a multiple of gradient_accumulation_steps; "
                f"got {self.steps_per_generation} and {self.gradient_accumulation_steps}"
            )

    @property
    def batches(self) -> int:
        """Batches of a device that are drawn at once."""
        return self.steps_per_generation or self.gradient_accumulation_steps

    def items_per_step(self, processes: int) -> int:
        completions = self.per_device_train_batch_size * self.batches * processes
        if completions % self.num_generations:
            raise ValueError(
                f"grpo: the completions of a step must be whole groups of {self.num_generations}; got {completions} = "
                f"{self.per_device_train_batch_size} a batch x {self.batches} batches x {processes} processes"
            )
        return completions // self.num_generations

    @property
    def updates(self) -> int:
        return self.num_iterations * self.batches // self.gradient_accumulation_steps

    @property
    def new_tokens(self) -> int:
        return self.max_completion_length

    @property
    def rollout_batch(self) -> int:
        return self.per_device_train_batch_size * self.batches

    @property
    def reward_model(self) -> str | None:
        return self.reward_model_name_or_path

    @property
    def of_loss(self) -> dict[str, float]:
        """The options of the loss that were given."""
        ours = ("epsilon", "delta", "sapo_", "vespo_")
        return {name: value for name, value in vars(self).items() if name.startswith(ours) and value is not None}

    @property
    def loss_name(self) -> str:
        return self.loss_type if isinstance(self.loss_type, str) else name_of(self.loss_type)

    @property
    def reduction(self) -> str:
        """Over what the loss is a mean: tokens (mean), completions, or a constant."""
        loss = POLICY_LOSSES[self.loss_type] if isinstance(self.loss_type, str) else self.loss_type
        return trait(loss, "reduction")


def main(argv: Sequence[str]) -> int:
    """`fastpref grpo ARGV...`."""
    return run_command(GRPOOptions, train, argv, description=__doc__ or "")


@lean
def train(options: GRPOOptions) -> Outcome:
    """Tunes the model and returns what that changed. Everything it leaves is in `output_dir`."""
    run, rewards = open_online(options)
    sample, held_out = partial(answers, rewards=rewards), partial(evaluate, rewards=rewards)
    state, log = begin(run, lambda _: {}, held_out, sample)
    rollouts = RolloutLog(run, rewards, state["step"])
    for step, indices in steps_to_do(run, state):
        wanted = [(i, k) for i in indices for k in range(options.num_generations)]
        samples = draw(run, rewards, run.items, wanted, step, partial(facts_of, run))
        batch, sums = judged(options, rewards, samples)
        done = several_updates(run, step, batch)
        rollouts(step, samples)
        tokens = sum(sample.n_tokens for sample in samples)
        done = done._replace(sums=merged(done.sums, {**rewards.logged, **sums}))
        after_step(run, state, log, step, done, held_out, tokens=tokens)
    return finish(run, state, log, title=options.loss_name, sample=sample)


@dataclass(frozen=True)
class Batch:
    """The completions of a step and their advantages (N,); of their tokens (N, L) each, 0 past the end."""

    samples: list[Sample]
    advantages: Tensor
    mask: Tensor  # a truncated completion may have none
    logps: Tensor
    ref_logps: Tensor | None


def judged(o: GRPOOptions, rewards: Rewards, samples: list[Sample]) -> tuple[Batch, Sums]:
    """The batch with its advantages, and the metrics of its completions."""
    logps, ref_logps = (
        pad_sequence([s.tokens[name] for s in samples], batch_first=True) if name in samples[0].tokens else None
        for name in ("logps", "ref_logps")
    )
    assert logps is not None
    lengths = torch.tensor([len(sample.ids) for sample in samples])
    stopped = torch.tensor([sample.stopped for sample in samples])
    mask = torch.arange(logps.shape[1]) < lengths[:, None]
    totals = rewards.totals(samples)
    kl = None if ref_logps is None else (logps - ref_logps).sum(1)
    if o.kl_coef and ref_logps is not None:
        estimate = kl_estimator_named(o.recipe, o.kl_estimator or "k1")
        totals = totals - o.kl_coef * torch.where(mask, estimate(logps, ref_logps), 0.0).sum(1)
    advantages, deviations = group_advantages(totals, o.num_generations, str(o.scale_rewards), o.loss_name)

    found = {"completions/mean_length": lengths.float(), "completions/clipped_ratio": 1 - stopped.float()}
    if kl is not None:
        found["objective/kl"] = kl
    each = torch.tensor([sample.rewards for sample in samples]).T
    found |= {"reward": totals, **{f"rewards/{k}/mean": v for k, v in zip(rewards.names, each, strict=True)}}
    sums = {name: [float(x.double().nansum()), float((~x.isnan()).sum())] for name, x in found.items()}
    sums["reward_std"] = [float(deviations.sum()), float(len(deviations))]
    sums["frac_reward_zero_std"] = [float((deviations < 1e-8).sum()), float(len(deviations))]
    if o.mask_truncated_completions:
        mask = mask & stopped[:, None]
    return Batch(samples, advantages, mask, logps, ref_logps), sums


def group_advantages(rewards: Tensor, group: int, scale: str, loss: str) -> tuple[Tensor, Tensor]:
    """((N,) advantages of N completions, group by group; (N / group,) standard deviations of the groups' rewards).

    A reward of NaN is left out of its group, and its advantage is 0.
    """
    known = ~rewards.view(-1, group).isnan()
    values = torch.where(known, rewards.view(-1, group), 0.0)
    count = known.sum(1, keepdim=True)
    apart = torch.where(known, values - values.sum(1, keepdim=True) / count.clamp(min=1), 0.0)
    deviations = (apart.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    advantages = apart
    if loss == "rloo":  # R - mean of the others = (R - mean of all) n / (n - 1)
        advantages = apart * count / (count - 1).clamp(min=1)
    if scale == "group" or (scale == "paper" and loss not in UNSCALED):
        advantages = advantages / (deviations + 1e-4)
    elif scale == "batch":
        every = rewards[~rewards.isnan()]
        advantages = advantages / ((every.std() if len(every) > 1 else 0.0) + 1e-4)
    return advantages.flatten(), deviations[:, 0]


def several_updates(run: Run, step: int, batch: Batch) -> Update:
    """The step's passes over its completions."""
    o, done, sums = run.options, None, Sums()
    parts = o.batches // o.gradient_accumulation_steps
    for minibatch in minibatches(len(batch.samples), o.num_iterations, parts, o.seed, step):
        items = int(batch.mask[minibatch].sum()) if o.reduction == "mean" else len(minibatch)
        done = update_roles(run, step, minibatch, partial(backward_of_batch, run, batch, max(items, 1)))
        sums = merged(sums, done.sums)
    assert done is not None
    return done._replace(sums=sums)


def backward_of_batch(run: Run, batch: Batch, num_items: int, indices: list[int], tally: Tally) -> None:
    """Adds the actor's gradient; num_items: tokens or completions of the minibatch, over all processes."""
    o, roles = run.options, run.bare_model
    samples = [batch.samples[i] for i in indices]
    counts = [len(sample.ids) for sample in samples]

    def in_place(values: Tensor | None, targets: Tensor) -> Tensor | None:
        return None if values is None else placed(values[indices].to(targets.device), counts, targets)

    def head(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        live, old_logps, ref_logps = (in_place(x, targets) for x in (batch.mask.float(), batch.logps, batch.ref_logps))
        assert live is not None
        out = linear_policy_loss(
            hidden,
            weight,
            torch.where(live != 0, targets, IGNORE_INDEX),
            advantages=batch.advantages[indices].to(hidden.device),
            old_logps=old_logps,
            loss_type=o.loss_type,
            importance_sampling_level=o.importance_sampling_level,
            ref_logps=ref_logps if o.beta else None,
            kl_coef=o.beta,
            kl_estimator=o.kl_estimator or "k3",
            use_bias_correction_kl=o.use_bias_correction_kl and o.beta > 0,
            entropy_coef=o.entropy_coef,
            temperature=o.temperature,
            num_items=num_items,
            max_length=o.max_completion_length if o.reduction == "constant" else None,
            **options,
            **o.of_loss,
        )
        # not the extremes, clip_ratio/low_min and high_max: the mean of those of some batches is no figure of the step
        return out.loss, {name: x for name, x in out.metrics.items() if not name.endswith(("_min", "_max"))}

    with roles.playing("actor"):
        (loss, metrics), aux_loss = through_head(run, roles, sequences_of(samples), head)
        tokens = int(batch.mask[indices].sum())  # 0 where all are masked
        items = tokens if o.reduction == "mean" else len(indices)
        weights = {"share": items / num_items, "weight": tokens, "items": items}
        run.accelerator.backward(tallied(run, tally, loss, metrics, aux_loss, **weights))
