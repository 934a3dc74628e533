"""linear_logps at its edges: extreme rows, bits that depend on nothing else, and what it refuses."""

import math

import pytest
import torch

from fastpref import linear_logps
from tests._oracle import (
    BACKENDS,
    IGNORE,
    as_dict,
    assert_gradient,
    assert_logps,
    assert_no_worse,
    assert_same_bits,
    head,
    option_case,
    run,
    scores,
    three_ways,
    truth,
    upstream,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIXTEEN = [torch.bfloat16, torch.float16]
MIB = 1 << 20


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_equal_rows(dtype, backend):
    args = {"hidden": torch.zeros(4, 5), "weight": torch.ones(1000, 5), "targets": torch.tensor([0, 1, 999, IGNORE])}
    args = {k: x.to(dtype) if x.is_floating_point() else x for k, x in args.items()}
    got = linear_logps(**args, outputs=("entropy",), backend=backend)
    torch.testing.assert_close(got.logps[:3], torch.full((3,), -math.log(1000)), rtol=1e-6, atol=0)
    torch.testing.assert_close(got.entropy[:3], torch.full((3,), math.log(1000)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e3, 1e4])
def test_huge_logits(size, dtype, backend):
    args = head(60, 16, 300, dtype, spread=1.0, ignored=0.1)
    args["hidden"] = (args["hidden"].float() * size / scores(args["hidden"], args["weight"]).max().float()).to(dtype)
    largest = scores(args["hidden"].double(), args["weight"].double()).abs().max()
    assert 0.5 * size < largest < 2 * size
    grads = {"logps": upstream(60), "entropy": upstream(60, seed=2)}
    got, d_got = run(linear_logps, args, grads=grads, outputs=("entropy",), backend=backend)
    want, d_want = run(truth, args, grads={"logps": grads["logps"]}, dtype=torch.float64)
    assert_logps(got["logps"], want["logps"], largest)
    assert bool((got["entropy"] >= 0).all()) and all(bool(torch.isfinite(x).all()) for x in d_got.values())
    d_got = run(linear_logps, args, grads={"logps": grads["logps"]}, backend=backend)[1]
    for name in d_got:  # fp32 logits of 1e4 are known to 1e-3 at best, and probabilities with them
        error = (d_got[name].double() - d_want[name]).norm() / d_want[name].norm()
        assert error <= max(3e-3 if dtype in SIXTEEN else 3e-6, 2e-7 * size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("below", [50.0, 59.9, 60.1, 75.0, 89.0, 100.0, 1000.0])
def test_labels_far_below_the_maximum(below, dtype, backend):
    args = head(40, 65, 129, dtype, ignored=0.1)
    args["targets"][args["targets"] == 0] = 1
    live = args["targets"] != IGNORE
    args["bias"] = torch.zeros(129).to(dtype)
    args["bias"][0] = below  # one column answers every row, by `below` and a few nats: some rows on each side of 60
    grads = {"logps": upstream(40)}
    (ours, d_ours), (fp32, _), (want, d_want) = three_ways(args, grads, backend=backend)
    assert want["logps"][live].min() < -0.9 * below
    assert_logps(ours["logps"], want["logps"], max(64.0, below))
    assert_no_worse(ours["logps"], fp32["logps"], want["logps"])
    for name in d_ours:
        assert_gradient(d_ours[name], d_want[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [10.0, 21.0, 28.0, 40.0])
def test_confident_rows_keep_relative_precision(lead, dtype, backend):
    """z_y - logsumexp in fp32 returns 0 from 17 nats on."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 64, generator=generator)
    weight = torch.randn(50, 64, generator=generator) * 0.05
    weight[:20] += lead * hidden / hidden.square().sum(1, keepdim=True)
    args = {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "targets": torch.arange(20)}
    grads = {"logps": upstream(20)}
    got, d_got = run(linear_logps, args, grads=grads, backend=backend)
    want, d_want = run(truth, args, grads=grads, dtype=torch.float64)
    assert want["logps"].abs().median() < 60 * math.exp(-0.75 * lead)
    # an error of 4e-6 in a logit of 64 is one of 4e-6 in exp(d), relative
    torch.testing.assert_close(got["logps"].double(), want["logps"], rtol=1e-5, atol=0)
    if dtype != torch.float16:  # whose smallest number is 6e-8
        for name in d_got:
            assert_gradient(d_got[name], d_want[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_of_a_thousand_tokens(dtype, backend):
    args = head(1024, 128, 1500, dtype, spread=4.0, ignored=0.0)
    got = linear_logps(**args, backend=backend)
    want = truth(**{k: x.double() if x.is_floating_point() else x for k, x in args.items()})["logps"]
    assert_logps(got, want)
    assert abs(got.double().sum() - want.sum()) <= 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_of_more_than_two_billion_elements(backend):
    """4 GB if anything copied it; the rows that count lie past 2^31."""
    row = torch.randn(1, 1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16() / 1024
    weight = torch.randn(3, 1 << 20, generator=torch.Generator().manual_seed(1)).bfloat16()
    targets = torch.full((2051,), IGNORE)
    targets[-2:] = torch.tensor([0, 2])
    want = (row.double() @ weight.double().T).log_softmax(1)[0, [0, 2]]
    got = linear_logps(row.expand(2051, -1), weight, targets, backend=backend)[-2:].double()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_does_not_grow_with_chunks(dtype, backend):
    args = head(600, 24, 4099, dtype, ignored=0.1)
    grads = {"logps": upstream(600), "entropy": upstream(600, seed=2)}
    d_want = run(truth, args, grads=grads, dtype=torch.float64)[1]
    one, many = (
        run(linear_logps, args, grads=grads, outputs=("entropy",), backend=backend, workspace=size)
        for size in (256 * MIB, MIB)
    )
    for name in ("logps", "entropy"):
        assert_no_worse(many[0][name], one[0][name], run(truth, args, dtype=torch.float64)[0][name])
    for name in ("hidden", "weight"):
        assert_gradient(many[1][name], d_want[name])
        errors = [(d[1][name].double() - d_want[name]).norm() for d in (one, many)]
        assert errors[1] <= 1.1 * errors[0]


@pytest.mark.usefixtures("any_algorithms")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["none", "all"])
def test_same_bits_whatever_else_is_there(name, backend, dtype):
    """A row's bits depend on neither the other rows, nor the chunk, nor the threads, nor the run."""
    fixed = {"backend": backend, "outputs": ("entropy",), "deterministic": True}
    args, options = option_case(name, 300, 67, 1031, dtype, ignored=0.1)
    first = as_dict(linear_logps(**args, **options, **fixed))
    threads = torch.get_num_threads()
    try:
        for count, workspace in ((1, None), (2, MIB), (3, None)):
            torch.set_num_threads(count)
            again = as_dict(linear_logps(**args, **options, **fixed, workspace=workspace))
            for name in first:
                assert_same_bits(again[name], first[name])
    finally:
        torch.set_num_threads(threads)
    alone = [slice(t, t + 1) for t in range(0, 60, 12)]  # where a library would call its vector product
    for chosen in (*alone, slice(7, 12), slice(100, 233), slice(None, None, 3)):
        some = {k: x[chosen] if k in ("hidden", "targets", "temperature") else x for k, x in args.items()}
        few = as_dict(linear_logps(**some, **options, **fixed))
        for name in first:
            assert_same_bits(few[name], first[name][chosen])


@pytest.mark.usefixtures("any_algorithms")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_bits_do_not_depend_on_what_needs_a_gradient(dtype, backend):
    args = head(300, 67, 1031, dtype)
    want = linear_logps(**args, backend=backend, deterministic=True)
    for trained in (("hidden",), ("weight",), ("hidden", "weight")):
        leaves = {k: args[k].clone().requires_grad_() for k in trained}
        assert_same_bits(linear_logps(**{**args, **leaves}, backend=backend, deterministic=True).detach(), want)


@pytest.mark.usefixtures("any_algorithms")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_same_bits_run_after_run(dtype, backend):
    args = head(300, 67, 1031, dtype)
    grads = {"logps": upstream(300), "entropy": upstream(300, seed=2)}
    call = {"grads": grads, "outputs": ("entropy",), "backend": backend, "workspace": MIB}
    first, again = (run(linear_logps, args, **call)[1] for _ in range(2))
    for name in first:
        assert_same_bits(again[name], first[name])


def change(**changes):
    """Arguments of a call, with some replaced; a function replaces by what it makes of the old one."""
    args = head(6, 5, 7, ignored=0.0)
    args["targets"][:] = torch.arange(6)
    return {**args, **{k: c(args[k]) if callable(c) else c for k, c in changes.items()}}


REFUSALS = {
    "rank of hidden": ({"hidden": lambda x: x[0]}, ValueError, r"hidden must have 2 or 3 dimensions; got shape \(5,\)"),
    "rank of weight": ({"weight": lambda x: x[0]}, ValueError, r"weight must have 2 dimensions; got shape \(5,\)"),
    "H": ({"weight": lambda x: x[:, :4]}, ValueError, r"weight must be \(V, 5\).*got \(7, 4\)"),
    "N": ({"targets": lambda x: x[:3]}, ValueError, r"targets must be \(6,\).*got \(3,\)"),
    "B of targets": ({"targets": lambda x: x[None]}, ValueError, r"targets must be \(6,\).*got \(1, 6\)"),
    "V = 0": ({"weight": lambda x: x[:0]}, ValueError, r"weight must be \(V, H\).*; got \(0, 5\)"),
    "integer hidden": ({"hidden": lambda x: x.long()}, TypeError, r"hidden must be one of .*; got int64"),
    "dtypes": ({"weight": lambda x: x.bfloat16()}, TypeError, "weight must have the dtype of hidden, float32"),
    "float64": (
        {"hidden": lambda x: x.double(), "weight": lambda x: x.double(), "backend": "cpu"},
        TypeError,
        r"hidden must be one of bfloat16, float16, float32; got float64",
    ),
    "device of weight": ({"weight": lambda x: x.to("meta")}, ValueError, "weight must be on the device of hidden"),
    "device of targets": ({"targets": lambda x: x.to("meta")}, ValueError, "targets must be on the device of hidden"),
    "float targets": ({"targets": lambda x: x.float()}, TypeError, "targets must be integers; got float32"),
    "targets too large": ({"targets": lambda x: x + 2}, ValueError, r"targets must be .*\[0, 7\).*; got .*7"),
    "targets negative": ({"targets": lambda x: x - 2}, ValueError, r"targets must be .*\[0, 7\).*; got .*-2"),
    "not a tensor": ({"hidden": [[1.0]]}, TypeError, "hidden must be a tensor; got list"),
    "bias": ({"bias": torch.ones(5)}, ValueError, r"bias must be \(7,\).*; got \(5,\)"),
    "dtype of bias": ({"bias": torch.ones(7).double()}, TypeError, "bias must have the dtype of hidden, float32"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature must be .*; got 0.0"),
    "temperature nan": ({"temperature": math.nan}, ValueError, "temperature must be .*; got nan"),
    "temperatures": ({"temperature": -torch.ones(6)}, ValueError, "temperature must .* at every live target; got -1"),
    "temperature shape": ({"temperature": torch.ones(5)}, ValueError, r"temperature must .*\(6,\); got \(5,\)"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap must be .*, or None; got -1.0"),
    "logit_scale": ({"logit_scale": math.inf}, ValueError, "logit_scale must be finite.*; got inf"),
    "outputs": ({"outputs": ("entropi",)}, ValueError, "outputs must be among entropy.*; got 'entropi'"),
    "outputs a string": ({"outputs": "entropy"}, (TypeError, ValueError), "outputs must be .*; got .*'entropy'"),
    "workspace": ({"workspace": 100}, ValueError, "workspace .* at least 1 MiB; got 100"),
    "backend": (
        {"backend": "tritn"},
        ValueError,
        r"backend must be None or one of reference, torch, cpu, triton; got 'tritn'",
    ),
    "rows of batched": (
        {"hidden": lambda x: x[None], "targets": lambda x: x[None], "rows": torch.arange(6)},
        ValueError,
        r"rows wants packed hidden \(N, H\); got \(1, 6, 5\)",
    ),
    "rows shape": ({"rows": torch.arange(5)}, ValueError, r"targets must have the shape of rows, \(5,\); got \(6,\)"),
    "rows range": ({"rows": torch.arange(6) + 1}, ValueError, r"rows must be in \[0, 6\).*; got 1 to 6"),
    "rows dtype": ({"rows": torch.arange(6.0)}, TypeError, "rows must be integers; got float32"),
    "cu_seqlens dtype": ({"cu_seqlens": torch.tensor([0.0, 6.0])}, TypeError, "cu_seqlens must be integers"),
    "nan": ({"hidden": lambda x: x * math.nan, "check_finite": True}, ValueError, "hidden must be finite"),
    "infinity": ({"hidden": lambda x: x / 0, "check_finite": True}, ValueError, "hidden must be finite"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    changes, error, message = REFUSALS[name]
    if changes.get("backend") == "cpu" and "cpu" not in BACKENDS:
        pytest.skip("the extension is not built")
    with pytest.raises(error, match=f"^linear_logps: {message}"):
        linear_logps(**change(**changes))


def test_check_finite_forgives_what_is_not_read():
    args = change(targets=lambda x: torch.where(x == 2, IGNORE, x), check_finite=True)
    args["hidden"][2] = math.nan
    assert bool(torch.isfinite(linear_logps(**args)).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row(backend):
    args = change(backend=backend)
    want = linear_logps(**args)
    args["hidden"][2] = math.nan
    got = linear_logps(**args)
    assert bool(torch.isnan(got[2]))
    assert_same_bits(got[[0, 1, 3, 4, 5]], want[[0, 1, 3, 4, 5]])


def test_sharded_weight_points_to_fused_lm_head():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        args = change()
        args["weight"] = distribute_tensor(args["weight"], init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(ValueError, match=r"^linear_logps: weight .*DTensor.*fused_lm_head"):
            linear_logps(**args)
    finally:
        dist.destroy_process_group()
