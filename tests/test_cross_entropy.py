"""linear_cross_entropy against torch's cross_entropy of float64 logits: values, gradients, every option, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastpref import linear_cross_entropy
from tests._oracle import (
    BACKENDS,
    IGNORE,
    OPTIONS,
    assert_gradient,
    assert_gradients,
    assert_same_bits,
    head,
    option_case,
    run,
    scores,
    upstream,
)
from tests.test_compile import opcheck
from tests.test_plan import MIB, measured_passes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = {"n": 160, "h": 16, "v": 2053}  # with 1 MiB of workspace: several chunks
REDUCTIONS = ["mean", "sum", "none"]


def true_loss(hidden, weight, targets, bias=None, *, reduction="mean", num_items=None, rows=None, **options):
    """torch's own, on the rows that count; an empty mean is 0."""
    smoothing, temperature = options.pop("label_smoothing", 0.0), options.pop("temperature", 1.0)
    live = targets.flatten() != IGNORE
    hidden = hidden.flatten(0, -2)
    hidden = (hidden if rows is None else hidden[rows])[live]
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.flatten()[live]
    z = scores(hidden, weight, bias, temperature=temperature, **options)
    losses = F.cross_entropy(z, targets.flatten()[live], reduction="none", label_smoothing=smoothing)
    if reduction == "none":
        return {"loss": torch.zeros(targets.shape, dtype=z.dtype).masked_scatter(live.view(targets.shape), losses)}
    by = num_items or (max(int(live.sum()), 1) if reduction == "mean" else 1)
    return {"loss": losses.sum() / by}


def our_loss(**given):
    return {"loss": linear_cross_entropy(**given)}


def of_call(args, grad, *, trained=("hidden", "weight", "bias"), **options):
    """(ours, truth), each (loss, gradients)."""
    where = {k: options.pop(k) for k in ("backend", "workspace") if k in options}
    call = {"grads": {"loss": grad}, "trained": trained, **options}
    got, d_got = run(our_loss, args, **call, **where)
    want, d_want = run(true_loss, args, dtype=torch.float64, **call)
    return (got["loss"], d_got), (want["loss"], d_want)


def assert_loss(loss, truth, tokens):
    """Each token within the contract of a log-prob, rms; a sum of them grows as their number at worst."""
    assert loss.dtype in (torch.float32, torch.float64) and loss.shape == truth.shape
    error = (loss.double() - truth).abs()
    assert bool((error <= 3 * (2e-6 * tokens + 1e-6 * truth.abs())).all()), f"off by {error.max():.1e}"


def assert_contract(args, *, grad=None, reduction="mean", **options):
    shape = args["targets"].shape if reduction == "none" else ()
    grad = upstream(*shape) if grad is None else grad
    (loss, d_ours), (want, d_true) = of_call(args, grad, reduction=reduction, **options)
    tokens = args["targets"].numel() if reduction == "sum" else 1
    assert_loss(loss, want, tokens)
    # smoothing's gradient is rounded on its own, and takes from the label what the other one gave
    _, d_plain = of_call(args, grad, reduction=reduction, **options | {"label_smoothing": 0.0})[1]
    for name in d_ours:
        scale = d_plain[name].norm() + (d_true[name] - d_plain[name]).norm()
        assert_gradient(d_ours[name], d_true[name], scale if options.get("label_smoothing") else None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workspace", [MIB, None])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("hidden", "weight")])
def test_value_and_gradients(trained, smoothing, workspace, dtype, backend):
    """In one chunk and in several, whose gradients are formed in forward."""
    options = {"label_smoothing": smoothing, "workspace": workspace, "backend": backend, "trained": trained}
    assert_contract(head(*SMALL.values(), dtype), grad=torch.tensor(1.7), **options)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace", [MIB, None])
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
def test_options(smoothing, workspace, dtype, name):
    args, options = option_case(name, *SMALL.values(), dtype)
    assert_contract(args, label_smoothing=smoothing, workspace=workspace, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("workspace", [MIB, None])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"label_smoothing": 0.2, "softcap": 5.0}])
def test_reductions(options, workspace, reduction, backend):
    assert_contract(head(*SMALL.values()), reduction=reduction, workspace=workspace, backend=backend, **options)


@pytest.mark.parametrize("num_items", [37, 37.5, torch.tensor(37)])
@pytest.mark.parametrize("workspace", [MIB, None])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_num_items(smoothing, workspace, num_items):
    """The parts of a step add up to the whole, which the mean does not."""
    args = head(*SMALL.values())
    options = {"num_items": num_items, "label_smoothing": smoothing, "workspace": workspace}
    assert_contract(args, **options)
    parts = [{**args, "hidden": args["hidden"][s], "targets": args["targets"][s]} for s in (slice(50), slice(50, 160))]
    whole = linear_cross_entropy(**args, **options)
    torch.testing.assert_close(sum(linear_cross_entropy(**part, **options) for part in parts), whole)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradcheck(backend, reduction, softcap):
    args = head(6, 3, 5, torch.float64, bias=True)
    targets, leaves = args.pop("targets"), [args[k].requires_grad_() for k in ("hidden", "weight", "bias")]
    temperature = 0.5 + torch.rand(6, generator=torch.Generator().manual_seed(5))

    def loss(hidden, weight, bias):
        options = {"temperature": temperature, "softcap": softcap, "logit_scale": 1.3, "reduction": reduction}
        return linear_cross_entropy(hidden, weight, targets, bias=bias, label_smoothing=0.2, backend=backend, **options)

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("workspace", [MIB, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batched_packed_and_rows_agree(dtype, workspace, softcap):
    args = head(*SMALL.values(), dtype)
    options = {"label_smoothing": 0.1, "workspace": workspace, "softcap": softcap}
    packed = of_call(args, torch.tensor(1.7), **options)[0]
    batched = {k: x if k == "weight" else x.unflatten(0, (4, 40)) for k, x in args.items()}
    loss, gradients = of_call(batched, torch.tensor(1.7), **options)[0]
    assert_same_bits(loss, packed[0])
    assert_same_bits(gradients["hidden"].flatten(0, 1), packed[1]["hidden"])
    shared = torch.randint(160, (200,), generator=torch.Generator().manual_seed(3))
    targets = head(200, 16, 2053)["targets"]
    for cu_seqlens in (None, torch.tensor([0, 90, 200], dtype=torch.int32)):
        got, d_got = of_call({**args, "targets": targets}, torch.tensor(1.7), rows=shared, **options)[0]
        want, d_want = of_call({**args, "targets": targets}, torch.tensor(1.7), rows=shared, **options)[1]
        assert_loss(got, want, 1)
        assert_gradients(d_got, d_want)
        with torch.no_grad():
            again = linear_cross_entropy(
                args["hidden"], args["weight"], targets, rows=shared, cu_seqlens=cu_seqlens, **options
            )
        assert_loss(again, want, 1)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("tokens", [(0,), (5,), (0, 3), (2, 0), (2, 3)])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"label_smoothing": 0.1, "softcap": 5.0}])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_nothing_to_learn_is_zero_not_nan(backend, options, tokens, reduction):
    args = {"hidden": torch.full((*tokens, 4), math.nan), "targets": torch.full(tokens, IGNORE)}
    args |= {"weight": upstream(7, 4), "bias": upstream(7)}
    leaves = [args[k].requires_grad_() for k in ("hidden", "weight", "bias")]
    loss = linear_cross_entropy(**args, reduction=reduction, backend=backend, **options)
    assert loss.shape == (tokens if reduction == "none" else ())
    assert bool((loss == 0).all()) and not bool(loss.signbit().any())
    for gradient in torch.autograd.grad(loss.sum(), leaves):
        assert bool((gradient == 0).all())


@pytest.mark.parametrize("workspace", [MIB, None])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"label_smoothing": 0.1, "softcap": 5.0}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_tokens_are_never_read(backend, options, workspace):
    args = head(*SMALL.values(), ignored=0.5)
    ignored = args["targets"] == IGNORE
    options = {"workspace": workspace, "backend": backend, **options}
    poisoned = {**args, "hidden": args["hidden"].masked_fill(ignored[:, None], math.nan)}
    (want, d_want), _ = of_call(args, torch.tensor(1.7), **options)
    (got, d_got), _ = of_call(poisoned, torch.tensor(1.7), **options)
    assert_same_bits(got, want)
    for name in d_want:
        assert_same_bits(d_got[name], d_want[name])
    assert bool((d_got["hidden"][ignored] == 0).all())


PASSES = [  # over a trained head three, whether its rows fit a chunk or not; over a frozen one two
    (3, ("hidden", "weight"), {"workspace": MIB}),
    (3, ("hidden", "weight"), {}),
    (2, ("hidden",), {"workspace": MIB}),
    (3, ("hidden", "weight"), {"workspace": MIB, "label_smoothing": 0.1}),
    (2, ("hidden",), {"label_smoothing": 0.1}),
    (6, ("hidden", "weight"), {"label_smoothing": 0.1, "softcap": 5.0}),
    (4, ("hidden", "weight"), {"workspace": MIB, "reduction": "none"}),
    (4, ("hidden", "weight"), {"workspace": MIB, "max_extra_bytes": 0}),
]


@pytest.mark.parametrize(("wanted", "trained", "options"), PASSES)
def test_passes(wanted, trained, options):
    n, h, v = SMALL.values()
    args = head(n, h, v, ignored=0.0)
    leaves = [args[k].requires_grad_() for k in trained]

    def call():
        loss = linear_cross_entropy(**args, backend="torch", **options)
        torch.autograd.grad(loss, leaves, torch.ones_like(loss))

    assert measured_passes(call, 2 * n * h * v) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_autocast(dtype, smoothing):
    """Read in the autocast dtype; gradients in the parameters' own."""
    args = head(*SMALL.values(), dtype)
    with torch.autocast("cpu", torch.bfloat16):
        (loss, gradients), _ = of_call(args, torch.tensor(1.7), label_smoothing=smoothing)
    narrow = {k: x if k == "targets" else x.bfloat16() for k, x in args.items()}
    (want, d_want), _ = of_call(narrow, torch.tensor(1.7), label_smoothing=smoothing)
    assert_same_bits(loss, want)
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        # a second gradient is added in fp32 here, in bf16 there
        torch.testing.assert_close(gradient.bfloat16(), d_want[name], rtol=2**-6, atol=1e-5)


def test_strided_views():
    args = head(*SMALL.values())
    (want, d_want), _ = of_call(args, torch.tensor(1.7), label_smoothing=0.1)
    hidden = torch.full((16, 320), -7.0).T[::2].copy_(args["hidden"]).requires_grad_()
    weight = torch.full((2053, 40), -7.0)[:, 3:35:2].copy_(args["weight"]).requires_grad_()
    targets = torch.full((160, 3), -7)[:, 1].copy_(args["targets"])
    assert not any(x.is_contiguous() for x in (hidden, weight, targets))
    loss = linear_cross_entropy(hidden, weight, targets, label_smoothing=0.1)
    assert_same_bits(loss, want)
    for gradient, name in zip(torch.autograd.grad(loss, (hidden, weight), torch.tensor(1.7)), d_want, strict=True):
        assert_same_bits(gradient, d_want[name])


def test_accumulated_gradients_are_those_of_the_whole_batch():
    args = head(*SMALL.values())
    count = int((args["targets"] != IGNORE).sum())
    (_, d_want), _ = of_call(args, torch.tensor(1.0), label_smoothing=0.1)
    weight = args["weight"].requires_grad_()
    for part in (slice(0, 7), slice(7, 160)):
        hidden, targets = args["hidden"][part], args["targets"][part]
        linear_cross_entropy(hidden, weight, targets, label_smoothing=0.1, num_items=count).backward()
    assert_gradient(weight.grad, d_want["weight"].double())


@pytest.mark.parametrize("workspace", [MIB, None])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_second_derivative_raises(smoothing, workspace):
    args = head(*SMALL.values())
    weight = args["weight"].requires_grad_()
    loss = linear_cross_entropy(**args, label_smoothing=smoothing, workspace=workspace)
    (first,) = torch.autograd.grad(loss, weight, torch.tensor(1.7), create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        first.square().sum().backward()


@pytest.mark.parametrize("workspace", [MIB, None])
def test_retained_graph_and_checkpoint(workspace):
    args = head(*SMALL.values())
    weight = args["weight"].requires_grad_()
    options = {"label_smoothing": 0.1, "workspace": workspace}
    loss = linear_cross_entropy(**args, **options)
    first, second = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for _ in range(2))
    assert_same_bits(first, second)
    again = torch.utils.checkpoint.checkpoint(
        lambda h, w, y: linear_cross_entropy(h, w, y, **options),
        args["hidden"],
        weight,
        args["targets"],
        use_reentrant=False,
    )
    assert_same_bits(torch.autograd.grad(again, weight)[0], first)


@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"label_smoothing": 0.1, "softcap": 5.0}])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles(reduction, options):
    torch._dynamo.reset()
    args = head(9, 5, 11)
    grads = {"loss": upstream(*((9,) if reduction == "none" else ()))}
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    call = {"grads": grads, "reduction": reduction, **options}
    want, d_want = run(lambda **given: {"loss": linear_cross_entropy(**given)}, args, **call)
    got, d_got = run(lambda **given: {"loss": compiled(**given)}, args, **call)
    torch.testing.assert_close(got["loss"], want["loss"], rtol=1e-6, atol=1e-6)
    for name in d_want:
        torch.testing.assert_close(d_got[name], d_want[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    def call():
        args = head(7, 5, 11, dtype, bias=True) | {"rows": torch.tensor([0, 0, 1, 2, 3, 6, 6])}
        of_call({k: x for k, x in args.items() if k != "rows"}, torch.tensor(1.7), label_smoothing=0.1)
        leaves = [args[k].requires_grad_() for k in ("hidden", "weight", "bias")]
        torch.autograd.grad(linear_cross_entropy(**args, label_smoothing=0.1), leaves)

    names = opcheck(call, quick=dtype != torch.float32)
    assert names >= {"label_margin", "label_margin_backward"}


def change(**changes):
    args = {"hidden": upstream(6, 4), "weight": upstream(7, 4, seed=2), "targets": torch.arange(6)}
    return {**args, **{k: c(args[k]) if callable(c) else c for k, c in changes.items()}}


REFUSALS = {
    "reduction": ({"reduction": "avg"}, ValueError, "reduction must be one of mean, sum, none; got 'avg'"),
    "both": ({"num_items": 3, "reduction": "sum"}, ValueError, "num_items and reduction='sum' were both given"),
    "no items": ({"num_items": 0}, ValueError, "num_items must be > 0 and finite; got 0"),
    "NaN items": ({"num_items": math.nan}, ValueError, "num_items must be > 0 and finite; got nan"),
    "items": ({"num_items": "3"}, TypeError, "num_items must be a number; got str"),
    "items a vector": ({"num_items": torch.ones(2)}, ValueError, r"num_items must be .* 0-d tensor; got shape \(2,\)"),
    "items that learn": (
        {"num_items": torch.ones((), requires_grad=True)},
        ValueError,
        "num_items must be detached; got a tensor that requires grad",
    ),
    "smoothing": ({"label_smoothing": 1.1}, ValueError, r"label_smoothing must be in \[0, 1\]; got 1.1"),
    "NaN smoothing": ({"label_smoothing": math.nan}, ValueError, r"label_smoothing must be in \[0, 1\]; got nan"),
    "smoothing a tensor": ({"label_smoothing": torch.ones(())}, TypeError, "label_smoothing must be a number; got T"),
    "shape": ({"targets": lambda x: x[:3]}, ValueError, r"targets must be \(6,\).*; got \(3,\)"),
    "hidden": ({"hidden": lambda x: x[:, :3]}, ValueError, r"weight must be \(V, 3\).*; got \(7, 4\)"),
    "dtypes": ({"weight": lambda x: x.bfloat16()}, TypeError, "weight must have the dtype of hidden.*; got bfloat16"),
    "range": ({"targets": lambda x: x + 2}, ValueError, r"targets must be in \[0, 7\) or -100 .*; got 7"),
    "nan": ({"hidden": lambda x: x * math.nan, "check_finite": True}, ValueError, "hidden must be finite"),
    "backend": ({"backend": "tpu"}, ValueError, "backend must be None or one of .*; got 'tpu'"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    changes, error, message = REFUSALS[name]
    with pytest.raises(error, match=f"^linear_cross_entropy: {message}"):
        linear_cross_entropy(**change(**changes))


def test_metrics_are_means_over_the_tokens_that_count():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 8, generator=generator), torch.randn(11, 8, generator=generator)
    targets = torch.tensor([3, -100, 1, 10, -100, 0, 5])
    plain = linear_cross_entropy(hidden, weight, targets)
    loss, metrics = linear_cross_entropy(hidden, weight, targets, return_metrics=True)
    logps = (hidden @ weight.T).log_softmax(-1)[targets != -100]
    assert torch.equal(loss, plain)
    torch.testing.assert_close(metrics["entropy"], -(logps.exp() * logps).sum(-1).mean())
    right = (logps.argmax(-1) == targets[targets != -100]).float().mean()
    torch.testing.assert_close(metrics["mean_token_accuracy"], right)
