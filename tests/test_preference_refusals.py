"""What dpo_loss and linear_preference_loss refuse, each by its message: no silent meaning, no broken shape."""

import math

import pytest
import torch

from fastpref import couples, dpo_loss, linear_preference_loss
from tests._oracle import pairs


def change(**changes):
    args = {**pairs(b=2), "ref_logps": torch.zeros(4)}
    return {**args, **{k: c(args[k]) if callable(c) else c for k, c in changes.items()}}


def flat(**changes):
    args = {"hidden": lambda x: x.flatten(0, 1), "targets": lambda x: x.flatten()}
    return {**args, "cu_seqlens": torch.tensor([0, 9, 18, 27, 36], dtype=torch.int32), **changes}


NONE = {"ref_logps": None}
TYPES = r"loss_type must be a function or one of sigmoid, robust, hinge, .*"
REFUSALS = {
    "no reference": (
        NONE,
        ValueError,
        r"sigmoid needs ref_logps \(or ref_hidden and ref_weight\), or reference_free=True; got None",
    ),
    "two references": ({"reference_free": True}, ValueError, "give one reference; got ref_logps and reference_free"),
    "sums and tokens": ({"ref_token_logps": torch.zeros(4, 9)}, ValueError, "give one reference; got ref_logps and"),
    "ref_hidden alone": (
        {**NONE, "ref_hidden": torch.zeros(4, 9, 21)},
        ValueError,
        "ref_hidden and ref_weight go together; got only ref_hidden",
    ),
    "ref_weight alone": (
        {**NONE, "ref_weight": torch.zeros(67, 21)},
        ValueError,
        "ref_hidden and ref_weight go together; got only ref_weight",
    ),
    "ref shape": ({"ref_logps": torch.zeros(3)}, ValueError, r"ref_logps must be \(4,\).*; got \(3,\)"),
    "ref token shape": (
        {**NONE, "ref_token_logps": torch.zeros(4, 8)},
        ValueError,
        r"ref_token_logps must have the shape of targets, \(4, 9\); got \(4, 8\)",
    ),
    "ref dtype": ({"ref_logps": torch.zeros(4).long()}, TypeError, "ref_logps must be .*; got int64"),
    "ref device": ({"ref_logps": torch.zeros(4, device="meta")}, ValueError, "ref_logps must be on the device of"),
    "ref_hidden shape": (
        {**NONE, "ref_hidden": torch.zeros(4, 8, 21), "ref_weight": torch.zeros(67, 21)},
        ValueError,
        r"targets must be \(4, 8\), as ref_hidden is \(4, 8, 21\); got \(4, 9\)",
    ),
    "ref_weight shape": (
        {**NONE, "ref_hidden": torch.zeros(4, 9, 21), "ref_weight": torch.zeros(67, 20)},
        ValueError,
        r"ref_weight must be \(V, 21\), as ref_hidden is \(..., H\); got \(67, 20\)",
    ),
    "a trained bias for the reference": (
        {
            **NONE,
            "ref_hidden": torch.zeros(4, 9, 21),
            "ref_weight": torch.zeros(67, 21),
            "bias": torch.zeros(67, requires_grad=True),
        },
        ValueError,
        "ref_hidden is scored with the same bias, which must then be frozen; got one that requires grad",
    ),
    "beta 0": ({"beta": 0.0}, ValueError, "beta must be > 0 and finite; got 0.0"),
    "beta < 0": ({"beta": -0.1}, ValueError, "beta must be > 0 and finite; got -0.1"),
    "beta nan": ({"beta": math.nan}, ValueError, "beta must be > 0 and finite; got nan"),
    "beta a word": ({"beta": "0.1"}, (TypeError, ValueError), "beta must be .*; got (str|'0.1')"),
    "odd batch": (
        {"hidden": lambda x: x[:3], "targets": lambda x: x[:3], "ref_logps": torch.zeros(3)},
        ValueError,
        "B chosen, then B rejected .*; got an odd number, 3",
    ),
    "near name": ({"loss_type": "sigmod"}, ValueError, TYPES + r"; got 'sigmod' \(did you mean 'sigmoid'\?\)"),
    "far name": ({"loss_type": "zzz"}, ValueError, TYPES + "; got 'zzz'$"),
    "name in a list": ({"loss_type": ["ipo", "hing"]}, ValueError, TYPES + r"; got 'hing' \(did you mean 'hinge'"),
    "no loss": ({"loss_type": []}, ValueError, "loss_type must name at least one loss"),
    "type of loss": ({"loss_type": 3}, (TypeError, ValueError), "loss_type must be .*; got 3"),
    "option of another": (
        {"loss_type": "hinge", "label_smoothing": 0.1},
        TypeError,
        "'label_smoothing' is no option of hinge, whose options.* are: none",
    ),
    "unknown option": (
        {"smooth": 0.1},
        TypeError,
        "'smooth' is no option of sigmoid, whose options.* are: label_smoothing",
    ),
    "option of a list": (
        {"loss_type": ["hinge", "ipo"], "label_smoothing": 0.1},
        TypeError,
        "'label_smoothing' is no option of hinge",
    ),
    "outputs": ({"outputs": ("entropy",)}, TypeError, "'outputs' is no option of sigmoid"),
    "weights of a list": (
        {"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0]},
        ValueError,
        "loss_weights must have one weight for each loss, 2; got 1",
    ),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction must be one of mean, sum, none; got 'avg'"),
    "two normalisers": ({"reduction": "sum", "num_items": 4}, ValueError, "num_items and reduction='sum' were both"),
    "num_items": ({"num_items": 0}, ValueError, "num_items must be > 0.*; got 0"),
    "packed without bounds": (flat(cu_seqlens=None), ValueError, r"packed targets \(N,\) needs cu_seqlens"),
    "bounds of batched": (
        {"cu_seqlens": torch.tensor([0, 9, 18, 27, 36], dtype=torch.int32)},
        ValueError,
        r"cu_seqlens wants packed hidden \(N, H\); got \(4, 9, 21\)",
    ),
    "bounds short": (flat(cu_seqlens=torch.tensor([0, 9, 18, 27, 35])), ValueError, "cu_seqlens must rise from 0 to"),
    "bounds fall": (flat(cu_seqlens=torch.tensor([0, 18, 9, 27, 36])), ValueError, "cu_seqlens must rise from 0 to"),
    "bounds start": (flat(cu_seqlens=torch.tensor([1, 9, 18, 27, 36])), ValueError, "cu_seqlens must rise from 0 to"),
    "bounds odd": (flat(cu_seqlens=torch.tensor([0, 9, 18, 36])), ValueError, "got an odd number, 3"),
    "bounds float": (flat(cu_seqlens=torch.tensor([0.0, 36.0])), TypeError, "cu_seqlens must be integers; got float32"),
    "dtypes": ({"weight": lambda x: x.bfloat16()}, TypeError, "weight must have the dtype of hidden, float32"),
    "H": ({"weight": lambda x: x[:, :4]}, ValueError, r"weight must be \(V, 21\)"),
    "integer hidden": ({"hidden": lambda x: x.nan_to_num().long()}, TypeError, "hidden must be one of .*; got int64"),
    "targets range": ({"targets": lambda x: x.clamp(min=67)}, ValueError, r"targets must be .*\[0, 67\).*; got .*67"),
    "targets shape": ({"targets": lambda x: x[:, :4]}, ValueError, r"targets must be \(4, 9\).*; got \(4, 4\)"),
    "nan": (
        {"hidden": lambda x: torch.full_like(x, math.nan), "check_finite": True},
        ValueError,
        "hidden must be finite at every live target",
    ),
    "workspace": ({"workspace": 1}, ValueError, "workspace .* at least 1 MiB; got 1"),
    "backend": ({"backend": "gpu"}, ValueError, "backend must be .*; got 'gpu'"),
    "temperature": ({"temperature": -1.0}, ValueError, "temperature must be .*; got -1.0"),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("trained", [False, True])
def test_refusals(trained, name):
    changes, error, message = REFUSALS[name]
    args = change(**changes)
    if trained and args["weight"].is_floating_point():
        args["weight"] = args["weight"].detach().requires_grad_()
    with pytest.raises(error, match=f"^linear_preference_loss: .*{message}"):
        linear_preference_loss(**args)


@pytest.mark.parametrize("smoothing", [0.5, 1.0, -0.1, math.nan])
def test_label_smoothing_outside_its_range(smoothing):
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 0.5\); got"):
        linear_preference_loss(**change(), label_smoothing=smoothing)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 0.5\); got"):
        dpo_loss(*torch.zeros(4, 3), label_smoothing=smoothing)


@pytest.mark.parametrize("result", [lambda c: c.mean(), lambda c: c[:1], lambda c: c[:, None], lambda c: 3.0])
def test_functions_return_one_loss_a_pair(result):
    def wrong(pairs, *, beta):
        return result(pairs.chosen_logps)

    with pytest.raises((TypeError, ValueError), match=r"^linear_preference_loss: .* must return .*\(2,\); got"):
        linear_preference_loss(**change(), loss_type=wrong)
    with pytest.raises((TypeError, ValueError), match=r"^dpo_loss: .* must return .*\(3,\); got"):
        dpo_loss(*torch.zeros(4, 3), loss_type=wrong)


def test_function_that_needs_a_reference_is_refused_without_one():
    def needs_a_reference(pairs, *, beta):
        return beta * (pairs.chosen_logratios - pairs.rejected_logratios)

    with pytest.raises(ValueError, match=r"^linear_preference_loss: .*reference_free=True"):
        linear_preference_loss(**change(ref_logps=None), loss_type=needs_a_reference)


def test_couples_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"^couples: must be one of token, sequence, pair, batch; got 'row'"):
        couples("row")
