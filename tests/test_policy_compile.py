"""The policy losses under torch.compile(fullgraph=True): one graph, the same numbers."""

import pytest
import torch

from fastpref import linear_policy_loss, policy_loss, value_loss
from tests._policy import arguments, rollout, with_head


@pytest.mark.parametrize("loss_type", ["ppo", "gspo", "cispo"])
def test_policy_loss_compiles_into_one_graph(loss_type):
    given = arguments(rollout(poisoned=False))

    def loss(logps):
        return policy_loss(**{**given, "logps": logps}, loss_type=loss_type).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    values = []
    for f in (loss, compiled):
        logps = given["logps"].clone().requires_grad_()
        value = f(logps)
        values.append((value.detach(), *torch.autograd.grad(value, logps)))
    torch.testing.assert_close(values[1], values[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("loss_type", ["ppo", "gspo"])
def test_linear_policy_loss_compiles_into_one_graph(loss_type):
    args, batch = with_head(rollout(poisoned=False))
    given = {"advantages": arguments(batch)["advantages"], "old_logps": batch["old_logps"], "loss_type": loss_type}

    def loss(hidden, weight):
        return linear_policy_loss(hidden, weight, args["targets"], **given, entropy_coef=0.1).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    values = []
    for f in (loss, compiled):
        leaves = [args[key].clone().requires_grad_() for key in ("hidden", "weight")]
        value = f(*leaves)
        values.append((value.detach(), *torch.autograd.grad(value, leaves)))
    torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=1e-6)


def test_value_loss_compiles_into_one_graph():
    given = [torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    compiled = torch.compile(value_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given, torch.ones(3, 4)), value_loss(*given, torch.ones(3, 4)))
