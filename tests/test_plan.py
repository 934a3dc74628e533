"""plan against the table of passes, and against what the calls are measured to do: GEMMs and memory."""

import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastpref import linear_logps, linear_policy_loss, linear_preference_loss, plan
from fastpref.heads.sweep import Way, way_of
from fastpref.kernels.memory import release
from fastpref.ops import _head
from tests._oracle import BACKENDS, IGNORE, head, upstream

MIB = 1 << 20
COUPLES = ("token", "sequence", "pair", "batch")
LARGE = {"hidden_size": 576, "vocab_size": 49_152, "dtype": torch.bfloat16}


def planned(n=20_000, couples="pair", trainable_head=True, **changes):
    return plan(n, **{**LARGE, **changes}, trainable_head=trainable_head, couples=couples)


@pytest.mark.parametrize("couples", COUPLES)
def test_passes_of_the_table(couples):
    assert planned(couples=None).passes == planned(couples=None, trainable_head=False).passes == 1
    assert planned(couples=couples, trainable_head=False).passes == 2
    assert planned(couples=couples).passes == (4 if couples == "batch" else 3)
    assert planned(100, couples=couples).passes == 3  # the whole batch fits a chunk


@pytest.mark.parametrize("couples", [None, *COUPLES])
@pytest.mark.parametrize("trainable_head", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("workspace", [32 * MIB, 64 * MIB, None])
@pytest.mark.parametrize("n", [1, 1000, 20_000])
def test_numbers_are_consistent(n, workspace, dtype, trainable_head, couples):
    got = planned(n, couples, trainable_head, dtype=dtype, workspace=workspace)
    assert got.flops == got.passes * 2 * n * 576 * 49_152
    assert got.chunk_bytes <= (workspace or 256 * MIB)
    assert got.peak_bytes == got.chunk_bytes + got.accumulator_bytes
    if couples is not None:
        assert 1 <= got.chunk_tokens <= n and got.chunks == math.ceil(n / got.chunk_tokens)
        beside = 0 if "no copy is kept" not in got.why else got.accumulator_bytes - 4 * n * 576
        columns = (got.chunk_bytes + beside) / (got.chunk_tokens * dtype.itemsize)
        assert columns == 49_152 or (got.passes == (4 if trainable_head else 2) and 1 <= columns < 49_152)
    if got.passes == 3 and got.chunks > 1:
        assert got.accumulator_bytes >= 4 * 576 * 49_152
    assert got.why and isinstance(got.why, str)


def test_max_extra_bytes_forbids_the_copy_of_the_gradient():
    copy = 4 * 576 * 49_152
    rich, poor = planned(max_extra_bytes=copy), planned(max_extra_bytes=copy - 1)
    assert (rich.passes, poor.passes) == (3, 4) and rich == planned()
    assert poor.accumulator_bytes <= 4 * 576 * 20_000 + 256 * MIB / 8 and "max_extra_bytes" in poor.why
    assert planned(100, max_extra_bytes=0).passes == 3 and planned(trainable_head=False, max_extra_bytes=0).passes == 2


def test_exponentials_take_the_place_of_the_copy_where_they_take_less():
    copy = 4 * 576 * 49_152
    got = planned(2048)  # of which 1,776 fit the workspace
    assert (got.passes, got.chunks) == (3, 1) and "no copy is kept" in got.why
    assert got.chunk_bytes <= 192 * MIB and got.accumulator_bytes < copy
    assert planned(2048, max_extra_bytes=copy - 1).passes == planned(2048, "batch").passes == 4
    assert planned(4096).chunks == 3 and planned(4096).accumulator_bytes > copy


def test_a_small_chunk_does_not_pay_for_the_copy():
    """At V = 151,936 and 32 MiB a chunk holds 48 tokens: three passes then take longer than four."""
    large = {"hidden_size": 896, "vocab_size": 151_936, "workspace": 32 * MIB}
    assert planned(**large).passes == 4 and "48 tokens" in planned(**large).why
    assert planned(**{**large, "workspace": 256 * MIB}).passes == 3
    assert planned(**{**large, "hidden_size": 32}).passes == 3  # of a gradient that stays in the cache


def test_more_workspace_means_fewer_chunks():
    plans = [planned(workspace=size * MIB) for size in (32, 64, 128, 512)]
    chunks = [p.chunks for p in plans]
    assert chunks == sorted(set(chunks), reverse=True)
    assert [p.chunk_bytes for p in plans] == sorted(p.chunk_bytes for p in plans)


def test_why_names_the_reason():
    assert "frozen" in planned(trainable_head=False).why
    assert "no gradient" in planned(couples=None).why
    assert "batch" in planned(couples="batch").why and "20000" in planned(couples="batch").why


def test_a_device_that_is_not_here_with_a_workspace():
    assert planned(100, device="cuda:99", workspace=64 * MIB).passes == 3


def test_nothing_to_plan():
    got = planned(0)
    assert (got.flops, got.chunk_tokens, got.chunks, got.chunk_bytes) == (0, 0, 0, 0)


REFUSALS = {
    "tokens": ({"n": -1}, ValueError, "n_tokens must be >= 0; got -1"),
    "half a token": ({"n": 1.5}, (TypeError, ValueError), "n_tokens must be .*; got (1.5|float)"),
    "hidden": ({"hidden_size": -1}, ValueError, "hidden_size must be .*; got -1"),
    "vocabulary": ({"vocab_size": 0}, ValueError, "vocab_size must be .*; got 0"),
    "couples": (
        {"couples": "row"},
        ValueError,
        "couples must be None or one of token, sequence, pair, batch; got 'row'",
    ),
    "workspace": ({"workspace": 5}, ValueError, "workspace .* at least 1 MiB; got 5"),
    "a device that is not here": ({"device": "cuda:99"}, ValueError, "workspace must be given for device 'cuda:99'"),
    "extra": ({"max_extra_bytes": -1}, ValueError, "max_extra_bytes must be .* >= 0, or None; got -1"),
    "dtype": ({"dtype": torch.int32}, TypeError, "dtype must be .*; got .*int32"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    changes, error, message = REFUSALS[name]
    with pytest.raises(error, match=f"^plan: {message}"):
        planned(**changes)


def measured_passes(call, scale):
    """The FLOPs of the call's GEMMs over those of one pass, 2 N H V."""
    with profile(activities=[ProfilerActivity.CPU], with_flops=True, record_shapes=True, acc_events=True) as record:
        call()
    return (
        sum(e.flops for e in record.events() if e.name in ("aten::mm", "aten::addmm", "aten::bmm") and e.flops) / scale
    )


def measured_peak(call):
    """Bytes of the allocations alive at once, beyond those alive before the call."""
    release()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        call()
    alive = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def logps_call(n, h, v, dtype=torch.float32, *, trained=(), ignored=0.0, **options):
    args = head(n, h, v, dtype, ignored=ignored)
    live = int((args["targets"] != IGNORE).sum())
    leaves = {k: args[k].requires_grad_() for k in trained}

    def call():
        logps = linear_logps(**args, **options)
        if leaves:
            logps.backward(upstream(n))

    return call, live


def preference_call(n, h, v, dtype=torch.float32, *, trained=("hidden",), sequences=16, **options):
    args = head(n, h, v, dtype, ignored=0.0)
    args = {k: x if k == "weight" else x.unflatten(0, (sequences, -1)) for k, x in args.items()}
    args |= {k: args[k].clone().requires_grad_() for k in trained}

    def call():
        loss = linear_preference_loss(**args, reference_free=True, **options).loss
        if trained:
            loss.backward()

    return call, n


def coupled(pairs, *, beta):
    return (pairs.chosen_logps - pairs.rejected_logps.mean()).square()


@pytest.mark.parametrize("ignored", [0.0, 0.5])
@pytest.mark.parametrize("trained", [(), ("hidden",), ("hidden", "weight")])
def test_measured_passes_of_linear_logps(trained, ignored):
    n, h, v = 160, 16, 2053
    call, live = logps_call(n, h, v, trained=trained, ignored=ignored, backend="torch", workspace=MIB)
    passes = measured_passes(call, 2 * live * h * v)
    couples = "batch" if trained else None
    expected = plan(
        live, h, v, dtype=torch.float32, trainable_head="weight" in trained, couples=couples, workspace=MIB
    ).passes
    assert passes == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("trained", [(), ("hidden",), ("hidden", "weight")])
@pytest.mark.parametrize("workspace", [MIB, None])
def test_measured_passes_of_the_loss(workspace, trained):
    n, h, v = 160, 16, 2053
    for loss_type, couples in (("sigmoid", "pair"), (coupled, "batch")):
        call, _ = preference_call(n, h, v, trained=trained, loss_type=loss_type, backend="torch", workspace=workspace)
        expected = plan(
            n,
            h,
            v,
            dtype=torch.float32,
            trainable_head="weight" in trained,
            couples=couples if trained else None,
            workspace=workspace,
        ).passes
        assert measured_passes(call, 2 * n * h * v) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("trained", "passes"), [((), 1), (("hidden",), 2), (("weight",), 3), (("hidden", "weight"), 4)]
)
def test_measured_passes_without_room_for_the_copy(trained, passes):
    call, _ = preference_call(160, 16, 2053, trained=trained, backend="torch", workspace=MIB, max_extra_bytes=0)
    assert measured_passes(call, 2 * 160 * 16 * 2053) == pytest.approx(passes, rel=1e-6)


def test_of_a_pair_larger_than_a_chunk_the_rows_beyond_it_cost_a_pass():
    sizes = {"dtype": torch.float32, "trainable_head": True, "couples": "pair", "workspace": MIB}
    fits = plan(160, 16, 2053, **sizes).chunk_tokens
    call, _ = preference_call(160, 16, 2053, trained=("hidden", "weight"), sequences=2, backend="torch", workspace=MIB)
    assert 2 * fits < 160
    assert measured_passes(call, 2 * 160 * 16 * 2053) == pytest.approx(3 + (160 - fits) / 160, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_rows_in_one_chunk_in_the_place_of_the_copy(backend):
    """Three passes, no copy of the gradient, and bit for bit what a larger workspace gives."""
    n, h, v, dtype = 480, 128, 8209, torch.bfloat16
    expected = plan(n, h, v, dtype=dtype, trainable_head=True, couples="pair", workspace=8 * MIB)
    assert expected.chunks == 1 and expected.accumulator_bytes < 4 * h * v
    options = {"trained": ("hidden", "weight"), "backend": backend}
    call, _ = preference_call(n, h, v, dtype, **options, workspace=8 * MIB)
    assert measured_peak(call) <= 8 * MIB + expected.accumulator_bytes + 2 * h * (n + v) + 512 * n
    if backend == "torch":
        assert measured_passes(call, 2 * n * h * v) == pytest.approx(3, rel=1e-6)

    args = {k: x if k == "weight" else x.unflatten(0, (16, -1)) for k, x in head(n, h, v, dtype, ignored=0.0).items()}
    leaves = [args[k].requires_grad_() for k in ("hidden", "weight")]

    def gradients(workspace):
        loss = linear_preference_loss(**args, reference_free=True, backend=backend, workspace=workspace).loss
        return torch.autograd.grad(loss, leaves)

    for few, many in zip(gradients(8 * MIB), gradients(64 * MIB), strict=True):
        assert torch.equal(few, many)


def test_a_batch_without_a_live_token_took_a_copy_of_the_weights_gradient():
    args = {k: x if k == "weight" else x.unflatten(0, (16, -1)) for k, x in head(160, 16, 2053).items()}
    args["targets"].fill_(IGNORE)
    flat = _head.flatten("test", **args, options=_head.HeadOptions(workspace=MIB))
    assert way_of(flat._replace(weight=flat.weight.requires_grad_()), "token") == Way(False)


@pytest.mark.parametrize("live", [0, 1])
def test_a_gradient_that_nothing_is_added_to_is_zero(live):
    """Over several chunks it is not initialised before the first; fresh memory is NaN here."""
    args = {k: x if k == "weight" else x.unflatten(0, (16, -1)) for k, x in head(160, 16, 2053, ignored=0.0).items()}
    leaves = [args[k].requires_grad_() for k in ("hidden", "weight")]
    advantages = torch.zeros(16)
    advantages[-1] = live  # of the last chunk
    found = torch.autograd.grad(linear_policy_loss(**args, advantages=advantages, workspace=MIB).loss, leaves)
    assert all(x.isfinite().all() and bool(x.any()) == bool(live) for x in found)


@pytest.mark.parametrize("workspace", [MIB, None])
def test_measured_passes_of_frozen_hidden(workspace):
    """Two for a loss, formed in forward; linear_logps learns its upstream gradient too late, but for one chunk."""
    args = {"trained": ("weight",), "backend": "torch", "workspace": workspace}
    loss, _ = preference_call(160, 16, 2053, **args)
    logps, _ = logps_call(160, 16, 2053, **args)
    assert measured_passes(loss, 2 * 160 * 16 * 2053) == pytest.approx(2, rel=1e-6)
    assert measured_passes(logps, 2 * 160 * 16 * 2053) == pytest.approx(2 if workspace is None else 3, rel=1e-6)


@pytest.mark.parametrize(
    ("trained", "one_chunk", "several"), [(("hidden",), 2, 3), (("weight",), 2, 3), (("hidden", "weight"), 3, 4)]
)
@pytest.mark.parametrize("of", ["entropy", "logps", "both"])
def test_measured_passes_with_entropy(of, trained, one_chunk, several):
    args = head(160, 16, 2053, ignored=0.0)
    leaves = [args[k].requires_grad_() for k in trained]

    for workspace, passes in ((None, one_chunk), (MIB, several)):

        def call(workspace=workspace):
            out = linear_logps(**args, outputs=("entropy",), backend="torch", workspace=workspace)
            of_each = {"entropy": out.entropy, "logps": out.logps, "both": out.logps + out.entropy}
            torch.autograd.grad(of_each[of], leaves, upstream(160))

        assert measured_passes(call, 2 * 160 * 16 * 2053) == pytest.approx(passes, rel=1e-6)


@pytest.mark.parametrize("workspace", [MIB, None])
def test_rows_without_upstream_gradient_cost_one_pass(workspace):
    args = head(160, 16, 2053, ignored=0.0)
    leaves = [args[k].requires_grad_() for k in ("hidden", "weight")]
    grad = upstream(160) * (torch.arange(160) % 4 == 0)

    def call():
        torch.autograd.grad(linear_logps(**args, backend="torch", workspace=workspace), leaves, grad)

    expected = 1 + (2 if workspace is None else 3) / 4
    assert measured_passes(call, 2 * 160 * 16 * 2053) == pytest.approx(expected, rel=1e-6)


def test_measured_passes_of_the_compiled_loss():
    n, h, v = 160, 16, 2053
    args = head(n, h, v, ignored=0.0)
    hidden, weight = args["hidden"].view(16, -1, h).requires_grad_(), args["weight"].requires_grad_()
    targets = args["targets"].view(16, -1)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(hidden, weight):
        return linear_preference_loss(hidden, weight, targets, reference_free=True, backend="torch").loss

    loss(hidden, weight).backward()
    expected = plan(n, h, v, dtype=torch.float32, trainable_head=True, couples="pair").passes
    assert measured_passes(lambda: loss(hidden, weight).backward(), 2 * n * h * v) == pytest.approx(expected, rel=1e-6)


def test_no_grad_costs_one_pass():
    n, h, v = 160, 16, 2053
    args = head(n, h, v, ignored=0.0)
    hidden, weight = args["hidden"].view(16, -1, h).requires_grad_(), args["weight"].requires_grad_()
    targets = args["targets"].view(16, -1)

    @torch.no_grad()
    def call():
        linear_preference_loss(hidden, weight, targets, reference_free=True, backend="torch")

    assert measured_passes(call, 2 * n * h * v) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [(), ("hidden",), ("hidden", "weight")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of", ["linear_logps", "linear_preference_loss", "with max_extra_bytes"])
def test_workspace_bounds_the_memory(of, dtype, trained, backend):
    """In all, 3 to 5 chunks; what else the plan names, the gradients returned, and 512 bytes a token for the rest."""
    n, h, v, workspace = 2048, 16, 4099, 8 * MIB
    options = {"trained": trained, "backend": backend, "workspace": workspace}
    extra = 0 if of == "with max_extra_bytes" else None
    make = logps_call if of == "linear_logps" else preference_call
    call, _ = make(n, h, v, dtype, **options, max_extra_bytes=extra)
    trainable = "weight" in trained
    couples = ("batch" if of == "linear_logps" else "pair") if trained else None
    expected = plan(
        n, h, v, dtype=dtype, trainable_head=trainable, couples=couples, workspace=workspace, max_extra_bytes=extra
    )
    gradients = dtype.itemsize * h * (n * ("hidden" in trained) + v * trainable)
    peak = measured_peak(call)
    allowed = workspace + expected.accumulator_bytes + gradients + 512 * n
    assert peak <= allowed, f"{peak / MIB:.1f} MiB at once; {allowed / MIB:.1f} MiB allowed"
