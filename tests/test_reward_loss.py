"""reward_loss against its formula in float64, and what it refuses."""

import math

import pytest
import torch

from fastpref import reward_loss
from tests._oracle import upstream

MARGINS = {"none": None, "number": 0.5, "tensor": torch.tensor([0.5, 1.0, 0.0, 2.0, 3.0])}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("center_coef", [0.0, 0.01])
@pytest.mark.parametrize("margin", MARGINS)
def test_value_and_gradient(margin, center_coef, dtype):
    chosen, rejected = (3 * upstream(5, seed=s).double() for s in (1, 2))
    chosen, rejected, g = chosen.to(dtype), rejected.to(dtype), upstream(5, seed=3)
    leaves = [x.clone().requires_grad_() for x in (chosen, rejected)]
    losses = reward_loss(*leaves, margin=MARGINS[margin], center_coef=center_coef)
    exact = [x.double().requires_grad_() for x in (chosen, rejected)]
    apart = exact[0] - exact[1] - (0.0 if margin == "none" else MARGINS[margin])
    want = torch.log(1 + torch.exp(-apart)) + center_coef * (exact[0] + exact[1]) ** 2
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(losses.double(), want, rtol=1e-5, atol=1e-6)
    got = torch.autograd.grad(losses, leaves, g.to(losses.dtype))
    for x, y in zip(got, torch.autograd.grad(want, exact, g.double()), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=4 * torch.finfo(dtype).eps + 1e-6, atol=1e-6)


def test_extreme_rewards_and_a_margin_without_gradient():
    chosen = torch.tensor([200.0, -200.0, 1e4, -1e4], requires_grad=True)
    margin = torch.ones(4, requires_grad=True)
    losses = reward_loss(chosen, -chosen, margin=margin, center_coef=0.01)
    losses.sum().backward()
    assert bool(torch.isfinite(losses).all()) and bool(torch.isfinite(chosen.grad).all())
    assert losses[1] == 401 and margin.grad is None


def test_gradcheck():
    x, y = (upstream(4, seed=s).double().requires_grad_() for s in (1, 2))
    assert torch.autograd.gradcheck(lambda a, b: reward_loss(a, b, margin=0.3, center_coef=0.1), [x, y])


REFUSALS = {
    "shapes": ({"rejected": torch.zeros(2)}, ValueError, r"rejected must have the shape of chosen, \(3,\); got \(2,\)"),
    "rank": ({"chosen": torch.zeros(3, 1)}, ValueError, r"chosen must have 1 dim.*\(3, 1\)"),
    "integers": ({"chosen": torch.zeros(3).long()}, TypeError, "chosen must be one of .*; got int64"),
    "dtypes": ({"rejected": torch.zeros(3).double()}, TypeError, "rejected must have the dtype of chosen"),
    "devices": ({"rejected": torch.zeros(3, device="meta")}, ValueError, "rejected must be on the device of chosen"),
    "margin shape": (
        {"margin": torch.zeros(1)},
        ValueError,
        r"margin must have the shape of chosen, \(3,\); got \(1,\)",
    ),
    "margin": ({"margin": "1"}, TypeError, "margin must be a number; got str"),
    "margin nan": ({"margin": math.nan}, ValueError, "margin must be finite; got nan"),
    "center_coef": ({"center_coef": -0.1}, ValueError, "center_coef must be >= 0 and finite; got -0.1"),
    "center_coef nan": ({"center_coef": math.nan}, ValueError, "center_coef must be >= 0 and finite; got nan"),
    "no tensor": ({"chosen": [0.0]}, TypeError, "chosen must be a tensor; got list"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    changes, error, message = REFUSALS[name]
    args = {"chosen": torch.zeros(3), "rejected": torch.zeros(3), **changes}
    with pytest.raises(error, match=f"^reward_loss: {message}"):
        reward_loss(args.pop("chosen"), args.pop("rejected"), **args)
