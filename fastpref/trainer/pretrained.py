"""What is read from a folder or the hub: a model, a tokenizer, a configuration."""

import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings)\b")  # tables of one vector a position
TOKENS = ("prompt_ids", "completion_ids", "chosen_ids", "rejected_ids")  # of an item, those that it has


def from_pretrained(auto: Any, name: str, recipe: str, **options: Any) -> Any:
    """auto.from_pretrained(name, **options); a ValueError names recipe and folder where that cannot be."""
    try:
        return auto.from_pretrained(name, **options)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        # ImportError: of a package that its code or its attention needs; RuntimeError: weights of another shape
        what = {"AutoTokenizer": "tokenizer", "AutoConfig": "configuration"}.get(auto.__name__, "model")
        is_path = Path(name).is_absolute() or name.startswith((".", "~"))
        why = "no such folder" if is_path and not Path(name).exists() else str(error).strip().partition("\n")[0]
        if "trust_remote_code" in str(error):
            why = "it brings Python code of its own, which runs with --trust_remote_code only"
        raise ValueError(
            f"{recipe}: no {what} to be had from {name!r} ({why}). Wanted: a hub name, or a folder with config.json, "
            "weights and the tokenizer's files, as save_pretrained writes them"
        ) from error


def is_adapter(name: str | Path) -> bool:
    """Whether this is the folder of a peft adapter."""
    return (Path(name) / "adapter_config.json").is_file()


def check_vocabulary(recipe: str, model: Any, items: Iterable[Any]) -> None:
    """A ValueError if an item has a token that the model has no embedding of."""
    known = model.get_input_embeddings().weight.shape[0]
    largest = max(max(getattr(item, name, ()), default=0) for item in items for name in TOKENS)
    if largest >= known:
        raise ValueError(
            f"{recipe}: the model has embeddings of {known:,} tokens, and the tokenizer makes token {largest:,}: it is "
            "another model's, or tokens were added to it without model.resize_token_embeddings(len(tokenizer))"
        )


def check_positions(recipe: str, model: Any, longest: int, new_tokens: int = 0) -> None:
    """A ValueError if a sequence is longer than the model's table of positions; without one any length will do.

    longest: tokens of the longest sequence as it is read; new_tokens: those that are drawn after it.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    named = chain(model.named_parameters(), model.named_buffers())
    tables = (name for name, table in named if table.ndim == 2 and POSITIONS.search(name))
    if limit and longest + new_tokens > limit and (name := next(tables, None)):
        drawn = f" and {new_tokens:,} to be drawn" if new_tokens else ""
        what = "with fewer to be drawn, " if new_tokens else ""
        raise ValueError(
            f"{recipe}: the model has {limit:,} positions ({name}), and a sequence of {longest:,} tokens{drawn} does "
            f"not fit; {what}--max_length {limit} cuts such sequences, or leaves them out"
        )
