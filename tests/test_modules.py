"""The modules call the functions with the options they hold."""

import pytest
import torch

from fastpref import (
    LinearDPOLoss,
    LinearKTOLoss,
    LinearPPOLoss,
    linear_policy_loss,
    linear_preference_loss,
    linear_unpaired_loss,
)
from tests._oracle import assert_same_bits, pairs, reference_of

LABELS = torch.tensor([True, False, True, True, False, False])


def mine(pairs, *, beta, shift=0.0):
    return pairs.chosen_logps + shift


@pytest.mark.parametrize(
    "held",
    [
        {},
        {"loss_type": "sigmoid", "beta": 0.3, "label_smoothing": 0.1, "f_divergence_type": "js_divergence"},
        {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.2], "reduction": "sum"},
        {"loss_type": mine, "shift": 2.0},
    ],
)
def test_dpo(held):
    args = pairs()
    ref = reference_of(args)
    out = LinearDPOLoss(**held)(**args, ref_logps=ref)
    want = linear_preference_loss(**args, ref_logps=ref, **held)
    assert type(out) is type(want)
    assert_same_bits(out.loss, want.loss)
    assert_same_bits(out.chosen_rewards, want.chosen_rewards)


@pytest.mark.parametrize("held", [{}, {"loss_type": "apo_zero_unpaired", "beta": 0.3, "desirable_weight": 1.4}])
def test_kto(held):
    args = pairs()
    ref = reference_of(args)
    out = LinearKTOLoss(**held)(*args.values(), LABELS, ref_logps=ref, kl=0.5)
    want = linear_unpaired_loss(**args, desirable=LABELS, ref_logps=ref, kl=0.5, **held)
    assert type(out) is type(want)
    assert_same_bits(out.loss, want.loss)


@pytest.mark.parametrize("held", [{}, {"loss_type": "cispo", "epsilon_high": 2.0, "entropy_coef": 0.01}])
def test_ppo(held):
    args = pairs()
    advantages = torch.linspace(-1, 1, args["targets"].shape[0])
    out = LinearPPOLoss(**held)(**args, advantages=advantages)
    want = linear_policy_loss(**args, advantages=advantages, **held)
    assert type(out) is type(want)
    assert_same_bits(out.loss, want.loss)


def test_repr_says_what_is_held():
    assert repr(LinearDPOLoss()) == "LinearDPOLoss(loss_type='sigmoid', beta=0.1)"
    shown = "LinearDPOLoss(loss_type=['ipo', mine], beta=0.5, loss_weights=[1.0, 2.0], softcap=30.0)"
    assert repr(LinearDPOLoss(["ipo", mine], beta=0.5, loss_weights=[1.0, 2.0], softcap=30.0)) == shown
    assert repr(LinearKTOLoss(desirable_weight=1.3)) == "LinearKTOLoss(loss_type='kto', beta=0.1, desirable_weight=1.3)"


def test_no_parameters_and_no_state():
    loss = torch.nn.Sequential(LinearDPOLoss("simpo"), LinearKTOLoss(), LinearPPOLoss("grpo"))
    assert not list(loss.parameters()) and not loss.state_dict()


REFUSALS = {
    "ppo, option": (
        lambda: LinearPPOLoss("grpo", epsilom=0.1),
        TypeError,
        r"LinearPPOLoss: 'epsilom' is no option of grpo",
    ),
    "name": (lambda: LinearDPOLoss("sigmod"), ValueError, r"LinearDPOLoss: loss_type .*did you mean 'sigmoid'"),
    "name of the others": (lambda: LinearKTOLoss("sigmoid"), ValueError, r"LinearKTOLoss: loss_type must be .* kto"),
    "option": (
        lambda: LinearDPOLoss("ipo", label_smoothing=0.1),
        TypeError,
        "LinearDPOLoss: 'label_smoothing' is no option of ipo",
    ),
    "tensor": (
        lambda: LinearDPOLoss(bias=torch.zeros(3)),
        TypeError,
        "LinearDPOLoss: bias must be no tensor.*each call",
    ),
    "twice": (
        lambda: LinearDPOLoss(softcap=30.0)(**pairs(), softcap=30.0, reference_free=True),
        TypeError,
        "LinearDPOLoss: softcap was given at construction and again in the call",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    call, error, message = REFUSALS[name]
    with pytest.raises(error, match=f"^{message}"):
        call()
