"""Buffers that stay for the next call: whose memory is whose."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastpref import linear_logps
from fastpref.kernels import memory
from fastpref.kernels.memory import recycled
from tests._oracle import assert_same_bits, head, upstream

ROWS = 2**23 // 2 // 64  # of 64 bf16: 8 MiB
pytestmark = [  # under deterministic algorithms nothing is used again
    pytest.mark.skipif(sys.platform != "linux", reason="Linux's memory"),
    pytest.mark.usefixtures("any_algorithms"),
]


@pytest.fixture(autouse=True)
def no_buffer_of_an_earlier_test():
    memory.release()


def fresh(rows=ROWS):
    return recycled(torch.empty(rows, 64, dtype=torch.bfloat16))


def test_memory_is_used_again_only_when_nobody_holds_it():
    first = fresh(2 * ROWS)
    where = first.data_ptr()
    assert first.shape == (2 * ROWS, 64) and first.dtype == torch.bfloat16 and first.is_contiguous()
    part = first[-1:].fill_(3.0)
    del first
    second = fresh()
    assert second.data_ptr() != where
    second.fill_(5.0)
    assert bool((part == 3).all())
    del second, part  # what is given back last stays
    third = fresh()
    assert third.data_ptr() == where
    larger = fresh(3 * ROWS).fill_(1.0)
    assert larger.numel() == 3 * ROWS * 64 and larger.data_ptr() != where


def test_nothing_stays_where_nothing_may():
    used = fresh()
    with memory.keep_at_most(0):
        del used
        assert not memory._idle
        x = torch.empty(ROWS, 64, dtype=torch.bfloat16)
        assert recycled(x) is x
    del x
    assert recycled(x := torch.empty(ROWS, 64, dtype=torch.bfloat16)) is not x


def test_small_ones_and_very_large_ones_do_not_stay():
    for rows in (ROWS // 2, 65 * ROWS):
        x = torch.empty(rows, 64, dtype=torch.bfloat16)
        assert recycled(x) is x


def test_what_torch_fills_is_filled():
    used = fresh().fill_(1.0)
    del used
    torch.use_deterministic_algorithms(True)
    assert bool(fresh().isnan().all())


def test_threads_have_memory_of_their_own():
    def mine(number):
        for _ in range(20):
            x = fresh()
            x[::512] = number
            if not bool((x[::512] == number).all()):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(mine, range(4)))


def test_two_calls_at_once_keep_their_exponentials():
    args = head(440, 16, 40_001, torch.bfloat16, ignored=0.0)  # 35 MB of them
    leaves = [args[name].requires_grad_() for name in ("hidden", "weight")]
    grads = upstream(440, seed=1), upstream(440, seed=2)

    def alone(grad):
        return torch.autograd.grad(linear_logps(**args), leaves, grad)

    want = [alone(grad) for grad in grads]
    both = [linear_logps(**args), linear_logps(**args, temperature=2.0), linear_logps(**args)]
    for of_each, logps, grad in zip(want, (both[0], both[2]), grads, strict=True):
        for a, b in zip(of_each, torch.autograd.grad(logps, leaves, grad), strict=True):
            assert_same_bits(a, b)
