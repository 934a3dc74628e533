"""What tuning changed: a model beside its reference on held-out preferences, and on samples that a scorer judges.

    loss, accuracy, margin   of the dataset's pairs, as in training: `loss_type`, beta
    score, best of k         mean reward of a sample, and of the best of k samples of a prompt
    win rate                 how often the model's sample scores above the reference's own, a tie counting half
    KL                       mean of log p(y) - log p_ref(y) over the model's own samples y, nats a sequence

    fastpref eval --model_name_or_path runs/dpo/model --ref_model_name_or_path MODEL --dataset pairs.jsonl \\
        --reward_funcs my_module:my_reward

Each figure stands beside its standard error over pairs or prompts. Option names are TRL's.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import transformers
from accelerate import PartialState
from peft import AutoPeftModelForCausalLM
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from fastpref import dpo_loss, fused_lm_head, linear_logps
from fastpref.trainer.collate import IGNORE_INDEX, PromptAndCompletion, collate
from fastpref.trainer.config import given_options, option, settle
from fastpref.trainer.data import Pair, pair_columns, sequences_of, tokenize_pairs
from fastpref.trainer.data_files import Rows, load_rows, place_of, split_to_judge
from fastpref.trainer.encode import scored
from fastpref.trainer.figures import Figure, Figures, of_scores, table, win_rates, write
from fastpref.trainer.packing import enable_packing, pack, packs, through_rows
from fastpref.trainer.pretrained import check_positions, check_vocabulary, from_pretrained, is_adapter
from fastpref.trainer.prompts import Prompt, prompt_columns, room_for_prompt, tokenize_prompts
from fastpref.trainer.rewards import Rewards
from fastpref.trainer.rollout import Sample, Sampling, batches, drawn, stop_ids_of
from fastpref.trainer.start import padding_id


@dataclass(kw_only=True)
class EvalOptions:
    recipe: ClassVar[str] = "eval"

    model_name_or_path: str | None = option(None, "the tuned model's or adapter's folder or hub name")
    ref_model_name_or_path: str | None = option(
        None, "the model to compare with; none: an adapter's base model, or for any other no comparison"
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = option("float32", "the weights' type")
    trust_remote_code: bool = option(False, "run the Python code that a model brings along")
    bf16: bool = option(False, "compute in bfloat16, keeping the weights' own type")
    dataset_name: str | None = option(
        None, "pairs or prompts: a .jsonl, .json, .parquet or .csv file, a folder, or a hub name", alias="dataset"
    )
    dataset_config: str | None = option(None, "the hub dataset's configuration")
    dataset_test_split: str | None = option(None, "the split to evaluate on; none: test where there is one, else train")
    max_samples: int | None = option(None, "the first rows of it; none: all")
    max_length: int | None = option(1024, "prompt + completion are cut to this many tokens; none: no limit")
    beta: float = option(0.1, "of the loss and the rewards")
    loss_type: str = option("sigmoid", "a preference loss")

    reward_model_path: str | None = option(None, "a trained reward model, which scores samples")
    reward_funcs: list[str | Callable[..., Any]] | None = option(
        None, "rewards: module:function, or reward models; their sum counts"
    )
    reward_weights: list[float] | None = option(None, "weights of several rewards; none: 1 each")
    max_prompts: int = option(64, "prompts to complete; 0: none")
    num_generations: int = option(4, "completions of a prompt by either model")
    max_completion_length: int = option(256, "tokens of the longest completion")
    temperature: float = option(1.0, "of sampling, and of the KL's log-probabilities")
    per_device_eval_batch_size: int = option(8, "sequences read or drawn at once")
    seed: int = option(42, "seed of what is drawn")
    output_file: str | None = option(None, "where the figures go as JSON; none: nowhere")

    def __post_init__(self) -> None:
        settle(self)
        for name in "max_samples max_length num_generations max_completion_length per_device_eval_batch_size".split():
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"eval: {name} must be at least 1; got {getattr(self, name)}")
        if self.max_prompts < 0:
            raise ValueError(f"eval: max_prompts must be at least 0; got {self.max_prompts}")
        if not self.temperature > 0 or not self.beta > 0:
            raise ValueError(f"eval: temperature and beta must be above 0; got {self.temperature} and {self.beta}")
        for name in ("model_name_or_path", "dataset_name"):
            if getattr(self, name) is None:
                raise ValueError(f"eval: {name.removesuffix('_name')} must be given; got none")

    @property
    def sources(self) -> list[Any]:
        """What scores samples."""
        return [*([self.reward_model_path] if self.reward_model_path else []), *(self.reward_funcs or [])]

    @property
    def has_reference(self) -> bool:
        """A model of its own, or the one under the adapter."""
        return self.ref_model_name_or_path is not None or is_adapter(str(self.model_name_or_path))


def main(argv: Sequence[str]) -> int:
    """`fastpref eval ARGV...`."""
    given = given_options(EvalOptions, argv, prog="fastpref eval", description=(__doc__ or "").partition("\n")[0])
    transformers.utils.logging.disable_progress_bar()
    options = EvalOptions(**given)
    found = evaluate(options)
    print(table(found))
    if options.output_file:
        write(Path(options.output_file), vars(options), found)
    return 0


@torch.no_grad()
def evaluate(options: EvalOptions) -> dict[str, Figures]:
    """{"policy": figures, "reference": figures}; the latter is empty without a reference."""
    o, state = options, PartialState()
    if state.num_processes > 1:
        raise ValueError(f"eval: runs in one process; got {state.num_processes}")
    assert o.model_name_or_path is not None
    remote = {"trust_remote_code": o.trust_remote_code}
    tokenizer = from_pretrained(AutoTokenizer, o.model_name_or_path, "eval", **remote)
    pairs, prompts = load(o, tokenizer)
    how = o.reward_weights, tokenizer, state.device, o.per_device_eval_batch_size
    score = Rewards(o.sources, *how) if o.sources else None
    longest = [*(pair.longest for pair in pairs), *(prompt.longest + o.max_completion_length for prompt in prompts)]
    both = Both(o, tokenizer, state.device, [*pairs, *prompts], max(longest))
    found: dict[str, Figures] = {"policy": {}, "reference": {}}
    if pairs:
        found["policy"] |= of_pairs(o, both, pairs)
    if prompts:
        policy, reference = of_samples(o, both, prompts, score)
        found["policy"] |= policy
        found["reference"] |= reference
    return found


def load(o: EvalOptions, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Pair], list[Prompt]]:
    """Pairs, of rows that have both answers, and the distinct prompts to complete where something judges the samples.

    Raises:
        ValueError: the rows hold neither.
    """

    def columns(names: Sequence[str]) -> str | None:
        return None if pair_columns(names) is None else prompt_columns(names)

    assert o.dataset_name is not None
    split = o.dataset_test_split or split_to_judge(o.dataset_name, o.dataset_config)
    print(f"dataset   {o.dataset_name}, split {split}", flush=True)
    every = load_rows(o.dataset_name, columns=columns, split=split, config=o.dataset_config)
    first = zip(range(o.max_samples or len(every)), every, strict=False)
    rows = Rows((place_of(every, i), row) for i, row in first)
    pairs: list[Pair] = []
    prompts: list[Prompt] = []
    if pair_columns(list(rows[0])) is None:
        pairs, told = tokenize_pairs(rows, tokenizer, max_length=o.max_length)
        print(f"pairs     {told}", flush=True)
    if o.max_prompts and (o.sources or o.has_reference) and prompt_columns(list(rows[0])) is None:
        room = room_for_prompt("eval", o.max_length, o.max_completion_length)
        only = ({key: value for key, value in row.items() if key not in ("chosen", "rejected")} for row in rows)
        rows = Rows(zip(rows.places, only, strict=True))
        prompts, asked = tokenize_prompts(rows, tokenizer, max_length=room, distinct=True)
        print(f"prompts   {asked}", flush=True)
    if not pairs and not prompts:
        raise ValueError(
            "eval: prompts alone want max_prompts above 0, and reward_funcs, reward_model_path or "
            f"ref_model_name_or_path to judge samples by; got max_prompts {o.max_prompts}, sources {o.sources}"
        )
    return pairs, prompts[: o.max_prompts]


class Both:
    """The tuned model and its reference: another model, or the same with its adapter off.

    items: what they are to read; longest: tokens of its longest sequence, completions among them.
    """

    def __init__(
        self,
        options: EvalOptions,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        items: Sequence[Pair | Prompt],
        longest: int,
    ) -> None:
        o = options
        self._options, self._tokenizer, self._device, self._items, self._longest = o, tokenizer, device, items, longest
        assert o.model_name_or_path is not None
        self._policy = self._load(o.model_name_or_path)
        self._reference = self._load(o.ref_model_name_or_path) if o.ref_model_name_or_path else None

    @contextmanager
    def model(self, side: str) -> Iterator[Any]:
        """The model that plays "policy" or "reference"."""
        own = side == "policy" or self._reference is not None
        model = self._policy if side == "policy" or self._reference is None else self._reference
        autocast = torch.autocast(self._device.type, torch.bfloat16) if self._options.bf16 else nullcontext()
        with nullcontext() if own else model.disable_adapter(), autocast:
            yield model

    def logps(self, side: str, sequences: Sequence[PromptAndCompletion], temperature: float = 1.0) -> Tensor:
        """(S,) float64, nats, summed over the completions."""
        found = torch.zeros(len(sequences), dtype=torch.float64)
        size = self._options.per_device_eval_batch_size
        with self.model(side) as model:
            for batch in batches(range(len(sequences)), size, lambda i: sum(map(len, sequences[i]))):
                found[batch] = self._sums(model, [sequences[i] for i in batch], temperature)
        return found

    def draw(self, side: str, prompts: Sequence[Prompt]) -> list[Sample]:
        """num_generations completions of each prompt, those of a prompt together."""
        o, tokenizer = self._options, self._tokenizer
        how = Sampling(
            max_new_tokens=o.max_completion_length,
            temperature=o.temperature,
            stop_ids=stop_ids_of(tokenizer, self._policy),  # for both alike
            pad_id=padding_id(tokenizer),
            batch_size=o.per_device_eval_batch_size,
        )
        wanted = [(i, k) for i in range(len(prompts)) for k in range(o.num_generations)]
        with self.model(side) as model:
            # not the same numbers for both: the samples of one must say nothing of the other's
            return drawn(model, prompts, wanted, how, o.seed, ["policy", "reference"].index(side))

    def _load(self, name: str) -> Any:
        auto = AutoPeftModelForCausalLM if is_adapter(name) else AutoModelForCausalLM
        how = {"dtype": self._options.dtype, "trust_remote_code": self._options.trust_remote_code}
        model: Any = fused_lm_head(from_pretrained(auto, name, "eval", **how))
        check_vocabulary("eval", model, self._items)
        check_positions("eval", model, self._longest)
        if reason := enable_packing(model):
            print(f"padding   {name} reads padded rows: {reason}", flush=True)
        model.to(self._device)
        return model.eval()

    def _sums(self, model: Any, sequences: list[PromptAndCompletion], temperature: float) -> Tensor:
        def head(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
            return linear_logps(hidden, weight, targets, temperature=temperature, **options)[targets != IGNORE_INDEX]

        if packs(model):
            logps = through_rows(model, pack(sequences).to(self._device), head)
        else:
            padded = {name: x.to(self._device) for name, x in collate(sequences, padding_id(self._tokenizer)).items()}
            logps = model(head=partial(head, targets=padded.pop("targets")), **padded)
        counts = [scored(*sequence) for sequence in sequences]
        return torch.stack([own.double().sum() for own in logps.cpu().split(counts)])


def of_pairs(o: EvalOptions, both: Both, pairs: list[Pair]) -> Figures:
    """Loss, accuracy and margin of the pairs; without a reference, accuracy of the log-probabilities themselves."""
    chosen, rejected = both.logps("policy", sequences_of(pairs)).chunk(2)
    if not o.has_reference:
        return {"logps/accuracies": Figure.of(chosen > rejected)}
    ref_chosen, ref_rejected = both.logps("reference", sequences_of(pairs)).chunk(2)
    counts = torch.tensor([scored(*sequence) for sequence in sequences_of(pairs)]).chunk(2)
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        chosen,
        rejected,
        ref_chosen,
        ref_rejected,
        loss_type=o.loss_type,
        beta=o.beta,
        chosen_lengths=counts[0],
        rejected_lengths=counts[1],
    )
    margins = chosen_rewards - rejected_rewards
    return {
        "loss": Figure.of(losses),
        "rewards/accuracies": Figure.of(margins > 0),
        "rewards/margins": Figure.of(margins),
    }


def of_samples(
    o: EvalOptions, both: Both, prompts: list[Prompt], score: Callable[..., Any] | None
) -> tuple[Figures, Figures]:
    """Figures of the policy and of the reference on their own samples."""
    n = o.num_generations
    found: dict[str, Figures] = {"policy": {}, "reference": {}}
    scores: dict[str, Tensor] = {}
    for side in ["policy", *(["reference"] if o.has_reference else [])]:
        samples = both.draw(side, prompts)
        if score is not None:
            score([prompts[sample.prompt] for sample in samples], samples)
            scores[side] = score.totals(samples).view(-1, n)  # type: ignore[attr-defined]
            found[side] |= of_scores(scores[side])
        lengths = torch.tensor([len(sample.ids) for sample in samples]).view(-1, n)
        found[side]["tokens"] = Figure.of(lengths.double().mean(1))
        if side == "policy" and o.has_reference:
            sequences = [(sample.prompt_ids, sample.ids) for sample in samples]
            ratios = both.logps("policy", sequences, o.temperature) - both.logps("reference", sequences, o.temperature)
            found[side]["kl"] = Figure.of(ratios.view(-1, n).mean(1))
    if len(scores) == 2:
        found["policy"]["win_rate"] = Figure.of(win_rates(scores["policy"], scores["reference"]))
    return found["policy"], found["reference"]
