"""Inputs of gae, and the float64 reference within eager's own error: of the CPU's kernels and of a GPU's."""

import torch

from fastpref.kernels.reference import gae as reference


def inputs(shape, dtype=torch.float32, seed=0):
    """gae's arguments; what stands at masked steps is NaN, and a third of them are masked, inside the rows too."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, *shape, generator=generator).to(dtype)
    mask = torch.rand(shape, generator=generator) > 0.3
    rewards[~mask] = values[~mask] = float("nan")
    return {
        "rewards": rewards,
        "values": values,
        "mask": mask,
        "dones": torch.rand(shape, generator=generator) < 0.1,
        "bootstrap": torch.randn(shape[:-1], generator=generator).to(dtype),
    }


def run(function, args, dtype=None, gamma=0.99, lam=0.95):
    """A backend's own function, which takes its arguments by position: (advantages, returns)."""
    floats = ("rewards", "values", "bootstrap")
    cast = {name: x.to(dtype) if dtype and name in floats else x for name, x in args.items()}
    return function(*cast.values(), gamma, lam, True)[0]


def assert_no_worse(actual, eager, truth, factor=2.0):
    error, allowed = (actual.double() - truth).abs().max(), factor * (eager.double() - truth).abs().max()
    ulp = torch.finfo(actual.dtype).eps * truth.abs().max()
    assert error <= allowed + ulp, f"error {error:.1e} > {factor} x eager's + 1 ulp = {allowed + ulp:.1e}"


def check(function, args):
    truth = run(reference.gae, args, torch.float64)
    eager = run(reference.gae, args, torch.float32)
    for got, e, t in zip(run(function, args), eager, truth, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got[~args["mask"]], torch.zeros_like(got[~args["mask"]]))
        assert_no_worse(got, e, t)


def check_moments(function, args):
    """Of the advantages it returned itself, in float64."""
    (advantages, _), sums = function(*args.values(), 0.99, 0.95, True)
    live, wide = torch.ones_like(advantages) if args["mask"] is None else args["mask"], advantages.double()
    expected = torch.stack((live.sum(1).double(), wide.sum(1), wide.square().sum(1)), dim=1)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-10)
