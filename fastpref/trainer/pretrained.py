"""What is read from a folder or the hub: a model, a tokenizer, a configuration."""

from pathlib import Path
from typing import Any


def from_pretrained(auto: Any, name: str, recipe: str, **options: Any) -> Any:
    """auto.from_pretrained(name, **options); a ValueError names recipe and folder where that cannot be."""
    try:
        return auto.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        what = {"AutoTokenizer": "tokenizer", "AutoConfig": "configuration"}.get(auto.__name__, "model")
        is_path = Path(name).is_absolute() or name.startswith((".", "~"))
        why = "no such folder" if is_path and not Path(name).exists() else str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{recipe}: no {what} to be had from {name!r} ({why}). Wanted: a hub name, or a folder with config.json, "
            "weights and the tokenizer's files, as save_pretrained writes them"
        ) from error


def is_adapter(name: str | Path) -> bool:
    """Whether this is the folder of a peft adapter."""
    return (Path(name) / "adapter_config.json").is_file()
