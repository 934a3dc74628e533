"""DPO: tune a model on preference pairs, no reward model in between.

    loss = -log sigmoid(beta [(log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected))])

Rafailov et al. 2023, arXiv:2305.18290, eq. 7; `loss_type` names its relatives. p_ref is the model before training: its
log-probabilities of the pairs are computed once, up front, and kept. The logits are never stored: the fused head works
inside the model's own forward.

    fastpref dpo --model_name_or_path MODEL --dataset pairs.jsonl
    train(DPOOptions(model_name_or_path=MODEL, dataset_name="pairs.jsonl"))

Option names and defaults are those of TRL's DPOConfig, but for those that trainer/options.py names and
`cache_ref_log_probs`, `reference_free` and most options of single losses, which are ours.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastpref import linear_logps, linear_preference_loss
from fastpref.losses._protocol import trait
from fastpref.losses.dpo import bind
from fastpref.losses.pairs import Pairs, Tokens
from fastpref.losses.preference import PREFERENCE_LOSSES
from fastpref.trainer.batches import my_batches, of_all
from fastpref.trainer.collate import IGNORE_INDEX
from fastpref.trainer.command import run_command
from fastpref.trainer.config import name_of, option
from fastpref.trainer.data import Pair, pair_columns, sequences_of, tokenize_pairs
from fastpref.trainer.demo import demo_pairs
from fastpref.trainer.encode import scored
from fastpref.trainer.forward import placed, rows_of, tallied, through_head
from fastpref.trainer.metrics import Tally, means
from fastpref.trainer.options import CausalOptions, check_ranges
from fastpref.trainer.reference import LogpsCache, open_cache, remembered
from fastpref.trainer.run import Metrics, Outcome, Run, State, after_step, begin, finish, open_run, steps_to_do, update
from fastpref.trainer.start import lean, load_items

# Options of single losses: none leaves a loss its own default, and one that no loss of the run owns is refused
OF_LOSSES = sorted(
    {name for loss in PREFERENCE_LOSSES.values() for name in inspect.signature(loss).parameters} - {"pairs", "beta"}
)


@dataclass(kw_only=True)
class DPOOptions(CausalOptions):
    recipe: ClassVar[str] = "dpo"

    output_dir: str = option("runs/dpo", "where model, metrics, plot and checkpoints go")
    learning_rate: float = option(1e-6, "the optimizer's learning rate at its peak")

    beta: float = option(0.1, "how strongly the reference holds the policy; higher: closer to it")
    loss_type: str | Callable[..., Tensor] | list[str | Callable[..., Tensor]] = option(
        "sigmoid", "a preference loss, or several to be summed"
    )
    loss_weights: list[float] | None = option(None, "weights of several losses; none: 1 each")
    reference_free: bool = option(False, "compare with a uniform reference, not with the model before training")
    cache_ref_log_probs: bool | str = option(
        True, "keep the reference's log-probabilities for later runs: in the user's cache, or in this folder"
    )
    f_divergence_type: str = option(
        "reverse_kl", "the pull to the reference: reverse_kl, forward_kl, js_divergence, alpha_divergence"
    )
    f_alpha_divergence_coef: float | None = option(None, "alpha of alpha_divergence, in [0, 1]; none: 0.5")
    ld_alpha: float | None = option(
        None, "what a token counts beyond the length of the shorter answer, in [0, 1]; none: 1 (LD-DPO)"
    )
    use_weighting: bool = option(False, "weigh pairs by how likely their answers are under the policy (WPO)")
    label_smoothing: float | None = option(None, "probability that a label is flipped; sigmoid, robust, exo_pair, ...")
    discopop_tau: float | None = option(None, "discopop's temperature; none: 0.05")
    cpo_alpha: float | None = option(None, "weight of cpo's likelihood term; none: 1")
    simpo_gamma: float | None = option(None, "simpo's target margin; none: 0.5")
    dpop_lambda: float | None = option(None, "weight of dpop's penalty; none: 50")
    unlikelihood_alpha: float | None = option(None, "weight of unlikelihood's second term; none: 1")
    delta: float | None = option(None, "bco_pair's reward shift; none: 0")

    def __post_init__(self) -> None:
        super().__post_init__()
        loss = bind(
            "dpo",
            self.loss_type,
            self.loss_weights,
            self.beta,
            f_divergence_type=self.f_divergence_type,
            f_alpha_divergence_coef=self.f_alpha_divergence_coef,
            ld_alpha=self.ld_alpha,
            use_weighting=self.use_weighting,
            options=self.of_losses,
        )
        zero, one = torch.zeros(1), torch.ones(1)
        tokens = Tokens(torch.zeros(2), torch.zeros(2), torch.ones(2, dtype=torch.bool), torch.arange(2))
        pair = Pairs(zero, zero, zero, zero, one, one, tokens)
        check_ranges("dpo", loss.terms, PREFERENCE_LOSSES.values(), zero, pair, beta=self.beta)

    @property
    def of_losses(self) -> dict[str, float]:
        """The options of single losses that were given."""
        return {name: value for name in OF_LOSSES if (value := getattr(self, name)) is not None}

    @property
    def losses(self) -> list[Any]:
        return self.loss_type if isinstance(self.loss_type, list) else [self.loss_type]

    @property
    def loss_names(self) -> list[str]:
        return [loss if isinstance(loss, str) else name_of(loss) for loss in self.losses]

    @property
    def has_reference(self) -> bool:
        """Whether the reference's log-probabilities are needed: a loss without them takes them for its metrics only."""
        losses = [PREFERENCE_LOSSES[loss] if isinstance(loss, str) else loss for loss in self.losses]
        return not self.reference_free and any(trait(loss, "reference") for loss in losses)


def main(argv: Sequence[str]) -> int:
    """`fastpref dpo ARGV...`."""
    return run_command(DPOOptions, train, argv, description=__doc__ or "", demo={"per_device_train_batch_size": 4})


@lean
def train(options: DPOOptions) -> Outcome:
    """Tunes the model and returns what that changed. Everything it leaves is in `output_dir`."""
    run = open_run(options, unit="pairs", load=load_pairs)
    state, log = begin(run, references, evaluate)
    for step, indices in steps_to_do(run, state):
        batches = my_batches(run.accelerator, indices, options.per_device_train_batch_size)
        loss = partial(loss_of_batch, run, run.model, run.items, state["reference"], num_items=len(indices))
        done = update(run, step, batches, loss)
        after_step(run, state, log, step, done, evaluate, tokens=sum(run.items[i].n_tokens for i in indices))
    return finish(run, state, log, title=f"{' + '.join(options.loss_names)}, beta {options.beta:g}")


def load_pairs(
    options: DPOOptions, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]
) -> tuple[list[Pair], list[Pair]]:
    """(pairs to train on, held-out pairs) as token ids; what was cut or dropped is said."""
    return load_items(
        options,
        say,
        columns=pair_columns,
        tokenize=partial(tokenize_pairs, tokenizer=tokenizer, max_length=options.max_length),
        demo=lambda held_out: demo_pairs(seed=options.seed, held_out=held_out),
    )


def references(run: Run) -> State:
    """The log-probabilities under the model before training, of the pairs that the run will visit and the held-out."""
    if not run.options.has_reference:
        return {"reference": None, "held_out_reference": None}
    visited = {i for _, indices in steps_to_do(run, {"step": 0}) for i in indices}
    run.say(f"reference scores {len(visited) + len(run.held_out)} pairs, once")
    cache = open_cache(run) if run.options.ld_alpha is None else None  # which keeps sums
    held_out = reference_logps(run, cache, run.held_out, range(len(run.held_out)))
    return {"reference": reference_logps(run, cache, run.items, visited), "held_out_reference": held_out}


@torch.no_grad()
def reference_logps(run: Run, cache: LogpsCache | None, pairs: list[Pair], indices: Iterable[int]) -> Tensor:
    """(pairs, 2) summed log-probabilities of chosen and rejected under the model as it is, NaN at other pairs.

    With ld_alpha (pairs, 2, longest completion), of each token, 0 past the end.
    """
    longest = max((n for pair in pairs for n in lengths([pair])), default=0)
    per_token = run.options.ld_alpha is not None

    def logps(batch: list[int], _: Tally) -> Tensor:
        def head(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
            found = linear_logps(hidden, weight, targets, **options)
            return rows_of(found[targets != IGNORE_INDEX], counts, longest)

        chosen_then_rejected = [pairs[i] for i in batch]
        counts = lengths(chosen_then_rejected)
        rows = through_head(run, run.bare_model, sequences_of(chosen_then_rejected), head)[0]
        rows = rows if per_token else rows.double().sum(-1)
        return rows.unflatten(0, (2, len(batch))).transpose(0, 1)

    def score(missing: list[int]) -> Tensor:
        return of_all(run.accelerator, pairs, missing, run.options.per_device_eval_batch_size, logps, "reference")[0]

    run.model.eval()
    return remembered(run, cache, [sequences_of([pair]) for pair in pairs], indices, score)


def loss_of_batch(
    run: Run,
    model: Any,
    pairs: list[Pair],
    reference: Tensor | None,
    batch: list[int],
    tally: Tally,
    num_items: int | None = None,
) -> Tensor:
    """The loss of the pairs at `batch`: their sum over num_items, or without it their mean.

    reference: what `reference_logps` returned for `pairs`; None: the losses need none.
    """
    o, these = run.options, [pairs[i] for i in batch]
    counts = lengths(these)

    def head(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        given: dict[str, Any] = {}
        if reference is not None:
            ref = reference[batch].transpose(0, 1).flatten(0, 1).to(hidden.device)
            given = {"ref_logps": ref} if o.ld_alpha is None else {"ref_token_logps": placed(ref, counts, targets)}
        out = linear_preference_loss(
            hidden,
            weight,
            targets,
            loss_type=o.loss_type,
            loss_weights=o.loss_weights,
            beta=o.beta,
            reference_free=o.reference_free,
            f_divergence_type=o.f_divergence_type,
            f_alpha_divergence_coef=o.f_alpha_divergence_coef,
            ld_alpha=o.ld_alpha,
            use_weighting=o.use_weighting,
            num_items=num_items,
            **given,
            **options,
            **o.of_losses,
        )
        return out.loss, out.metrics

    (loss, metrics), aux_loss = through_head(run, model, sequences_of(these), head)
    chosen, rejected = sum(counts[: len(batch)]), sum(counts[len(batch) :])
    weights = {"entropy": chosen + rejected, "mean_token_accuracy": chosen}
    weights |= {"logits/chosen": chosen, "logits/rejected": rejected}
    share = len(batch) / num_items if num_items else 1.0
    return tallied(run, tally, loss, metrics, aux_loss, share=share, weight=len(batch), **weights)


@torch.no_grad()
def evaluate(run: Run, state: State) -> Metrics:
    """Mean metrics of the held-out pairs, named eval_...; before training every margin is 0, and accuracy None."""

    def score(batch: list[int], tally: Tally) -> Tensor:
        loss = loss_of_batch(run, run.bare_model, run.held_out, state["held_out_reference"], batch, tally)
        return loss.expand(len(batch))

    run.model.eval()
    size = run.options.per_device_eval_batch_size
    _, sums = of_all(run.accelerator, run.held_out, range(len(run.held_out)), size, score, "held out")
    metrics: Metrics = {f"eval_{name}": mean for name, mean in means(sums).items()}
    if state["step"] == 0 and run.options.has_reference:
        metrics["eval_rewards/accuracies"] = None
    return metrics


def lengths(pairs: list[Pair]) -> list[int]:
    """Scored tokens of the 2B sequences of B pairs: the chosen, then the rejected."""
    return [scored(prompt, completion) for prompt, completion in sequences_of(pairs)]
