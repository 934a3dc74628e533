"""Log-probabilities of a reference model, kept on disk: the same model and tokens are never scored twice.

    cache = open_cache(run)                              # None where the run keeps none
    logps = remembered(run, cache, sequences, score)     # score(indices of those not known)

    cache = LogpsCache(folder, fingerprint(model), precision)
    known = cache.get(sequences)                         # (S,) float64, NaN where not known
    cache.put(sequences, logps)

A sequence is (ids of a prompt, ids of its completion), its value the sum over the completion in nats. One file a model,
whose name is a hash of its weights and configuration, so that another model never reads it, and fastpref's version, so
that other kernels do not; a file grows, and is written aside and renamed.
"""

import hashlib
import json
import os
import sys
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from filelock import FileLock
from torch import Tensor

from fastpref import __version__
from fastpref.trainer.cache import cache_folder
from fastpref.trainer.collate import PromptAndCompletion
from fastpref.trainer.run import Run

DIGEST = 16  # bytes that stand for a sequence


def fingerprint(model: Any) -> str:
    """32 hex digits of a transformers model: weights, their types, and the configuration; adapters left out.

    A PeftModel has the fingerprint of its base model, which is what it is with its adapters off.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = hashlib.blake2b(digest_size=16)
    told = {key: value for key, value in base.config.to_dict().items() if key not in ("_name_or_path", "use_cache")}
    found.update(json.dumps(told, sort_keys=True, default=str).encode())
    for name, tensor in base.state_dict().items():
        if "lora_" in name or "modules_to_save." in name:
            continue
        own = name.replace(".base_layer", "").replace(".original_module", "")
        found.update(f"{own} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole = tensor.full_tensor() if type(tensor).__name__ == "DTensor" else tensor
        found.update(whole.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def open_cache(run: Run) -> "LogpsCache | None":
    """Of the run's model as it is before training, where its options keep one."""
    kept = run.options.cache_ref_log_probs
    if kept is False:
        return None
    folder = cache_folder() / "reference" if kept is True else Path(kept)
    return LogpsCache(folder, fingerprint(run.bare_model), run.accelerator.mixed_precision)


def remembered(
    run: Run,
    cache: "LogpsCache | None",
    sequences: Sequence[Sequence[PromptAndCompletion]],
    indices: Iterable[int],
    score: Callable[[list[int]], Tensor],
) -> Tensor:
    """(I, k) of I items with k sequences each: score(indices), but for those that the cache knows. NaN elsewhere.

    Every process calls this, with the same items; the main one reads and writes the cache.
    """
    wanted = sorted(indices)
    if cache is None:
        return score(wanted)
    known = [[cache.get(sequences[i]).tolist() for i in wanted]]
    broadcast_object_list(known)
    of_item = dict(zip(wanted, torch.tensor(known[0]), strict=True))
    missing = [i for i, values in of_item.items() if values.isnan().any()]
    if len(missing) < len(wanted):
        run.say(f"reference {len(wanted) - len(missing)} of {len(wanted)} are known from an earlier run")
    k = len(sequences[0]) if sequences else 1
    found = score(missing) if missing else torch.full((len(sequences), k), torch.nan)
    if run.accelerator.is_main_process:
        cache.put([one for i in missing for one in sequences[i]], found[missing].flatten())
    for i in of_item.keys() - set(missing):
        found[i] = of_item[i]
    return found


class LogpsCache:
    """The sums of one model in one precision.

    Args:
        folder: made if it is not there.
        model: its `fingerprint`.
        precision: what the model computes in ("no", "bf16", "fp16"): another one is another file.
    """

    def __init__(self, folder: str | os.PathLike[str], model: str, precision: str) -> None:
        self.path = Path(folder) / f"{model}-{precision}-{__version__}.npz"
        self._known = self._read()

    def get(self, sequences: Sequence[PromptAndCompletion]) -> Tensor:
        """(S,) float64; NaN where not known."""
        return torch.tensor([self._known.get(_digest(one), np.nan) for one in sequences], dtype=torch.float64)

    def put(self, sequences: Sequence[PromptAndCompletion], logps: Tensor) -> None:
        """Adds (S,) values, those that another run wrote meanwhile kept. Where the disk takes none, that is said."""
        if not sequences:
            return
        self._known.update(zip(map(_digest, sequences), logps.tolist(), strict=True))
        try:
            self._write()
        except OSError as error:  # the run has its values, and only a later one would save by them
            print(
                f"fastpref: reference log-probabilities cannot be kept in {self.path}: {error}. The run goes on; "
                "--cache_ref_log_probs names another folder",
                file=sys.stderr,
            )

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            self._known = {**self._read(), **self._known}
            digests = np.frombuffer(b"".join(self._known), np.uint8).reshape(-1, DIGEST)
            aside = self.path.with_suffix(".partial")
            try:
                with aside.open("wb") as file:
                    np.savez(file, digests=digests, logps=np.array([*self._known.values()], np.float64))
                os.replace(aside, self.path)
            finally:
                aside.unlink(missing_ok=True)

    def _read(self) -> dict[bytes, float]:
        try:
            with np.load(self.path) as file:
                digests, logps = file["digests"], file["logps"]
        except FileNotFoundError:
            return {}
        # a file cut short by a full disk or a bad copy is worth no more than its recomputation
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            print(f"fastpref: reference log-probabilities in {self.path} cannot be read: {error}", file=sys.stderr)
            return {}
        return {digest.tobytes(): float(value) for digest, value in zip(digests, logps, strict=True)}


def _digest(sequence: PromptAndCompletion) -> bytes:
    prompt, completion = sequence
    ids = np.array([len(prompt), *prompt, *completion], np.int64)
    return hashlib.blake2b(ids.tobytes(), digest_size=DIGEST).digest()
