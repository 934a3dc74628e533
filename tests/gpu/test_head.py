"""The fused head on a GPU: the contract of its numbers, memory, the same bits, streams, graphs, sizes, devices.

Needs a CUDA device; values, bounds and machine code are tested without one in tests/test_triton_*.py.
"""

import math

import pytest
import torch

from fastpref import (
    kernels,
    linear_cross_entropy,
    linear_logps,
    linear_policy_loss,
    linear_preference_loss,
    plan,
    selective_logps,
)
from fastpref.kernels.chunks import default_workspace
from tests import _oracle
from tests._oracle import IGNORE, OPTIONS, assert_logps, assert_same_bits, head, option_case, upstream

REASON = kernels.why_not("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=f"triton: {REASON}")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RAGGED = (263, 520, 4099)  # rows and columns leave a rest in every tile, depth in some


def moved(values, device):
    if isinstance(values, dict):
        return {name: moved(x, device) for name, x in values.items()}
    return values.to(device) if isinstance(values, torch.Tensor) else values


def on_gpu(function, device="cuda"):
    """`function` of tensors on the CPU, computed on a GPU; gradients come back the same way."""

    def run(**arguments):
        return moved(_oracle.as_dict(function(**moved(arguments, device))), "cpu")

    return run


def check(args, grads, *, trained=_oracle.TRAINED, workspace=None, backend=None, device="cuda", **options):
    outputs = {"outputs": ("entropy",)} if "entropy" in grads else {}
    given = {"grads": grads, "trained": trained}
    ours = _oracle.run(
        on_gpu(linear_logps, device), args, workspace=workspace, backend=backend, **outputs, **given, **options
    )
    true = _oracle.run(_oracle.truth, args, dtype=torch.float64, **given, **options)
    assert_logps(ours[0]["logps"], true[0]["logps"])
    if "entropy" in grads:
        _oracle.assert_entropy(ours[0]["entropy"], true[0]["entropy"])
    _oracle.assert_gradients(ours[1], true[1])


def test_triton_is_what_runs():
    assert kernels.choose("head", "cuda").__name__ == "fastpref.kernels.triton.head"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, dtype):
    args, options = option_case(name, *RAGGED, dtype)
    args["hidden"][args["targets"] == IGNORE] = math.nan
    check(args, {"logps": upstream(263)}, **options)
    check(args, {"logps": upstream(263), "entropy": upstream(263, seed=2)}, **options)


# one row; the tiles of sm_90, and one past them; a vocabulary of one; more columns than 2^16
@pytest.mark.parametrize("shape", [(1, 16, 64), (128, 256, 512), (129, 257, 513), (2, 3, 1), (65, 64, 70001)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(shape, dtype):
    check(head(*shape, dtype), {"logps": upstream(shape[0])})


@pytest.mark.parametrize("workspace", [2**21, 2**25])
@pytest.mark.parametrize("trained", [_oracle.TRAINED, ("hidden",), ("weight",)])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_chunks(backend, trained, workspace):
    check(head(1500, 96, 4099, torch.bfloat16, bias=True), {"logps": upstream(1500)}, trained=trained,
          workspace=workspace, backend=backend)  # fmt: skip


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_the_library_and_of_triton(monkeypatch, dtype, library):
    from fastpref.kernels.triton import configs

    lookup = configs.lookup
    monkeypatch.setattr(configs, "lookup", lambda *key: lookup(*key)._replace(library=library))
    grads = upstream(1500)
    grads[200:900] = 0.0  # whole blocks without a gradient
    check(head(1500, 520, 4099, dtype), {"logps": grads})


def test_label_100_nats_below_the_maximum():
    for dtype in DTYPES:
        args = head(130, 64, 4099, dtype, ignored=0.0)
        z = args["hidden"].double() @ args["weight"].double().T
        for row in (7, 64, 129):
            args["targets"][row] = z[row].argmin()
            args["hidden"][row] *= 100 / (z[row].max() - z[row].min())
        check(args, {"logps": upstream(130)})


def nan_rows(x):
    return x.flatten(1).isnan().any(1).nonzero()[:, 0].tolist()


def out_of_range(n, vocab_size):
    """Arguments whose targets 3 and 9 and row 11 are out of range, and an ignored one whose row is."""
    args = head(n, 16, vocab_size, torch.bfloat16, ignored=0.0)
    args["targets"][3], args["targets"][9], args["targets"][20] = vocab_size, -7, IGNORE
    args["rows"] = torch.arange(n)
    args["rows"][11], args["rows"][20] = n, -1
    args = moved(args, "cuda")
    args["hidden"].requires_grad_(), args["weight"].requires_grad_()
    return args


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    ("function", "options"), [(linear_logps, {}), *((linear_cross_entropy, {"label_smoothing": s}) for s in (0.0, 0.1))]
)
def test_target_or_row_out_of_range_is_nan(function, options, backend):
    args = out_of_range(40, 131)
    losses = function(**args, **options, backend=backend, **({} if function is linear_logps else {"reduction": "none"}))
    (gradient,) = torch.autograd.grad(losses, args["hidden"], upstream(40).cuda())
    assert nan_rows(losses[:, None]) == [3, 9, 11] and nan_rows(gradient) == [3, 9, 39]
    with pytest.raises(ValueError, match="targets must be in"):
        function(**args, **options, backend=backend, check_finite=True)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("function", [linear_cross_entropy, linear_policy_loss])
def test_swept_loss_of_a_target_or_row_out_of_range_is_nan(function, backend):
    args, options = out_of_range(400, 2003), {"workspace": 2**20, "backend": backend}  # several chunks
    if function is linear_policy_loss:
        bounds = torch.tensor([0, 40, 400], dtype=torch.int32, device="cuda")
        options |= {"advantages": torch.ones(2, device="cuda"), "cu_seqlens": bounds}
    out = function(**args, **options)
    loss = out if function is linear_cross_entropy else out.loss
    (gradient,) = torch.autograd.grad(loss, args["hidden"])
    assert loss.isnan() and {3, 9, 399} <= set(nan_rows(gradient))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_selective_logps_of_a_target_out_of_range_are_nan(backend):
    logits = upstream(5, 70).cuda().requires_grad_()
    targets = torch.tensor([3, 70, IGNORE, -1, 69], device="cuda")
    logps = selective_logps(logits, targets, backend=backend)
    (gradient,) = torch.autograd.grad(logps, logits, upstream(5).cuda())
    assert nan_rows(logps[:, None]) == nan_rows(gradient) == [1, 3]


def peaked(n, hidden_size, vocab_size, dtype=torch.bfloat16, spread=4.0):
    """Arguments on the GPU, the labels likely ones; logits of standard deviation `spread`, up to some 64."""
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(vocab_size, hidden_size, generator=generator, device="cuda") / hidden_size**0.5
    targets = torch.randint(vocab_size, (n,), generator=generator, device="cuda")
    hidden = spread * torch.randn(n, hidden_size, generator=generator, device="cuda")
    hidden += 30 * torch.rand(n, 1, generator=generator, device="cuda") * weight[targets]
    return {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "targets": targets}


def true_logps(hidden, weight, targets):
    """fp64, on the device of the arguments, 256 rows at a time."""
    weight, parts = weight.double(), []
    for x, y in zip(hidden.split(256), targets.split(256), strict=True):
        z = x.double() @ weight.T
        z_y = z.gather(1, y[:, None])
        others = (z - z_y).scatter(1, y[:, None], -math.inf).logsumexp(1)
        parts.append(-torch.logaddexp(torch.zeros_like(others), others))
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_of_1024_tokens(dtype):
    args = peaked(1024, 4096, 50257, dtype)
    logps, true = linear_logps(**args), true_logps(**args)
    assert_logps(logps.cpu(), true.cpu())
    assert abs(float(logps.double().sum() - true.sum())) <= 5e-3


def test_gradients_of_a_real_size():
    args = peaked(1024, 2048, 50257)
    grads = upstream(1024).cuda()
    leaves = {name: args[name].requires_grad_() for name in ("hidden", "weight")}
    found = torch.autograd.grad(linear_logps(**args), list(leaves.values()), grads)
    wide = [x.detach().double().requires_grad_() for x in leaves.values()]
    z = (wide[0] @ wide[1].T).log_softmax(1)
    true = torch.autograd.grad(z.gather(1, args["targets"][:, None])[:, 0], wide, grads.double())
    for ours, exact in zip(found, true, strict=True):
        _oracle.assert_gradient(ours, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_every_time_and_beside_any_rows(dtype):
    torch.use_deterministic_algorithms(False)
    args = peaked(700, 1024, 50257, dtype)
    args["targets"][100:200] = args["targets"][0]  # rows of one label add up in one place
    leaves = [args[name].requires_grad_() for name in ("hidden", "weight")]

    def run():
        logps = linear_logps(**args)
        return logps, *torch.autograd.grad(logps, leaves, upstream(700).cuda())

    first = run()
    for _ in range(3):
        for one, other in zip(first, run(), strict=True):
            assert_same_bits(one, other)
    for part in (slice(0, 1), slice(300, 437), slice(699, 700)):
        few = {"hidden": args["hidden"][part], "weight": args["weight"], "targets": args["targets"][part]}
        assert_same_bits(first[0][part], linear_logps(**few))
        assert_same_bits(first[0][part], linear_logps(**few, workspace=2**25))


def test_losses_have_the_same_bits_every_time():
    torch.use_deterministic_algorithms(False)  # which would put other sums in the place of those by atomics
    args = peaked(8 * 500, 256, 4099)
    args["hidden"], args["targets"] = args["hidden"].view(8, 500, 256), args["targets"].view(8, 500)
    leaves = [args[name].requires_grad_() for name in ("hidden", "weight")]

    def run():
        found = []
        for out in (
            linear_preference_loss(**args, ref_logps=torch.zeros(8, device="cuda")),
            linear_policy_loss(**args, advantages=torch.ones(8, device="cuda"), loss_type="gspo"),
        ):
            found += [out.loss, *torch.autograd.grad(out.loss, leaves)]
        return found

    first = run()
    for _ in range(3):
        for one, other in zip(first, run(), strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("trained", [True, False])
def test_shared_rows_the_same_bits_every_time(trained):
    torch.use_deterministic_algorithms(False)
    args = peaked(64, 512, 4099)
    rows = torch.randint(64, (700,), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    args["targets"] = args["targets"][rows]
    args["hidden"].requires_grad_(), args["weight"].requires_grad_(trained)
    run = [torch.autograd.grad(linear_logps(**args, rows=rows), args["hidden"], upstream(700).cuda()) for _ in range(3)]
    assert_same_bits(run[0][0], run[1][0])
    assert_same_bits(run[0][0], run[2][0])


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("function", [linear_logps, linear_cross_entropy])
def test_rows_of_one_label_the_same_bits_every_time(function, backend):
    torch.use_deterministic_algorithms(False)
    args = peaked(64, 512, 4099)
    rows = torch.randint(64, (5000,), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    args["targets"], args["bias"] = args["targets"][rows] % 7, args["weight"][:, 0].clone()
    leaves = [args[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    grads, options = (upstream(5000).cuda(), {}) if function is linear_logps else (None, {"label_smoothing": 0.3})
    first, *others = (
        torch.autograd.grad(function(**args, rows=rows, backend=backend, **options), leaves, grads) for _ in range(3)
    )
    for other in others:
        for one, again in zip(first, other, strict=True):
            assert_same_bits(one, again)


@pytest.fixture
def no_wait():
    """What makes the host wait raises."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def forward_and_backward(args, leaves, grads, **options):
    logps = linear_logps(**args, **options)
    return logps, *torch.autograd.grad(logps, leaves, grads)


def test_host_never_waits(no_wait):
    torch.use_deterministic_algorithms(False)  # conftest's filling of fresh memory is not ours
    args = peaked(2000, 256, 4099)
    args["targets"][::3] = IGNORE
    leaves = [args[name].requires_grad_() for name in ("hidden", "weight")]
    grads = upstream(2000).cuda()
    forward_and_backward(args, leaves, grads)


def test_losses_do_not_wait_in_one_chunk(no_wait):
    torch.use_deterministic_algorithms(False)
    args = peaked(8 * 100, 256, 4099)
    args["hidden"], args["targets"] = args["hidden"].view(8, 100, 256), args["targets"].view(8, 100)
    args["hidden"].requires_grad_()
    args["weight"].requires_grad_()
    linear_preference_loss(**args, ref_logps=torch.zeros(8, device="cuda")).loss.backward()
    linear_policy_loss(**args, advantages=torch.ones(8, device="cuda")).loss.backward()


def test_stream():
    args = peaked(600, 256, 4099)
    leaves, grads = [args[name].requires_grad_() for name in ("hidden", "weight")], upstream(600).cuda()
    expected = forward_and_backward(args, leaves, grads)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # whoever launches elsewhere is done before the inputs are
        scaled = {**args, "hidden": args["hidden"] * 1}
        found = forward_and_backward(scaled, [scaled["hidden"], args["weight"]], grads)
    stream.synchronize()
    for one, other in zip(expected, found, strict=True):
        assert_same_bits(one, other)


def test_graph():
    args = peaked(600, 256, 4099)
    leaves, grads = [args[name].requires_grad_() for name in ("hidden", "weight")], upstream(600).cuda()
    torch.use_deterministic_algorithms(False)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        forward_and_backward(args, leaves, grads)  # compiles
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = forward_and_backward(args, leaves, grads)
    other = peaked(600, 256, 4099, spread=2.0)
    other["targets"][::5] = IGNORE
    with torch.no_grad():
        for name, x in other.items():
            args[name].copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    for one, captured in zip(forward_and_backward(args, leaves, grads), found, strict=True):
        assert_same_bits(one, captured)


def test_compiles_whole():
    args = peaked(300, 256, 4099)
    leaves, grads = [args[name].requires_grad_() for name in ("hidden", "weight")], upstream(300).cuda()
    logps = torch.compile(linear_logps, fullgraph=True)(**args)
    found = logps, *torch.autograd.grad(logps, leaves, grads)
    for one, other in zip(forward_and_backward(args, leaves, grads), found, strict=True):
        assert_same_bits(one, other)


def room(gibibytes):
    if REASON is None and torch.cuda.get_device_properties(0).total_memory < gibibytes * 2**30:
        pytest.skip(f"needs {gibibytes} GiB")


def test_more_than_2_to_the_31_logits():
    room(40)
    n, vocab_size = 20_000, 131_075
    args = peaked(n, 64, vocab_size)
    leaves = [args[name].requires_grad_() for name in ("hidden", "weight")]
    grads = torch.zeros(n, device="cuda")
    grads[-40:] = upstream(40).cuda()  # the last rows of the chunk, past 2^31 elements of it
    logps, d_hidden, d_weight = forward_and_backward(args, leaves, grads, workspace=8 * 2**30)
    few = {name: x.detach() if name == "weight" else x.detach()[-40:] for name, x in args.items()}
    assert_logps(logps[-40:].cpu(), true_logps(**few).cpu())
    assert not d_hidden[:-40].any()
    wide = [few["hidden"].double().requires_grad_(), few["weight"].double().requires_grad_()]
    z = (wide[0] @ wide[1].T).log_softmax(1).gather(1, few["targets"][:, None])[:, 0]
    true = torch.autograd.grad(z, wide, grads[-40:].double())
    _oracle.assert_gradient(d_hidden[-40:], true[0])
    _oracle.assert_gradient(d_weight, true[1])


def test_weight_of_more_than_2_to_the_31_elements():
    room(60)
    args = peaked(64, 8192, 2**18 + 3)
    assert_logps(linear_logps(**args).cpu(), true_logps(**args).cpu())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_another_device_than_the_current_one():
    check(head(*RAGGED, torch.bfloat16, bias=True), {"logps": upstream(263)}, device="cuda:1")


def extra_bytes(call):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("workspace", [2**27, 2**29, None])
@pytest.mark.parametrize("trained", [True, False])
def test_memory_is_what_plan_says(trained, workspace):
    n, hidden_size, vocab_size = 4096, 1024, 100_003
    args = peaked(n, hidden_size, vocab_size)
    leaves = [args["hidden"].requires_grad_(), *([args["weight"].requires_grad_()] if trained else [])]
    grads = upstream(n).cuda()
    used = extra_bytes(lambda: forward_and_backward(args, leaves, grads, workspace=workspace))
    planned = plan(
        n, hidden_size, vocab_size, dtype=torch.bfloat16, trainable_head=trained, couples="batch", device="cuda",
        workspace=workspace,
    )  # fmt: skip
    returned = sum(2 * x.numel() for x in leaves)
    beside = (workspace or default_workspace(torch.device("cuda"))) - planned.chunk_bytes
    # some (n, H) of copies, which the planner does not count
    assert used <= planned.peak_bytes + returned + max(beside, 0) + 16 * n * hidden_size, f"{used / 2**20:.0f} MiB"


def test_scoring_takes_no_chunk():
    args = peaked(8192, 1024, 100_003)
    used = extra_bytes(lambda: linear_logps(**args))
    assert used <= 2**28, f"{used / 2**20:.0f} MiB"  # 8,192 x 100,003 logits would be 1.5 GiB in 16 bits


@pytest.mark.parametrize("workspace", [2**22, 2**28])
def test_preference_loss(workspace):
    args = _oracle.pairs(6, 40, 64, 4099, dtype=torch.float32, bias=True)
    ref = _oracle.reference_of(args)
    leaves = {name: args[name].cuda().requires_grad_() for name in _oracle.TRAINED}
    out = linear_preference_loss(
        **{**moved(args, "cuda"), **leaves}, ref_logps=ref.cuda(), beta=0.1, workspace=workspace
    )
    found = dict(zip(leaves, torch.autograd.grad(out.loss, list(leaves.values())), strict=True))
    truths, true_gradients = _oracle.true_loss(args, ref_logps=ref)
    _oracle.assert_close(moved(_oracle.as_dict(out), "cpu"), truths)
    _oracle.assert_gradients(moved(found, "cpu"), true_gradients)
