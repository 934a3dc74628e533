"""torch's default dtype and device are the caller's own business: nothing here may depend on them."""

import pytest
import torch

import fastpref
from tests._oracle import BACKENDS, assert_same_bits, head, upstream

B, T = 4, 12


@pytest.fixture(params=["bfloat16", "float64", "meta"])
def default(request):
    def begin():
        if request.param == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, request.param))

    yield begin
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def calls(backend):
    args = {k: x if k == "weight" else x.unflatten(0, (B, T)) for k, x in head(B * T, 16, 301).items()}
    leaves = [args[name].requires_grad_() for name in ("hidden", "weight")]
    grad, ref, advantages = upstream(B, T), -5 - upstream(B).abs(), upstream(B)
    logits = (args["hidden"] @ args["weight"].T).detach().requires_grad_()
    frozen = {**args, "weight": args["weight"].detach()}
    rewards, values, mask = upstream(B, T, seed=2), upstream(B, T, seed=3), args["targets"] >= 0
    good, kl, half = torch.tensor([True, False, True, True]), torch.tensor(0.1), upstream(B // 2)
    old, none = -upstream(B, T).abs(), grad * 0

    def backward(out, *inputs, of=None):
        return [out.detach(), *torch.autograd.grad(out, inputs, of)]

    yield "trained", lambda: backward(fastpref.linear_logps(**args, backend=backend), *leaves, of=grad)
    yield "frozen", lambda: backward(fastpref.linear_logps(**frozen, backend=backend), leaves[0], of=grad)
    yield (
        "selective",
        lambda: backward(fastpref.selective_logps(logits, args["targets"], backend=backend), logits, of=grad),
    )
    for name, couple in (
        ("preference", lambda **o: fastpref.linear_preference_loss(**args, ref_logps=ref, **o).loss),
        (
            "unpaired",
            lambda **o: fastpref.linear_unpaired_loss(**args, desirable=good, ref_logps=ref, kl=kl, **o).loss,
        ),
        ("policy", lambda **o: fastpref.linear_policy_loss(**args, advantages=advantages, old_logps=old, **o).loss),
        ("cross entropy", lambda **o: fastpref.linear_cross_entropy(**args, label_smoothing=0.1, **o)),
    ):
        yield name, lambda couple=couple: backward(couple(backend=backend), *leaves)
    if backend == "cpu":
        yield "gae", lambda: fastpref.gae(rewards, values, mask=mask, whiten=True)
        yield "shape_rewards", lambda: [fastpref.shape_rewards(ref, old, none, mask, kl_coef=0.1)]
        yield "dpo_loss", lambda: fastpref.dpo_loss(half, half + 1, half - 1, half * 2)
        yield "reward_loss", lambda: [fastpref.reward_loss(half, half * 2, center_coef=0.1)]
        yield "value_loss", lambda: [fastpref.value_loss(values, values + 0.3, rewards, mask)[0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_do_not_depend_on_torchs_defaults(backend, default):
    prepared = list(calls(backend))
    want = [call() for _, call in prepared]
    default()
    for (name, call), expected in zip(prepared, want, strict=True):
        for a, b in zip(call(), expected, strict=True):
            assert a.dtype == b.dtype, name
            assert_same_bits(a, b)
