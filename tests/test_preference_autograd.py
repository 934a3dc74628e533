"""linear_preference_loss in autograd, under checkpoint and autocast, and the bits it promises."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastpref import linear_preference_loss
from tests._oracle import BACKENDS, assert_gradient, assert_same_bits, our_loss, pairs, reference_of, true_loss

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MIB = 1 << 20
# where all rows fit one chunk, and where the gradients are formed in forward, a few pairs at a time
CHUNKS = {"one": ({}, {}), "many": ({"b": 6, "t": 40, "h": 8, "v": 4099}, {"workspace": MIB})}


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")])
def test_retained_graph_gives_the_same_twice(chunks, trained, backend):
    shape, options = CHUNKS[chunks]
    args = pairs(**shape, dtype=torch.bfloat16)
    call = {"ref_logps": reference_of(args), "backend": backend, **options}
    leaves = [args[k].requires_grad_() for k in trained]
    result = linear_preference_loss(**args, **call)
    for name, factor in (("loss", 1.0), ("chosen_logps", 0.3), ("loss", 1.7), ("loss", 1.0)):
        output = getattr(result, name).sum()
        again = torch.autograd.grad(output, leaves, torch.tensor(factor), retain_graph=True)
        given = {name: torch.tensor(factor).expand(getattr(result, name).shape)}
        clean = {k: x.detach() for k, x in args.items()}
        fresh = our_loss(clean, trained=trained, grads=given, **call)[1]
        for gradient, expected in zip(again, fresh.values(), strict=True):
            assert_same_bits(gradient, expected)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("hidden", "weight")])
@pytest.mark.parametrize("output", ["loss", "chosen_logps"])
def test_second_derivative_raises(chunks, output, trained, backend):
    shape, options = CHUNKS[chunks]
    args = pairs(**shape)
    leaves = [args[k].requires_grad_() for k in trained]
    result = getattr(linear_preference_loss(**args, reference_free=True, backend=backend, **options), output).sum()
    for given in (None, torch.tensor(1.0, requires_grad=True)):
        first = torch.autograd.grad(result, leaves, given, create_graph=True)
        penalty = sum(x.square().sum() for x in first)
        with pytest.raises(RuntimeError, match=r"twice|second derivative"):
            (result + penalty).backward()  # a sum: the penalty alone would be refused by torch


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_no_grad_and_checkpoint(chunks, reentrant, backend):
    shape, options = CHUNKS[chunks]
    args = pairs(**shape)
    call = {"ref_logps": reference_of(args), "backend": backend, **options}
    values, gradients = our_loss(args, **call)
    with torch.no_grad():
        quiet = linear_preference_loss(**args, **call)
    assert not quiet.loss.requires_grad and not quiet.chosen_logps.requires_grad
    torch.testing.assert_close(quiet.loss, values["loss"].detach(), rtol=1e-6, atol=1e-6)
    leaves = [args[k].requires_grad_() for k in gradients]
    loss = checkpoint(
        lambda hidden, weight: linear_preference_loss(hidden, weight, args["targets"], **call).loss,
        *leaves,
        use_reentrant=reentrant,
    )
    loss.backward()
    for leaf, gradient in zip(leaves, gradients.values(), strict=True):
        assert_same_bits(leaf.grad, gradient)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")])
def test_autocast(chunks, trained, backend):
    shape, options = CHUNKS[chunks]
    args = pairs(**shape, bias=True)
    call = {"ref_logps": reference_of(args), "backend": backend, "trained": trained, **options}
    cast = {k: x.bfloat16() if x.is_floating_point() else x for k, x in args.items()}
    with torch.autocast("cpu", torch.bfloat16):
        values, gradients = our_loss(args, **call)
    assert_same_bits(values["loss"], our_loss(cast, **call)[0]["loss"])
    d_truths = true_loss(cast, ref_logps=call["ref_logps"], trained=trained)[1]
    for name in gradients:
        assert gradients[name].dtype == torch.float32
        error = (gradients[name].double() - d_truths[name]).norm() / d_truths[name].norm()
        assert error <= 3e-3


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")])
def test_upstream_factor_is_exact(chunks, trained, backend):
    """Gradients formed in forward stay fp32 until multiplied: no double rounding, and 2^-20 loses nothing."""
    shape, options = CHUNKS[chunks]
    args = pairs(**shape, dtype=torch.bfloat16)
    ref = reference_of(args)
    call = {"ref_logps": ref, "backend": backend, "trained": trained, **options}
    plain = our_loss(args, **call)[1]
    for factor in (2.0**-20, 2.0**20):
        scaled = our_loss(args, grads={"loss": torch.tensor(factor)}, **call)[1]
        for name in trained:
            assert_same_bits(scaled[name], plain[name] * factor)
    # 1.7 is no power of two: one rounding to bf16, of rms 1.7e-3, leaves less error than two
    for name, gradient in our_loss(args, grads={"loss": torch.tensor(1.7)}, **call)[1].items():
        d_truth = true_loss(args, ref_logps=ref, trained=trained, grads={"loss": torch.tensor(1.7)})[1][name]
        once = 1.7 * true_loss(args, ref_logps=ref, trained=trained)[1][name]
        assert_gradient(gradient, d_truth)
        assert (gradient.double() - once).norm() <= 1.15 * (plain[name].double() * 1.7 - once).norm()


@pytest.mark.usefixtures("any_algorithms")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pair_does_not_depend_on_the_others(dtype, backend):
    args = pairs(6, 20, 24, 1031, dtype)
    ref = reference_of(args)
    call = {"reduction": "none", "deterministic": True, "backend": backend}
    threads = torch.get_num_threads()
    for trained in ((), ("hidden", "weight")):
        leaves = {k: args[k].clone().requires_grad_() for k in trained}
        whole = linear_preference_loss(**{**args, **leaves}, ref_logps=ref, **call)
        some = torch.tensor([2, 8])
        alone = {k: x[some] if k != "weight" else x for k, x in {**args, **leaves}.items()}
        try:
            torch.set_num_threads(threads % 2 + 1)
            part = linear_preference_loss(**alone, ref_logps=ref[some], workspace=MIB, **call)
        finally:
            torch.set_num_threads(threads)
        for name in ("loss", "chosen_logps", "rejected_logps"):
            assert_same_bits(getattr(part, name).detach(), getattr(whole, name)[2:3].detach())


@pytest.mark.usefixtures("any_algorithms")
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_on_a_rerun(backend):
    args = pairs(6, 40, 24, 4099, torch.bfloat16)
    call = {"ref_logps": reference_of(args), "backend": backend, "workspace": MIB}
    first, again = our_loss(args, **call), our_loss(args, **call)
    assert_same_bits(first[0]["loss"], again[0]["loss"])
    for name in first[1]:
        assert_same_bits(first[1][name], again[1][name])


def test_order_of_pairs_and_swap():
    """No oracle: pairs may come in any order, and swapping chosen with rejected negates the margin."""
    args = pairs()
    ref = reference_of(args)
    values = our_loss(args, ref_logps=ref)[0]
    order = torch.tensor([2, 0, 1, 5, 3, 4])
    moved = {**args, "hidden": args["hidden"][order], "targets": args["targets"][order]}
    torch.testing.assert_close(our_loss(moved, ref_logps=ref[order])[0]["loss"], values["loss"])
    swapped = {**args, "hidden": args["hidden"].roll(3, 0), "targets": args["targets"].roll(3, 0)}
    other = our_loss(swapped, ref_logps=ref.roll(3, 0), reduction="none", grads={"loss": torch.ones(3)})[0]["loss"]
    mine = our_loss(args, ref_logps=ref, reduction="none", grads={"loss": torch.ones(3)})[0]["loss"]
    margin = values["chosen_rewards"] - values["rejected_rewards"]
    torch.testing.assert_close(other - mine, margin, rtol=1e-5, atol=1e-5)
