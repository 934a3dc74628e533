"""A prompt and its completion, text or messages, to token ids; where a completion starts is TRL 1.16's rule."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def kind_of(name: str, value: Any, where: str) -> str:
    """ "text" or "messages"; anything else is a ValueError."""
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


def is_empty(completion: str | list[Mapping[str, Any]]) -> bool:
    if isinstance(completion, str):
        return not completion.strip()
    return not any(str(m.get("content") or "").strip() or m.get("tool_calls") for m in completion)


def encode(
    prompt: Any,
    completions: Sequence[Any],
    tokenizer: "PreTrainedTokenizerBase",
    row: Mapping[str, Any],
    where: str,
) -> tuple[list[int], list[list[int]], bool]:
    """(ids of the prompt, ids of each completion, whether they start before the tokenized prompt ends).

    Prompt and completions are all texts or all lists of messages. The completions start where the prompt, tokenized
    alone, parts from any prompt + completion. A text ends with EOS; a conversation as its chat template ends it.
    """
    if isinstance(prompt, str):
        prompt_ids = encode_text(prompt, tokenizer)
        wholes = [with_eos(encode_text(prompt + completion, tokenizer), tokenizer) for completion in completions]
    else:
        options = template_options(row, where)
        prompt_ids = encode_chat(prompt, tokenizer, where, add_generation_prompt=True, **options)
        wholes = [encode_chat(prompt + completion, tokenizer, where, **options) for completion in completions]
    start = min(common_prefix(prompt_ids, whole) for whole in wholes)
    return prompt_ids[:start], [whole[start:] for whole in wholes], start < len(prompt_ids)


def template_options(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a row says to its chat template: tools, and chat_template_kwargs."""
    tools, more = row.get("tools"), row.get("chat_template_kwargs") or {}
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError as error:
        raise ValueError(f"{where}: tools must be a list of tools, or that list as JSON; {error}") from error
    if not isinstance(more, Mapping):
        raise ValueError(f"{where}: chat_template_kwargs must be a mapping; got {type(more).__name__}")
    return {"tools": tools or None, **more}


def encode_text(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    return list(tokenizer(text, verbose=False)["input_ids"])  # verbose warns of a length that is cut later


def with_eos(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    if tokenizer.eos_token_id is None:
        raise ValueError("with_eos: tokenizer must have an EOS token to end text completions; set eos_token")
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def encode_chat(messages: Any, tokenizer: "PreTrainedTokenizerBase", where: str, **options: Any) -> list[int]:
    return list(_through_template(messages, tokenizer, where, **options)["input_ids"])


def encode_turns(
    messages: Any, tokenizer: "PreTrainedTokenizerBase", where: str, **options: Any
) -> tuple[list[int], list[bool]]:
    """(ids of a conversation, whether the assistant said each), by the generation marks of its chat template."""
    found = _through_template(messages, tokenizer, where, return_assistant_tokens_mask=True, **options)
    mask = [bool(said) for said in found["assistant_masks"]]
    template = options.get("chat_template") or tokenizer.get_chat_template(tools=options.get("tools"))
    if not any(mask) and not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        raise ValueError(
            f"{where}: assistant_only_loss needs a chat template that marks what the assistant says; got one without "
            "{% generation %} ... {% endgeneration %}. Add them around its answers in tokenizer.chat_template, or give "
            "rows of prompt and completion"
        )
    return list(found["input_ids"]), mask


def _through_template(messages: Any, tokenizer: "PreTrainedTokenizerBase", where: str, **options: Any) -> Any:
    from jinja2 import TemplateError

    if tokenizer.chat_template is None and "chat_template" not in options:
        raise ValueError(
            f"{where} holds messages, which need a tokenizer with a chat template; got one without. Take the instruct "
            "or chat variant of the model, set tokenizer.chat_template, or give prompt and completions as text"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    except TemplateError as error:
        raise ValueError(f"{where}: the chat template refuses these messages: {error}") from error


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many leading items two sequences share."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def scored(prompt_ids: list[int], completion_ids: list[int]) -> int:
    """How many completion tokens have a predecessor to be predicted from."""
    return len(completion_ids) if prompt_ids else max(len(completion_ids) - 1, 0)
