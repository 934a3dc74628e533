"""What a resumed run must have in common with the one that wrote its checkpoint: options, data, processes."""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import reduce
from typing import Any

from fastpref.trainer.config import name_of

# What may differ: where the run goes and who watches, not what it computes
MAY_CHANGE = "output_dir overwrite_output_dir resume_from_checkpoint save_strategy save_steps save_total_limit".split()
MAY_CHANGE += ["report_to", "run_name"]


def identity(options: Any, data: Sequence[Iterable[Any]], processes: int) -> dict[str, Any]:
    """What must be equal for a resumed run to go on as if nothing had happened; data: the items, the held-out items."""
    names = [field.name for field in fields(options) if field.name not in MAY_CHANGE]
    own = {name: _named(getattr(options, name)) for name in names}
    return {**own, "processes": processes, "data checksum": "".join(f"{checksum(items):08x}" for items in data)}


def checksum(items: Iterable[Any]) -> int:
    """CRC-32 of the items' texts, one at a time: the text of a whole data set would be many times as large as it."""
    return reduce(lambda crc, item: zlib.crc32(f"{item!r}\n".encode(), crc), items, 0)


def differences(now: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """`name then (now value)` of what is not as the state remembers it."""
    then = state["identity"]
    return [f"{key} {then.get(key)} (now {value})" for key, value in now.items() if then.get(key) != value]


def _named(value: Any) -> Any:
    """A function by its name, and what else a checkpoint cannot hold as text."""
    if isinstance(value, list | tuple):
        return [_named(one) for one in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    return name_of(value) if callable(value) else str(value)
