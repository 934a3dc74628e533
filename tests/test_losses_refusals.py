"""What the losses of pairs and their options refuse, each by its message."""

import math

import pytest
import torch

from fastpref import dpo_loss, linear_preference_loss
from tests._losses import case, tokens_of
from tests._oracle import pairs


def on_logps(**options):
    c = case()
    tokens = options.pop("tokens", None)
    ref = () if options.pop("no_reference", False) else c.ref.sum(1).chunk(2)
    return dpo_loss(*c.logps.sum(1).chunk(2), *ref, tokens=tokens and tokens(c), **options)


def on_the_head(**options):
    return linear_preference_loss(**pairs(), **{"ref_token_logps": torch.zeros(6, 9), **options})


def uncoupled(pairs, *, beta):
    return pairs.chosen_logps


BOTH = {
    "divergence": (
        {"f_divergence_type": "kl"},
        ValueError,
        "f_divergence_type must be one of reverse_kl, .*; got 'kl'",
    ),
    "divergence of another loss": (
        {"f_divergence_type": "forward_kl", "loss_type": ["sigmoid", "bco_pair"]},
        ValueError,
        "f_divergence_type='forward_kl' goes with sigmoid, robust, .*; got loss_type bco_pair",
    ),
    "divergence without effect": (
        {"f_divergence_type": "forward_kl", "loss_type": "sft"},
        ValueError,
        "f_divergence_type='forward_kl' goes with .* beside sft; got loss_type sft",
    ),
    "coefficient of another": (
        {"f_alpha_divergence_coef": 0.3, "f_divergence_type": "forward_kl"},
        ValueError,
        "f_alpha_divergence_coef belongs to alpha_divergence; got f_divergence_type='forward_kl'",
    ),
    "coefficient": (
        {"f_alpha_divergence_coef": 1.5, "f_divergence_type": "alpha_divergence"},
        ValueError,
        r"f_alpha_divergence_coef must be in \[0, 1\]; got 1.5",
    ),
    "ld_alpha": ({"ld_alpha": -0.1}, ValueError, r"ld_alpha must be in \[0, 1\]; got -0.1"),
    "ld_alpha a word": ({"ld_alpha": "1"}, TypeError, "ld_alpha must be a number; got str"),
    "ld_alpha of another loss": (
        {"ld_alpha": 0.5, "loss_type": "simpo"},
        ValueError,
        "ld_alpha goes with sigmoid, .*dpop, alone or beside sft; got loss_type simpo",
    ),
    "weighting of sorted pairs": (
        {"use_weighting": True, "loss_type": "aot"},
        ValueError,
        "use_weighting weighs pairs, .* not with aot, aot_unpaired, or a function without",
    ),
    "weighting of who knows what": (
        {"use_weighting": True, "loss_type": uncoupled},
        ValueError,
        "use_weighting weighs pairs, .*or a function without fastpref.couples",
    ),
    "weight a word": ({"loss_weights": ["a"]}, TypeError, "loss_weights must be a number; got str"),
    "weight nan": ({"loss_weights": [math.nan]}, ValueError, "loss_weights must be finite; got nan"),
    "a list in a list": (
        {"loss_type": [["ipo"]]},
        ValueError,
        r"loss_type must be a function or one of .*; got \['ipo'\]",
    ),
    "free of a reference": (
        {"reference_free": "yes"},
        TypeError,
        "reference_free must be True or False; got 'yes'",
    ),
    "weighting by a number": ({"use_weighting": 0.5}, TypeError, "use_weighting must be True or False; got 0.5"),
}


@pytest.mark.parametrize("function", [on_logps, on_the_head])
@pytest.mark.parametrize("name", BOTH)
def test_refused_options(name, function):
    options, error, message = BOTH[name]
    fn = {on_logps: "dpo_loss", on_the_head: "linear_preference_loss"}[function]
    with pytest.raises(error, match=f"^{fn}: {message}"):
        function(**options)


SUMS = {
    "no tokens, ld_alpha": ({"ld_alpha": 0.5}, ValueError, "ld_alpha needs log-probs per token: give tokens"),
    "no tokens, weighting": ({"use_weighting": True}, ValueError, "use_weighting needs log-probs per token"),
    "no tokens, unlikelihood": ({"loss_type": "unlikelihood"}, ValueError, "unlikelihood needs tokens; got None"),
    "no reference per token": (
        {"ld_alpha": 0.5, "tokens": lambda c: tokens_of(c, ref_logps=None)},
        ValueError,
        "ld_alpha needs the reference per token, and has sums: give tokens.ref_logps",
    ),
    "no squares": (
        {"use_weighting": True, "tokens": tokens_of},
        ValueError,
        "use_weighting needs log_sum_sq_probs among the outputs of tokens",
    ),
    "tokens and lengths": (
        {"tokens": tokens_of, "chosen_lengths": torch.ones(4), "rejected_lengths": torch.ones(4)},
        ValueError,
        "tokens and lengths were both given",
    ),
    "mask of tokens": (
        {"tokens": lambda c: tokens_of(c, mask=c.mask.long())},
        TypeError,
        "tokens.mask must be bool; got int64",
    ),
    "shape of tokens": (
        {"tokens": lambda c: tokens_of(c, mask=c.mask[:3])},
        ValueError,
        r"tokens.mask must have the shape of tokens.logps, \(56,\); got \(21,\)",
    ),
    "kind of tokens": ({"tokens": lambda c: c.logps}, TypeError, "tokens must be fastpref.Tokens; got Tensor"),
    **{
        f"no {what}, {name}": (
            {"loss_type": name, **({"no_reference": True} if what == "ref_chosen_logps" else {})},
            ValueError,
            f"{name} needs {what}.*; got None",
        )
        for what, names in {
            "ref_chosen_logps": (
                "sigmoid robust hinge exo_pair nca_pair bco_pair sppo_hard aot aot_unpaired apo_zero apo_down "
                "discopop dpop"
            ),
            "chosen_lengths": "ipo sigmoid_norm sft cpo simpo orpo",
        }.items()
        for name in names.split()
    },
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_that_are_not_enough(name):
    options, error, message = SUMS[name]
    with pytest.raises(error, match=f"^dpo_loss: {message}"):
        on_logps(**options)


def test_ld_dpo_wants_the_reference_per_token():
    message = "ld_alpha needs the reference per token, and has sums: give ref_token_logps, or ref_hidden"
    with pytest.raises(ValueError, match=f"^linear_preference_loss: {message}"):
        on_the_head(ref_token_logps=None, ref_logps=torch.zeros(6), ld_alpha=0.5)
    assert bool(torch.isfinite(on_the_head(ref_token_logps=None, reference_free=True, ld_alpha=0.5).loss))


OWN = {  # loss: its option, a value outside its range, and what is said
    "sigmoid": ("label_smoothing", 0.5, r"in \[0, 0.5\); got 0.5"),
    "robust": ("label_smoothing", 0.5, r"in \[0, 0.5\); got 0.5"),
    "aot": ("label_smoothing", -0.1, r"in \[0, 0.5\); got -0.1"),
    "aot_unpaired": ("label_smoothing", 0.7, r"in \[0, 0.5\); got 0.7"),
    "cpo": ("cpo_alpha", -1.0, "be >= 0 and finite; got -1.0"),
    "exo_pair": ("label_smoothing", 0.0, "> 0, or the loss is infinite"),
    "discopop": ("discopop_tau", 0.0, r"be in \(0, 1\]; got 0.0"),
    "dpop": ("dpop_lambda", math.inf, "be >= 0 and finite; got inf"),
    "simpo": ("simpo_gamma", "0.5", "be a number; got str"),
    "unlikelihood": ("unlikelihood_alpha", -0.5, "be >= 0 and finite; got -0.5"),
    "bco_pair": ("delta", torch.zeros(4), r"be a number or a detached 0-d tensor; got \(4,\)"),
}


@pytest.mark.parametrize("name", OWN)
def test_options_outside_their_range(name):
    option, value, message = OWN[name]
    with pytest.raises((TypeError, ValueError), match=f"^{name}: {option} must .*{message}"):
        on_logps(loss_type=name, tokens=tokens_of, **{option: value})
    with pytest.raises((TypeError, ValueError), match=f"^{name}: {option} must .*{message}"):
        on_the_head(loss_type=name, **{option: value})
