"""Large buffers on the CPU."""

import ctypes
import sys
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_HUGE_PAGE = 2**21
_MADV_HUGEPAGE = 14  # linux/mman.h
_LEAST = 2**23  # bytes of a buffer that stays
_most = 2**29
_idle: deque[Tensor] = deque(maxlen=1)  # what the last tensor of that size has given back


def huge_pages(x: Tensor) -> Tensor:
    """`x`, whose memory nobody has touched yet, asked to come in huge pages: the first touch of 100 MB costs a quarter.

    Linux on a CPU; elsewhere, or where the system gives none, it is as it was.
    """
    if sys.platform == "linux" and x.device.type == "cpu" and x.nbytes >= 2 * _HUGE_PAGE:
        first = -(-x.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        size = (x.data_ptr() + x.nbytes - first) // _HUGE_PAGE * _HUGE_PAGE
        # an advice: a kernel without huge pages refuses it, and that is all
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _MADV_HUGEPAGE)
    return x


def recycled(x: Tensor) -> Tensor:
    """As `x`, whose memory nobody has touched yet, in the memory of an earlier one that is no longer used.

    One buffer of up to 512 MiB stays for the next call, where the system would take its pages and give them again,
    zeroed: a tenth of a step of the head on a virtual machine that hands its free pages back to its host.
    """
    fits = sys.platform == "linux" and x.device.type == "cpu" and _LEAST <= x.nbytes <= _most and x.is_contiguous()
    # which fills what is not initialised, so that reading it shows
    if not fits or torch.are_deterministic_algorithms_enabled():
        return huge_pages(x)
    try:
        memory = _idle.pop()
    except IndexError:
        memory = x
    if memory.nbytes < x.nbytes:
        memory = x
    if memory is x:
        huge_pages(x)
    lent = (ctypes.c_char * x.nbytes).from_address(memory.data_ptr())  # lives as long as the tensor on it
    weakref.finalize(lent, _give_back, memory).atexit = False
    return torch.frombuffer(lent, dtype=x.dtype).view(x.shape)


def _give_back(memory: Tensor) -> None:
    if memory.nbytes <= _most:
        _idle.append(memory)


def release() -> None:
    """Gives the buffer that stays back to the system."""
    _idle.clear()


@contextmanager
def keep_at_most(nbytes: int) -> Iterator[None]:
    """Within, no larger buffer stays; 0: none does."""
    global _most
    before, _most = _most, nbytes
    release()
    try:
        yield
    finally:
        _most = before
