"""linear_divergence against float64 divergences of whole logits, written with torch's kl_div."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastpref import linear_divergence
from tests._oracle import IGNORE, OPTIONS, assert_gradient, assert_same_bits, head, run, scores, upstream
from tests.test_compile import opcheck
from tests.test_plan import MIB, measured_passes, measured_peak

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["torch", "reference"]
KINDS = {
    "reverse": {"kind": "reverse_kl"},
    "forward": {"kind": "forward_kl"},
    "jsd": {"kind": "jsd"},
    "jsd, teacher's share 0.1": {"kind": "jsd", "jsd_beta": 0.1},
}
LEAVES = ("hidden_p", "weight_p", "bias_p", "hidden_q", "weight_q", "bias_q")
SMALL = {"n": 100, "v": 2053}  # with 1 MiB of workspace: several chunks


def inputs(n=100, v=2053, dtype=torch.float32, *, h_p=16, h_q=24, close=None, biased=False, spread=3.0):
    """Arguments of linear_divergence; `close`: q is p, moved by this much. A fifth of the tokens is masked."""
    p, q = (head(n, h, v, dtype, seed=s, spread=spread, bias=biased) for h, s in ((h_p, 0), (h_q, 1)))
    if close is not None:
        q = {k: x if k == "targets" else (x + close * upstream(*x.shape)).to(dtype) for k, x in p.items()}
    args = {f"{k}_{name}": x for side, name in ((p, "p"), (q, "q")) for k, x in side.items() if k != "targets"}
    return {**args, "mask": head(n, 2, 2, seed=2, ignored=0.2)["targets"] != IGNORE}


def truth(hidden_p, weight_p, hidden_q, weight_q, *, kind, mask, bias_p=None, bias_q=None, jsd_beta=0.5, **options):
    if isinstance(options.get("temperature"), torch.Tensor):
        options["temperature"] = options["temperature"][mask]
    log_p = scores(hidden_p[mask], weight_p, bias_p, **options).log_softmax(-1)
    log_q = scores(hidden_q[mask], weight_q, bias_q, **options).log_softmax(-1)

    def kl(a, b):  # KL(a || b)
        return F.kl_div(b, a, reduction="none", log_target=True).sum(-1)

    if kind == "jsd":
        log_m = torch.logaddexp(math.log(jsd_beta) + log_q, math.log(1 - jsd_beta) + log_p)
        found = jsd_beta * kl(log_q, log_m) + (1 - jsd_beta) * kl(log_p, log_m)
    else:
        found = kl(log_p, log_q) if kind == "reverse_kl" else kl(log_q, log_p)
    return {"divergence": torch.zeros(mask.shape, dtype=log_p.dtype).masked_scatter(mask, found)}


def ours(**given):
    return {"divergence": linear_divergence(**given)}


def both(args, *, trained=LEAVES, grad=None, **options):
    """(divergence, gradients) of ours, and of the truth."""
    grads = {"divergence": upstream(*args["mask"].shape) if grad is None else grad}
    where = {k: options.pop(k) for k in ("backend", "workspace") if k in options}
    got, d_got = run(ours, args, grads=grads, trained=trained, **options, **where)
    want, d_want = run(truth, args, grads=grads, trained=trained, dtype=torch.float64, **options)
    return (got["divergence"], d_got), (want["divergence"], d_want)


def assert_divergence(actual, truth):
    """As exact as a log-prob of its size, every token: two standard deviations of what the contract allows one."""
    assert actual.dtype == torch.float32 and bool((actual >= 0).all())
    error = (actual.double() - truth).abs()
    assert bool((error <= 2 * (2e-6 + 1e-6 * truth)).all()), f"off by {error.max():.1e}"


def assert_contract(args, **options):
    (got, d_got), (want, d_want) = both(args, **options)
    assert_divergence(got, want)
    for name in d_want:
        assert d_got[name].dtype == args[name].dtype
        assert_gradient(d_got[name], d_want[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workspace", [MIB, None])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients(kind, workspace, dtype):
    """In one chunk and in several, of heads of different hidden sizes."""
    assert_contract(inputs(dtype=dtype), workspace=workspace, **KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_reference(kind):
    (got, d_got), (want, d_want) = both(inputs(dtype=torch.float64), backend="reference", **KINDS[kind])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for name in d_want:
        assert_gradient(d_got[name], d_want[name])


@pytest.mark.parametrize("trained", [(x,) for x in LEAVES if "bias" not in x] + [("hidden_p", "hidden_q"), LEAVES[:2]])
@pytest.mark.parametrize("workspace", [MIB, None])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_only_where_asked(kind, workspace, trained):
    """With frozen heads they are formed in forward, else in backward."""
    assert_contract(inputs(), workspace=workspace, trained=trained, **KINDS[kind])


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_options(dtype, kind, name):
    options = dict(OPTIONS[name])
    args = inputs(dtype=dtype, biased=options.pop("bias", False))
    if options.pop("per_token", False):
        args["temperature"] = 0.5 + torch.rand(100, generator=torch.Generator().manual_seed(5))
    assert_contract(args, workspace=MIB, **KINDS[kind], **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("close", [1e-2, 1e-3, 1e-4])
def test_close_heads_keep_relative_precision(close, kind):
    """The KL to a reference that the policy has hardly left: second order in what fp32 logits resolve to first."""
    (got, d_got), (want, d_want) = both(inputs(close=close), **KINDS[kind])
    live = want > 0
    ratio = got[live].double() / want[live]
    assert bool(((ratio - 1).abs() <= 1e-5 / close).all()), f"off by {(ratio - 1).abs().max():.1e}"
    # dD/dz = p (log p/q - D): the difference of logs is as exact as their roundings
    for name in d_want:
        assert_gradient(d_got[name], d_want[name], d_want[name].norm() / close)


@pytest.mark.parametrize("kind", KINDS)
def test_never_below_zero(kind):
    """Heads apart by a rounding: what is left of the sum is of either sign."""
    args = inputs(1000, 67, spread=1.0, close=1e-7)
    got = linear_divergence(**args, **KINDS[kind])
    assert bool((got >= 0).all()) and bool((got < 1e-9).all())


def test_equal_heads_are_no_distance_apart():
    args = inputs(close=0.0)
    for kind in KINDS.values():
        (got, d_got), _ = both(args, **kind)
        assert bool((got == 0).all())
        assert all(bool((x.abs() <= 1e-6).all()) for x in d_got.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [60.0, 1e3])
def test_far_apart_heads_are_finite_and_right(spread, dtype, kind):
    """Margins of 200 nats and of thousands: probabilities underflow, log-probs do not."""
    args = inputs(60, 67, dtype, spread=spread)
    (got, d_got), (want, d_want) = both(args, grad=upstream(60) / 100, **KINDS[kind])  # within fp16
    assert want.max() > (0.3 if "jsd" in kind else 2 * spread)
    scale = 6 * spread / 64  # the largest logit over 64
    torch.testing.assert_close(got.double(), want, rtol=2e-6 * scale, atol=4e-6 * scale)
    for name in d_want:
        norm = d_want[name].norm()
        if "jsd" in kind:  # it has reached its bound, and its gradient is what is left of p log p / m
            factor = {"hidden": "weight", "weight": "hidden"}[name[:-2]] + name[-2:]
            norm = norm + upstream(60).norm() / 100 * args[factor].double().norm(dim=1).mean() * math.log(2) / 2
        error = (d_got[name].double() - d_want[name]).norm() / norm
        assert error <= (6e-6 * scale if dtype == torch.float32 else 3e-3)


def test_margins_of_200_nats():
    """A one-hot against another one: the KL is the margin, its gradient moves mass at that rate."""
    hidden = torch.eye(2)
    weight_p, weight_q = 200 * torch.tensor([[1.0, -1], [0, 0]]), 200 * torch.tensor([[-1.0, 1], [0, 0]])
    for kind, options in KINDS.items():
        got = linear_divergence(hidden, weight_p, hidden, weight_q, **options)
        beta = options.get("jsd_beta", 0.5)
        jsd = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        torch.testing.assert_close(got, torch.full((2,), jsd if "jsd" in kind else 200.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_symmetries(kind):
    """KL(p || q) forward is KL(q || p) reverse; the JSD with shares exchanged is itself; all are >= 0."""
    args, options = inputs(), KINDS[kind]
    got = linear_divergence(**args, **options)
    swapped = {k.replace("_p", "_x").replace("_q", "_p").replace("_x", "_q"): x for k, x in args.items()}
    if options["kind"] == "jsd":
        back = linear_divergence(**swapped, kind="jsd", jsd_beta=1 - options.get("jsd_beta", 0.5))
    else:
        other = {"reverse_kl": "forward_kl", "forward_kl": "reverse_kl"}[options["kind"]]
        back = linear_divergence(**swapped, kind=other)
    torch.testing.assert_close(back, got, rtol=1e-6, atol=1e-6)
    assert bool((got >= 0).all())


def test_small_shares_approach_the_kls():
    """JSD(b) / b tends to the forward KL as b falls to 0, JSD(b) / (1 - b) to the reverse one as b rises to 1."""
    args = inputs(spread=1.0)
    for beta, share, kind in ((1e-4, 1e-4, "forward_kl"), (1 - 1e-4, 1e-4, "reverse_kl")):
        jsd = linear_divergence(**args, kind="jsd", jsd_beta=beta) / share
        torch.testing.assert_close(jsd, linear_divergence(**args, kind=kind), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", [LEAVES, ("hidden_p", "hidden_q")])
def test_gradcheck(trained, kind, softcap, backend):
    args = inputs(4, 5, torch.float64, h_p=3, h_q=2, biased=True)
    temperature = 0.5 + torch.rand(4, generator=torch.Generator().manual_seed(5))
    leaves = [args[k].requires_grad_() for k in trained]

    def divergence(*leaves):
        given = {**args, **dict(zip(trained, leaves, strict=True))}
        options = {"temperature": temperature, "softcap": softcap, "logit_scale": 1.3, "backend": backend}
        return linear_divergence(**given, **options, **KINDS[kind])

    assert torch.autograd.gradcheck(divergence, leaves)


@pytest.mark.parametrize("trained", [LEAVES, ("hidden_p", "hidden_q")])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_tokens_are_never_read(kind, trained):
    args = inputs()
    dead = ~args["mask"][:, None]
    grad = upstream(100)
    (want, d_want), _ = both(args, trained=trained, grad=grad, **KINDS[kind])
    poison = {k: args[k].masked_fill(dead, math.nan) for k in ("hidden_p", "hidden_q")}
    grad = grad.masked_fill(dead[:, 0], math.nan)
    (got, d_got), _ = both({**args, **poison}, trained=trained, grad=grad, **KINDS[kind])
    assert_same_bits(got, want)
    assert bool((got[dead[:, 0]] == 0).all())
    for name in d_want:
        assert_same_bits(d_got[name], d_want[name])
        if "hidden" in name:
            assert bool((d_got[name][dead[:, 0]] == 0).all())


@pytest.mark.parametrize("trained", [LEAVES, ("hidden_p", "hidden_q")])
def test_a_row_without_gradient_may_be_spoilt(trained):
    args, silent = inputs(), torch.arange(100) % 3 == 0
    grad = upstream(100).masked_fill(silent, 0.0)
    (_, d_want), _ = both(args, trained=trained, grad=grad, kind="jsd")
    spoilt = {k: args[k].masked_fill(silent[:, None], math.nan) for k in ("hidden_p", "hidden_q")}
    (_, d_got), _ = both({**args, **spoilt}, trained=trained, grad=grad, kind="jsd")
    for name in d_want:
        assert_same_bits(d_got[name], d_want[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_does_not_grow_with_chunks(dtype):
    """22 of them, whose gradients have one sign."""
    args = inputs(1000, 2053, dtype, h_p=8, h_q=8, spread=1.0)
    for name in ("hidden_p", "hidden_q"):
        args[name] = args[name] + 3
    grad = 1 + upstream(1000).abs()
    assert_contract(args, workspace=MIB, trained=("weight_p", "weight_q"), grad=grad, kind="reverse_kl")


@pytest.mark.parametrize("tokens", [(0,), (3,), (0, 4), (3, 0), (2, 3)])
@pytest.mark.parametrize("trained", [LEAVES, ("hidden_p", "hidden_q")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_compare(backend, trained, tokens):
    args = {k: torch.full((*tokens, 4), math.nan) for k in ("hidden_p", "hidden_q")}
    args |= {"weight_p": upstream(7, 4), "weight_q": upstream(7, 4, seed=2)}
    args["mask"] = torch.zeros(tokens, dtype=torch.bool)
    grads = {"divergence": upstream(*tokens)}
    values, gradients = run(ours, args, grads=grads, trained=trained, kind="jsd", backend=backend)
    assert values["divergence"].shape == tokens
    assert all(bool((x == 0).all()) for x in [*values.values(), *gradients.values()])


def test_vocabulary_of_one():
    (got, d_got), _ = both(inputs(5, 1), kind="jsd")
    assert all(bool((x == 0).all()) for x in [got, *d_got.values()])


@pytest.mark.parametrize("kind", KINDS)
def test_batched_strided_and_unmasked(kind):
    args = inputs()
    (want, d_want), _ = both({**args, "mask": torch.ones(100, dtype=torch.bool)}, **KINDS[kind])
    grad = upstream(100).view(5, 20)
    strided = {k: x for k, x in args.items() if k != "mask"}
    for name in ("hidden_p", "hidden_q"):
        strided[name] = torch.full((args[name].shape[1], 200), -7.0).T[::2].copy_(args[name])
    for name in ("weight_p", "weight_q"):
        strided[name] = torch.full((args[name].shape[0], 60), -7.0)[:, 3 : 3 + 2 * args[name].shape[1] : 2].copy_(
            args[name]
        )
    leaves = [x.requires_grad_() for x in strided.values()]
    batched = {k: x.unflatten(0, (5, 20)) if "hidden" in k else x for k, x in strided.items()}
    got = linear_divergence(**batched, **KINDS[kind])
    assert_same_bits(got.flatten(), want)
    for name, gradient in zip(strided, torch.autograd.grad(got, leaves, grad), strict=True):
        torch.testing.assert_close(gradient, d_want[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    args = inputs(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        (got, d_got), _ = both(args, kind="jsd")
    (want, d_want), _ = both({k: x if k == "mask" else x.bfloat16() for k, x in args.items()}, kind="jsd")
    assert_same_bits(got, want)
    for name in d_want:
        assert d_got[name].dtype == dtype
        assert_same_bits(d_got[name].bfloat16(), d_want[name])


def test_sides_of_different_dtypes():
    args = inputs()
    args |= {k: args[k].bfloat16() for k in ("hidden_q", "weight_q")}
    assert_contract(args, kind="reverse_kl")


@pytest.mark.parametrize("trained", [(), LEAVES[:1], ("hidden_p", "hidden_q"), LEAVES[:2], LEAVES[1:2]])
def test_passes(trained):
    """As the docstring counts them, over heads of one size."""
    args = inputs(64, 2053, h_p=16, h_q=16)
    args["mask"][:] = True
    leaves = [args[k].requires_grad_() for k in trained]

    def call():
        divergence = linear_divergence(**args, workspace=MIB)
        if leaves:
            torch.autograd.grad(divergence, leaves, upstream(64))

    wanted = 2 + len(trained) + 2 * ("weight_p" in trained)
    assert measured_passes(call, 2 * 64 * 16 * 2053) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("trained", [(), ("hidden_p",), ("hidden_p", "weight_p", "hidden_q", "weight_q")])
def test_workspace_bounds_the_memory(trained):
    n, h, v, workspace, dtype = 256, 16, 4099, 2 * MIB, torch.bfloat16
    args = inputs(n, v, dtype, h_p=h, h_q=h)
    leaves = [args[k].requires_grad_() for k in trained]

    def call():
        divergence = linear_divergence(**args, workspace=workspace)
        if leaves:
            torch.autograd.grad(divergence, leaves, torch.ones(n))

    call()
    gradients = sum(x.numel() for x in leaves) * (dtype.itemsize + 4)  # and the sums in fp32
    allowed = workspace + gradients + 512 * n
    assert measured_peak(call) <= allowed < n * v * 4


@pytest.mark.parametrize("trained", [LEAVES[:2], ("hidden_p",)])
def test_second_derivative_raises_and_graphs_are_kept(trained):
    args = inputs(9, 29)
    leaves = [args[k].requires_grad_() for k in trained]
    divergence = linear_divergence(**args)
    first, second = (torch.autograd.grad(divergence, leaves, upstream(9), retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)
    (again, *_) = torch.autograd.grad(divergence, leaves, upstream(9), create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        again.square().sum().backward()


@pytest.mark.parametrize("trained", [LEAVES, ("hidden_p",)])
@pytest.mark.parametrize("kind", ["reverse", "jsd"])
def test_compiles(kind, trained):
    torch._dynamo.reset()
    args = inputs(9, 29, biased=True)
    options = {"softcap": 5.0, "temperature": 0.7, **KINDS[kind]}
    compiled = torch.compile(linear_divergence, fullgraph=True, backend="aot_eager")
    call = {"grads": {"divergence": upstream(9)}, "trained": trained, **options}
    want, d_want = run(ours, args, **call)
    got, d_got = run(lambda **given: {"divergence": compiled(**given)}, args, **call)
    assert_same_bits(got["divergence"], want["divergence"])
    for name in d_want:
        assert_same_bits(d_got[name], d_want[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trained", [LEAVES, ("hidden_p", "hidden_q")])
def test_opcheck(trained, dtype):
    names = opcheck(lambda: both(inputs(7, 11, dtype), trained=trained, kind="jsd"), quick=dtype != torch.float32)
    assert names == {"linear_divergence"} | ({"linear_divergence_backward"} if trained == LEAVES else set())


def change(**changes):
    args = inputs(6, 7, h_p=4, h_q=3)
    return {**args, **{k: c(args[k]) if callable(c) else c for k, c in changes.items()}}


REFUSALS = {
    "kind": ({"kind": "kl"}, ValueError, "kind must be one of reverse_kl, forward_kl, jsd; got 'kl'"),
    "share": ({"kind": "jsd", "jsd_beta": 1.0}, ValueError, r"jsd_beta must be in \(0, 1\); got 1.0"),
    "share of a KL": ({"jsd_beta": 0.1}, ValueError, "jsd_beta goes with kind='jsd'; got kind='reverse_kl' and .*0.1"),
    "rank": ({"hidden_p": torch.ones(4)}, ValueError, r"hidden_p must have 2 or 3 dimensions; got shape \(4,\)"),
    "H": ({"weight_q": torch.ones(7, 4)}, ValueError, r"weight_q must be \(V, 3\), as hidden_q .*; got \(7, 4\)"),
    "V": ({"weight_q": torch.ones(8, 3)}, ValueError, r"weight_q must have the rows of weight_p, 7; got \(8, 3\)"),
    "V = 0": ({"weight_p": torch.ones(0, 4)}, ValueError, r"weight_p must be \(V, 4\).* V, H >= 1; got \(0, 4\)"),
    "tokens": ({"hidden_q": torch.ones(5, 3)}, ValueError, r"hidden_q must hold the tokens of .* \(6,\); got \(5, 3\)"),
    "mask": ({"mask": lambda x: x[:5]}, ValueError, r"mask must be bool, \(6,\); got bool of shape \(5,\)"),
    "mask of numbers": ({"mask": lambda x: x.int()}, ValueError, r"mask must be bool, .*; got int32 of shape \(6,\)"),
    "integers": ({"hidden_p": lambda x: x.long()}, TypeError, "hidden_p must be one of .*; got int64"),
    "fp64": ({"hidden_p": lambda x: x.double()}, TypeError, "hidden_p must be one of .*; got float64"),
    "dtypes": ({"weight_q": lambda x: x.half()}, TypeError, "weight_q must have the dtype of hidden_q.*; got float16"),
    "bias": ({"bias_p": torch.ones(6)}, ValueError, r"bias_p must be \(7,\), the rows of weight_p; got \(6,\)"),
    "devices": ({"weight_q": lambda x: x.to("meta")}, ValueError, "weight_q must be on the device of hidden_p.*meta"),
    "list": ({"hidden_q": [[1.0]]}, TypeError, "hidden_q must be a tensor; got list"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature must be .*; got 0.0"),
    "temperatures": ({"temperature": torch.ones(5)}, ValueError, r"temperature must be .*\(6,\); got \(5,\)"),
    "cold": ({"temperature": torch.zeros(6)}, ValueError, "temperature must be > 0 and finite .*; got 0"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap must be .*, or None; got -1.0"),
    "workspace": ({"workspace": 5}, ValueError, "workspace is in bytes and must be at least 1 MiB; got 5"),
    "nan": (
        {"hidden_q": lambda x: x * math.nan, "check_finite": True},
        ValueError,
        "hidden_p and hidden_q must be",
    ),
    "backend": ({"backend": "tpu"}, ValueError, "backend must be None or one of .*; got 'tpu'"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    changes, error, message = REFUSALS[name]
    with pytest.raises(error, match=f"^linear_divergence: {message}"):
        linear_divergence(**change(**changes))
