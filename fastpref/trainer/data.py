"""Preference rows to token ids: what the recipes of pairs read.

    rows = load_preferences("pairs.jsonl")               # a file, a folder, or a hub name
    pairs, report = tokenize_pairs(rows, tokenizer)      # list[Pair], and what was dropped or cut
    batch = collate(sequences_of(pairs[:4]), pad_id)     # tensors (8, T): 4 chosen, then 4 rejected

The row formats, and where a completion starts, are those of TRL 1.16's DPOTrainer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from fastpref.trainer.collate import PromptAndCompletion
from fastpref.trainer.data_files import load_rows, place_of
from fastpref.trainer.data_report import DataReport
from fastpref.trainer.encode import common_prefix, encode, is_empty, kind_of, scored

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Pair", "load_preferences", "pair_columns", "sequences_of", "tokenize_pairs"]


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference as token ids: the sequences are prompt + chosen and prompt + rejected."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float | None = None  # how much better the chosen is, in units of reward, for a reward model

    @property
    def n_tokens(self) -> int:
        """Tokens as a model reads them: the prompt counts twice."""
        return 2 * len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)

    @property
    def longest(self) -> int:
        """Tokens of the longer sequence."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


def sequences_of(pairs: Sequence[Pair]) -> list[PromptAndCompletion]:
    """The 2B sequences of B pairs: the chosen, then the rejected."""
    chosen = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    return chosen + [(pair.prompt_ids, pair.rejected_ids) for pair in pairs]


def pair_columns(names: Sequence[str]) -> str | None:
    """None if rows of these columns hold pairs, else what is wanted."""
    wanted = "chosen and rejected, and prompt unless both start with it"
    return None if "chosen" in names and "rejected" in names else wanted


load_preferences = partial(load_rows, columns=pair_columns)


def tokenize_pairs(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None = 1024,
    too_long: Literal["cut", "drop"] = "cut",
) -> tuple[list[Pair], DataReport]:
    """Pairs of token ids, in the order of the rows, and a report of what was cut or dropped.

    A row holds chosen and rejected, each a text or a list of messages, and usually prompt of the same kind. Without a
    prompt, what both share from their start is the prompt. A text prompt beside conversations is taken for a copy of
    their opening. Message rows may have `tools` and `chat_template_kwargs` for the template, any row `margin`.

    The completion starts where prompt and prompt + completion, both tokenized, part. A text completion ends with EOS,
    appended where it is absent; a conversation ends as its chat template ends it. BOS is the tokenizer's affair.

    Dropped and counted: an empty (or blank) completion, a chosen equal to its rejected, and a row with no completion
    token to predict, mostly a prompt that fills max_length.

    Args:
        rows: mappings, such as `load_preferences` returns.
        tokenizer: a transformers tokenizer; rows of messages need its chat template, rows of text its EOS token.
        max_length: prompt + completion is cut to this many tokens, the start kept; None: no limit.
        too_long: "drop" leaves out a pair with a longer sequence: a score of half an answer is of something else.
    Raises:
        ValueError: a malformed row (named by file and line, or its index), messages without a chat template, a
            tokenizer without EOS, no row left, or max_length < 2.
    """
    if max_length is not None and max_length < 2:
        raise ValueError(f"tokenize_pairs: max_length must be None or at least 2; got {max_length}")
    pairs: list[Pair] = []
    report = DataReport()
    for index, row in enumerate(rows):
        report.rows += 1
        where = f"tokenize_pairs: {place_of(rows, index)}"
        prompt, chosen, rejected = split_pair(row, where)
        if is_empty(chosen) or is_empty(rejected):
            report.drop(index, "an empty completion")
            continue
        prompt_ids, (chosen_ids, rejected_ids), shifted = encode(prompt, (chosen, rejected), tokenizer, row, where)
        whole = Pair(prompt_ids, chosen_ids, rejected_ids, _margin(row, where))
        pair = _truncate(whole, max_length)
        if pair != whole and too_long == "drop":
            report.drop(index, f"longer than max_length={max_length}")
            continue
        if not scored(pair.prompt_ids, pair.chosen_ids) or not scored(pair.prompt_ids, pair.rejected_ids):
            report.drop(index, f"no completion token within max_length={max_length}")
        elif pair.chosen_ids == pair.rejected_ids:
            report.drop(index, "chosen and rejected identical")
        else:
            pairs.append(pair)
            report.truncated += pair != whole
            report.shifted += shifted
    report.close(pairs, "tokenize_pairs: rows must hold at least one usable pair", "prompt", "chosen", "rejected")
    return pairs, report


def split_pair(row: Mapping[str, Any], where: str) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected) of a row, all three texts or all three lists of messages."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} must be a mapping with chosen and rejected; got {type(row).__name__}")
    prompt: Any = row.get("prompt")
    chosen: Any = row.get("chosen")
    rejected: Any = row.get("rejected")
    kind = kind_of("chosen", chosen, where)
    if kind_of("rejected", rejected, where) != kind:
        raise ValueError(f"{where}: chosen and rejected must both be text or both be messages; chosen is {kind}")
    if prompt is None or (isinstance(prompt, str) and kind == "messages"):
        n = min(common_prefix(chosen, rejected), max(min(len(chosen), len(rejected)) - 1, 0))
        if kind == "messages" and n == 0:
            raise ValueError(
                f"{where}: without a prompt of messages, chosen and rejected must start with the same message; "
                f"got {chosen[:1]} and {rejected[:1]}"
            )
        if kind == "text" and chosen[n - 1 : n] == " ":
            n -= 1  # a word's leading space is part of its token
        return chosen[:n], chosen[n:], rejected[n:]
    if kind_of("prompt", prompt, where) != kind:
        raise ValueError(f"{where}: prompt must be {kind}, as chosen and rejected are; got {type(prompt).__name__}")
    if kind == "messages" and not prompt:
        raise ValueError(f"{where}: prompt must hold at least one message; got none")
    if kind == "messages" and prompt in (chosen[: len(prompt)], rejected[: len(prompt)]):
        raise ValueError(
            f"{where}: chosen and rejected must not repeat the prompt's messages; leave out the prompt column"
        )
    return prompt, chosen, rejected


def _margin(row: Mapping[str, Any], where: str) -> float | None:
    margin = row.get("margin")
    if margin is not None and (isinstance(margin, bool) or not isinstance(margin, int | float)):
        raise ValueError(f"{where}: margin must be a number; got {margin!r}")
    return margin


def _truncate(pair: Pair, max_length: int | None) -> Pair:
    if max_length is None:
        return pair
    room = max(max_length - len(pair.prompt_ids), 0)
    return replace(pair, chosen_ids=pair.chosen_ids[:room], rejected_ids=pair.rejected_ids[:room])
