"""linear_logps against float64 truth, eager's own error and the contract, in values, gradients and autograd."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastpref import linear_logps
from tests._oracle import (
    BACKENDS,
    IGNORE,
    OPTIONS,
    as_dict,
    assert_entropy,
    assert_gradient,
    assert_logps,
    assert_no_worse,
    assert_same_bits,
    head,
    option_case,
    run,
    three_ways,
    truth,
    upstream,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIXTEEN = [torch.bfloat16, torch.float16]
# N, H, V: one of each, all odd, whole blocks, one past them, and three blocks of 256 along H with a rest
SHAPES = [(1, 1, 2), (7, 13, 11), (64, 64, 512), (33, 65, 129), (65, 577, 1031)]
MIB = 1 << 20
EVERY = {"outputs": ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")}
if "cpu" in BACKENDS:
    from fastpref import _cpu

    ISAS = _cpu.isas()
else:
    ISAS = []


def assert_contract(args, grads, *, backend, **options):
    (ours, d_ours), (fp32, d_fp32), (want, d_want) = three_ways(args, grads, backend=backend, **options)
    for name in grads:
        assert ours[name].dtype == torch.float32
        assert bool((ours[name][args["targets"] == IGNORE] == 0).all())
    assert_logps(ours["logps"], want["logps"])
    assert_no_worse(ours["logps"], fp32["logps"], want["logps"])
    if "entropy" in grads:
        assert_entropy(ours["entropy"], want["entropy"])
    assert d_ours.keys() == d_want.keys()
    for name, gradient in d_ours.items():
        assert gradient.dtype == args[name].dtype
        assert_gradient(gradient, d_want[name])
        # gradient GEMMs of fp16 run in bf16, for its range, so eager's in fp16 are closer
        if gradient.dtype != torch.float16:
            assert_no_worse(gradient, d_fp32[name], d_want[name])
    return d_ours


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_eager(shape, dtype, backend):
    assert_contract(head(*shape, dtype), {"logps": upstream(shape[0])}, backend=backend)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(dtype, isa, monkeypatch):
    monkeypatch.setenv("FASTPREF_CPU_ISA", isa)
    for shape in [(1, 1, 2), (33, 65, 129), (37, 577, 515)]:
        assert_contract(head(*shape, dtype), {"logps": upstream(shape[0])}, backend="cpu")
    args, options = option_case("all", 35, 67, 131, dtype)
    assert_contract(args, {"logps": upstream(35), "entropy": upstream(35, seed=2)}, backend="cpu", **options)


def test_unknown_instruction_set_is_refused(monkeypatch):
    if not ISAS:
        pytest.skip("the extension is not built")
    monkeypatch.setenv("FASTPREF_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match="mmx"):
        linear_logps(**head(2, 3, 5), backend="cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("weight", "bias"), ("bias",)])
def test_frozen_parts(trained, dtype, backend):
    args = head(33, 65, 129, dtype, bias="bias" in trained)
    assert set(assert_contract(args, {"logps": upstream(33)}, backend=backend, trained=trained)) == set(trained)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("with_entropy", [False, True])
def test_options(with_entropy, name, dtype, backend):
    args, options = option_case(name, 33, 65, 129, dtype)
    grads = {"logps": upstream(33), "entropy": upstream(33, seed=2)} if with_entropy else {"logps": upstream(33)}
    assert_contract(args, grads, backend=backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("hidden", "weight")])
def test_entropy_gradient_alone(trained, backend):
    for dtype in (torch.float32, torch.bfloat16):
        args, grads = head(33, 65, 129, dtype), {"entropy": upstream(33)}
        ours = run(linear_logps, args, grads=grads, trained=trained, backend=backend, outputs=("entropy",))[1]
        want = run(truth, args, grads=grads, trained=trained, dtype=torch.float64)[1]
        for name in trained:
            assert_gradient(ours[name], want[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("below", [0.0, 5.0, 10.0])
def test_entropy_does_not_depend_on_how_unlikely_the_label_is(below, backend):
    """Anchored at the label, log S and sum e d / S both grow with the label's distance, and cancel."""
    args = {**head(200, 64, 129, ignored=0.0), "bias": torch.zeros(129)}
    args["targets"][args["targets"] == 0] = 1
    args["bias"][0] = below  # one column above most labels; every entropy stays between 0.1 and 4 nats
    (ours, d_ours), (fp32, _), (want, d_want) = three_ways(args, {"entropy": upstream(200)}, backend=backend)
    assert_no_worse(ours["entropy"], fp32["entropy"], want["entropy"])
    for name in d_ours:
        assert_gradient(d_ours[name], d_want[name])


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["none", "all"])
def test_extra_outputs(name, dtype, backend):
    args, options = option_case(name, 40, 65, 129, dtype)
    got = as_dict(linear_logps(**args, **options, **EVERY, backend=backend))
    want = run(truth, args, dtype=torch.float64, **options)[0]
    assert set(got) == set(want)
    for output in ("entropy", "log_sum_sq_probs", "mean_logits"):
        torch.testing.assert_close(got[output].double(), want[output], rtol=1e-5, atol=1e-5)
        assert bool((got[output][args["targets"] == IGNORE] == 0).all())
    assert torch.equal(got["is_top1"].bool(), want["is_top1"])
    assert bool((got["entropy"] >= 0).all())


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(name, backend):
    args, options = option_case(name, 5, 3, 7, torch.float64)
    trained = [key for key in ("hidden", "weight", "bias") if key in args]

    def outputs(*leaves):
        both = linear_logps(
            **{**args, **dict(zip(trained, leaves, strict=True))}, **options, outputs=("entropy",), backend=backend
        )
        return both.logps, both.entropy

    assert torch.autograd.gradcheck(outputs, [args[key].requires_grad_() for key in trained])


def test_gradcheck_of_many_chunks():
    args = head(70, 3, 2053, torch.float64)
    leaves = [args.pop(k).requires_grad_() for k in ("hidden", "weight")]
    assert torch.autograd.gradcheck(
        lambda x, w: linear_logps(x, w, args["targets"], backend="torch", workspace=MIB), leaves, fast_mode=True
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_tokens_are_never_read(dtype, backend):
    args = head(33, 65, 129, dtype, ignored=0.5)
    ignored = args["targets"] == IGNORE
    grads = {"logps": upstream(33), "entropy": upstream(33, seed=2)}
    clean = run(linear_logps, args, grads=grads, outputs=("entropy",), backend=backend)
    poisoned = {**args, "hidden": args["hidden"].masked_fill(ignored[:, None], math.nan)}
    grads = {name: gradient.masked_fill(ignored, math.nan) for name, gradient in grads.items()}
    values, gradients = run(linear_logps, poisoned, grads=grads, outputs=("entropy",), backend=backend)
    for name in values:
        assert_same_bits(values[name], clean[0][name])
        assert bool((values[name][ignored] == 0).all())
    for name in gradients:
        assert_same_bits(gradients[name], clean[1][name])
    assert bool((gradients["hidden"][ignored] == 0).all())


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("n", [0, 5])
def test_nothing_to_score(n, backend):
    args = {**head(n, 3, 7, bias=True), "targets": torch.full((n,), IGNORE)}
    args["hidden"].fill_(math.nan)
    grads = {"logps": upstream(n), "entropy": upstream(n)}
    values, gradients = run(linear_logps, args, grads=grads, backend=backend, **EVERY)
    for name, x in [*values.items(), *gradients.items()]:
        assert bool((x == 0).all()), name
    assert [gradients[k].shape for k in gradients] == [(n, 3), (7, 3), (7,)]


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_vocabulary_of_one_is_certain(dtype, backend):
    args = head(5, 3, 1, dtype, ignored=0.2)
    values, gradients = run(linear_logps, args, grads={"logps": upstream(5)}, backend=backend, outputs=("entropy",))
    assert all(bool((x == 0).all()) for x in [*values.values(), *gradients.values()])


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("ignore_index", [-1, 3, 10**9])
def test_another_ignore_index(ignore_index, backend):
    args = head(33, 5, 11)
    args["targets"][args["targets"] == 3] = 4
    want = linear_logps(**args, backend=backend)
    args["targets"] = torch.where(args["targets"] == IGNORE, ignore_index, args["targets"])
    assert_same_bits(linear_logps(**args, backend=backend, ignore_index=ignore_index), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batched_is_packed_with_another_shape(backend):
    args, _ = option_case("temperature per token", 30, 13, 11, torch.float32)
    packed, d_packed = run(linear_logps, args, grads={"logps": upstream(30)}, backend=backend, outputs=("entropy",))
    shaped = {k: x if k == "weight" else x.unflatten(0, (5, 6)) for k, x in args.items()}
    grads = {"logps": upstream(30).view(5, 6)}
    batched, d_batched = run(linear_logps, shaped, grads=grads, backend=backend, outputs=("entropy",))
    for name in packed:
        assert batched[name].shape == (5, 6)
        assert_same_bits(batched[name].flatten(), packed[name])
    assert_same_bits(d_batched["hidden"].flatten(0, 1), d_packed["hidden"])
    assert_same_bits(d_batched["weight"], d_packed["weight"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_views(dtype, backend):
    args, options = option_case("all", 30, 13, 29, dtype)
    grads = {"logps": upstream(30).view(5, 6)}
    args = {k: x.unflatten(0, (5, 6)) if k in ("hidden", "targets", "temperature") else x for k, x in args.items()}
    want = run(linear_logps, args, grads=grads, backend=backend, **options)

    def strided(x):  # the same numbers, every dimension apart and out of order
        wide = torch.full([2 * s + 1 for s in reversed(x.shape)], -7).to(x.dtype)
        view = wide.permute(*reversed(range(x.dim())))[tuple(slice(1, None, 2) for _ in x.shape)]
        return view.copy_(x)

    leaves = {k: strided(args[k]).requires_grad_() for k in ("hidden", "weight", "bias")}
    others = {k: strided(args[k]) for k in ("targets", "temperature")}
    assert not any(x.is_contiguous() for x in [*leaves.values(), *others.values()])
    logps = linear_logps(**leaves, **others, **options, backend=backend)
    assert_same_bits(logps, want[0]["logps"])
    spread = strided(grads["logps"])  # an upstream gradient may be a view too
    for name, gradient in zip(leaves, torch.autograd.grad(logps, list(leaves.values()), spread), strict=True):
        assert_same_bits(gradient, want[1][name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_upstream_gradient(backend):
    args = head(33, 13, 29)
    want = run(linear_logps, args, grads={"logps": torch.full((33,), 0.3)}, backend=backend)[1]
    got = run(linear_logps, args, grads={"logps": torch.tensor(0.3).expand(33)}, backend=backend)[1]
    assert all(torch.equal(got[k], want[k]) for k in want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", [torch.int32, torch.int16, torch.uint8])
def test_integer_dtypes_of_targets(index, backend):
    args = head(33, 5, 11, ignored=0.0)
    want = linear_logps(**args, backend=backend)
    assert_same_bits(linear_logps(**{**args, "targets": args["targets"].to(index)}, backend=backend), want)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_serve_several_targets(dtype, backend):
    args = head(40, 65, 129, dtype)
    rows = torch.randint(0, 9, (40,), generator=torch.Generator().manual_seed(3))
    args |= {"hidden": args["hidden"][:10].clone(), "rows": rows}
    args["hidden"][9] = math.nan  # no target wants it
    args["targets"][rows == 8] = IGNORE
    args["hidden"][8] = math.nan
    grads = {"logps": upstream(40), "entropy": upstream(40, seed=2)}
    (ours, d_ours), (fp32, _), (want, d_want) = three_ways(args, grads, backend=backend)
    assert_no_worse(ours["logps"], fp32["logps"], want["logps"])
    for name in d_ours:
        assert_gradient(d_ours[name], d_want[name])
    assert bool((d_ours["hidden"][8:] == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_cu_seqlens_change_nothing(backend):
    args = head(33, 5, 11)
    bounds = torch.tensor([0, 7, 7, 33], dtype=torch.int32)
    assert_same_bits(linear_logps(**args, cu_seqlens=bounds, backend=backend), linear_logps(**args, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")])
def test_retained_graph_gives_the_same_twice(trained, backend):
    args = head(33, 13, 29, torch.bfloat16)
    leaves = {k: args[k].requires_grad_() for k in trained}
    logps = linear_logps(**args, backend=backend)
    for seed in (1, 2, 1):
        given = {"logps": upstream(33, seed=seed)}
        want = run(linear_logps, args, grads=given, trained=trained, backend=backend)[1]
        got = torch.autograd.grad(logps, list(leaves.values()), given["logps"], retain_graph=True)
        for name, gradient in zip(leaves, got, strict=True):
            assert_same_bits(gradient, want[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("hidden", "weight")])
def test_second_derivative_raises(trained, backend):
    args = head(7, 3, 5)
    leaves = [args[k].requires_grad_() for k in trained]
    both = linear_logps(**args, outputs=("entropy",), backend=backend)
    for output in (both.logps, both.entropy):
        for given in (upstream(7), upstream(7).requires_grad_()):
            first = torch.autograd.grad(output, leaves, given, create_graph=True)
            penalty = sum(x.square().sum() for x in first)
            with pytest.raises(RuntimeError, match=r"twice|second derivative"):
                (output.sum() + penalty).backward()  # a sum: the penalty alone would be refused by torch


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_grad_keeps_no_graph(backend):
    args = head(33, 13, 29)
    want = linear_logps(**args, backend=backend)
    args["hidden"].requires_grad_()
    with torch.no_grad():
        logps = linear_logps(**args, backend=backend)
    assert not logps.requires_grad
    assert_same_bits(logps, want)
    with torch.inference_mode():
        assert_same_bits(linear_logps(**args, backend=backend).clone(), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant, backend):
    args = head(33, 13, 29)
    want = run(linear_logps, args, grads={"logps": upstream(33)}, backend=backend)[1]
    leaves = [args[k].requires_grad_() for k in want]
    logps = checkpoint(
        lambda hidden, weight: linear_logps(hidden, weight, args["targets"], backend=backend),
        *leaves,
        use_reentrant=reentrant,
    )
    logps.backward(upstream(33))  # which the reentrant form insists on
    for leaf, gradient in zip(leaves, want.values(), strict=True):
        assert_same_bits(leaf.grad, gradient)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unused_logps_cost_no_gradient(backend):
    """entropy alone in the loss; and logps in a loss that throws rows away."""
    args = head(33, 13, 29)
    args["hidden"].requires_grad_()
    logps = linear_logps(**args, backend=backend)
    (gradient,) = torch.autograd.grad(logps[:0].sum(), args["hidden"])
    assert bool((gradient == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_upstream_gradients_are_exact(dtype, backend):
    """num_items and means divide by thousands: rows of g / S must not go subnormal. Scaled by a power of two."""
    args = head(33, 65, 129, dtype, spread=5.0)
    (given,) = [upstream(33)]
    trained = ("hidden", "weight")
    small = run(linear_logps, args, grads={"logps": given * 2.0**-12}, backend=backend, trained=trained)[1]
    want = run(truth, args, grads={"logps": given * 2.0**-12}, dtype=torch.float64, trained=trained)[1]
    for name in want:
        if dtype != torch.float16:  # which goes subnormal itself
            assert_gradient(small[name], want[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_autocast(stored, dtype, backend):
    args = head(33, 65, 129, stored, bias=True)
    grads = {"logps": upstream(33)}
    with torch.autocast("cpu", dtype):
        values, gradients = run(linear_logps, args, grads=grads, backend=backend)
    cast = {k: x.to(dtype) if x.is_floating_point() else x for k, x in args.items()}
    want, d_want = run(linear_logps, cast, grads=grads, backend=backend)
    assert_same_bits(values["logps"], want["logps"])
    assert_same_bits(gradients["hidden"], d_want["hidden"].to(stored))  # the weight was read in the same dtype
    d_truth = run(truth, cast, grads=grads, dtype=torch.float64)[1]
    for name in gradients:
        assert gradients[name].dtype == stored
        error = (gradients[name].double() - d_truth[name]).norm() / d_truth[name].norm()
        assert error <= 3e-3, name


def test_autocast_joins_unequal_dtypes():
    args = head(33, 65, 129)
    args["hidden"] = args["hidden"].bfloat16()
    with pytest.raises(TypeError, match="weight must have the dtype of hidden, bfloat16; got float32"):
        linear_logps(**args)
    with torch.autocast("cpu", torch.bfloat16):
        gradients = run(linear_logps, args, grads={"logps": upstream(33)})[1]
    assert (gradients["hidden"].dtype, gradients["weight"].dtype) == (torch.bfloat16, torch.float32)


def test_temperature_gets_no_gradient():
    args, _ = option_case("temperature per token", 7, 3, 5, torch.float32)
    args["temperature"].requires_grad_()
    assert not linear_logps(**args).requires_grad


def test_labels_shift_and_permutation():
    """No oracle: the same shift of every logit changes nothing, and columns may come in any order."""
    args = head(33, 65, 129, bias=True)
    want = linear_logps(**args)
    shifted = linear_logps(**{**args, "bias": args["bias"] + 3})
    torch.testing.assert_close(shifted, want, rtol=0, atol=4e-6)
    order = torch.randperm(129, generator=torch.Generator().manual_seed(2))
    place = order.argsort()
    moved = {"weight": args["weight"][order], "bias": args["bias"][order]}
    targets = torch.where(args["targets"] == IGNORE, IGNORE, place[args["targets"].clamp(min=0)])
    torch.testing.assert_close(linear_logps(**{**args, **moved, "targets": targets}), want, rtol=1e-6, atol=2e-6)
