"""From tensors to a call of fastpref._cuda: addresses, the device, its current stream. Nothing waits for the device."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def launch(entry: Callable[..., None], tensors: Sequence[Tensor | None], *sizes_and_scalars: float) -> None:
    """Calls entry(addresses, 0 for None; sizes and scalars; device; stream); contiguous tensors of one device."""
    addresses = [0 if x is None else x.data_ptr() for x in tensors]
    device = next(x for x in tensors if x is not None).device
    with torch.cuda.device(device):
        entry(*addresses, *sizes_and_scalars, device.index, torch.cuda.current_stream().cuda_stream)
