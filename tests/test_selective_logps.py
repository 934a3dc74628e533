"""selective_logps against float64 truth and eager's own error; it is linear_logps where the head is the identity."""

import math

import pytest
import torch

from fastpref import linear_logps, selective_logps
from tests._oracle import BACKENDS as FUSED
from tests._oracle import (
    IGNORE,
    as_dict,
    assert_entropy,
    assert_gradient,
    assert_logps,
    assert_no_worse,
    assert_same_bits,
    eager,
    run,
    truth,
    upstream,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = [*FUSED, "reference"]
# tokens before V: none to a batch, odd, a block, one past it
SHAPES = [((1,), 2), ((7,), 13), ((3, 11), 128), ((2, 2, 9), 1025)]
EVERY = {"outputs": ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")}
OPTIONS = [{}, {"temperature": 0.7}, {"softcap": 5.0}, {"logit_scale": 0.4}, {"softcap": 5.0, "logit_scale": 1.3}]


def inputs(tokens, v, dtype=torch.float32, *, seed=0, spread=3.0, ignored=0.25):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(*tokens, v, generator=generator)
    targets = torch.randint(v, tokens, generator=generator)
    targets = torch.where(torch.rand(tokens, generator=generator) < 1 / 3, logits.argmax(-1), targets)
    targets[torch.rand(tokens, generator=generator) < ignored] = IGNORE
    return {"logits": logits.to(dtype), "targets": targets}


def with_identity(function):
    """The oracle of the linear head, from logits: the head is the identity."""
    return lambda logits, targets, **options: function(
        logits, torch.eye(logits.shape[-1], dtype=logits.dtype), targets, **options
    )


def three_ways(args, grads, *, backend="torch", **options):
    outputs = {"outputs": ("entropy",)} if "entropy" in grads else {}
    call = {"grads": grads, "trained": ("logits",), **options}
    return (
        run(selective_logps, args, backend=backend, **outputs, **call),
        run(with_identity(eager), args, **call),
        run(with_identity(truth), args, dtype=torch.float64, **call),
    )


def assert_contract(args, grads, *, backend="torch", **options):
    (ours, d_ours), (fp32, d_fp32), (want, d_want) = three_ways(args, grads, backend=backend, **options)
    assert all(ours[name].dtype == torch.float32 for name in grads)
    assert_logps(ours["logps"], want["logps"])
    assert_no_worse(ours["logps"], fp32["logps"], want["logps"])
    assert d_ours["logits"].dtype == args["logits"].dtype
    assert_gradient(d_ours["logits"], d_want["logits"])
    if "entropy" in grads:  # its gradient, anchored at the label, is held to the contract and not to eager's error
        assert_entropy(ours["entropy"], want["entropy"])
    else:
        assert_no_worse(d_ours["logits"], d_fp32["logits"], d_want["logits"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_entropy", [False, True])
def test_no_worse_than_eager(with_entropy, shape, dtype, backend):
    tokens, _ = shape
    grads = {"logps": upstream(*tokens)} | ({"entropy": upstream(*tokens, seed=2)} if with_entropy else {})
    assert_contract(inputs(*shape, dtype), grads, backend=backend)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_options(with_entropy, per_token, options, dtype, backend):
    args = inputs((5, 7), 129, dtype)
    if per_token:
        args["temperature"] = 0.5 + torch.rand(5, 7, generator=torch.Generator().manual_seed(5))
        options = {k: x for k, x in options.items() if k != "temperature"}
    grads = {"logps": upstream(5, 7)} | ({"entropy": upstream(5, 7, seed=2)} if with_entropy else {})
    assert_contract(args, grads, backend=backend, **options)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("below", [0.0, 5.0, 10.0])
def test_entropy_does_not_depend_on_how_unlikely_the_label_is(below, backend):
    """Anchored at the label, log S and sum e d / S both grow with the label's distance, and cancel."""
    args = inputs((200,), 129, ignored=0.0)
    args["targets"][args["targets"] == 0] = 1
    args["logits"][:, 0] += below  # one column above most labels; every entropy stays between 0.1 and 4 nats
    (ours, d_ours), (fp32, _), (want, d_want) = three_ways(args, {"entropy": upstream(200)}, backend=backend)
    assert_no_worse(ours["entropy"], fp32["entropy"], want["entropy"])
    assert_gradient(d_ours["logits"], d_want["logits"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extra_outputs(dtype, backend):
    args = inputs((5, 8), 129, dtype)
    got = as_dict(selective_logps(**args, **EVERY, backend=backend, temperature=0.7))
    want = run(with_identity(truth), args, dtype=torch.float64, temperature=0.7)[0]
    assert set(got) == set(want)
    for output in ("entropy", "log_sum_sq_probs", "mean_logits"):
        torch.testing.assert_close(got[output].double(), want[output], rtol=1e-5, atol=1e-5)
    assert torch.equal(got["is_top1"].bool(), want["is_top1"])


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options, backend):
    args = inputs((2, 3), 7, torch.float64)

    def outputs(logits):
        both = selective_logps(logits, args["targets"], outputs=("entropy",), backend=backend, **options)
        return both.logps, both.entropy

    assert torch.autograd.gradcheck(outputs, [args["logits"].requires_grad_()])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_linear_logps_of_the_identity(dtype, backend):
    args = inputs((33,), 129, dtype)
    eye = torch.eye(129, dtype=dtype)
    want = linear_logps(args["logits"], eye, args["targets"], backend=backend)
    torch.testing.assert_close(selective_logps(**args, backend=backend), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_tokens_are_never_read(dtype, backend):
    args = inputs((33,), 129, dtype, ignored=0.5)
    ignored = args["targets"] == IGNORE
    grads = {"logps": upstream(33), "entropy": upstream(33, seed=2)}
    call = {"trained": ("logits",), "backend": backend, **EVERY}
    clean, d_clean = run(selective_logps, args, grads=grads, **call)
    poisoned = {**args, "logits": args["logits"].masked_fill(ignored[:, None], math.nan)}
    grads = {name: gradient.masked_fill(ignored, math.nan) for name, gradient in grads.items()}
    got, d_got = run(selective_logps, poisoned, grads=grads, **call)
    for name in got:
        assert_same_bits(got[name], clean[name])
        assert bool((got[name][ignored] == 0).all())
    assert_same_bits(d_got["logits"], d_clean["logits"])
    assert bool((d_got["logits"][ignored] == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [(0,), (0, 4), (3, 0), (5,), (2, 3)])
def test_nothing_to_score(tokens, backend):
    args = {"logits": torch.full((*tokens, 7), math.nan), "targets": torch.full(tokens, IGNORE)}
    grads = {"logps": upstream(*tokens), "entropy": upstream(*tokens)}
    values, gradients = run(selective_logps, args, grads=grads, trained=("logits",), backend=backend, **EVERY)
    assert gradients["logits"].shape == (*tokens, 7)
    assert all(bool((x == 0).all()) for x in [*values.values(), *gradients.values()])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_vocabulary_of_one_is_certain(dtype, backend):
    values, gradients = run(
        selective_logps,
        inputs((5,), 1, dtype),
        grads={"logps": upstream(5)},
        trained=("logits",),
        backend=backend,
        outputs=("entropy",),
    )
    assert all(bool((x == 0).all()) for x in [*values.values(), *gradients.values()])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [100.0, 1e4])
def test_huge_logits(spread, dtype, backend):
    """Nothing is lost here: the logits are given, their differences are exact to an ulp."""
    args = inputs((60,), 300, dtype, spread=spread / 3)
    grads = {"logps": upstream(60)}
    (ours, d_ours), (fp32, _), (want, d_want) = three_ways(args, grads, backend=backend)
    assert_logps(ours["logps"], want["logps"], args["logits"].abs().max())
    assert_no_worse(ours["logps"], fp32["logps"], want["logps"])
    error = (d_ours["logits"].double() - d_want["logits"]).norm() / d_want["logits"].norm()
    assert error <= (3e-6 if dtype == torch.float32 else 3e-3)  # fp32 differences of given logits are exact to 1e-7
    assert bool((selective_logps(**args, outputs=("entropy",), backend=backend).entropy >= 0).all())


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [10.0, 21.0, 40.0])
def test_confident_rows_keep_relative_precision(lead, dtype, backend):
    args = inputs((20,), 50, dtype, spread=1.0, ignored=0.0)
    args["logits"].scatter_(1, args["targets"][:, None], lead)
    want = run(with_identity(truth), args, dtype=torch.float64)[0]["logps"]
    got = selective_logps(**args, backend=backend).double()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", FUSED)
def test_infinite_logits_of_other_tokens_are_impossible(backend):
    """Masked vocabularies: -inf is a probability of 0, and its gradient is 0."""
    args = inputs((7,), 13, ignored=0.0)
    args["targets"] = args["targets"].clamp(max=9)
    args["logits"][:, 10:] = -math.inf
    call = {"grads": {"logps": upstream(7)}, "trained": ("logits",), "backend": backend}
    got, d_got = run(selective_logps, args, **call)
    want, d_want = run(selective_logps, {**args, "logits": args["logits"][:, :10]}, **call)
    torch.testing.assert_close(got["logps"], want["logps"])
    torch.testing.assert_close(d_got["logits"][:, :10], d_want["logits"])
    assert bool((d_got["logits"][:, 10:] == 0).all())


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("level", [-1e4, 0.0, 1e4])
def test_an_impossible_label(level, backend):
    """log 0, and all the others as if it were not there; its gradient is g, theirs -g p."""
    args = inputs((7,), 300, ignored=0.0)
    others = args["logits"][:, 1:] + level
    args["logits"] = torch.cat((torch.full((7, 1), -math.inf), others), 1)
    args["targets"][:] = 0
    (entropy, h) = (others.double().softmax(1).log() * -others.double().softmax(1)).sum(1), upstream(7, seed=2)
    call = {"trained": ("logits",), "backend": backend, "outputs": ("entropy",)}
    got, d_got = run(selective_logps, args, grads={"logps": upstream(7)}, **call)
    assert bool((got["logps"] == -math.inf).all())
    torch.testing.assert_close(got["entropy"].double(), entropy, rtol=2e-6, atol=2e-6)
    p = others.double().softmax(1)
    torch.testing.assert_close(d_got["logits"][:, 0], upstream(7))
    assert_gradient(d_got["logits"][:, 1:], -upstream(7)[:, None] * p)
    _, d_got = run(selective_logps, args, grads={"entropy": h}, **call)
    assert_gradient(d_got["logits"][:, 1:], -h[:, None] * p * (p.log() + entropy[:, None]))
    assert bool((d_got["logits"][:, 0] == 0).all())


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_each_other(dtype, backend):
    args = inputs((700,), 257, dtype)
    call = {"trained": ("logits",), "backend": backend}
    whole, d_whole = run(selective_logps, args, grads={"logps": upstream(700)}, **call)
    for chosen in (slice(0, 1), slice(3, 9), slice(512, 700), slice(None, None, 3)):
        some = {k: x[chosen] for k, x in args.items()}
        few, d_few = run(selective_logps, some, grads={"logps": upstream(700)[chosen]}, **call)
        assert_same_bits(few["logps"], whole["logps"][chosen])
        assert_same_bits(d_few["logits"], d_whole["logits"][chosen])


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_views(dtype, backend):
    args = inputs((5, 6), 29, dtype)
    call = {"grads": {"logps": upstream(5, 6)}, "trained": ("logits",), "backend": backend}
    want, d_want = run(selective_logps, args, **call)
    logits = torch.full((59, 13, 11), -7.0, dtype=dtype).permute(2, 1, 0)[1::2, 1::2, 1::2].copy_(args["logits"])
    targets = torch.full((13, 11), -7).T[1::2, 1::2].copy_(args["targets"])
    assert not logits.is_contiguous() and not targets.is_contiguous()
    got = selective_logps(logits.requires_grad_(), targets, backend=backend)
    assert_same_bits(got, want["logps"])
    assert_same_bits(torch.autograd.grad(got, logits, upstream(6, 5).T * 0 + upstream(5, 6))[0], d_want["logits"])


def test_retained_graph_and_checkpoint():
    args = inputs((9,), 29)
    logits = args["logits"].requires_grad_()
    logps = selective_logps(**args)
    first, second = (torch.autograd.grad(logps, logits, upstream(9), retain_graph=True)[0] for _ in range(2))
    assert_same_bits(first, second)
    again = torch.utils.checkpoint.checkpoint(selective_logps, logits, args["targets"], use_reentrant=False)
    assert_same_bits(torch.autograd.grad(again, logits, upstream(9))[0], first)


def test_second_derivative_raises():
    args = inputs((9,), 29)
    args["logits"].requires_grad_()
    both = selective_logps(**args, outputs=("entropy",))
    for output in (both.logps, both.entropy):
        for given in (upstream(9), upstream(9).requires_grad_()):
            (first,) = torch.autograd.grad(output, args["logits"], given, create_graph=True)
            with pytest.raises(RuntimeError, match=r"twice|second derivative"):
                (output.sum() + first.square().sum()).backward()  # a sum: torch would refuse the penalty alone


def test_instruction_sets_and_every_length_of_a_row(monkeypatch):
    """Ends of vectors, labels in every lane, and nothing read or written beyond a row: its neighbours are NaN."""
    if "cpu" not in FUSED:
        pytest.skip("fastpref was built without the C++ kernels")
    from fastpref import _cpu

    grads = {"logps": upstream(40), "entropy": upstream(40, seed=2)}
    for v in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 40):
        for dtype in DTYPES:
            args = inputs((40,), v, dtype, ignored=0.1)
            args["targets"] = torch.where(args["targets"] == IGNORE, IGNORE, torch.arange(40) % v)
            args["logits"] = torch.full((40, v + 64), math.nan, dtype=dtype)[:, 32 : 32 + v].copy_(args["logits"])
            want, d_want = run(with_identity(truth), args, grads=grads, trained=("logits",), dtype=torch.float64)
            for isa in _cpu.isas():
                monkeypatch.setenv("FASTPREF_CPU_ISA", isa)
                logits = args["logits"].requires_grad_()  # not a clone, which would be contiguous
                got = selective_logps(logits, args["targets"], outputs=("entropy",), backend="cpu")
                assert_logps(got.logps.detach(), want["logps"])
                assert_entropy(got.entropy.detach(), want["entropy"])
                (gradient,) = torch.autograd.grad(got[:2], logits, list(grads.values()))
                assert_gradient(gradient, d_want["logits"], d_want["logits"].norm() + 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_round_to_nearest_even(dtype):
    """g (1 - p_y) of a certain loser is g: every finite 16-bit value, the ties between them, and what overflows."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[every.isfinite()].sort().values.unique()
    ties = (every[1:].double() + every[:-1].double()).div(2).float()
    nearby = torch.cat((torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1)))
    g = torch.cat((every, ties, nearby, torch.tensor([65519.9, 65520.0, -65520.0, 3.4e38, -3.4e38])))
    g = g[g.abs() >= 2**-126]  # fp32's own subnormals are no gradients
    logits = torch.zeros(len(g), 2, dtype=dtype)
    logits[:, 1] = 1000.0
    logits.requires_grad_()
    logps = selective_logps(logits, torch.zeros(len(g), dtype=torch.long))
    (gradient,) = torch.autograd.grad(logps, logits, g)
    assert_same_bits(gradient[:, 0], g.to(dtype))


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_and_nan_logits_give_no_number(dtype, backend):
    """In fp16 infinity is no large number: its bits go another way."""
    for bad in (math.inf, math.nan):
        logits = torch.zeros(2, 40, dtype=dtype)
        logits[0, 7] = bad
        got = selective_logps(logits, torch.tensor([3, 3]), backend=backend)
        assert not bool(got[0].isfinite()) and bool(got[1].isfinite())


def change(**changes):
    args = {"logits": torch.randn(6, 7, generator=torch.Generator().manual_seed(0)), "targets": torch.arange(6)}
    return {**args, **{k: c(args[k]) if callable(c) else c for k, c in changes.items()}}


REFUSALS = {
    "rank": ({"logits": torch.ones(())}, ValueError, r"logits must have at least .*; got shape \(\)"),
    "shape": ({"targets": lambda x: x[:3]}, ValueError, r"targets must .*\(6,\).*; got \(3,\)"),
    "V = 0": ({"logits": lambda x: x[:, :0]}, ValueError, r"logits must .*; got .*\(6, 0\)"),
    "integers": ({"logits": lambda x: x.long()}, TypeError, "logits must be one of .*; got int64"),
    "float targets": ({"targets": lambda x: x.float()}, TypeError, "targets must be integers; got float32"),
    "targets range": ({"targets": lambda x: x + 2}, ValueError, r"targets must be .*\[0, 7\).*; got .*7"),
    "negative": ({"targets": lambda x: x - 2}, ValueError, r"targets must be .*\[0, 7\).*; got .*-2"),
    "devices": ({"targets": lambda x: x.to("meta")}, ValueError, "targets must be on the device of logits"),
    "not a tensor": ({"logits": [[1.0]]}, TypeError, "logits must be a tensor; got list"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature must be .*; got 0.0"),
    "softcap": ({"softcap": 0.0}, ValueError, "softcap must be .*, or None; got 0.0"),
    "logit_scale": ({"logit_scale": math.nan}, ValueError, "logit_scale must be finite.*; got nan"),
    "outputs": ({"outputs": ("x",)}, ValueError, "outputs must be among entropy.*; got 'x'"),
    "backend": ({"backend": "tpu"}, ValueError, "backend must be None or one of .*torch.*; got 'tpu'"),
    "fp64": ({"logits": lambda x: x.double()}, TypeError, "logits must be one of .*; got float64"),
    "nan": ({"logits": lambda x: x * math.nan, "check_finite": True}, ValueError, "logits must be finite"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    changes, error, message = REFUSALS[name]
    with pytest.raises(error, match=f"^selective_logps: {message}"):
        selective_logps(**change(**changes))
