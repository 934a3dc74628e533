"""selective_logps with inplace_backward: the same gradient, in the memory of the logits, and whom that concerns."""

from functools import partial

import pytest
import torch

from fastpref import selective_logps
from tests._oracle import BACKENDS, assert_same_bits, upstream
from tests.test_plan import measured_peak
from tests.test_selective_logps import DTYPES, inputs


def computed(args):
    """(a leaf, logits that are a product of it)."""
    leaf = args["logits"].clone().requires_grad_()
    return leaf, leaf * 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grads", [("logps",), ("entropy",), ("logps", "entropy")])
def test_of_the_logits(grads, dtype, backend):
    args = inputs((3, 11), 129, dtype)
    call = {"targets": args["targets"], "outputs": ("entropy",), "backend": backend, "softcap": 5.0}
    given = [upstream(3, 11, seed=len(name)) for name in grads]
    leaf, logits = computed(args)
    both = selective_logps(logits, **call)
    want = torch.autograd.grad([getattr(both, x) for x in grads], (leaf, logits), given)
    leaf, logits = computed(args)
    both = selective_logps(logits, **call, inplace_backward=True)
    outputs = [getattr(both, x) for x in grads]
    got = torch.autograd.grad(outputs, (leaf, logits), given, retain_graph=True)
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)
    assert got[1].untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(outputs, leaf, given)


def test_is_told_to_who_saved_the_logits():
    args = inputs((9,), 29)
    leaf, logits = computed(args)
    square = logits.square()  # its backward, made before, runs after
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (square.sum() + selective_logps(logits, args["targets"], inplace_backward=True).sum()).backward()
    leaf, logits = computed(args)
    both = [selective_logps(logits, args["targets"], inplace_backward=True) for _ in range(2)]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(sum(both), leaf, upstream(9))


def test_adds_to_others():
    """Of a use that saved nothing of the logits: the two gradients are added up."""
    args = inputs((9,), 29)
    given = upstream(9)
    found = []
    for inplace in (False, True):
        leaf, logits = computed(args)
        loss = (logits * 3).sum() + (selective_logps(logits, args["targets"], inplace_backward=inplace) * given).sum()
        found.append(torch.autograd.grad(loss, leaf)[0])
    assert_same_bits(*found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_allocates_no_matrix(backend, monkeypatch):
    monkeypatch.setattr("fastpref.kernels.torch.selective_logps.BLOCK_ELEMENTS", 2**16)
    args = inputs((512,), 4099, torch.bfloat16)
    peaks = []
    for inplace in (False, True):
        _, logits = computed(args)
        logps = selective_logps(logits, args["targets"], inplace_backward=inplace, backend=backend)
        backward = partial(torch.autograd.grad, logps, logits, upstream(512))
        peaks.append(measured_peak(backward))
    assert peaks[0] >= 512 * 4099 * 2 > 2 * peaks[1]


def test_asks_nothing_without_gradient():
    args = inputs((9,), 29)
    want = selective_logps(**args)
    assert_same_bits(selective_logps(**args, inplace_backward=True), want)
    with torch.no_grad():
        assert_same_bits(selective_logps(args["logits"].requires_grad_(), args["targets"], inplace_backward=True), want)


UNSAFE = {
    "leaf": (lambda x: x.requires_grad_(), "wants logits that were computed; got a leaf, or a view of one"),
    "view of a leaf": (lambda x: x.requires_grad_().view(6, 7), "wants .*; got a leaf, or a view of one"),
    "columns": (lambda x: (x.requires_grad_() * 2).T.contiguous().T, r"wants contiguous .*; got strides \(1, 6\)"),
    "overlapping": (lambda x: (x[0].requires_grad_() * 2).expand(6, 7), r"wants contiguous .*; got strides \(0, 1\)"),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_refusals(name):
    make, message = UNSAFE[name]
    logits = make(torch.randn(6, 7, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match=f"^selective_logps: inplace_backward {message}"):
        selective_logps(logits, torch.arange(6), inplace_backward=True)


def test_refuses_a_backend_without_a_backward_of_its_own():
    _, logits = computed(inputs((9,), 29))
    with pytest.raises(ValueError, match=r"inplace_backward wants a backend .*; got 'reference'"):
        selective_logps(logits, torch.arange(9), inplace_backward=True, backend="reference")


def test_compiles():
    torch._dynamo.reset()
    args = inputs((9,), 29)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def logps_of(leaf):
        return selective_logps(leaf * 2, args["targets"], inplace_backward=True)

    leaf, logits = computed(args)
    want = torch.autograd.grad(selective_logps(logits, args["targets"]), leaf, upstream(9))
    assert_same_bits(torch.autograd.grad(logps_of(leaf), leaf, upstream(9))[0], want[0])
