"""Which pairs when: the order of training is a function of seed and epoch, and each process takes its share."""

import math
import random
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from fastpref.trainer.data import Pair


def pairs_of_step(step: int, n_pairs: int, per_step: int, seed: int) -> list[int]:
    """The pairs of optimizer step 1, 2, ... An epoch is a permutation, and ends with its last full step."""
    epoch, place = divmod(step - 1, n_pairs // per_step)
    return _permutation(n_pairs, seed, epoch)[place * per_step : (place + 1) * per_step]


@lru_cache(maxsize=1)
def _permutation(n: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed} {epoch}").sample(range(n), n)


def my_batches(accelerator: Accelerator, indices: list[int], size: int) -> Iterator[tuple[list[int], bool]]:
    """(a batch of this process, whether it is its last) of the pairs of a step."""
    stride = size * accelerator.num_processes
    for first in range(accelerator.process_index * size, len(indices), stride):
        yield indices[first : first + size], first + stride >= len(indices)


def logps_of_all(
    accelerator: Accelerator,
    pairs: list[Pair],
    indices: Iterable[int],
    size: int,
    logps: Callable[[list[Pair], list[int]], Tensor],
    label: str,
) -> Tensor:
    """(pairs, 2) of logps(batch, its indices) (B, 2) for the pairs at `indices`, NaN elsewhere; on the CPU.

    Each process does its share; pairs of like length go together, which saves padding.
    """
    order = sorted(indices, key=lambda i: length(pairs[i]))
    batches = [order[first : first + size] for first in range(0, len(order), size)]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    found = torch.zeros(len(pairs), 2, device=accelerator.device)
    hidden = None if accelerator.is_main_process else True  # None: shown on a terminal only
    for batch in tqdm(mine, desc=label, unit="batch", leave=False, disable=hidden):
        found[batch] = logps([pairs[i] for i in batch], batch)
    everyone = accelerator.reduce(found, "sum").cpu()
    result = torch.full_like(everyone, math.nan)
    result[order] = everyone[order]
    return result


def length(pair: Pair) -> int:
    """Tokens of a pair as a model reads it: the prompt counts twice."""
    return 2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)
