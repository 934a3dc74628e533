"""Optimizers by transformers' names."""

import sys

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers.training_args import OptimizerNames

from fastpref.trainer.optimizers import NAMES, make_optimizer


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    made[2].requires_grad_(False)
    return made


def test_names_are_those_of_transformers():
    assert set(NAMES) <= {name.value for name in OptimizerNames}


@pytest.mark.parametrize("name", ["adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop"])
def test_takes_a_step_downhill(name):
    made = model()
    optimizer = make_optimizer(made, name, learning_rate=1e-2, weight_decay=0.1)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(3):
        loss = made(x).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > losses[1] > losses[2]


def test_decay_is_for_trained_matrices():
    made = model()
    optimizer = make_optimizer(made, "adamw_torch", learning_rate=3e-4, weight_decay=0.1)
    matrices, others = optimizer.param_groups
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert [p.shape for p in matrices["params"]] == [made[0].weight.shape]
    assert len(others["params"]) == 3
    assert matrices["lr"] == others["lr"] == 3e-4
    assert matrices["betas"] == (0.9, 0.999)


def test_refusals():
    with pytest.raises(ValueError, match=r"unknown optim 'adamw_torch_fuse'; did you mean 'adamw_torch_fused'\?"):
        make_optimizer(model(), "adamw_torch_fuse", learning_rate=1e-3, weight_decay=0.0)
    # needs projections of chosen layers
    with pytest.raises(ValueError, match="unknown optim 'galore_adamw'"):
        make_optimizer(model(), "galore_adamw", learning_rate=1e-3, weight_decay=0.0)


def test_an_optimizer_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"^make_optimizer: optim adamw_8bit: .*bitsandbytes"):
        make_optimizer(model(), "adamw_8bit", learning_rate=1e-3, weight_decay=0.0)
