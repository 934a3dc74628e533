"""gae on a CUDA device: values, bits, streams, graphs, devices, sizes."""

import pytest
import torch

from fastpref import gae, kernels
from fastpref.kernels.reference import gae as reference
from tests._gae import check, check_moments, inputs, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(kernels.why_not("cuda") is not None, reason=f"fastpref._cuda: {kernels.why_not('cuda')}"),
]
# a lane's steps; a warp's, one past them; warps; two stretches, in fours and not; 1,024 threads; more; many rows
SHAPES = [(1, 1), (3, 7), (2, 128), (3, 129), (2, 512), (5, 1030), (3, 2052), (2, 8197), (3, 70_001), (70_000, 33)]
DISCOUNTS = {"gamma": 0.99, "lam": 0.95}
GIB = 2**30


def kernel(*args):
    """On the device, back on the host."""
    on_device = (x.cuda() if torch.is_tensor(x) else x for x in args)
    return tuple(x.cpu() for x in kernels.choose("gae", "cuda", "cuda").gae(*on_device))


def on_device(args, device="cuda"):
    return {name: x.to(device) for name, x in args.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_eager(shape, dtype):
    if shape[1] > 10_000:
        args = inputs(shape, dtype)
        results = run(kernel, args).double()
        truth = run(kernels.choose("gae", "cpu").gae, args).double()  # held to float64 by tests/test_gae.py
        assert (results - truth).abs().max() <= 4 * torch.finfo(torch.float32).eps * truth.abs().max()
        return
    check(kernel, inputs(shape, dtype))
    check_moments(kernel, inputs(shape, dtype))


def test_error_does_not_grow_with_the_length():
    args = inputs((1, 1_000_000))
    args["mask"][:], args["dones"][:] = True, False
    args["rewards"], args["values"] = args["rewards"].nan_to_num(), args["values"].nan_to_num()
    to_go = args["rewards"].double().flip(1).cumsum(1).flip(1) + args["bootstrap"].double()[:, None]
    error = (run(kernel, args, None, 1.0, 1.0)[1].double() - to_go).abs().max()
    assert error <= 16 * torch.finfo(torch.float32).eps * to_go.abs().max()


@pytest.mark.parametrize("absent", ["mask", "dones", "bootstrap"])
@pytest.mark.parametrize("whiten", [False, True])
def test_public_function_is_that_of_the_cpu(absent, whiten):
    args = {name: x.nan_to_num() if x.is_floating_point() else x for name, x in inputs((9, 300)).items()}
    del args[absent]
    for got, want in zip(
        gae(**on_device(args), **DISCOUNTS, whiten=whiten), gae(**args, **DISCOUNTS, whiten=whiten), strict=True
    ):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)


def test_same_bits_on_every_run_whatever_the_other_rows_and_the_alignment():
    args = on_device(inputs((300, 4096)))
    wanted = gae(**args, **DISCOUNTS)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(gae(**args, **DISCOUNTS), wanted, strict=True))
    alone = gae(**{name: x[7:8] for name, x in args.items()}, **DISCOUNTS)
    assert all(torch.equal(a, b[7:8]) for a, b in zip(alone, wanted, strict=True))
    off = {k: torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape) for k, x in args.items()}
    assert all(torch.equal(a, b) for a, b in zip(gae(**off, **DISCOUNTS), wanted, strict=True))


def test_on_a_stream_of_its_own():
    """The inputs are made on that stream, behind work that takes a while: a launch elsewhere would read NaN."""
    args = inputs((64, 1024))
    wanted = run(reference.gae, args)
    stream, late = torch.cuda.Stream(), on_device(args)
    late = {name: torch.full_like(x, float("nan")) if x.is_floating_point() else x for name, x in late.items()}
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for name, x in args.items():
            late[name].copy_(x.pin_memory(), non_blocking=True)
        results = run(kernels.choose("gae", "cuda").gae, late)
    stream.synchronize()
    torch.testing.assert_close(results.cpu(), wanted, rtol=1e-5, atol=1e-5)


def test_in_a_graph_and_without_waiting_for_the_device():
    args = on_device(inputs((32, 1024)))
    call = lambda: gae(**args, **DISCOUNTS, whiten=True)  # noqa: E731
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for name, x in on_device(inputs((32, 1024), seed=5)).items():
        args[name].copy_(x)
    graph.replay()
    for got, want in zip(results, call(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_another_device_than_the_current_one():
    args = inputs((7, 300))
    wanted = gae(**args, **DISCOUNTS)
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        results = gae(**on_device(args, device), **DISCOUNTS)
        assert torch.cuda.current_device() == 0 and results[0].device == torch.device(device)
        for got, want in zip(results, wanted, strict=True):
            torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)


def test_more_than_two_to_the_31_steps():
    if torch.cuda.mem_get_info()[0] < 48 * GIB:
        pytest.skip("needs 48 GiB of device memory")
    rows, steps = 2**31 // 4096 + 3, 4096
    rewards = torch.randn(4, steps, device="cuda").repeat(rows // 4 + 1, 1)[:rows]
    advantages, _ = gae(rewards, rewards, **DISCOUNTS)
    few, _ = gae(rewards[-5:].clone(), rewards[-5:].clone(), **DISCOUNTS)
    assert torch.equal(advantages[-5:], few)
