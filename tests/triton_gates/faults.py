"""Each gate of the interpreter finds the fault it is for, planted in a copy of a shipped kernel."""

import pytest
import torch
import triton
import triton.language as tl

from fastpref import linear_logps
from fastpref.kernels.triton import _products, _rows, _score
from tests._oracle import head, upstream
from tests.triton_gates.cases import broken
from tests.triton_gates.sanitizer import Fault, sanitized
from tests.triton_gates.values import check

PLANTED = {
    "chunk stored past the last column": (_score, "mask=inside[:, None] & room)", "mask=inside[:, None])"),
    "weight read past the last row": (_score, "V - 1).to(tl.int64)", "V + BLOCK_V).to(tl.int64)"),
    "hidden read past the last row": (_score, "row = tl.minimum(at, n - 1)", "row = at"),
    "sums stored past the last row": (_score, "tl.store(out, exp_sum, mask=inside)", "tl.store(out, exp_sum)"),
    "off by one in the rest of H": (_score, "depth < H - k * BLOCK_K", "depth <= H - k * BLOCK_K"),
    "label read past the end": (_rows, "inside = column < H", "inside = column <= H"),
    "product read past the vocabulary": (_products, "inside = depth < V - k * BLOCK_V", "inside = depth < BLOCK_V"),
    "programs share a tile": (_products, "return band * GROUP + place % height, place // height", "return 0, 0"),
    "two programs add to a row": (_rows, "first = (place == 0) | (tl.load(index_ptr + before) != to)", "first = True"),
    "x without other": (_score, "mask=inside[None, :], other=0.0)", "mask=inside[None, :])"),
    "weight without other": (_score, "mask=inside[:, None], other=0.0)", "mask=inside[:, None])"),
    "padding columns counted": (_score, "other = real[None, :] & (", "other = (column >= 0)[None, :] & ("),
    "label counted among the others": (
        _score,
        "(column[None, :] != target[:, None])",
        "(column >= 0)[None, :]",
    ),
    "accumulator not started afresh": (
        _score,
        "            part = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)\n        x_ptr",
        "        x_ptr",
    ),
    "a dead block taken": (_products, "row = tl.load(block_ptr + k) * BLOCK_N", "row = k * BLOCK_N"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_finds(small_tiles, tmp_path, monkeypatch, name):
    args = head(70, 40, 259, torch.bfloat16, ignored=0.0)
    grads = upstream(70)
    grads[:50] = 0.0  # whole blocks of rows without a gradient, before those that have one
    broken(PLANTED[name][0], tmp_path, monkeypatch, *PLANTED[name][1:])
    with pytest.raises(AssertionError), sanitized():
        check(args, {"logps": grads})


@triton.jit
def _sum_in_place(x_ptr, n, BLOCK: tl.constexpr):
    # each program reads what the next one writes: the result depends on the order
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    following = tl.load(x_ptr + at + BLOCK, mask=at + BLOCK < n, other=0.0)
    tl.store(x_ptr + at, tl.load(x_ptr + at, mask=at < n, other=0.0) + following, mask=at < n)


def test_race_is_found_and_orders_differ():
    with pytest.raises(Fault, match=r"race: .* one of `x_ptr`"), sanitized():
        _sum_in_place[(4,)](torch.ones(64), 64, BLOCK=16)


@triton.jit
def _sum_of_bf16(x_ptr, out_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.arange(0, BLOCK), x + x)


def test_bf16_is_exact():
    x = torch.tensor([1.0, -3.25, 1e-40, 65280.0, float("inf"), -0.0, 1 / 3, 2.0**-130]).bfloat16()
    out = torch.empty_like(x)
    _sum_of_bf16[(1,)](x, out, BLOCK=8)
    assert torch.equal(out, x + x)


def test_view_ends_where_the_view_ends():
    memory = torch.zeros(32)
    with pytest.raises(Fault, match="out of bounds: load of 8 element"), sanitized():
        _sum_of_bf16[(1,)](memory[:8], memory[16:], BLOCK=16)


def test_target_of_another_dtype_is_not_confused(small_tiles):
    args = head(5, 16, 20, torch.float32)
    args["targets"] = args["targets"].int()
    with sanitized():
        linear_logps(**args, backend="triton")
