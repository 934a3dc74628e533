"""dlogp/dhidden of a frozen head, the vocabulary in slabs: against chunks of whole rows, bit for bit."""

import pytest
import torch

from fastpref import linear_logps, plan
from fastpref.kernels import head_unit
from fastpref.kernels.cpu import head as kernels
from fastpref.ops._head import OUTPUTS
from tests._oracle import assert_same_bits, head, upstream

MIB = 1 << 20
WITHOUT_ENTROPY = [name for name in OUTPUTS if name != "entropy"]  # with it the chunk stays for the backward
V = 2 * head_unit.SLAB + 1201
OPTIONS = {
    "plain": {},
    "bias": {"bias": torch.linspace(-2, 2, V)},
    "capped": {"softcap": 5.0, "logit_scale": 0.5, "temperature": 0.7},
}


def unit(args, grad, **options):
    hidden = args["hidden"].detach().requires_grad_()
    out = linear_logps(hidden, args["weight"], args["targets"], outputs=WITHOUT_ENTROPY, backend="cpu", **options)
    return *(x.detach() for x in out if x is not None), *torch.autograd.grad(out.logps, hidden, grad)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slabs_give_the_bits_of_whole_rows(name, dtype, monkeypatch):
    args = head(70, 24, V, dtype, ignored=0.1)
    options = {k: x.to(dtype) if isinstance(x, torch.Tensor) else x for k, x in OPTIONS[name].items()}
    grad = upstream(70)
    by_slabs = unit(args, grad, **options)
    small = unit(args, grad, **options, workspace=2 * MIB)  # fewer rows at a time
    monkeypatch.setattr(kernels, "SLABS", False)
    for a, b, c in zip(by_slabs, small, unit(args, grad, **options), strict=True):
        assert_same_bits(a, b)
        assert_same_bits(a, c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_label_far_below_the_maximum_goes_through_whole_rows(dtype, monkeypatch):
    args = head(40, 24, V, dtype, ignored=0.0)
    grad = upstream(40)
    args["hidden"][::3] *= 40  # 41.6 nats above the label is where the anchor moves
    seen = []
    by_rows = head_unit._by_rows
    monkeypatch.setattr(head_unit, "_by_rows", lambda k, p, index: seen.append(index.numel()) or by_rows(k, p, index))
    got = unit(args, grad)
    assert 0 < sum(seen) <= 14
    monkeypatch.setattr(kernels, "SLABS", False)
    for a, b in zip(got, unit(args, grad), strict=True):
        assert_same_bits(a, b)


def test_the_plan_knows():
    got = plan(1024, 896, 151_936, dtype=torch.bfloat16, trainable_head=False, couples="pair", workspace=32 * MIB)
    assert got.chunks == 1 and got.chunk_bytes == 1024 * head_unit.SLAB * 2
