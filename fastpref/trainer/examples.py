"""Rows of prompt and completion, texts or conversations to token ids: what `sft` and `kto` read.

    examples, report = tokenize_examples(rows, tokenizer)      # sft: prompt + completion, messages, or text
    examples, report = tokenize_labelled(rows, tokenizer)      # kto: prompt + completion + label, or pairs taken apart

The row formats, and where a completion starts, are those of TRL 1.16's SFTTrainer and KTOTrainer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastpref.trainer.data import split_pair
from fastpref.trainer.data_files import place_of
from fastpref.trainer.data_report import DataReport
from fastpref.trainer.encode import (
    common_prefix,
    encode,
    encode_chat,
    encode_text,
    encode_turns,
    is_empty,
    kind_of,
    scored,
    template_options,
    with_eos,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SHAREGPT = {"human": "user", "gpt": "assistant"}  # who speaks, in the words of chat templates


@dataclass(frozen=True, slots=True)
class Example:
    """A sequence prompt + completion as token ids."""

    prompt_ids: list[int]
    completion_ids: list[int]
    desirable: bool | None = None  # KTO's label
    learned: list[bool] | None = None  # which tokens of the completion are; None: all

    @property
    def n_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    longest = n_tokens

    @property
    def n_scored(self) -> int:
        """Completion tokens that are predicted and learned."""
        n = scored(self.prompt_ids, self.completion_ids)
        return n if self.learned is None else sum(self.learned[len(self.completion_ids) - n :])


def example_columns(names: Sequence[str], *, text_field: str = "text") -> str | None:
    """None if rows of these columns are for `sft`, else what is wanted."""
    there = {text_field, "messages", "conversations"} & {*names} or {"prompt", "completion"} <= {*names}
    return None if there else f"prompt and completion, or messages, or {text_field}"


def labelled_columns(names: Sequence[str]) -> str | None:
    """None if rows of these columns are for `kto`, else what is wanted."""
    there = {"prompt", "completion", "label"} <= {*names} or {"chosen", "rejected"} <= {*names}
    return None if there else "prompt, completion and label; or pairs: chosen and rejected"


def tokenize_examples(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None = 1024,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    text_field: str = "text",
) -> tuple[list[Example], DataReport]:
    """Examples for `sft`, in the order of the rows, and a report of what was cut or dropped.

    A row holds prompt and completion, both text or both messages; or messages, or conversations as ShareGPT has them;
    or text. Text ends with EOS, a conversation as its chat template ends it. Without a completion everything counts as
    one.

    Dropped and counted: an empty completion, text or conversation, and what has no token to predict within max_length.

    Args:
        max_length: an example is cut to this many tokens, the start kept; None: no limit.
        completion_only_loss: True: rows without a completion are refused. False: only with assistant_only_loss, whose
            answers then are those of the prompt too.
        assistant_only_loss: of messages, what the assistant says is learned, as the chat template marks it; text is
            refused.
        text_field: the column that holds text.
    Raises:
        ValueError: a malformed row (named by file and line, or its index), messages without a chat template or, with
            assistant_only_loss, its marks, a tokenizer without EOS, no row left, or max_length < 2.
    """
    fn = "tokenize_examples"
    kept = _Kept(fn, max_length)
    for index, row in enumerate(rows):
        where = f"{fn}: {place_of(rows, index)}"
        if not isinstance(row, Mapping):
            raise ValueError(f"{where} must be a mapping; got {type(row).__name__}")
        if isinstance(row.get("conversations"), list) and row.get("messages") is None:
            row = {**row, "messages": [_message(turn) for turn in row["conversations"]]}
        # a prompt beside whole conversations is a copy of their opening, as in ultrachat_200k
        alone = row.get("messages") is None and row.get(text_field) is None
        if row.get("completion") is not None or (row.get("prompt") is not None and alone):
            prompt, completion = _prompt_and_completion(row, where)
            if not assistant_only_loss:
                kept.add(index, prompt, completion, tokenizer, row, where)
            else:
                whole = _turns(prompt, completion, tokenizer, row, where, prompt_too=completion_only_loss is False)
                kept.keep(index, whole, False)
            continue
        if completion_only_loss:
            raise ValueError(f"{where}: completion_only_loss wants prompt and completion; got {', '.join(row)}")
        name = "messages" if row.get("messages") is not None else text_field
        content = row.get(name)
        kind = kind_of(name, content, where)
        if is_empty(content):  # type: ignore[arg-type]  # kind_of refused all else
            kept.drop(index, f"{'an empty text' if kind == 'text' else 'an empty conversation'}")
        elif assistant_only_loss:
            kept.keep(index, _turns([], content, tokenizer, row, where), False)
        elif kind == "text":
            kept.keep(index, Example([], with_eos(encode_text(str(content), tokenizer), tokenizer)), False)
        else:
            options = template_options(row, where)
            kept.keep(index, Example([], encode_chat(content, tokenizer, where, **options)), False)
    return kept.all()


def tokenize_labelled(
    rows: Iterable[Mapping[str, Any]], tokenizer: "PreTrainedTokenizerBase", *, max_length: int | None = 1024
) -> tuple[list[Example], DataReport]:
    """Examples for `kto`, in the order of the rows, and a report of what was cut or dropped.

    A row holds prompt, completion (both text or both messages) and label, true if the completion is desirable. Pairs
    are taken apart: all chosen as desirable, then all rejected as undesirable, as TRL does. Else as
    `tokenize_examples`.
    """
    fn = "tokenize_labelled"
    kept = _Kept(fn, max_length)
    rejected: list[tuple[int, Any, Any, Mapping[str, Any], str]] = []
    for index, row in enumerate(rows):
        where = f"{fn}: {place_of(rows, index)}"
        if isinstance(row, Mapping) and row.get("completion") is None:
            prompt, better, worse = split_pair(row, where)
            if better == worse:
                kept.drop(index, "chosen and rejected identical")
                continue
            kept.add(index, prompt, better, tokenizer, row, where, desirable=True)
            rejected.append((index, prompt, worse, row, where))
            continue
        prompt, completion = _prompt_and_completion(row, where)
        label = row.get("label")
        if not isinstance(label, bool):
            raise ValueError(f"{where}: label must be true or false; got {label!r}")
        kept.add(index, prompt, completion, tokenizer, row, where, desirable=label)
    for index, prompt, worse, row, where in rejected:
        kept.add(index, prompt, worse, tokenizer, row, where, desirable=False)
    kept.report.desirable = sum(bool(example.desirable) for example in kept.examples)
    return kept.all()


class _Kept:
    """The examples so far and the report on them."""

    def __init__(self, fn: str, max_length: int | None) -> None:
        if max_length is not None and max_length < 2:
            raise ValueError(f"{fn}: max_length must be None or at least 2; got {max_length}")
        self.fn, self.max_length = fn, max_length
        self.examples: list[Example] = []
        self.report = DataReport()

    def add(
        self,
        index: int,
        prompt: Any,
        completion: Any,
        tokenizer: "PreTrainedTokenizerBase",
        row: Mapping[str, Any],
        where: str,
        desirable: bool | None = None,
    ) -> None:
        if is_empty(completion):
            self.drop(index, "an empty completion")
            return
        prompt_ids, (completion_ids,), shifted = encode(prompt, [completion], tokenizer, row, where)
        self.keep(index, Example(prompt_ids, completion_ids, desirable), shifted)

    def keep(self, index: int, whole: Example, shifted: bool) -> None:
        """Keeps an example, cut, unless nothing of it is predicted."""
        room = None if self.max_length is None else max(self.max_length - len(whole.prompt_ids), 0)
        learned = None if whole.learned is None else whole.learned[:room]
        example = replace(whole, completion_ids=whole.completion_ids[:room], learned=learned)
        if not example.n_scored:
            what = "completion" if whole.learned is None else "assistant"
            self.drop(index, f"no {what} token within max_length={self.max_length}")
            return
        self.report.rows += 1
        self.examples.append(example)
        self.report.truncated += example != whole
        self.report.shifted += shifted

    def drop(self, index: int, reason: str) -> None:
        self.report.rows += 1
        self.report.drop(index, reason)

    def all(self) -> tuple[list[Example], DataReport]:
        self.report.close(
            self.examples, f"{self.fn}: rows must hold at least one usable example", "prompt", "completion"
        )
        return self.examples, self.report


def _message(turn: Any) -> Any:
    """A turn of ShareGPT's, {"from": "human", "value": text}, as a message; what is none as it is, to be refused."""
    if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
        return turn
    return {"role": SHAREGPT.get(turn["from"], turn["from"]), "content": turn["value"]}


def _turns(
    prompt: Any,
    completion: Any,
    tokenizer: "PreTrainedTokenizerBase",
    row: Mapping[str, Any],
    where: str,
    *,
    prompt_too: bool = True,
) -> Example:
    """What the assistant says first, and all that follows, as a completion of which its tokens are learned."""
    if isinstance(completion, str):
        raise ValueError(f"{where}: assistant_only_loss wants messages; got text")
    options = template_options(row, where)
    ids, said = encode_turns(prompt + completion, tokenizer, where, **options)
    if not prompt_too:
        alone = encode_chat(prompt, tokenizer, where, add_generation_prompt=True, **options)
        before = common_prefix(alone, ids)
        said = [False] * before + said[before:]
    start = said.index(True) if True in said else len(ids)
    return Example(ids[:start], ids[start:], learned=said[start:])


def _prompt_and_completion(row: Any, where: str) -> tuple[Any, Any]:
    """Both texts, or both lists of messages."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} must be a mapping with prompt and completion; got {type(row).__name__}")
    prompt, completion = row.get("prompt"), row.get("completion")
    kind = kind_of("completion", completion, where)
    if kind_of("prompt", prompt, where) != kind:
        raise ValueError(f"{where}: prompt must be {kind}, as completion is; got {type(prompt).__name__}")
    if kind == "messages" and not prompt:
        raise ValueError(f"{where}: prompt must hold at least one message; got none")
    return prompt, completion
