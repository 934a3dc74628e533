"""Preference rows to token ids to batches: what every preference recipe reads.

    rows = load_preferences("pairs.jsonl")            # a file, a folder, or a hub name
    pairs, report = tokenize_pairs(rows, tokenizer)   # list[Pair], and what was dropped or cut
    batch = PairCollator(pad_token_id)(pairs[:4])     # tensors (8, T): 4 chosen, then 4 rejected

The row formats, and where a completion starts, are those of TRL 1.16's DPOTrainer.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastpref.trainer.data_files import load_preferences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Pair", "PairCollator", "TokenizeReport", "load_preferences", "tokenize_pairs"]

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference as token ids: the sequences are prompt + chosen and prompt + rejected."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclass
class TokenizeReport:
    """What `tokenize_pairs` kept, cut and dropped. `str()` is one paragraph for the user."""

    rows: int = 0
    kept: int = 0
    truncated: int = 0  # kept pairs with a completion cut at max_length
    shifted: int = 0  # kept pairs whose completion starts before the end of the tokenized prompt
    dropped: dict[str, list[int]] = field(default_factory=dict)  # reason -> row indices
    prompt_tokens: float = 0.0  # means over the kept pairs, as are the next two
    chosen_tokens: float = 0.0
    rejected_tokens: float = 0.0

    def __str__(self) -> str:
        parts = [
            f"{self.kept} of {self.rows} rows kept; mean tokens: prompt {self.prompt_tokens:.1f}, "
            f"chosen {self.chosen_tokens:.1f}, rejected {self.rejected_tokens:.1f}."
        ]
        if self.truncated:
            parts.append(f"{self.truncated} cut to max_length.")
        if self.shifted:
            parts.append(
                f"In {self.shifted} the last tokens of the prompt differ once a completion follows "
                "(they merge, or the chat template renders them differently) and count as completion."
            )
        parts += [
            f"{len(rows)} dropped: {reason} (first: row {rows[0]})." for reason, rows in sorted(self.dropped.items())
        ]
        return " ".join(parts)


def tokenize_pairs(
    rows: Iterable[Mapping[str, Any]], tokenizer: "PreTrainedTokenizerBase", *, max_length: int | None = 1024
) -> tuple[list[Pair], TokenizeReport]:
    """Pairs of token ids, in the order of the rows, and a report of what was cut or dropped.

    A row holds chosen and rejected, each a text or a list of messages, and usually prompt of the same kind. Without a
    prompt, what both share from their start is the prompt. A text prompt beside conversations is taken for a copy of
    their opening. Message rows may carry `tools` and `chat_template_kwargs` for the template.

    The completion starts where prompt and prompt + completion, both tokenized, part. A text completion ends with EOS,
    appended where it is absent; a conversation ends as its chat template ends it. BOS is the tokenizer's affair.

    Dropped and counted: an empty (or blank) completion, a chosen equal to its rejected, and a row with no completion
    token to predict, mostly a prompt that fills max_length.

    Args:
        rows: mappings, such as `load_preferences` returns.
        tokenizer: a transformers tokenizer; rows of messages need its chat template, rows of text its EOS token.
        max_length: prompt + completion is cut to this many tokens, the start kept; None: no limit.
    Raises:
        ValueError: a malformed row (named by its index), messages without a chat template, a tokenizer without EOS, no
            row left, or max_length < 2.
    """
    if max_length is not None and max_length < 2:
        raise ValueError(f"tokenize_pairs: max_length must be None or at least 2; got {max_length}")
    pairs: list[Pair] = []
    report = TokenizeReport()
    for index, row in enumerate(rows):
        report.rows += 1
        where = f"tokenize_pairs: row {index}"
        prompt, chosen, rejected = _split(row, where)
        if _is_empty(chosen) or _is_empty(rejected):
            report.dropped.setdefault("an empty completion", []).append(index)
            continue
        whole, shifted = _encode_row(prompt, chosen, rejected, tokenizer, row, where)
        pair = _truncate(whole, max_length)
        if not _scored(pair, pair.chosen_ids) or not _scored(pair, pair.rejected_ids):
            report.dropped.setdefault(f"no completion token within max_length={max_length}", []).append(index)
        elif pair.chosen_ids == pair.rejected_ids:
            report.dropped.setdefault("chosen and rejected identical", []).append(index)
        else:
            pairs.append(pair)
            report.truncated += pair != whole
            report.shifted += shifted
    report.kept = len(pairs)
    if not pairs:
        raise ValueError(f"tokenize_pairs: rows must hold at least one usable pair; {report}")
    report.prompt_tokens = sum(len(p.prompt_ids) for p in pairs) / len(pairs)
    report.chosen_tokens = sum(len(p.chosen_ids) for p in pairs) / len(pairs)
    report.rejected_tokens = sum(len(p.rejected_ids) for p in pairs) / len(pairs)
    return pairs, report


@dataclass(frozen=True)
class PairCollator:
    """Turns B pairs into a batch: `PairCollator(pad_token_id)(pairs)`.

    Returns a dict of int64 tensors (2B, T), rows 0..B-1 the chosen and B..2B-1 the rejected, padded on the right to the
    longest sequence:
        input_ids: prompt + completion, then pad_token_id.
        attention_mask: 1 on the sequence, 0 on the padding.
        targets: targets[i, t] = input_ids[i, t + 1] where position t + 1 is completion, else -100.
    Raises:
        ValueError: no pairs. TypeError: pad_token_id is not an int.
    """

    pad_token_id: int

    def __post_init__(self) -> None:
        if not isinstance(self.pad_token_id, int):
            raise TypeError(
                f"PairCollator: pad_token_id must be an int; got {self.pad_token_id!r} "
                "(a tokenizer without a pad token can pad with its EOS)"
            )

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        if not pairs:
            raise ValueError("PairCollator: pairs must hold at least one pair; got none")
        sequences = [(p.prompt_ids, p.chosen_ids) for p in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs]
        longest = max(len(prompt) + len(completion) for prompt, completion in sequences)
        input_ids = torch.full((len(sequences), longest), self.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        targets = torch.full_like(input_ids, IGNORE_INDEX)
        for i, (prompt, completion) in enumerate(sequences):
            ids = torch.tensor(prompt + completion)
            start = max(len(prompt), 1)  # nothing predicts the first token of all
            input_ids[i, : len(ids)] = ids
            attention_mask[i, : len(ids)] = 1
            targets[i, start - 1 : len(ids) - 1] = ids[start:]
        return {"input_ids": input_ids, "attention_mask": attention_mask, "targets": targets}


def _split(row: Mapping[str, Any], where: str) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected) of a row, all three texts or all three lists of messages."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} must be a mapping with chosen and rejected; got {type(row).__name__}")
    prompt: Any = row.get("prompt")
    chosen: Any = row.get("chosen")
    rejected: Any = row.get("rejected")
    kind = _kind("chosen", chosen, where)
    if _kind("rejected", rejected, where) != kind:
        raise ValueError(f"{where}: chosen and rejected must both be text or both be messages; chosen is {kind}")
    if prompt is None or (isinstance(prompt, str) and kind == "messages"):
        n = min(_common_prefix(chosen, rejected), max(min(len(chosen), len(rejected)) - 1, 0))
        if kind == "messages" and n == 0:
            raise ValueError(
                f"{where}: without a prompt of messages, chosen and rejected must start with the same message; "
                f"got {chosen[:1]} and {rejected[:1]}"
            )
        if kind == "text" and chosen[n - 1 : n] == " ":
            n -= 1  # a word's leading space is part of its token
        return chosen[:n], chosen[n:], rejected[n:]
    if _kind("prompt", prompt, where) != kind:
        raise ValueError(f"{where}: prompt must be {kind}, as chosen and rejected are; got {type(prompt).__name__}")
    if kind == "messages" and not prompt:
        raise ValueError(f"{where}: prompt must hold at least one message; got none")
    if kind == "messages" and prompt in (chosen[: len(prompt)], rejected[: len(prompt)]):
        raise ValueError(
            f"{where}: chosen and rejected must not repeat the prompt's messages; leave out the prompt column"
        )
    return prompt, chosen, rejected


def _kind(name: str, value: Any, where: str) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and ("content" in m or "tool_calls" in m)
        for m in value
    ):
        return "messages"
    got = repr(value)
    raise ValueError(
        f"{where}: {name} must be a text or a list of messages, each with role and content; "
        f"got {type(value).__name__} {got if len(got) <= 120 else got[:120] + '...'}"
    )


def _is_empty(completion: str | list[Mapping[str, Any]]) -> bool:
    if isinstance(completion, str):
        return not completion.strip()
    return not any(str(m.get("content") or "").strip() or m.get("tool_calls") for m in completion)


def _encode_row(
    prompt: Any,
    chosen: Any,
    rejected: Any,
    tokenizer: "PreTrainedTokenizerBase",
    row: Mapping[str, Any],
    where: str,
) -> tuple[Pair, bool]:
    """The pair, uncut, and whether its completions start before the tokenized prompt ends."""
    if isinstance(prompt, str):
        prompt_ids = _encode_text(prompt, tokenizer)
        with_chosen = _with_eos(_encode_text(prompt + chosen, tokenizer), tokenizer)
        with_rejected = _with_eos(_encode_text(prompt + rejected, tokenizer), tokenizer)
    else:
        options = _template_options(row, where)
        prompt_ids = _encode_chat(prompt, tokenizer, where, add_generation_prompt=True, **options)
        with_chosen = _encode_chat(prompt + chosen, tokenizer, where, **options)
        with_rejected = _encode_chat(prompt + rejected, tokenizer, where, **options)
    start = min(_common_prefix(prompt_ids, with_chosen), _common_prefix(prompt_ids, with_rejected))
    return Pair(prompt_ids[:start], with_chosen[start:], with_rejected[start:]), start < len(prompt_ids)


def _template_options(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    tools, more = row.get("tools"), row.get("chat_template_kwargs") or {}
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError as error:
        raise ValueError(f"{where}: tools must be a list of tools, or that list as JSON; {error}") from error
    if not isinstance(more, Mapping):
        raise ValueError(f"{where}: chat_template_kwargs must be a mapping; got {type(more).__name__}")
    return {"tools": tools or None, **more}


def _encode_text(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    return list(tokenizer(text, verbose=False)["input_ids"])  # verbose warns of a length that is cut later


def _with_eos(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenize_pairs: tokenizer must have an EOS token to end text completions; set eos_token")
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def _encode_chat(messages: Any, tokenizer: "PreTrainedTokenizerBase", where: str, **options: Any) -> list[int]:
    from jinja2 import TemplateError

    if tokenizer.chat_template is None and "chat_template" not in options:
        raise ValueError(
            f"{where} holds messages, which need a tokenizer with a chat template; got one without. Take the instruct "
            "or chat variant of the model, set tokenizer.chat_template, or give prompt, chosen and rejected as text"
        )
    try:
        encoded: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    except TemplateError as error:
        raise ValueError(f"{where}: the chat template refuses these messages: {error}") from error
    return list(encoded["input_ids"])


def _common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many leading items two sequences share."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def _truncate(pair: Pair, max_length: int | None) -> Pair:
    if max_length is None:
        return pair
    room = max(max_length - len(pair.prompt_ids), 0)
    return Pair(pair.prompt_ids, pair.chosen_ids[:room], pair.rejected_ids[:room])


def _scored(pair: Pair, completion: list[int]) -> int:
    """How many completion tokens have a predecessor to be predicted from."""
    return len(completion) if pair.prompt_ids else len(completion) - 1
