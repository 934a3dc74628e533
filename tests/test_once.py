"""A second derivative of any op raises, whichever way autograd takes to it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastpref

TARGETS = torch.tensor([[1, 5, -100, 2], [4, -100, 3, 0]])
ADVANTAGES = torch.tensor([1.0, -0.5])
# each a scalar of hidden (2, 4, 6) and weight (8, 6)
OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear_logps": lambda h, w: fastpref.linear_logps(h, w, TARGETS).sum(),
    "linear_logps, squared": lambda h, w: fastpref.linear_logps(h, w, TARGETS).square().sum(),
    "linear_logps, frozen head": lambda h, w: fastpref.linear_logps(h, w.detach(), TARGETS).sum(),
    "linear_cross_entropy": lambda h, w: fastpref.linear_cross_entropy(h, w, TARGETS),
    "linear_cross_entropy, smoothed": lambda h, w: fastpref.linear_cross_entropy(h, w, TARGETS, label_smoothing=0.1),
    "linear_divergence": lambda h, w: fastpref.linear_divergence(h, w, h.detach() + 1, w.detach()).sum(),
    "selective_logps": lambda h, w: fastpref.selective_logps(h @ w.T, TARGETS).sum(),
    "linear_preference_loss": lambda h, w: (
        fastpref.linear_preference_loss(h, w, TARGETS, ref_logps=torch.zeros(2), workspace=1 << 20).loss
    ),
    "linear_policy_loss": lambda h, w: (
        fastpref.linear_policy_loss(h, w, TARGETS, advantages=ADVANTAGES, workspace=1 << 20).loss
    ),
}


def leaves() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 4, 6, generator=generator), torch.randn(8, 6, generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("way", ["backward", "grad"])
def test_a_penalty_on_the_gradient_raises(op: str, way: str) -> None:
    hidden, weight = leaves()
    # a second-order path beside the op's own: without it a derivative that autograd never visits is an error anyway
    loss = OPS[op](hidden, weight) + (hidden**3).sum()
    (d_hidden,) = torch.autograd.grad(loss, hidden, create_graph=True)
    penalty = d_hidden.square().sum()
    with pytest.raises(RuntimeError, match="second derivative"):
        if way == "backward":
            penalty.backward()
        else:
            torch.autograd.grad(penalty, hidden)


@pytest.mark.parametrize("op", OPS)
def test_create_graph_alone_changes_nothing(op: str) -> None:
    hidden, weight = leaves()
    (plain,) = torch.autograd.grad(OPS[op](hidden, weight), hidden)
    (kept,) = torch.autograd.grad(OPS[op](hidden, weight), hidden, create_graph=True)
    assert torch.equal(plain, kept)


def test_create_graph_works_inside_a_checkpoint() -> None:
    hidden, weight = leaves()
    logps = torch.utils.checkpoint.checkpoint(fastpref.linear_logps, hidden, weight, TARGETS, use_reentrant=False)
    (found,) = torch.autograd.grad(logps.sum(), hidden, create_graph=True)
    (plain,) = torch.autograd.grad(fastpref.linear_logps(hidden, weight, TARGETS).sum(), hidden)
    assert torch.equal(found, plain)
