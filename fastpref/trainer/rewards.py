"""Rewards of completions: trained reward models, Python functions, or several with weights.

A source is the folder or hub name of a reward model (a sequence classifier with one label), `module:function`, or a
function. Functions have the signature of TRL's reward functions, and may be async:

    f(prompts, completions, completion_ids, trainer_state, log_metric, log_extra, **other columns)
        -> a number, or None, for each completion

prompts and completions are texts, or lists of messages where the dataset has messages. None: it cannot tell. A column
that only some of the rows have is None for the others.
trainer_state is transformers' TrainerState, of which global_step, the steps done, and max_steps are kept up.
log_metric(name, value) adds to a mean in the step's metrics; log_extra(column, values) is taken and not kept.
"""

import asyncio
import importlib
import inspect
import math
import sys
import warnings
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForSequenceClassification
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase, TrainerState

from fastpref.trainer.collate import collate
from fastpref.trainer.config import name_of
from fastpref.trainer.metrics import Sums, merged
from fastpref.trainer.pretrained import from_pretrained, is_adapter
from fastpref.trainer.prompts import Prompt
from fastpref.trainer.rollout import Sample, batches
from fastpref.trainer.start import padding_id

OURS = (
    "prompts",
    "completion",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_metric",
    "log_extra",
)  # columns of these names a function does not get
Source = Callable[[Sequence[Prompt], Sequence[Sample]], list[float]]


class Rewards:
    """The sources of a run.

    Args:
        sources: as above, or (name, function of prompts and samples).
        weights: one a source; None: 1 each.
        tokenizer: the policy's.
        device, batch_size: where reward models run, and how many completions they read at once.
    Raises:
        ValueError: no source, weights of another number, or a source that is neither a function nor a reward model.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        weights: Sequence[float] | None,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        batch_size: int,
    ) -> None:
        if not sources:
            raise ValueError("Rewards: a reward is wanted: a reward model's folder, or a function as module:function")
        if weights is not None and len(weights) != len(sources):
            raise ValueError(f"Rewards: reward_weights must be {len(sources)}, one a source; got {len(weights)}")
        self.weights = torch.tensor([1.0] * len(sources) if weights is None else list(weights))
        self.trainer_state = TrainerState()
        self.logged: Sums = {}  # what functions said by log_metric, on this process or gathered by who asked for them
        self._sources: dict[str, Source] = {}
        for source in sources:
            name, function = self._named(source, tokenizer, device, batch_size)
            names = chain([name], (f"{name}_{i}" for i in count(2)))  # two lambdas have one
            self._sources[next(one for one in names if one not in self._sources)] = function

    @property
    def names(self) -> list[str]:
        return list(self._sources)

    def __call__(self, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> None:
        """Keeps what each source says in the samples' `rewards`; prompts[i] is that of samples[i]."""
        self.logged = {}
        found = [source(prompts, samples) for source in self._sources.values()] if samples else []
        for name, rewards in zip(self._sources, found, strict=False):
            if len(rewards) != len(samples):
                raise ValueError(f"Rewards: {name} must return {len(samples)} rewards, one each; got {len(rewards)}")
            if infinite := [i for i, reward in enumerate(rewards) if math.isinf(reward)]:
                raise ValueError(
                    f"Rewards: {name} must return finite numbers, or None where it cannot tell; "
                    f"got {rewards[infinite[0]]} for completion {infinite[0]}"
                )
        for i, sample in enumerate(samples):
            sample.rewards = [rewards[i] for rewards in found]
        if samples and all(math.isnan(reward) for rewards in found for reward in rewards):
            warnings.warn(
                f"Rewards: None for each of {len(samples)} completions, by {' and '.join(self.names)}: nothing "
                "comes of such a batch",
                stacklevel=2,
            )

    def totals(self, samples: Sequence[Sample]) -> Tensor:
        """(N,) weighted sums; a source that cannot tell adds nothing, and NaN is where none can."""
        each = torch.tensor([sample.rewards for sample in samples])
        return torch.where(each.isnan().all(1), torch.nan, (each * self.weights).nansum(1))

    def _log_metric(self, name: str, value: float) -> None:
        self.logged = merged(self.logged, {name: [float(value), 1.0]})

    @property
    def _given(self) -> dict[str, Any]:
        return {"trainer_state": self.trainer_state, "log_metric": self._log_metric, "log_extra": _not_kept}

    def _named(
        self, source: Any, tokenizer: PreTrainedTokenizerBase, device: torch.device, batch_size: int
    ) -> tuple[str, Source]:
        if isinstance(source, tuple):
            return source
        if callable(source):
            name = name_of(source)
            return name, partial(_of_function, name, source, tokenizer, self._given)
        if ":" in source:
            module, _, name = source.partition(":")
            if "" not in sys.path:
                sys.path.insert(0, "")  # the console script looks beside itself only, not where it is called
            function = getattr(_module(module, source), name, None)
            if not callable(function):
                raise ValueError(f"Rewards: {source} must name a function as module:function; {module} has no {name}")
            return name, partial(_of_function, name, function, tokenizer, self._given)
        if "/" not in source and not Path(source).exists():
            module, _, name = source.rpartition(".")
            raise ValueError(
                f"Rewards: {source} is neither a reward model's folder nor its hub name (owner/name), and a function "
                f"is given as module:function, as in {module or 'trl.rewards'}:{name}"
            )
        return str(source).rstrip("/").rpartition("/")[2], RewardModel(source, tokenizer, device, batch_size)


def _module(name: str, source: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):  # one that it imports
            raise
        raise ValueError(
            f"Rewards: no module {error.name} for {source}, in the current folder or in PYTHONPATH"
        ) from error


def _of_function(
    name: str,
    function: Callable[..., Any],
    tokenizer: PreTrainedTokenizerBase,
    given: dict[str, Any],
    prompts: Sequence[Prompt],
    samples: Sequence[Sample],
) -> list[float]:
    completions = [completion_of(tokenizer, prompt, sample) for prompt, sample in zip(prompts, samples, strict=True)]
    there = dict.fromkeys(name for prompt in prompts for name in prompt.columns if name not in OURS)
    columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in there}
    found = function(
        prompts=[prompt.prompt for prompt in prompts],
        completions=completions,
        completion_ids=[sample.ids for sample in samples],
        **given,
        **columns,
    )
    if inspect.isawaitable(found):
        with ThreadPoolExecutor(1) as thread:  # in a notebook this one has an event loop that runs
            found = thread.submit(asyncio.run, _result(found)).result()
    try:
        return [float("nan") if reward is None else float(reward) for reward in found]
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"Rewards: {name} must return {len(samples)} rewards, each a number or None; got {found!r:.100}"
        ) from error


def _not_kept(column: str, values: Sequence[Any]) -> None:
    """TRL's log_extra, whose table of completions there is not."""


async def _result(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


class RewardModel:
    """A trained sequence classifier with one label, read at the last token of prompt + completion."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, device: torch.device, batch_size: int) -> None:
        adapter = is_adapter(name)
        auto: Any = AutoPeftModelForSequenceClassification if adapter else AutoModelForSequenceClassification
        model = from_pretrained(auto, name, "RewardModel", **({"num_labels": 1} if adapter else {}))
        if model.config.num_labels != 1:
            raise ValueError(f"RewardModel: {name} must have one label; got {model.config.num_labels}")
        self._model = model.to(device).eval()
        self._tokenizer = from_pretrained(AutoTokenizer, name, "RewardModel")
        if model.config.pad_token_id is None:  # by which it finds the last token
            model.config.pad_token_id = padding_id(self._tokenizer)
        self._same = self._tokenizer.get_vocab() == tokenizer.get_vocab()
        self._policys, self._device, self._batch_size = tokenizer, device, batch_size

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> list[float]:
        found = [0.0] * len(samples)
        wholes = [self._ids(sample) for sample in samples]
        for batch in batches(range(len(samples)), self._batch_size, lambda i: len(wholes[i])):
            read = collate([(wholes[i], []) for i in batch], self._model.config.pad_token_id)
            inputs = {name: read[name].to(self._device) for name in ("input_ids", "attention_mask")}
            for i, score in zip(batch, self._model(**inputs).logits[:, 0].tolist(), strict=True):
                found[i] = score
        return found

    def _ids(self, sample: Sample) -> list[int]:
        ids = sample.prompt_ids + sample.ids
        if self._same:
            return ids
        # another vocabulary: its own tokens for the same text, special tokens of the prompt's template included
        text = self._policys.decode(ids, skip_special_tokens=False)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def text_of(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> str:
    """The completion as text, without special tokens."""
    return str(tokenizer.decode(sample.ids, skip_special_tokens=True))


def completion_of(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, sample: Sample) -> str | list[dict[str, str]]:
    """The completion as the prompt is given: as text, or as the assistant's message."""
    text = text_of(tokenizer, sample)
    return text if isinstance(prompt.prompt, str) else [{"role": "assistant", "content": text}]
