"""Rollouts: completions drawn from the policy, and what is known of each of their tokens.

A completion of T tokens is a function of the model and of T uniform numbers, one a token: the first token at which the
cumulated probability of softmax(logits / temperature), or of what top_k, top_p and min_p leave of it, exceeds its
number. The numbers are seeded by what is asked for (run, step, prompt, how many before), so batches, padding and
processes change nothing but rounding.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@dataclass
class Sample:
    """A completion of a prompt, and what is known of it."""

    prompt: int  # index of its prompt
    prompt_ids: list[int]
    ids: list[int]  # with the stop token, where one came
    stopped: bool  # by a stop token, not by the limit
    tokens: dict[str, Tensor] = field(default_factory=dict)  # name -> (len(ids),) float32, on the CPU
    rewards: list[float] = field(default_factory=list)  # one a source

    @property
    def n_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.ids)


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn."""

    max_new_tokens: int
    temperature: float  # 0: the likeliest token
    stop_ids: tuple[int, ...]  # none: every completion has max_new_tokens
    pad_id: int
    batch_size: int
    # what is drawn from, in the order of transformers' sampling; log-probabilities are those of the whole distribution
    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None

    def processors(self) -> LogitsProcessorList:
        """What makes of logits those that are drawn from."""
        found = LogitsProcessorList()
        if self.temperature not in (0, 1):
            found.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            found.append(TopPLogitsWarper(self.top_p))
        if self.min_p is not None:
            found.append(MinPLogitsWarper(self.min_p))
        return found


def check_sampling(recipe: str, temperature: float, top_p: float, top_k: int, min_p: float | None) -> None:
    """A ValueError if one of these options of the recipe is out of its range."""
    if not temperature > 0:
        raise ValueError(f"{recipe}: temperature must be above 0; got {temperature}")
    if not 0 < top_p <= 1 or not 0 <= (min_p or 0) <= 1:
        raise ValueError(f"{recipe}: top_p must be in (0, 1], min_p in [0, 1] or none; got {top_p} and {min_p}")
    if top_k < 0:
        raise ValueError(f"{recipe}: top_k must be 0, which is all tokens, or more; got {top_k}")


def stop_ids_of(tokenizer: Any, model: Any) -> tuple[int, ...]:
    """The tokens that end a completion: EOS of the tokenizer, and all that the model's generation_config names.

    A chat model's answers may end with another than EOS, as Gemma's with <end_of_turn>.
    """
    named = model.generation_config.eos_token_id
    every = [tokenizer.eos_token_id, *(named if isinstance(named, list | tuple) else [named])]
    return tuple(dict.fromkeys(token for token in every if token is not None))


class _DrawnToken(LogitsProcessor):
    """Leaves one token to `generate`: the one that the row's next uniform number falls on."""

    def __init__(self, uniform: Tensor, prompt_length: int) -> None:
        self._uniform, self._start = uniform, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # fp64: 150,000 probabilities summed in fp32 would move the last of them by more than they are
        below = torch.softmax(scores.float(), -1).cumsum(-1, dtype=torch.float64)
        drawn = self._uniform[:, input_ids.shape[1] - self._start, None] * below[:, -1:]
        token = torch.searchsorted(below, drawn, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def seed_of(*what: int | str) -> int:
    """A seed for what is asked: seed_of(run's seed, step, prompt, number)."""
    return random.Random(" ".join(map(str, what))).getrandbits(63)


@torch.no_grad()
def complete(
    model: Any, prompts: Sequence[Sequence[int]], seeds: Sequence[int], how: Sampling
) -> list[tuple[list[int], bool]]:
    """(tokens, whether a stop token ended them) of a completion of each prompt, in their order.

    Args:
        model: a causal LM of transformers, or a PeftModel around one; its own generation settings are left aside.
        prompts: token ids, at least one each.
        seeds: one a completion.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    found: list[tuple[list[int], bool]] = [([], False)] * len(prompts)
    for batch in batches(range(len(prompts)), how.batch_size, lambda i: len(prompts[i])):
        longest = max(len(prompts[i]) for i in batch)
        input_ids = torch.full((len(batch), longest), how.pad_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, i in enumerate(batch):
            input_ids[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
            attention_mask[row, longest - len(prompts[i]) :] = 1
        new = _generate(causal_lm, input_ids, attention_mask, [seeds[i] for i in batch], how)[:, longest:].tolist()
        for i, ids in zip(batch, new, strict=True):
            end = next((t for t, token in enumerate(ids) if token in how.stop_ids), None)
            found[i] = (ids if end is None else ids[: end + 1], end is not None)
    return found


def drawn(
    model: Any, prompts: Sequence[Any], wanted: Sequence[tuple[int, int]], how: Sampling, seed: int, step: int
) -> list[Sample]:
    """A completion of prompts[i].prompt_ids for each (i, how many of that prompt's completions come before)."""
    ids = [prompts[i].prompt_ids for i, _ in wanted]
    found = complete(model, ids, [seed_of(seed, step, *one) for one in wanted], how)
    return [Sample(i, prompt_ids, *one) for (i, _), prompt_ids, one in zip(wanted, ids, found, strict=True)]


def _generate(causal_lm: Any, input_ids: Tensor, attention_mask: Tensor, seeds: list[int], how: Sampling) -> Tensor:
    device, processors = causal_lm.device, how.processors()
    if how.temperature > 0:
        numbers = [[draw.random() for _ in range(how.max_new_tokens)] for draw in map(random.Random, seeds)]
        uniform = torch.tensor(numbers, dtype=torch.float64, device=device)
        processors.append(_DrawnToken(uniform, input_ids.shape[1]))
    own = causal_lm.generation_config
    # as the model's own, not as an argument: from that one generate() fills what is None with the model's own
    causal_lm.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=how.max_new_tokens,
        eos_token_id=list(how.stop_ids) or None,
        pad_token_id=how.pad_id,
    )
    try:
        return causal_lm.generate(
            input_ids.to(device), attention_mask=attention_mask.to(device), logits_processor=processors
        )
    finally:
        causal_lm.generation_config = own


def batches(indices: Sequence[int], size: int, length: Callable[[int], int]) -> Iterator[list[int]]:
    """The indices in batches of like length, which saves padding."""
    order = sorted(indices, key=length)
    for first in range(0, len(order), size):
        yield order[first : first + size]


@torch.no_grad()
def score_tokens(
    samples: Sequence[Sample],
    size: int,
    of_batch: Callable[[list[Sample]], dict[str, Tensor]],
    *,
    keep_order: bool = False,
) -> None:
    """Keeps of_batch(some samples) in their `tokens`: each result (M,), the M tokens of their completions in a row.

    keep_order: those of a prompt stay side by side; else those of like length come together, which saves padding.
    """
    for batch in batches(range(len(samples)), size, lambda i: 0 if keep_order else samples[i].n_tokens):
        some = [samples[i] for i in batch]
        for name, values in of_batch(some).items():
            parts = values.float().cpu().split([len(sample.ids) for sample in some])
            for sample, own in zip(some, parts, strict=True):
                sample.tokens[name] = own.clone()
