"""Prompts to complete: rows with a `prompt`, text or messages, whose other columns go to the reward functions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastpref.trainer.data_files import place_of
from fastpref.trainer.data_report import DataReport
from fastpref.trainer.demo import demo_pairs
from fastpref.trainer.encode import encode_chat, encode_text, kind_of, template_options
from fastpref.trainer.options import TrainOptions
from fastpref.trainer.start import load_items


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as it was given, as token ids, and what stands beside it in its row."""

    prompt: str | list[dict[str, Any]]
    prompt_ids: list[int]
    columns: dict[str, Any]

    @property
    def n_tokens(self) -> int:
        return len(self.prompt_ids)

    longest = n_tokens


def prompt_columns(names: Sequence[str]) -> str | None:
    """None if a row has these columns and a prompt among them, else what is wanted."""
    return None if "prompt" in names else "prompt"


def tokenize_prompts(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    distinct: bool = False,
) -> tuple[list[Prompt], DataReport]:
    """Prompts as token ids, in the order of the rows; messages end where the assistant's answer begins.

    max_length: of a prompt, tokens; longer ones are dropped and counted, as are those without a token.
    distinct: repeated rows are too.
    """
    prompts: list[Prompt] = []
    report, seen = DataReport(), set()
    for index, row in enumerate(rows):
        report.rows += 1
        prompt, where = row["prompt"], f"tokenize_prompts: {place_of(rows, index)}"
        if kind_of("prompt", prompt, where) == "text":
            ids = encode_text(prompt, tokenizer)
        else:
            options = template_options(row, where)
            ids = encode_chat(prompt, tokenizer, where, add_generation_prompt=True, **options)
        key = repr(row)
        if not ids:
            reason = "no token"
        elif max_length is not None and len(ids) > max_length:
            reason = f"more than {max_length} tokens, which with a completion would exceed max_length"
        elif distinct and key in seen:
            reason = "repeated"
        else:
            seen.add(key)
            prompts.append(Prompt(prompt, ids, {name: value for name, value in row.items() if name != "prompt"}))
            continue
        report.drop(index, reason)
    report.close(prompts, "tokenize_prompts: rows must hold at least one usable prompt", "prompt")
    return prompts, report


def room_for_prompt(recipe: str, max_length: int | None, new_tokens: int) -> int | None:
    """Tokens of the longest prompt beside `new_tokens` within max_length; None: no limit. No room is a ValueError."""
    room = None if max_length is None else max_length - new_tokens
    if room is not None and room < 1:
        raise ValueError(
            f"{recipe}: max_length must leave room for a prompt beside {new_tokens} new tokens; got {max_length}"
        )
    return room


def load_prompts(
    options: TrainOptions, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None], *, new_tokens: int
) -> tuple[list[Prompt], list[Prompt]]:
    """(prompts to train on, held-out prompts) that leave room for `new_tokens` within max_length."""
    room = room_for_prompt(options.recipe, options.max_length, new_tokens)
    return load_items(
        options,
        say,
        columns=prompt_columns,
        tokenize=lambda rows: tokenize_prompts(rows, tokenizer, max_length=room),
        demo=lambda size: _demo_prompts(options.seed, size),
    )


def _demo_prompts(seed: int, held_out: int) -> tuple[Sequence[Any], Sequence[Any]]:
    """`Review of the movie ...:`, each film once."""
    both = demo_pairs(seed=seed, held_out=held_out)
    train, test = ([{"prompt": p} for p in dict.fromkeys(row["prompt"] for row in rows)] for rows in both)
    return train, test
