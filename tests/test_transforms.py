"""What stands around the ops: transforms that they refuse, checkpoints, autocast, forked and loading processes."""

import os

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from fastpref import linear_cross_entropy, linear_divergence, linear_logps, linear_preference_loss, selective_logps
from tests._oracle import head, run, upstream

CALLS = {
    "linear_logps": lambda x, a: linear_logps(x, a["weight"], a["targets"]),
    "linear_preference_loss": lambda x, a: (
        linear_preference_loss(x.view(4, 3, 5), a["weight"], a["targets"].view(4, 3), reference_free=True).loss
    ),
    "linear_divergence": lambda x, a: linear_divergence(x, a["weight"], x.detach(), a["weight"]),
    "selective_logps": lambda x, a: selective_logps(x @ a["weight"].T, a["targets"]),
}


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_is_refused_and_not_a_tangent_of_zero(name):
    args = head(12, 5, 11)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(args["hidden"], upstream(12, 5))
        with pytest.raises(ValueError, match=rf"^{name}: .* in reverse mode.* got one with a forward-mode tangent"):
            CALLS[name](dual, args)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian])
def test_torch_func_is_refused(transform, name):
    args = head(12, 5, 11)
    with pytest.raises(ValueError, match=rf"^{name}: .* in reverse mode.* got one inside a transform of torch.func"):
        transform(lambda x: CALLS[name](x, args).sum())(args["hidden"])


def test_the_reference_backend_is_torch_alone():
    args = head(12, 5, 11)
    (want,) = run(linear_logps, args, grads={"logps": torch.ones(12)}, trained=("hidden",))[1].values()
    found = torch.func.grad(lambda x: linear_logps(x, args["weight"], args["targets"], backend="reference").sum())
    torch.testing.assert_close(found(args["hidden"]), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", [linear_logps, linear_divergence, selective_logps])
def test_the_reference_backend_has_a_forward_mode(function):
    args = head(12, 5, 11)
    by = {
        linear_logps: lambda x: linear_logps(x, args["weight"], args["targets"], backend="reference"),
        linear_divergence: lambda x: linear_divergence(
            x, args["weight"], args["hidden"] + 1, args["weight"], backend="reference"
        ),
        selective_logps: lambda x: selective_logps(x @ args["weight"].T, args["targets"], backend="reference"),
    }[function]
    forward, reverse = torch.func.jacfwd(by)(args["hidden"]), torch.func.jacrev(by)(args["hidden"])
    torch.testing.assert_close(forward, reverse, rtol=1e-5, atol=1e-6)
    assert forward.any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_head_inside_a_checkpoint(reentrant):
    """Its forward runs twice: first without gradient, one pass, then with."""
    args = head(12, 5, 11)

    def loss(hidden, weight):
        return linear_cross_entropy(hidden.tanh(), weight, args["targets"])

    def through(hidden, weight):
        return checkpoint(loss, hidden, weight, use_reentrant=reentrant)

    found = []
    for function in (loss, through):
        leaves = [args[name].clone().requires_grad_() for name in ("hidden", "weight")]
        found.append(torch.autograd.grad(function(*leaves), leaves) if not reentrant else backward(function, leaves))
    for want, got in zip(*found, strict=True):
        assert torch.equal(got, want)


def backward(function, leaves):
    function(*leaves).backward()
    return [x.grad for x in leaves]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_reads_in_its_dtype_and_returns_gradients_in_the_parameters(dtype):
    args = head(12, 5, 11)
    grads = {"logps": upstream(12)}
    with torch.autocast("cpu", dtype):
        logps, got = run(linear_logps, args, grads=grads)
    narrow = {k: x.to(dtype) if x.is_floating_point() else x for k, x in args.items()}
    want_logps, want = run(linear_logps, narrow, grads=grads)
    assert torch.equal(logps["logps"], want_logps["logps"])
    for name, g in got.items():
        assert g.dtype == torch.float32
        torch.testing.assert_close(g, want[name].float(), rtol=2**-7, atol=1e-2)


class Scored(Dataset):
    """Log-probs computed by the process that loads."""

    def __init__(self, args, expected):
        self.args, self.expected = args, expected

    def __len__(self):
        return 4

    def __getitem__(self, i):
        logps = linear_logps(**self.args)
        return torch.tensor([os.getpid(), int(torch.equal(logps, self.expected))])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_in_the_workers_of_a_data_loader(start):
    """After a call in this process: a thread pool of its own must not be waited for in a fork."""
    args = head(64, 16, 301)
    expected = linear_logps(**args)
    loader = DataLoader(Scored(args, expected), num_workers=2, multiprocessing_context=start, timeout=60)
    rows = torch.cat(list(loader))
    assert len(set(rows[:, 0].tolist()) - {os.getpid()}) == 2
    assert bool(rows[:, 1].all())
    assert torch.equal(linear_logps(**args), expected)
