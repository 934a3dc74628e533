"""The kernels of losses on a CUDA device: values, bits, streams, graphs, devices; and the heads that use them."""

import pytest
import torch

from fastpref import kernels, linear_policy_loss, linear_preference_loss
from fastpref.heads import _rows
from fastpref.losses.dpo import bind
from tests._oracle import head
from tests._rows import PAIR_LOSSES, PAIR_SIZES, SIZES, TOKEN_LOSSES, batch, check_pairs, check_tokens, pairs, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(kernels.why_not("cuda") is not None, reason=f"fastpref._cuda: {kernels.why_not('cuda')}"),
]
LENGTHS = [700, 0, 1300, 2]


@pytest.mark.parametrize(("loss_type", "options"), PAIR_LOSSES)
@pytest.mark.parametrize(("n", "spread"), [*PAIR_SIZES, (100_000, 2.0)])
def test_dpo_row_is_the_function(loss_type, options, n, spread):
    check_pairs(loss_type, options, n, spread, device="cuda")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", TOKEN_LOSSES)
def test_ppo_row_is_the_function(options, size):
    check_tokens(options, size, device="cuda")


def pair_call(device="cuda", seed=0):
    """(call, the tensors it reads)."""
    loss = bind("test", "sigmoid", None, 0.3, "reverse_kl", None, None, False, {})
    some, leaves = pairs(300, 5.0, device=device, seed=seed)
    reads = [*leaves, some.ref_chosen_logps, some.ref_rejected_logps]

    def call():
        rows = _rows.pair_rows(loss, some)
        return [rows.losses, *torch.autograd.grad(rows.losses.sum(), leaves), *rows.metrics.values()]

    return call, reads


def token_call(device="cuda", seed=0):
    b = batch(LENGTHS, device=device, seed=seed)
    goal, *leaves = tokens(b, {"kl_coef": 0.1, "entropy_coef": 0.02, "delta": 2.0}, torch.float32)
    bounds = b["cu_seqlens"].long()
    reads = [*leaves, goal.old_logps, goal.ref_logps, goal.advantages, goal.shares, goal.mask]

    def call():
        rows = _rows.token_rows(goal, *leaves, bounds)
        return [rows.losses, *torch.autograd.grad(rows.losses.sum(), leaves), *rows.metrics.values()]

    return call, reads


@pytest.mark.parametrize("make", [pair_call, token_call])
def test_same_bits_and_no_waiting_for_the_device(make):
    call, _ = make()
    wanted = call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [call() for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for found in again for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("make", [pair_call, token_call])
def test_in_a_graph(make):
    call, reads = make()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    other, others = make(seed=3)
    with torch.no_grad():
        for x, y in zip(reads, others, strict=True):
            x.copy_(y)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, other(), strict=True))


@pytest.mark.parametrize("make", [pair_call, token_call])
def test_on_a_stream_of_its_own(make):
    """The inputs come on that stream, behind work that takes a while."""
    wanted, (call, reads) = make()[0](), make(seed=3)
    right = make()[1]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(50_000_000)
        for x, y in zip(reads, right, strict=True):
            x.copy_(y)
        with torch.enable_grad():
            found = call()
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("make", [pair_call, token_call])
def test_on_another_device_than_the_current_one(make):
    wanted = make("cuda:0")[0]()
    found = make("cuda:1")[0]()
    assert torch.cuda.current_device() == 0
    assert all(x.device.index == 1 and torch.equal(x.to("cuda:0"), y) for x, y in zip(found, wanted, strict=True))


def test_more_than_two_to_the_31_tokens():
    n = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 100 * 2**30:
        pytest.skip("needs 100 GiB of device memory")
    ones, mask = torch.ones(n, device="cuda"), torch.ones(n, dtype=torch.bool, device="cuda")
    logps, old = -ones, -ones
    logps[-3:] = torch.tensor([-2.0, -0.5, -1.5], device="cuda")
    run = kernels.choose("ppo_row", "cuda", "cuda").ppo_row

    def rows_of(last):
        some = [x[last:] for x in (logps, old, ones, ones)]
        return run(*some, None, None, None, mask[last:], None, 0.8, 1.2, float("inf"), 1.0, 0.0, "k3", 0.0)[0]

    assert torch.equal(rows_of(0)[:2, -3:], rows_of(-3)[:2])


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("workspace", [None, 2**20])
@pytest.mark.parametrize("loss", ["preference", "policy"])
def test_heads_by_the_kernel_and_by_the_function(monkeypatch, loss, workspace, trained):
    def step():
        args = {k: x.cuda() for k, x in head(240, 32, 1003, torch.float32, ignored=0.1).items()}
        args["hidden"].requires_grad_(), args["weight"].requires_grad_(trained)
        layout = {"cu_seqlens": torch.tensor([0, 50, 120, 200, 240], dtype=torch.int32, device="cuda")}
        old = -4 + 0.5 * torch.randn(240, generator=torch.Generator().manual_seed(1)).cuda()
        if loss == "preference":
            out = linear_preference_loss(**args, **layout, workspace=workspace, beta=0.3, ref_token_logps=old)
        else:
            given = {"advantages": torch.sin(torch.arange(240.0)).cuda(), "old_logps": old, "ref_logps": old - 0.1}
            options = {"kl_coef": 0.1, "entropy_coef": 0.02}
            out = linear_policy_loss(**args, **layout, **given, **options, workspace=workspace)
        (out.loss * 1.7).backward()
        grads = [args["hidden"].grad, *([args["weight"].grad] if trained else [])]
        return [*(x for x in out[:-1] if x is not None), *grads, *out.metrics.values()]

    by_kernel = step()
    monkeypatch.setattr(_rows, "_on_cuda", lambda x: False)
    for got, want in zip(by_kernel, step(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
