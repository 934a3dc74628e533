"""SFT: teach a model to answer as the examples do.

    loss = -mean over completion tokens of log p(token | what came before)

The mean is over the tokens of the whole optimizer step, all processes and accumulated batches together. The logits are
never stored: the fused head works inside the model's own forward.

    fastpref sft --model_name_or_path MODEL --dataset examples.jsonl
    train(SFTOptions(model_name_or_path=MODEL, dataset_name="examples.jsonl"))

Option names and defaults are those of TRL's SFTConfig, but for those that trainer/options.py names and
`label_smoothing` and `disable_dropout`, which are ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastpref import linear_cross_entropy
from fastpref.trainer.batches import my_batches, of_all
from fastpref.trainer.collate import IGNORE_INDEX, PromptAndCompletion
from fastpref.trainer.command import run_command
from fastpref.trainer.config import option
from fastpref.trainer.demo import demo_pairs
from fastpref.trainer.encode import scored
from fastpref.trainer.examples import Example, example_columns, tokenize_examples
from fastpref.trainer.forward import tallied, through_head
from fastpref.trainer.metrics import Tally, means
from fastpref.trainer.options import CausalOptions
from fastpref.trainer.run import Metrics, Outcome, Run, State, after_step, begin, finish, open_run, steps_to_do, update
from fastpref.trainer.start import lean, load_items


@dataclass(kw_only=True)
class SFTOptions(CausalOptions):
    recipe: ClassVar[str] = "sft"

    output_dir: str = option("runs/sft", "where model, metrics, plot and checkpoints go")
    learning_rate: float = option(2e-5, "the optimizer's learning rate at its peak")
    disable_dropout: bool = option(False, "the model's own dropout is off")

    completion_only_loss: bool | None = option(
        None, "false: learn prompts too; true: rows must have a completion; none: completions where there are any"
    )
    assistant_only_loss: bool = option(
        False, "of conversations, learn what the assistant says: the chat template must mark it (generation)"
    )
    dataset_text_field: str = option("text", "the column of plain text")
    label_smoothing: float = option(0.0, "share of probability spread evenly over the vocabulary, in [0, 1)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"sft: label_smoothing must be in [0, 1); got {self.label_smoothing}")


def main(argv: Sequence[str]) -> int:
    """`fastpref sft ARGV...`."""
    return run_command(SFTOptions, train, argv, description=__doc__ or "", demo={"learning_rate": 5e-5})


@lean
def train(options: SFTOptions) -> Outcome:
    """Tunes the model and returns what that changed. Everything it leaves is in `output_dir`."""
    run = open_run(options, unit="examples", load=load_examples)
    state, log = begin(run, lambda run: {}, evaluate)
    for step, indices in steps_to_do(run, state):
        batches = my_batches(run.accelerator, indices, options.per_device_train_batch_size)
        num_items = sum(tokens_to_learn(options, run.items[i]) for i in indices)
        loss = partial(loss_of_batch, run, run.model, run.items, num_items=num_items)
        done = update(run, step, batches, loss)
        after_step(run, state, log, step, done, evaluate, tokens=sum(run.items[i].n_tokens for i in indices))
    return finish(run, state, log)


def load_examples(
    options: SFTOptions, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]
) -> tuple[list[Example], list[Example]]:
    """(examples to train on, held-out examples) as token ids; what was cut or dropped is said."""
    return load_items(
        options,
        say,
        columns=partial(example_columns, text_field=options.dataset_text_field),
        tokenize=partial(
            tokenize_examples,
            tokenizer=tokenizer,
            max_length=options.max_length,
            completion_only_loss=options.completion_only_loss,
            assistant_only_loss=options.assistant_only_loss,
            text_field=options.dataset_text_field,
        ),
        demo=lambda held_out: demo_examples(options.seed, held_out),
    )


def demo_examples(seed: int, held_out: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(rows to train on, held-out rows): film critics' quotes, those of a critic who liked the film."""
    sides = demo_pairs(seed=seed, held_out=held_out)
    train, test = ([{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows] for rows in sides)
    return train, test


def sequence_of(options: SFTOptions, example: Example) -> PromptAndCompletion:
    """The example with what is learned as its completion."""
    if options.completion_only_loss is False and example.learned is None:
        return [], example.prompt_ids + example.completion_ids
    return example.prompt_ids, example.completion_ids


def tokens_to_learn(options: SFTOptions, example: Example) -> int:
    return scored(*sequence_of(options, example)) if example.learned is None else example.n_scored


def learned_of(targets: Tensor, learned: Sequence[list[bool] | None], counts: Sequence[int]) -> Tensor:
    """The targets with -100 at those that are not learned; counts[i] of them are the last of sequence i."""
    if not any(learned):
        return targets
    marks = [[True] * n if mask is None else mask[len(mask) - n :] for mask, n in zip(learned, counts, strict=True)]
    keep = torch.tensor([*chain.from_iterable(marks)], device=targets.device)
    found = targets.clone()
    found[targets != IGNORE_INDEX] = targets[targets != IGNORE_INDEX].where(keep, IGNORE_INDEX)
    return found


def loss_of_batch(
    run: Run, model: Any, examples: list[Example], batch: list[int], tally: Tally, num_items: int | None = None
) -> Tensor:
    """The loss of the examples at `batch`: their tokens' sum over num_items, or without it their mean."""
    o = run.options
    sequences = [sequence_of(o, examples[i]) for i in batch]
    counts = [scored(*sequence) for sequence in sequences]
    learned = [examples[i].learned for i in batch]
    tokens = sum(tokens_to_learn(o, examples[i]) for i in batch)

    def head(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return linear_cross_entropy(
            hidden,
            weight,
            learned_of(targets, learned, counts),
            num_items=num_items,
            label_smoothing=o.label_smoothing,
            return_metrics=True,
            **options,
        )

    (loss, metrics), aux_loss = through_head(run, model, sequences, head)
    share = tokens / num_items if num_items else 1.0
    return tallied(run, tally, loss, metrics, aux_loss, share=share, weight=tokens)


@torch.no_grad()
def evaluate(run: Run, state: State) -> Metrics:
    """Mean metrics of the held-out examples' tokens, named eval_...."""

    def score(batch: list[int], tally: Tally) -> Tensor:
        return loss_of_batch(run, run.bare_model, run.held_out, batch, tally).expand(len(batch))

    run.model.eval()
    size = run.options.per_device_eval_batch_size
    _, sums = of_all(run.accelerator, run.held_out, range(len(run.held_out)), size, score, "held out")
    return {f"eval_{name}": mean for name, mean in means(sums).items()}
