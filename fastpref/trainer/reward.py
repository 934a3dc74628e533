"""Reward model: a score for an answer, learned from which of two was preferred.

    loss = -log sigmoid(r(chosen) - r(rejected) - margin) + center_rewards_coefficient (r(chosen) + r(rejected))^2

Bradley-Terry, as in Ouyang et al. 2022, arXiv:2203.02155, eq. 1 (fastpref.reward_loss has the other sources). r is a
linear head on the last token of prompt + answer: transformers' AutoModelForSequenceClassification with one label, which
the saved model loads in.

    fastpref reward --model_name_or_path MODEL --dataset pairs.jsonl
    train(RewardOptions(model_name_or_path=MODEL, dataset_name="pairs.jsonl"))

Option names and defaults are those of TRL's RewardConfig, but for those that trainer/options.py names. The extremes
that are logged are means over batches, as TRL's are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from fastpref import reward_loss
from fastpref.trainer.batches import my_batches, of_all
from fastpref.trainer.collate import collate
from fastpref.trainer.command import run_command
from fastpref.trainer.config import option
from fastpref.trainer.data import Pair, pair_columns, sequences_of, tokenize_pairs
from fastpref.trainer.demo import demo_pairs
from fastpref.trainer.metrics import Tally, means
from fastpref.trainer.options import TrainOptions
from fastpref.trainer.pretrained import from_pretrained
from fastpref.trainer.run import Metrics, Outcome, Run, State, after_step, begin, finish, open_run, steps_to_do, update
from fastpref.trainer.start import lean, load_items, load_model, padding_id


@dataclass(kw_only=True)
class RewardOptions(TrainOptions):
    recipe: ClassVar[str] = "reward"

    max_length: int | None = option(1024, "pairs with a longer sequence are left out; none: no limit")
    output_dir: str = option("runs/reward", "where model, metrics, plot and checkpoints go")
    learning_rate: float = option(1e-4, "the optimizer's learning rate at its peak")

    center_rewards_coefficient: float | None = option(
        None, "weight of (r(chosen) + r(rejected))^2, which keeps rewards around 0; 0.01 is usual; none: 0"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= (self.center_rewards_coefficient or 0) < float("inf"):
            got = self.center_rewards_coefficient
            raise ValueError(f"reward: center_rewards_coefficient must be 0 or more; got {got}")


def main(argv: Sequence[str]) -> int:
    """`fastpref reward ARGV...`."""
    demo = {"learning_rate": 2e-5, "test_split_size": 128}
    return run_command(RewardOptions, train, argv, description=__doc__ or "", demo=demo)


@lean
def train(options: RewardOptions) -> Outcome:
    """Tunes the model and returns what that changed. Everything it leaves is in `output_dir`."""
    run = open_run(options, unit="pairs", load=load_pairs, build=scorer)
    state, log = begin(run, lambda run: {}, evaluate, scored_answers)
    for step, indices in steps_to_do(run, state):
        batches = my_batches(run.accelerator, indices, options.per_device_train_batch_size)
        loss = partial(loss_of_batch, run, run.model, run.items, num_items=len(indices))
        done = update(run, step, batches, loss)
        after_step(run, state, log, step, done, evaluate, tokens=sum(run.items[i].n_tokens for i in indices))
    return finish(run, state, log, sample=scored_answers)


def load_pairs(
    options: RewardOptions, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]
) -> tuple[list[Pair], list[Pair]]:
    """(pairs to train on, held-out pairs) as token ids; what was dropped is said."""
    return load_items(
        options,
        say,
        columns=pair_columns,
        tokenize=partial(tokenize_pairs, tokenizer=tokenizer, max_length=options.max_length, too_long="drop"),
        demo=lambda held_out: demo_pairs(seed=options.seed, held_out=held_out),
    )


def scorer(options: RewardOptions, name: str, resumed: Path | None) -> Any:
    """The model with a head of one number; without a score head in its checkpoint, a random one."""
    pad = padding_id(from_pretrained(AutoTokenizer, name, options.recipe, trust_remote_code=options.trust_remote_code))
    auto = AutoModelForSequenceClassification
    model = load_model(auto, options, name, resumed, task="SEQ_CLS", num_labels=1, pad_token_id=pad)
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{options.recipe}: the model must read prompt and answer as one text; {name} has a decoder apart"
        )
    return model


def scores(run: Run, model: Any, pairs: Sequence[Pair]) -> Tensor:
    """(2B,) rewards of B pairs: the chosen, then the rejected."""
    batch = collate(sequences_of(pairs), padding_id(run.tokenizer))
    inputs = {name: batch[name].to(run.accelerator.device) for name in ("input_ids", "attention_mask")}
    return model(**inputs, use_cache=False).logits.squeeze(-1).float()


def loss_of_batch(
    run: Run, model: Any, pairs: list[Pair], batch: list[int], tally: Tally, num_items: int | None = None
) -> Tensor:
    """The loss of the pairs at `batch`: their sum over num_items, or without it their mean."""
    these = [pairs[i] for i in batch]
    rewards = scores(run, model, these)
    chosen, rejected = rewards.chunk(2)
    margin = rewards.new_tensor([pair.margin or 0.0 for pair in these])
    losses = reward_loss(chosen, rejected, margin=margin, center_coef=run.options.center_rewards_coefficient or 0.0)
    tally.add(
        {
            "loss": losses.mean(),
            "accuracy": (chosen > rejected).float().mean(),
            "margin": (chosen - rejected).mean(),
            "mean_reward": rewards.mean(),
            "min_reward": rewards.min(),
            "max_reward": rewards.max(),
        },
        len(batch),
    )
    return losses.sum() / (num_items or len(batch))


@torch.no_grad()
def evaluate(run: Run, state: State) -> Metrics:
    """Mean metrics of the held-out pairs, named eval_...."""

    def score(batch: list[int], tally: Tally) -> Tensor:
        return loss_of_batch(run, run.bare_model, run.held_out, batch, tally).expand(len(batch))

    run.model.eval()
    size = run.options.per_device_eval_batch_size
    _, sums = of_all(run.accelerator, run.held_out, range(len(run.held_out)), size, score, "held out")
    return {f"eval_{name}": mean for name, mean in means(sums).items()}


@torch.no_grad()
def scored_answers(run: Run) -> list[list[str]]:
    """[prompt, its two answers with their rewards] of two pairs, for the report."""
    run.model.eval()
    pairs = (run.held_out or run.items)[:2]
    rewards = scores(run, run.bare_model, pairs).tolist()
    found = []
    for pair, chosen, rejected in zip(pairs, rewards[: len(pairs)], rewards[len(pairs) :], strict=True):
        prompt, *answers = (
            str(run.tokenizer.decode(ids, skip_special_tokens=True))
            for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
        )
        found.append([prompt, f"{chosen:+.2f} {answers[0]} | {rejected:+.2f} {answers[1]}"])
    return found
