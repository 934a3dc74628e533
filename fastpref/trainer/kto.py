"""KTO: tune a model on single answers, each labelled good or bad.

    loss = w_d (1 - sigmoid(beta (r - kl))) if desirable, else w_u (1 - sigmoid(beta (kl - r)))

r = log p(answer) - log p_ref(answer). Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7. kl, of policy and reference, is
estimated anew for each optimizer step, from that step's answers after prompts that they do not belong to; it counts as
a constant. One estimate for all processes and accumulated batches together, so that how a step is split changes
nothing (TRL takes one for each batch). p_ref is the model before training, whose log-probabilities are computed once.

    fastpref kto --model_name_or_path MODEL --dataset labelled.jsonl
    train(KTOOptions(model_name_or_path=MODEL, dataset_name="labelled.jsonl"))

Option names and defaults are those of TRL's KTOConfig, but for those that trainer/options.py names and
`cache_ref_log_probs`, which is ours; the order of the data is drawn anew each epoch.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastpref import kto_kl, linear_logps, linear_unpaired_loss
from fastpref.trainer.batches import my_batches, of_all
from fastpref.trainer.collate import IGNORE_INDEX
from fastpref.trainer.command import run_command
from fastpref.trainer.config import option
from fastpref.trainer.demo import demo_pairs
from fastpref.trainer.examples import Example, labelled_columns, tokenize_labelled
from fastpref.trainer.forward import rows_of, tallied, through_head
from fastpref.trainer.metrics import Tally, means
from fastpref.trainer.options import CausalOptions
from fastpref.trainer.pretrained import check_positions
from fastpref.trainer.reference import LogpsCache, open_cache, remembered
from fastpref.trainer.run import Metrics, Outcome, Run, State, after_step, begin, finish, open_run, steps_to_do, update
from fastpref.trainer.start import lean, load_items


@dataclass(kw_only=True)
class KTOOptions(CausalOptions):
    recipe: ClassVar[str] = "kto"

    output_dir: str = option("runs/kto", "where model, metrics, plot and checkpoints go")
    learning_rate: float = option(1e-6, "the optimizer's learning rate at its peak")
    cache_ref_log_probs: bool | str = option(
        True, "keep the reference's log-probabilities for later runs: in the user's cache, or in this folder"
    )

    beta: float = option(0.1, "how strongly the reference holds the policy; higher: closer to it")
    loss_type: Literal["kto", "apo_zero_unpaired"] = option("kto", "kto, or apo_zero_unpaired, which needs no kl")
    desirable_weight: float = option(1.0, "weight of desirable answers' losses")
    undesirable_weight: float = option(1.0, "weight of undesirable answers' losses")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"kto: beta must be > 0 and finite; got {self.beta}")
        for name in ("desirable_weight", "undesirable_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"kto: {name} must be 0 or more; got {getattr(self, name)}")


def main(argv: Sequence[str]) -> int:
    """`fastpref kto ARGV...`."""
    return run_command(KTOOptions, train, argv, description=__doc__ or "", demo={})


@lean
def train(options: KTOOptions) -> Outcome:
    """Tunes the model and returns what that changed. Everything it leaves is in `output_dir`."""
    run = open_run(options, unit="examples", load=load_examples)
    state, log = begin(run, references, evaluate)
    for step, indices in steps_to_do(run, state):
        kl = None
        if options.loss_type == "kto":
            of_step = slice((step - 1) * run.per_step, step * run.per_step)
            kl = estimated_kl(run, mismatched(run, run.items, indices), state["mismatched_reference"][of_step])
        batches = my_batches(run.accelerator, indices, options.per_device_train_batch_size)
        loss = partial(loss_of_batch, run, run.model, run.items, state["reference"], kl, num_items=len(indices))
        done = update(run, step, batches, loss)
        after_step(run, state, log, step, done, evaluate, tokens=sum(run.items[i].n_tokens for i in indices))
    return finish(run, state, log, title=f"{options.loss_type}, beta {options.beta:g}")


def load_examples(
    options: KTOOptions, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]
) -> tuple[list[Example], list[Example]]:
    """(examples to train on, held-out examples) as token ids; what was cut or dropped is said."""
    examples, held_out = load_items(
        options,
        say,
        columns=labelled_columns,
        tokenize=partial(tokenize_labelled, tokenizer=tokenizer, max_length=options.max_length),
        demo=lambda held_out: demo_pairs(seed=options.seed, held_out=-(-held_out // 2)),
    )
    if options.loss_type == "kto" and len(held_out) == 1 and options.dataset_test_split is None:
        say("held out  none: the one example goes back to those to train on, since kl needs two")
        examples, held_out = [*examples, *held_out], []
    desirable = sum(bool(example.desirable) for example in examples)
    good, bad = options.desirable_weight * desirable, options.undesirable_weight * (len(examples) - desirable)
    if not bad <= good <= 4 / 3 * bad:
        say(
            f"weights   desirable {good:g}, undesirable {bad:g} (number times weight); the paper keeps their ratio "
            "between 1 and 4/3, by desirable_weight or undesirable_weight"
        )
    return examples, held_out


def mismatched(run: Run, examples: Sequence[Example], indices: Sequence[int]) -> list[Example]:
    """Each prompt at `indices` with the answer of the next of them that has another prompt, the first after the last.

    Where all prompts are one, with the answer of the next. Cut to max_length.
    """
    limit = run.options.max_length
    found = []
    for place, i in enumerate(indices):
        later = [*indices[place + 1 :], *indices[:place]]
        other = next((j for j in later if examples[j].prompt_ids != examples[i].prompt_ids), later[0])
        room = None if limit is None else limit - len(examples[i].prompt_ids)
        found.append(Example(examples[i].prompt_ids, examples[other].completion_ids[:room]))
    return found


def references(run: Run) -> State:
    """The log-probabilities under the model before training: of the answers, and of the mismatched ones for kl."""
    n_held_out, steps = len(run.held_out), list(steps_to_do(run, {"step": 0}))
    visited = {i for _, indices in steps for i in indices}
    if run.options.loss_type == "kto" and (run.per_step < 2 or n_held_out == 1):
        raise ValueError("kto: kl needs at least 2 examples a step, and 2 held out or none; raise the batch size")
    run.say(f"reference scores {len(visited) + n_held_out} examples, once")
    cache = open_cache(run)
    found = {
        "reference": reference_logps(run, cache, run.items, visited),
        "held_out_reference": reference_logps(run, cache, run.held_out, range(n_held_out)),
    }
    if run.options.loss_type == "kto":
        others = [other for _, indices in steps for other in mismatched(run, run.items, indices)]
        held_out = mismatched(run, run.held_out, range(n_held_out))
        check_positions("kto", run.bare_model, max(other.longest for other in [*others, *held_out]))
        found["mismatched_reference"] = reference_logps(run, cache, others, range(len(others)))
        found["held_out_mismatched_reference"] = reference_logps(run, cache, held_out, range(n_held_out))
    return found


def reference_logps(run: Run, cache: LogpsCache | None, examples: list[Example], indices: Iterable[int]) -> Tensor:
    """What `logps_of` returns, but for what the cache knows."""
    sequences = [[(example.prompt_ids, example.completion_ids)] for example in examples]
    found = remembered(run, cache, sequences, indices, lambda missing: logps_of(run, examples, missing)[:, None])
    return found[:, 0]


@torch.no_grad()
def logps_of(run: Run, examples: list[Example], indices: Sequence[int], label: str | None = "reference") -> Tensor:
    """(examples,) summed log-probabilities of the completions under the model as it is, NaN at other examples."""

    def logps(batch: list[int], _: Tally) -> Tensor:
        these = [examples[i] for i in batch]
        counts = [example.n_scored for example in these]

        def head(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
            found = linear_logps(hidden, weight, targets, **options)
            return rows_of(found[targets != IGNORE_INDEX], counts, max(counts)).double().sum(-1)

        return through_head(run, run.bare_model, [(e.prompt_ids, e.completion_ids) for e in these], head)[0]

    run.model.eval()
    return of_all(run.accelerator, examples, indices, run.options.per_device_eval_batch_size, logps, label)[0]


def estimated_kl(run: Run, others: list[Example], reference: Tensor) -> Tensor:
    """0-d: the KL of policy and reference, from mismatched examples and their reference log-probabilities."""
    policy = logps_of(run, others, range(len(others)), label=None)
    return kto_kl(policy.to(run.accelerator.device), reference.to(run.accelerator.device))


def loss_of_batch(
    run: Run,
    model: Any,
    examples: list[Example],
    reference: Tensor,
    kl: Tensor | None,
    batch: list[int],
    tally: Tally,
    num_items: int | None = None,
) -> Tensor:
    """The loss of the examples at `batch`: their sum over num_items, or without it their mean."""
    o, these = run.options, [examples[i] for i in batch]

    def head(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        out = linear_unpaired_loss(
            hidden,
            weight,
            targets,
            torch.tensor([bool(example.desirable) for example in these], device=hidden.device),
            loss_type=o.loss_type,
            beta=o.beta,
            ref_logps=reference[batch].to(hidden.device),
            kl=kl,
            desirable_weight=o.desirable_weight,
            undesirable_weight=o.undesirable_weight,
            num_items=num_items,
            **options,
        )
        return out.loss, out.metrics

    (loss, metrics), aux_loss = through_head(run, model, [(e.prompt_ids, e.completion_ids) for e in these], head)
    # of unpaired answers the margin is a difference of means, which `means` takes at the end
    metrics = {name: value for name, value in metrics.items() if name != "rewards/margins" and "count" not in name}
    chosen, rejected = ([e.n_scored for e in these if bool(e.desirable) is side] for side in (True, False))
    weights: dict[str, float] = {"entropy": sum(chosen) + sum(rejected)}
    for side, lengths in {"chosen": chosen, "rejected": rejected}.items():
        weights |= {f"rewards/{side}": len(lengths), f"logps/{side}": len(lengths), f"logits/{side}": sum(lengths)}
    share = len(batch) / num_items if num_items else 1.0
    return tallied(run, tally, loss, metrics, aux_loss, share=share, weight=len(batch), **weights)


@torch.no_grad()
def evaluate(run: Run, state: State) -> Metrics:
    """Mean metrics of the held-out examples, named eval_...."""
    n, kl = len(run.held_out), None
    if run.options.loss_type == "kto":
        kl = estimated_kl(run, mismatched(run, run.held_out, range(n)), state["held_out_mismatched_reference"])

    def score(batch: list[int], tally: Tally) -> Tensor:
        reference = state["held_out_reference"]
        return loss_of_batch(run, run.bare_model, run.held_out, reference, kl, batch, tally).expand(len(batch))

    run.model.eval()
    _, sums = of_all(run.accelerator, run.held_out, range(n), run.options.per_device_eval_batch_size, score, "held out")
    return {f"eval_{name}": mean for name, mean in means(sums).items()}
