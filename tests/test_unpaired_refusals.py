"""What kto_loss and linear_unpaired_loss refuse, each by its message."""

import math

import pytest
import torch

from fastpref import couples, kto_loss, linear_unpaired_loss
from tests._oracle import pairs

LABELS = torch.tensor([True, False, True, True, False])


def batch():
    """Five sequences."""
    args = pairs()
    return {**args, "hidden": args["hidden"][:5], "targets": args["targets"][:5], "desirable": LABELS}


def linear(**changes):
    return linear_unpaired_loss(**{**batch(), "ref_logps": torch.zeros(5), "kl": 0.7, **changes})


def on_logps(**changes):
    args = {"policy_logps": torch.zeros(3), "ref_logps": torch.zeros(3), "desirable": LABELS[:3], "kl": 0.7, **changes}
    return kto_loss(args.pop("policy_logps"), args.pop("ref_logps"), args.pop("desirable"), **args)


BOTH = {
    "no reference": ({"ref_logps": None}, ValueError, r"kto needs ref_logps.*, or reference_free=True; got None"),
    "no kl": ({"kl": None}, ValueError, "kto needs kl; got None"),
    "kl of each": (
        {"kl": torch.zeros(3)},
        ValueError,
        r"kl must be a number or a detached 0-d tensor.*; got shape \(3,\)",
    ),
    "learnable kl": ({"kl": torch.tensor(0.1, requires_grad=True)}, ValueError, "kl must be .*one that requires grad"),
    "kl below 0": ({"kl": -0.1}, ValueError, "kl must be >= 0 and finite; got -0.1"),
    "kl a word": ({"kl": "0"}, TypeError, "kl must be a number; got str"),
    "labels as numbers": ({"desirable": torch.ones(3)}, TypeError, "desirable must be bool; got float32"),
    "labels missing": ({"desirable": [True] * 3}, TypeError, "desirable must be a tensor; got list"),
    "number of labels": (
        {"desirable": LABELS[:2]},
        ValueError,
        r"desirable must be \(\d,\), one a sequence; got \(2,\)",
    ),
    "device of labels": ({"desirable": "meta"}, ValueError, "desirable must be on the device of"),
    "beta": ({"beta": -1.0}, ValueError, "beta must be > 0 and finite; got -1.0"),
    "name": (
        {"loss_type": "kt"},
        ValueError,
        r"loss_type must be .* kto, apo_zero_unpaired; got 'kt' \(did you mean 'kto'",
    ),
    "option": (
        {"label_smoothing": 0.1},
        TypeError,
        "'label_smoothing' is no option of kto, whose options.* are: desirable",
    ),
    "pairs": (
        {"loss_type": couples("pair")(lambda unpaired, *, beta: unpaired.logps)},
        ValueError,
        'loss_type must couple "token", "sequence" or "batch"',
    ),
    "shape of a loss": (
        {"loss_type": lambda unpaired, *, beta: unpaired.logps.mean()},
        ValueError,
        r"must return a tensor of shape \(\d,\); got \(\)",
    ),
}


@pytest.mark.parametrize("function", [linear, on_logps])
@pytest.mark.parametrize("name", BOTH)
def test_refusals(name, function):
    changes, error, message = BOTH[name]
    if changes.get("desirable") is not None:
        n, like = (5 if function is linear else 3), changes["desirable"]
        if name == "labels as numbers":
            changes = {"desirable": torch.ones(n)}
        if like == "meta":
            changes = {"desirable": LABELS[:n].to("meta")}
    fn = {linear: "linear_unpaired_loss", on_logps: "kto_loss"}[function]
    with pytest.raises(error, match=f"^{fn}: .*{message}"):
        function(**changes)


@pytest.mark.parametrize("function", [linear, on_logps])
@pytest.mark.parametrize("weight", [-0.1, math.inf])
def test_weights_outside_their_range(weight, function):
    with pytest.raises(ValueError, match=r"^kto: undesirable_weight must be >= 0 and finite; got"):
        function(undesirable_weight=weight)


LINEAR = {
    "two references": ({"reference_free": True}, ValueError, "give one reference; got ref_logps and reference_free"),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction must be one of mean, sum, none; got 'avg'"),
    "two normalisers": ({"reduction": "sum", "num_items": 4}, ValueError, "num_items and reduction='sum' were both"),
    "ref shape": (
        {"ref_logps": torch.zeros(4)},
        ValueError,
        r"ref_logps must be \(5,\), one sum a sequence; got \(4,\)",
    ),
}


@pytest.mark.parametrize("name", LINEAR)
def test_refusals_of_linear_unpaired_loss(name):
    changes, error, message = LINEAR[name]
    with pytest.raises(error, match=f"^linear_unpaired_loss: {message}"):
        linear(**changes)


def test_packed_without_bounds():
    args = batch()
    flat = {"hidden": args["hidden"].flatten(0, 1), "targets": args["targets"].flatten()}
    with pytest.raises(ValueError, match=r"^linear_unpaired_loss: packed targets \(N,\) needs cu_seqlens"):
        linear_unpaired_loss(**{**args, **flat}, ref_logps=torch.zeros(5), kl=0.7)


def test_refusals_of_kto_loss():
    for changes, error, message in (
        ({"reference_free": True}, ValueError, "reference_free=True and ref_logps were both given"),
        (
            {"ref_logps": torch.zeros(2)},
            ValueError,
            r"ref_logps must have the shape of policy_logps, \(3,\); got \(2,\)",
        ),
        ({"ref_logps": torch.zeros(3).double()}, TypeError, "ref_logps must have the dtype of policy_logps"),
        ({"policy_logps": torch.zeros(3).long()}, TypeError, "policy_logps must be one of"),
        ({"policy_logps": torch.zeros(3, 1)}, ValueError, "policy_logps must have 1 dim"),
    ):
        with pytest.raises(error, match=f"^kto_loss: {message}"):
            on_logps(**changes)
