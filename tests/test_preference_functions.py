"""Losses are functions: a user's own, alone or in a list, with and without fastpref.couples."""

import functools

import pytest
import torch
import torch.nn.functional as F

from fastpref import couples, linear_logps, linear_preference_loss
from tests._oracle import BACKENDS, IGNORE, LOSSES, assert_gradients, our_loss, pairs, reference_of, run, truth

MIB = 1 << 20


def my_sigmoid(pairs, *, beta, label_smoothing=0.0):
    z = beta * (pairs.chosen_logps - pairs.ref_chosen_logps - pairs.rejected_logps + pairs.ref_rejected_logps)
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def my_ipo(pairs, *, beta):
    chosen = (pairs.chosen_logps - pairs.ref_chosen_logps) / pairs.chosen_lengths
    return (chosen - (pairs.rejected_logps - pairs.ref_rejected_logps) / pairs.rejected_lengths - 0.5 / beta) ** 2


def my_hinge(pairs, *, beta):
    return torch.relu(1 - beta * (pairs.chosen_logratios - pairs.rejected_logratios))


USERS = {"cdpo": my_sigmoid, "ipo": my_ipo, "hinge": my_hinge}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("declared", [None, "pair", "batch"])
@pytest.mark.parametrize("name", USERS)
@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("hidden", "weight")])
def test_user_function_equals_what_it_imitates(trained, name, declared, backend):
    # couples() may mark the function it is given
    fresh = functools.wraps(USERS[name])(lambda *args, **options: USERS[name](*args, **options))
    args = pairs()
    call = {"ref_logps": reference_of(args), "backend": backend, "trained": trained}
    values, gradients = our_loss(args, name, **call)
    function = couples(declared)(fresh) if declared else fresh
    mine, d_mine = our_loss(args, function, **call, **LOSSES[name][1])
    for key in ("loss", "chosen_rewards", "rejected_rewards"):
        torch.testing.assert_close(mine[key], values[key], rtol=1e-6, atol=1e-6)
    for key in gradients:
        torch.testing.assert_close(d_mine[key], gradients[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")])
@pytest.mark.parametrize("workspace", [MIB, None])
def test_undeclared_function_may_couple_the_batch(workspace, trained, backend):
    """Sorted margins, as in alignment by optimal transport: a term depends on every pair."""

    def coupled(pairs, *, beta):
        chosen = (pairs.chosen_logps - pairs.ref_chosen_logps).sort().values
        return F.softplus(-beta * (chosen - (pairs.rejected_logps - pairs.ref_rejected_logps).sort().values))

    args = pairs(6, 40, 24, 4099)
    ref = reference_of(args)

    def whole(**given):
        chosen, rejected = (truth(**given)["logps"].sum(1) - ref).chunk(2)
        return {"loss": F.softplus(-0.1 * (chosen.sort().values - rejected.sort().values)).mean()}

    call = {"grads": {"loss": torch.tensor(1.3)}, "trained": trained}
    values, gradients = our_loss(args, coupled, ref_logps=ref, backend=backend, workspace=workspace, **call)
    truths, d_truths = run(whole, args, dtype=torch.float64, **call)
    torch.testing.assert_close(values["loss"].double(), truths["loss"], rtol=1e-5, atol=1e-5)
    assert_gradients(gradients, d_truths)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("declared", [None, "pair"])
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")])
@pytest.mark.parametrize("workspace", [MIB, None])
def test_function_of_tokens(workspace, trained, declared, backend):
    """Each token's log-prob to the power 1.5: a loss that sums alone cannot give."""

    def by_token(pairs, *, beta):
        tokens, b = pairs.tokens, len(pairs.chosen_logps)
        powers = torch.where(tokens.mask.bool(), tokens.logps, -1.0).neg().pow(1.5) * tokens.mask
        sums = torch.zeros(2 * b, dtype=powers.dtype).index_add(0, tokens.sequence.long(), powers)
        return beta * (sums[:b] - 0.5 * sums[b:])

    args = pairs(6, 40, 24, 4099, torch.bfloat16)
    args["targets"][0, :] = IGNORE  # a sequence without tokens

    def whole(**given):
        logps = truth(**given)["logps"]
        powers = torch.where(args["targets"] == IGNORE, -1.0, logps).neg().pow(1.5) * (args["targets"] != IGNORE)
        return {"loss": (0.1 * (powers.sum(1)[:6] - 0.5 * powers.sum(1)[6:])).mean()}

    call = {"grads": {"loss": torch.tensor(1.3)}, "trained": trained}
    function = couples(declared)(by_token) if declared else by_token
    given = {"reference_free": True, "backend": backend, "workspace": workspace}
    values, gradients = our_loss(args, function, **given, **call)
    truths, d_truths = run(whole, args, dtype=torch.float64, **call)
    torch.testing.assert_close(values["loss"].double(), truths["loss"], rtol=1e-5, atol=1e-5)
    assert_gradients(gradients, d_truths)


def test_tokens_hold_the_reference_of_each():
    def with_reference(pairs, *, beta):
        tokens = pairs.tokens
        ratios = torch.where(tokens.mask.bool(), tokens.logps - tokens.ref_logps, 0.0)
        sums = torch.zeros(6).index_add(0, tokens.sequence.long(), ratios)
        return -F.logsigmoid(beta * (sums[:3] - sums[3:]))

    args = pairs()
    tokens = linear_logps(**args) + 0.1
    values, gradients = our_loss(args, ref_token_logps=tokens)
    mine, d_mine = our_loss(args, with_reference, ref_token_logps=tokens)
    torch.testing.assert_close(mine["loss"], values["loss"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(d_mine["weight"], gradients["weight"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", [None, [0.3, 2.0, 1.0]])
def test_lists_of_losses(weights, backend):
    args = pairs()
    call = {"ref_logps": reference_of(args), "backend": backend}
    types = ["sigmoid", my_ipo, "hinge"]
    values, gradients = run(
        linear_preference_loss,
        args,
        grads={"loss": torch.tensor(1.0)},
        loss_type=types,
        loss_weights=weights,
        label_smoothing=0.2,
        **call,
    )
    each = [our_loss(args, name, **call) for name in ("cdpo", "ipo", "hinge")]
    scale = weights or [1.0] * 3
    expected = sum(w * one[0]["loss"] for w, one in zip(scale, each, strict=True))
    torch.testing.assert_close(values["loss"], expected, rtol=1e-6, atol=1e-6)
    for name in gradients:
        expected = sum(w * one[1][name] for w, one in zip(scale, each, strict=True))
        torch.testing.assert_close(gradients[name], expected, rtol=1e-5, atol=1e-5)


def test_an_error_in_a_user_function_comes_through():
    def broken(pairs, *, beta):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        our_loss(pairs(), broken, reference_free=True)
