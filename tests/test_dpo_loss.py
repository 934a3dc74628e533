"""dpo_loss against formulas in float64, and what it refuses, each by its message."""

import pytest
import torch

from fastpref import dpo_loss
from tests._oracle import LOSSES, assert_same_bits, formula

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sums(b=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    values = [(-50 * torch.rand(b, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(4)]
    return values, torch.tensor([[3, 1, 7, 9, 2], [2, 8, 5, 1, 4]])[:, :b]


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_loss_is_the_formula(beta, name, dtype):
    values, lengths = sums(dtype=dtype)
    loss_type, own = LOSSES[name]
    given = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1], "loss_type": loss_type, **own}
    losses, chosen, rejected = dpo_loss(*values, beta=beta, **given)
    exact = [x.double() for x in values]
    assert losses.dtype == chosen.dtype == rejected.dtype == (dtype if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(losses.double(), formula(name, *exact, lengths, beta), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(chosen.double(), beta * (exact[0] - exact[2]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rejected.double(), beta * (exact[1] - exact[3]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_dpo_loss_gradcheck(name):
    values, lengths = sums()
    loss_type, own = LOSSES[name]
    given = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1], "loss_type": loss_type, **own}

    def losses(chosen, rejected):
        return dpo_loss(chosen, rejected, *values[2:], beta=0.1, **given)[0]

    assert torch.autograd.gradcheck(losses, [x.requires_grad_() for x in values[:2]])


def test_dpo_rewards_are_detached():
    values, _ = sums()
    losses, chosen, rejected = dpo_loss(*[x.requires_grad_() for x in values])
    assert losses.requires_grad and not chosen.requires_grad and not rejected.requires_grad


@pytest.mark.parametrize("name", ["sigmoid", "cdpo", "hinge"])
def test_dpo_loss_of_extreme_margins_is_finite(name):
    chosen = torch.tensor([-1e4, 0.0, -1e4, 1.0], requires_grad=True)
    loss_type, own = LOSSES[name]
    losses = dpo_loss(chosen, torch.tensor([0.0, -1e4, -1e4, 0.0]), *torch.zeros(2, 4), loss_type=loss_type, **own)[0]
    losses.sum().backward()
    assert bool(torch.isfinite(losses).all()) and bool(torch.isfinite(chosen.grad).all())
    assert losses[0] > 0.5e3 and abs(chosen.grad[1]) <= 0.1


def test_dpo_reference_free_is_a_uniform_reference():
    values, _ = sums()
    free = dpo_loss(*values[:2], None, None, reference_free=True)
    for x, y in zip(free, dpo_loss(*values[:2], *torch.zeros(2, 5, dtype=torch.float64)), strict=True):
        assert_same_bits(x, y)


def test_dpo_of_no_pairs():
    chosen = torch.zeros(0, requires_grad=True)
    losses = dpo_loss(chosen, *torch.zeros(3, 0))[0]
    losses.sum().backward()
    assert losses.shape == chosen.grad.shape == (0,)


def test_lists_of_losses_in_dpo_loss():
    values, lengths = sums()
    given = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    losses = dpo_loss(*values, loss_type=["sigmoid", "ipo"], loss_weights=[2.0, 0.5], **given)[0]
    expected = 2 * formula("sigmoid", *values, lengths, 0.1) + 0.5 * formula("ipo", *values, lengths, 0.1)
    torch.testing.assert_close(losses, expected)


TYPES = r"loss_type must be a function or one of sigmoid, robust, hinge, .*"
FOUR = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
DPO_REFUSALS = {
    "no reference": (
        {"ref_chosen_logps": None, "ref_rejected_logps": None},
        ValueError,
        "sigmoid needs ref_chosen_logps, or reference_free=True; got None",
    ),
    "half a reference": ({"ref_rejected_logps": None}, ValueError, "ref_chosen_logps and ref_rejected_logps go togeth"),
    "two meanings": ({"reference_free": True}, ValueError, "reference_free=True and reference log-probs were both"),
    "lengths": ({"loss_type": "ipo"}, ValueError, "ipo needs chosen_lengths; got None"),
    "length shape": (
        {"loss_type": "ipo", "chosen_lengths": torch.ones(2), "rejected_lengths": torch.ones(3)},
        ValueError,
        r"chosen_lengths must .*\(3,\); got \(2,\)",
    ),
    "shapes": (
        {"policy_rejected_logps": torch.zeros(2)},
        ValueError,
        r"policy_rejected_logps must have the shape of policy_chosen_logps, \(3,\); got \(2,\)",
    ),
    "ref shape": ({"ref_chosen_logps": torch.zeros(1)}, ValueError, r"ref_chosen_logps must .*\(3,\); got \(1,\)"),
    "rank": (dict.fromkeys(FOUR, torch.zeros(1, 3)), ValueError, r"policy_chosen_logps must have 1 dim.* \(1, 3\)"),
    "integers": ({"policy_chosen_logps": torch.zeros(3).long()}, TypeError, "policy_chosen_logps must be one of"),
    "dtypes": (
        {"policy_rejected_logps": torch.zeros(3).double()},
        TypeError,
        "policy_rejected_logps must have the dtype of policy_chosen_logps, float32; got float64",
    ),
    "devices": (
        {"ref_chosen_logps": torch.zeros(3, device="meta")},
        ValueError,
        "ref_chosen_logps must be on the device of policy_chosen_logps",
    ),
    "not tensors": ({"policy_chosen_logps": [0.0] * 3}, TypeError, "policy_chosen_logps must be a tensor; got list"),
    "beta": ({"beta": 0}, ValueError, "beta must be > 0 and finite; got 0"),
    "name": ({"loss_type": "hing"}, ValueError, TYPES + r"; got 'hing' \(did you mean 'hinge'\?\)"),
    "option": ({"smooth": 1}, TypeError, "'smooth' is no option of sigmoid"),
}


@pytest.mark.parametrize("name", DPO_REFUSALS)
def test_dpo_refusals(name):
    changes, error, message = DPO_REFUSALS[name]
    args = {**dict.fromkeys(FOUR, torch.zeros(3)), **changes}
    with pytest.raises(error, match=f"^dpo_loss: {message}"):
        dpo_loss(*[args.pop(k) for k in FOUR], **args)
