"""Large buffers on the CPU."""

import ctypes
import sys

from torch import Tensor

_HUGE_PAGE = 2**21
_MADV_HUGEPAGE = 14  # linux/mman.h


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
