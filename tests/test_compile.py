"""Every op under opcheck, and torch.compile(fullgraph=True): the same values and gradients as without."""

import shutil

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastpref import (
    couples,
    dpo_loss,
    gae,
    linear_logps,
    linear_policy_loss,
    linear_preference_loss,
    linear_unpaired_loss,
    selective_logps,
)
from fastpref.losses.preference import PREFERENCE_LOSSES
from tests._oracle import BACKENDS, as_dict, head, run, upstream

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {"outputs": ("entropy",), "softcap": 5.0, "logit_scale": 1.3, "temperature": 0.7}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Calls(TorchDispatchMode):
    """The calls of registered fastpref ops in its block: (op, arguments)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastpref":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


def opcheck(call, *, quick=False):
    """opcheck of each op that call() runs, forward and backward, with the arguments it runs with."""
    with Calls() as seen:
        call()
    names = {function._opname for function, _ in seen.calls}
    for function, args in seen.calls:
        # a backward op's inputs come out of the graph; it has no gradient of its own
        fresh = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in args]
        if function._opname.endswith("_backward"):
            fresh = [x.detach() if isinstance(x, torch.Tensor) else x for x in fresh]
        utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(function, tuple(fresh), test_utils=utils[:3] if quick else utils)
    return names


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_of_linear_logps(dtype, backend):
    def call():
        run(linear_logps, head(7, 5, 11, dtype, bias=True), grads=grads, backend=backend, **OPTIONS)

    grads = {"logps": upstream(7), "entropy": upstream(7, seed=2)}
    assert opcheck(call, quick=dtype != torch.float32) == {"linear_logps", "linear_logps_backward"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_linear_logps_with_rows_and_a_frozen_head(backend):
    args = {**head(7, 5, 11), "rows": torch.tensor([0, 0, 1, 2, 3, 6, 6])}
    opcheck(lambda: run(linear_logps, args, grads={"logps": upstream(7)}, trained=("hidden",), backend=backend))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_of_selective_logps(dtype):
    args = head(7, 11, 11, dtype)
    grads = {"logps": upstream(7), "entropy": upstream(7, seed=2)}

    def call():
        given = {"logits": args["hidden"], "targets": args["targets"]}
        run(selective_logps, given, grads=grads, trained=("logits",), **OPTIONS)

    assert opcheck(call, quick=dtype != torch.float32) == {"selective_logps", "selective_logps_backward"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_of_gae(dtype):
    rewards, values = (upstream(3, 5, seed=s).to(dtype) for s in (1, 2))
    call = {"mask": rewards > -1, "dones": values > 1, "bootstrap": values[:, 0], "gamma": 0.9}
    assert opcheck(lambda: gae(rewards, values, **call), quick=dtype != torch.float32) == {"gae"}


def test_every_registered_op_is_here():
    names = {x.split("::")[1].split(".")[0] for x in torch._C._dispatch_get_all_op_names() if "fastpref::" in x}
    twice = {"label_margin", "linear_divergence", "linear_logps", "selective_logps"}
    assert names == {"gae", *twice, *(f"{name}_backward" for name in twice)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_fake_tensors_have_the_shapes_of_real_ones(backend):
    args = sequences()
    real = linear_logps(**args, backend=backend, **OPTIONS)
    with FakeTensorMode() as mode:
        fake = linear_logps(**{k: mode.from_tensor(x) for k, x in args.items()}, backend=backend, **OPTIONS)
    for x, y in zip(as_dict(fake).values(), as_dict(real).values(), strict=True):
        assert (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)


def sequences(b=2, t=6, h=5, v=11, dtype=torch.float32, seed=0):
    args = head(2 * b * t, h, v, dtype, seed=seed, ignored=0.2)
    return {k: x if k == "weight" else x.unflatten(0, (2 * b, t)) for k, x in args.items()}


def assert_compiles(function, args, grads, *, backend="aot_eager", dynamic=None, more=(), tolerance=0.0, **options):
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    for given in (args, *more):
        want, d_want = run(function, given, grads=grads(given), **options)
        got, d_got = run(compiled, given, grads=grads(given), **options)
        pairs = [(got[k], want[k]) for k in want if isinstance(want[k], torch.Tensor)]
        pairs += [(d_got[k], d_want[k]) for k in d_want]
        assert d_want and want.keys() == got.keys()
        for x, y in pairs:
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def of_logps(given):
    shape = given["targets"].shape
    return {"logps": upstream(*shape), "entropy": upstream(*shape, seed=2)}


def of_loss(given):
    return {"loss": torch.tensor(1.7)}


@pytest.mark.parametrize("head_backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_logps(dtype, head_backend):
    assert_compiles(
        lambda **given: linear_logps(**given, **OPTIONS, backend=head_backend),
        head(9, 5, 11, dtype, bias=True),
        of_logps,
    )


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"softcap": 5.0}, {"logit_scale": 1.3}])
def test_linear_logps_of_any_length(options):
    def function(**given):
        return linear_logps(**given, outputs=("entropy",), **options)

    more = [head(n, 5, 11) for n in (14, 31)]
    assert_compiles(function, head(9, 5, 11), of_logps, dynamic=True, more=more)


@pytest.mark.parametrize("name", ["temperature", "softcap", "logit_scale"])
def test_options_that_change_between_calls(name):
    """A float that differs at the second call becomes symbolic, if nothing stops it."""
    args = head(9, 5, 11)
    compiled = torch.compile(linear_logps, fullgraph=True, backend="aot_eager")
    for value in (0.7, 1.3, 2.9):
        assert torch.equal(compiled(**args, **{name: value}), linear_logps(**args, **{name: value}))


def test_linear_logps_with_rows_and_temperatures():
    args = {**head(7, 5, 11), "rows": torch.tensor([0, 0, 1, 2, 3, 6, 6]), "temperature": torch.full((7,), 0.7)}
    assert_compiles(lambda **given: linear_logps(**given, outputs=("entropy",)), args, of_logps)


def test_linear_logps_under_autocast():
    def function(**given):
        with torch.autocast("cpu", torch.bfloat16):
            return linear_logps(**given, outputs=("entropy",))

    assert_compiles(function, head(9, 5, 11), of_logps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selective_logps(dtype):
    args = head(9, 11, 11, dtype)
    given = {"logits": args["hidden"], "targets": args["targets"]}
    assert_compiles(lambda **given: selective_logps(**given, **OPTIONS), given, of_logps, trained=("logits",))


def test_gae():
    rewards, values = upstream(3, 5), upstream(3, 5, seed=2)
    compiled = torch.compile(lambda r, v: gae(r, v, gamma=0.9), fullgraph=True, backend="aot_eager")
    for x, y in zip(compiled(rewards, values), gae(rewards, values, gamma=0.9), strict=True):
        assert torch.equal(x, y)


@couples("pair")
def mine(pairs, *, beta):
    return torch.relu(1 - beta * (pairs.chosen_logratios - pairs.rejected_logratios))


@pytest.mark.parametrize("head_backend", BACKENDS)
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge", ["sigmoid", "ipo"]])
def test_preference_loss(loss_type, trained, head_backend):
    ref = -20 * upstream(4).abs()
    assert_compiles(
        lambda **given: linear_preference_loss(**given, ref_logps=ref, loss_type=loss_type, backend=head_backend),
        sequences(),
        of_loss,
        trained=trained,
        tolerance=5e-6,  # compiled, the gradients need not come from the forward pass: the order of roundings differs
    )


CHANGES = {"f_divergence_type": "forward_kl", "ld_alpha": 0.5, "use_weighting": True}


@pytest.mark.parametrize(
    "options",
    [{"loss_type": list(PREFERENCE_LOSSES)}, {"loss_type": ["sigmoid", "sft"], **CHANGES}],
    ids=["all", "changed"],
)
def test_every_loss_of_pairs(options):
    args = sequences()
    reference = args["hidden"] + 0.1 * upstream(4, 6, 5)

    def function(**given):
        return linear_preference_loss(**given, ref_hidden=reference, ref_weight=args["weight"], **options)

    # sppo_hard and ipo square tens of nats
    assert_compiles(function, args, of_loss, trained=("hidden",), tolerance=5e-5)


def test_every_unpaired_loss():
    args = {**sequences(), "desirable": torch.tensor([True, False, False, True])}
    options = {"loss_type": ["kto", "apo_zero_unpaired"], "ref_logps": -9 * upstream(4).abs(), "kl": 0.3}
    assert_compiles(
        lambda **given: linear_unpaired_loss(**given, **options), args, of_loss, trained=("hidden",), tolerance=5e-6
    )


SIZED = {  # what a loss is given beside sequences, of which there are number.numel()
    linear_preference_loss: lambda number: {"ref_logps": -9 - 0.3 * number, "label_smoothing": 0.1},
    linear_unpaired_loss: lambda number: {"ref_logps": -9 - 0.3 * number, "desirable": number % 2 == 0, "kl": 0.3},
    linear_policy_loss: lambda number: {"advantages": 0.7 * number - 1, "entropy_coef": 0.1, "epsilon_high": 0.3},
}


@pytest.mark.parametrize("function", SIZED)
def test_losses_of_any_shape(function):
    """The numbers among a loss's defaults too are then inputs of the graph, if anything reads them."""

    def of(hidden, weight, targets):
        return function(hidden, weight, targets, **SIZED[function](torch.arange(targets.shape[0])))

    more = [sequences(3, 7), sequences(4, 9)]
    assert_compiles(of, sequences(), of_loss, dynamic=True, more=more, trained=("hidden",), tolerance=5e-6)


def test_preference_loss_of_packed_sequences():
    args = head(24, 5, 11, ignored=0.2)
    args["cu_seqlens"] = torch.tensor([0, 6, 13, 17, 24], dtype=torch.int32)
    assert_compiles(lambda **given: linear_preference_loss(**given, reference_free=True), args, of_loss, tolerance=5e-6)


def test_preference_loss_of_a_function_runs_compiled():
    """A user's function runs between ops: compiling around it must work, if not in one graph."""
    args = sequences()
    want, d_want = run(linear_preference_loss, args, grads=of_loss(args), reference_free=True, loss_type=mine)
    compiled = torch.compile(linear_preference_loss, backend="aot_eager")
    got, d_got = run(compiled, args, grads=of_loss(args), reference_free=True, loss_type=mine)
    torch.testing.assert_close(got["loss"], want["loss"])
    for name in d_want:
        torch.testing.assert_close(d_got[name], d_want[name])


def test_dpo_loss():
    def function(chosen, rejected):
        return dict(zip(("loss", "chosen", "rejected"), dpo_loss(chosen, rejected, *torch.zeros(2, 3)), strict=True))

    args = {"chosen": upstream(3), "rejected": upstream(3, seed=2)}
    assert_compiles(
        function, args, lambda _: {"loss": upstream(3, seed=3)}, trained=("chosen", "rejected"), tolerance=1e-6
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
def test_inductor_once():
    """A loss after a tanh: an op between two fused loops, forward and backward."""

    def function(hidden, weight, targets):
        return linear_preference_loss(hidden.tanh(), weight, targets, reference_free=True)

    assert_compiles(function, sequences(), of_loss, backend="inductor", trained=("hidden",), tolerance=1e-5)
