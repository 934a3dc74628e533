"""Checkpoints: a folder is whole or it is not there.

A checkpoint is filled under another name, then given its own by one rename. Its `manifest.json` lists each file with
size and CRC-32, so one that lost something later (a copy cut short, a bad disk) is recognised and passed over.
"""

import json
import os
import random
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError

MANIFEST = "manifest.json"
BLOCK = 1 << 20  # bytes read at once
# what torch.save and safetensors say, not as an OSError, when a write fails
FAILED_WRITES = ("inline_container", "PytorchStreamWriter", "I/O error")


def save_state(
    accelerator: Accelerator,
    folder: Path,
    state: dict[str, Any],
    parts: dict[str, Any],
    save_model: Callable[[Path], None],
    limit: int | None,
) -> None:
    """Writes `folder`/checkpoint-STEP: the model, and in `state.pt` all else that the next step depends on.

    Every process calls this; the main one writes, then removes all but the last `limit` checkpoints.
    Args:
        state: numbers, texts, tensors, and dicts and lists of them; its "step" names the checkpoint.
        parts: what has a state_dict: optimizer, scheduler, ...
    """
    generators = gather_object([_random_state(accelerator.device)])  # each process has its own
    saved = {name: part.state_dict() for name, part in parts.items()}  # which under FSDP2 all of them gather

    def fill(path: Path) -> None:
        save_model(path)
        torch.save({"state": state, "parts": saved, "generators": generators}, path / "state.pt")

    if accelerator.is_main_process:
        write_whole(folder / f"checkpoint-{state['step']}", fill)
        for old in checkpoints(folder)[: -limit if limit else 0]:
            remove(old)
    accelerator.wait_for_everyone()


def load_state(
    accelerator: Accelerator, resumed: Path, parts: dict[str, Any], same: Callable[[dict[str, Any]], list[str]]
) -> dict[str, Any]:
    """The state that `save_state` wrote; parts and random generators are put back too, later checkpoints removed.

    same: given the state, names what was different when it was written. Anything named is a ValueError, and nothing
        is touched.
    """
    saved = torch.load(resumed / "state.pt", map_location="cpu", weights_only=True)
    if differing := same(saved["state"]):
        raise ValueError(f"load_state: cannot go on from {resumed}, which was written with {', '.join(differing)}")
    for name, part in parts.items():
        part.load_state_dict(saved["parts"][name])
    if accelerator.is_main_process:
        for later in checkpoints(resumed.parent):  # this run writes them anew
            if step_of(later) > step_of(resumed):
                remove(later)
    _set_random_state(saved["generators"][accelerator.process_index], accelerator.device)
    return saved["state"]


def write_whole(folder: Path, fill: Callable[[Path], None]) -> None:
    """Creates `folder` with what `fill(path)` writes into the path it is given, or leaves nothing behind.

    Raises:
        OSError: it could not be written (a full disk, mostly); what there was of it is removed.
    """
    aside = folder.with_name(folder.name + ".partial")
    remove(aside)
    try:
        aside.mkdir(parents=True)
        fill(aside)
        files = {str(path.relative_to(aside)): _size_and_crc(path) for path in aside.rglob("*") if path.is_file()}
        (aside / MANIFEST).write_text(json.dumps(files, indent=1), encoding="utf-8")
        # a rename that reaches the disk before the bytes it names would be a partial checkpoint after a power cut
        for path in aside.rglob("*"):
            _sync(path)
        remove(folder)
        aside.rename(folder)
        _sync(folder.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        if not isinstance(error, OSError) and not any(words in str(error) for words in FAILED_WRITES):
            raise
        raise OSError(f"write_whole: could not write {folder}: {error}. Nothing of it was left behind") from error
    finally:
        remove(aside)


def why_broken(folder: Path) -> str | None:
    """None if the checkpoint is whole, else what is wrong with it."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in files.items():
            if _size_and_crc(folder / name) != expected:
                return f"{name} is not as it was written"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The folders `checkpoint-STEP` of a run, in order of step, whole or not."""
    return sorted((path for path in folder.glob("checkpoint-*") if re.search(r"-\d+$", path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """40 for .../checkpoint-40."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def last_whole(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The latest whole checkpoint of a run, or None; says which it passed over, and why."""
    for checkpoint in reversed(checkpoints(folder)):
        reason = why_broken(checkpoint)
        if reason is None:
            return checkpoint
        say(f"passing over {checkpoint}: {reason}")
    return None


def remove(folder: Path) -> None:
    """Removes a folder if it is there: renamed first, so that a removal cut short is not taken for a checkpoint."""
    doomed = folder.with_name(folder.name + ".removed")
    if doomed.exists():  # that was cut short
        shutil.rmtree(doomed)
    if folder.exists():
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _random_state(device: torch.device) -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],  # type: ignore[attr-defined]  # a dict if legacy=False
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def _size_and_crc(path: Path) -> list[int]:
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
