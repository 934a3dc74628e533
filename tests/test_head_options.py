"""The head options: written out in each signature, and handed on, each under its own name."""

import inspect

import pytest
import torch

import fastpref
from fastpref.ops import _head

TENSORS = {name: torch.zeros(2) for name in ("hidden", "weight", "targets", "desirable", "advantages")}


class Reached(Exception):
    """flatten was called."""


@pytest.mark.parametrize(
    "name",
    ["linear_logps", "linear_cross_entropy", "linear_preference_loss", "linear_unpaired_loss", "linear_policy_loss"],
)
def test_every_function_takes_and_hands_on_all_of_them(name, monkeypatch):
    def flatten(fn, hidden, weight, targets, options):
        raise Reached(fn, options)

    monkeypatch.setattr(_head, "flatten", flatten)
    function = getattr(fastpref, name)
    parameters = inspect.signature(function).parameters
    given = {option: object() for option in _head.HeadOptions._fields}
    tensors = {k: x for k, x in TENSORS.items() if k in parameters}
    with pytest.raises(Reached) as found:
        function(**tensors, **given)
    assert found.value.args == (name, _head.HeadOptions(**given))
    assert {option: parameters[option].default for option in given} == _head.HeadOptions._field_defaults
