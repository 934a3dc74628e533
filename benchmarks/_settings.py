"""What a user chose on the command line of `fastpref bench`, and the batch that fits it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastpref.benchmarks._inputs import Shape

FLOPS = {"cpu": 1.5e12, "cuda": 1e14}  # of the products of one step of DPO: a second or two, or a tenth of one


@dataclass(frozen=True, kw_only=True)
class Settings:
    device: str = "cpu"
    shapes: Sequence[Shape] = (Shape.parse("SmolLM2-135M"),)
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32)
    losses: Sequence[str] = ("score", "logps", "sft", "dpo", "kto", "ppo", "grpo")
    heads: Sequence[str] = ("trained", "frozen")
    contenders: Sequence[str] | None = None  # None: all
    rounds: int = 5
    longest: float = 60.0  # seconds that the rounds of one contender may take; one round is always taken
    pairs: int | None = None  # None: what fits, as is length
    length: int | None = None  # of a sequence; its first half is prompt
    memory_gib: float = 1.0  # for the longest sequence that fits
    quick: bool = False
    real: bool = False  # hidden states of SmolLM2-135M, which is fetched, in the head suite
    json: Path | None = None

    def but(self, **changes: object) -> "Settings":
        return replace(self, **changes)  # type: ignore[arg-type]


def memory_of(device: str) -> int:
    """Bytes that the device has."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 8 * 2**30


def sizes(shape: Shape, settings: Settings) -> tuple[int, int]:
    """(pairs, length of a sequence): 4 and 256 on a CPU, 4 and 2,048 on a GPU, less where that does not fit.

    H and V stay the model's. What fits: half the memory for eager PyTorch's 14 bytes a logit, and FLOPS.
    """
    kind = settings.device.partition(":")[0]
    pairs, length = 4, 256 if kind == "cpu" else 2048
    if settings.quick:
        pairs = 2
    if kind == "cpu":
        length = 128 if settings.quick else length
    room = memory_of(settings.device) // 2 - 12 * shape.hidden * shape.vocab
    while length > 32 and (
        14 * 2 * pairs * length * shape.vocab > room
        or 4 * 2 * pairs * length * shape.hidden * shape.vocab > FLOPS[kind]
    ):
        pairs, length = (pairs // 2, length) if pairs > 1 else (1, length // 2)
    return settings.pairs or pairs, settings.length or length
