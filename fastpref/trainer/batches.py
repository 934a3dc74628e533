"""Which examples when: the order of training is a function of seed and epoch, and each process takes its share."""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from fastpref.trainer.metrics import Sums, Tally


def items_of_step(step: int, n_items: int, per_step: int, seed: int) -> list[int]:
    """The items of optimizer step 1, 2, ... An epoch is a permutation, and ends with its last full step."""
    epoch, place = divmod(step - 1, n_items // per_step)
    return _permutation(n_items, seed, epoch)[place * per_step : (place + 1) * per_step]


@lru_cache(maxsize=1)
def _permutation(n: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed} {epoch}").sample(range(n), n)


def my_batches(accelerator: Accelerator, indices: Sequence[int], size: int) -> Iterator[tuple[list[int], bool]]:
    """(a batch of this process, whether it is its last) of the items of a step."""
    stride = size * accelerator.num_processes
    for first in range(accelerator.process_index * size, len(indices), stride):
        yield list(indices[first : first + size]), first + stride >= len(indices)


def of_all(
    accelerator: Accelerator,
    items: Sequence[Any],
    indices: Iterable[int],
    size: int,
    score: Callable[[list[int], Tally], Tensor],
    label: str | None,
) -> tuple[Tensor, Sums]:
    """((items, ...) of score(batch of indices, tally) (B, ...), NaN at other items, on the CPU; the tally's sums).

    Each process does its share; items of like length go together, which saves padding.
    items: with n_tokens each. label: of the progress bar; None: none is shown.
    """
    order = sorted(indices, key=lambda i: items[i].n_tokens)
    batches = [order[first : first + size] for first in range(0, len(order), size)]
    # under FSDP every process must call the model equally often: some do a batch again, and it does not count
    rounds = math.ceil(len(batches) / accelerator.num_processes)
    tally, found = Tally(), torch.zeros(0)
    hidden = None if accelerator.is_main_process and label else True  # None: shown on a terminal only
    for i in tqdm(range(rounds), desc=label, unit="batch", leave=False, disable=hidden):
        place = i * accelerator.num_processes + accelerator.process_index
        counts = place < len(batches)
        batch = batches[place if counts else 0]
        values = score(batch, tally if counts else Tally()).float()
        if not i:
            found = values.new_zeros(len(items), *values.shape[1:])
        if counts:
            found[batch] = values
    everyone = accelerator.reduce(found, "sum").cpu() if batches else found.new_zeros(len(items))
    result = torch.full_like(everyone, math.nan)
    result[order] = everyone[order]
    return result, tally.reduced()
