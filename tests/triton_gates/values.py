"""The head on the triton backend under the interpreter, against float64 formulas, with the sanitizer watching."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastpref import (
    linear_cross_entropy,
    linear_logps,
    linear_policy_loss,
    linear_preference_loss,
    linear_unpaired_loss,
    selective_logps,
)
from fastpref.kernels.triton import configs
from fastpref.kernels.triton import head as kernels
from fastpref.kernels.triton import selective_logps as selective
from fastpref.ops import _head
from fastpref.ops.linear_logps import rows_of_one_chunk
from tests import _oracle
from tests._oracle import IGNORE, assert_gradient, assert_logps, assert_same_bits, head, option_case, upstream
from tests.triton_gates.cases import DTYPES, SMALL
from tests.triton_gates.sanitizer import sanitized

RAGGED = (35, 40, 259)  # rows, depth and columns all leave a rest


def check(args, grads, *, trained=_oracle.TRAINED, workspace=None, **options):
    outputs = {"outputs": ("entropy",)} if "entropy" in grads else {}
    given = {"grads": grads, "trained": trained, **options}
    ours = _oracle.run(linear_logps, args, backend="triton", workspace=workspace, **outputs, **given)
    true = _oracle.run(_oracle.truth, args, dtype=torch.float64, **given)
    largest = max(64.0, float(_oracle.scores(*_clean(args)).abs().max()))
    assert_logps(ours[0]["logps"], true[0]["logps"], largest)
    if "entropy" in grads:
        _oracle.assert_entropy(ours[0]["entropy"], true[0]["entropy"])
    _oracle.assert_gradients(ours[1], true[1])


def _clean(args):
    return [args[name].nan_to_num().double().flatten(0, -2) for name in ("hidden", "weight")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["none", "temperature per token", "all"])
def test_options(checked, name, dtype):
    args, options = option_case(name, *RAGGED, dtype)
    args["hidden"][args["targets"] == IGNORE] = math.nan  # never read
    check(args, {"logps": upstream(35), "entropy": upstream(35, seed=2)}, **options)


# one row; a tile, and one past it, of rows, of columns and of depth; a vocabulary of one
@pytest.mark.parametrize("shape", [(1, 16, 64), (32, 32, 128), (33, 33, 129), (2, 3, 1), (65, 1, 257)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes(checked, shape, dtype):
    check(head(*shape, dtype), {"logps": upstream(shape[0])})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shipped_tiles(dtype):
    with sanitized():
        check(head(70, 72, 300, dtype, bias=True), {"logps": upstream(70)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_descriptors(checked, monkeypatch, dtype):
    described = SMALL._replace(score=SMALL.score._replace(descriptors=True))
    monkeypatch.setattr(configs, "lookup", lambda *_: described)
    check(head(*RAGGED, dtype, bias=True), {"logps": upstream(35)})
    odd = head(35, 37, 259, dtype)  # rows that are not 16 bytes apart: through pointers
    check(odd, {"logps": upstream(35)})


def test_label_100_nats_below_the_maximum(checked):
    # such rows are scored twice; one in the middle of a tile, one alone in its tile
    for dtype in DTYPES:
        args = head(33, 16, 131, dtype, ignored=0.0)
        z = args["hidden"].double() @ args["weight"].double().T
        for row in (7, 32):
            args["targets"][row] = z[row].argmin()
            args["hidden"][row] *= 100 / (z[row].max() - z[row].min())
        check(args, {"logps": upstream(33)})
        check(args, {"logps": upstream(33), "entropy": upstream(33, seed=2)})


def test_every_extra_output(checked):
    args, options = option_case("all", *RAGGED, torch.bfloat16)
    names = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    ours, _ = _oracle.run(linear_logps, args, outputs=names, backend="triton", **options)
    true, _ = _oracle.run(_oracle.truth, args, dtype=torch.float64, **options)
    for name in names[1:3]:
        torch.testing.assert_close(ours[name].double(), true[name], rtol=1e-6, atol=1e-5)
    assert_same_bits(ours["is_top1"], true["is_top1"].bool() & (args["targets"] != IGNORE))


def test_views_and_shared_rows(checked):
    args = head(36, 40, 131, torch.bfloat16, ignored=0.0)
    wide = torch.full((36, 2, 40), math.nan, dtype=torch.bfloat16)
    wide[:, 1] = args["hidden"]
    args["hidden"], args["weight"] = wide[:, 1], args["weight"].T.contiguous().T
    args["targets"][5:9] = IGNORE
    check(args, {"logps": upstream(36)})
    rows = torch.randint(36, (50,), generator=torch.Generator().manual_seed(1))
    args["targets"] = torch.cat((args["targets"], args["targets"][:14]))
    check(args, {"logps": upstream(50)}, rows=rows)


def test_nothing_to_score(checked):
    for n in (0, 5):
        args = head(n, 8, 20, torch.bfloat16)
        args["targets"].fill_(IGNORE)
        args["hidden"].fill_(math.nan)
        values, gradients = _oracle.run(linear_logps, args, grads={"logps": upstream(n)}, backend="triton")
        assert not values["logps"].any() and not any(g.isnan().any() or g.any() for g in gradients.values())


def out_of_range(n, vocab_size, ignore_index=IGNORE):
    """(arguments whose targets 3 and 9 and row 11 are out of range, an ignored one whose row is; the wrong ones)."""
    args = head(n, 16, vocab_size, torch.bfloat16, ignored=0.0)
    args["targets"] = args["targets"].clamp(min=1)
    args["targets"][3], args["targets"][9], args["targets"][20] = vocab_size, -7, ignore_index
    args["rows"] = torch.arange(n)
    args["rows"][11], args["rows"][20] = n, -1
    return {**args, "ignore_index": ignore_index}, [3, 9, 11]


def nan_rows(x):
    return x.flatten(1).isnan().any(1).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("trained", [_oracle.TRAINED, ("hidden",)])
@pytest.mark.parametrize("ignore_index", [IGNORE, 0])
def test_target_or_row_out_of_range_is_nan_and_reads_nothing(checked, ignore_index, trained):
    args, wrong = out_of_range(40, 131, ignore_index)
    options = {name: args.pop(name) for name in ("rows", "ignore_index")}
    grads = {"logps": upstream(40)}
    values, gradients = _oracle.run(linear_logps, args, grads=grads, trained=trained, backend="triton", **options)
    assert nan_rows(values["logps"][:, None]) == wrong
    assert nan_rows(gradients["hidden"]) == [3, 9, 39]  # a row past the end stands for the last


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_smoothing_of_a_target_or_row_out_of_range_is_nan(checked, softcap):
    args, wrong = out_of_range(40, 131)
    args["hidden"].requires_grad_(), args["weight"].requires_grad_()
    losses = linear_cross_entropy(**args, label_smoothing=0.1, softcap=softcap, reduction="none", backend="triton")
    (gradient,) = torch.autograd.grad(losses, args["hidden"], upstream(40))
    assert nan_rows(losses[:, None]) == wrong and nan_rows(gradient) == [3, 9, 39]


SWEPT = [linear_cross_entropy, linear_preference_loss, linear_unpaired_loss, linear_policy_loss]


@pytest.mark.parametrize("function", SWEPT)
def test_swept_loss_of_a_target_or_row_out_of_range_is_nan(checked, monkeypatch, function):
    monkeypatch.setattr("fastpref.heads.sweep.rows_of_one_chunk", lambda *_: None)
    args, _ = out_of_range(40, 131)
    args["hidden"].requires_grad_(), args["weight"].requires_grad_()
    bounds = torch.tensor([0, 15, 20, 30, 40], dtype=torch.int32)  # the wrong ones are in the first
    ref = {"ref_logps": torch.zeros(4)}
    given = {
        linear_preference_loss: ref,
        linear_unpaired_loss: {**ref, "desirable": torch.tensor([True, False] * 2), "kl": 0.0},
        linear_policy_loss: {"advantages": torch.ones(4)},
    }
    out = function(**args, **given.get(function, {}), cu_seqlens=bounds, backend="triton")
    loss = out if function is linear_cross_entropy else out.loss
    (gradient,) = torch.autograd.grad(loss, args["hidden"])
    assert loss.isnan() and {3, 9, 39} <= set(nan_rows(gradient)) <= {*range(15), *range(20, 30), 39}


def test_selective_logps_of_a_target_out_of_range_are_nan(checked):
    logits = upstream(5, 70).requires_grad_()
    targets = torch.tensor([3, 70, IGNORE, -1, 69])
    logps = selective_logps(logits, targets, backend="triton")
    (gradient,) = torch.autograd.grad(logps, logits, upstream(5))
    assert nan_rows(logps[:, None]) == nan_rows(gradient) == [1, 3]


def test_four_passes_and_a_frozen_head(small_tiles):
    args = head(60, 16, 2003, torch.float32, bias=True, ignored=0.0)  # more rows than a chunk of 1 MiB holds
    check(args, {"logps": upstream(60)}, workspace=2**20)
    check(args, {"logps": upstream(60)}, workspace=2**20, trained=("hidden",))


@pytest.mark.parametrize("workspace", [2**20, 2**28])
def test_preference_loss(checked, workspace):
    # of one chunk, and of several, since one of 1 MiB has 48 rows
    args = _oracle.pairs(4, 20, 8, 2003, bias=True)
    ref = _oracle.reference_of(args)
    values, gradients = _oracle.our_loss(args, ref_logps=ref, backend="triton", workspace=workspace)
    truths, true_gradients = _oracle.true_loss(args, ref_logps=ref)
    _oracle.assert_close(values, truths)
    _oracle.assert_gradients(gradients, true_gradients)


def test_policy_loss_is_the_cpu_kernels(checked):
    args = head(3 * 20, 16, 131, torch.float32)
    args["hidden"], args["targets"] = args["hidden"].view(3, 20, 16), args["targets"].view(3, 20)
    options = {"advantages": upstream(3), "entropy_coef": 0.01}
    with torch.no_grad():
        old = linear_logps(**args, backend="torch") + 0.2 * upstream(3, 20, seed=4)
    found = {}
    for backend in ("triton", "torch"):
        grads = {"loss": torch.tensor(1.7)}
        found[backend] = _oracle.run(linear_policy_loss, args, grads=grads, old_logps=old, backend=backend, **options)
    torch.testing.assert_close(found["triton"][0]["loss"], found["torch"][0]["loss"], rtol=1e-5, atol=1e-6)
    for name, gradient in found["triton"][1].items():
        assert_gradient(gradient, found["torch"][1][name].double())


def test_chunk_holds_the_rows_that_count(checked):
    # 160 targets do not fit a chunk of 1 MiB, the 80 that count do: three passes, their F kept
    args = head(160, 16, 1003, torch.float32, ignored=0.0)
    args["targets"][::2] = IGNORE
    args["hidden"][::2] = math.nan
    options = _head.HeadOptions(workspace=2**20, backend="triton")
    assert rows_of_one_chunk(_head.flatten("test", **args, options=options)) == 80
    check(args, {"logps": upstream(160)}, workspace=2**20)


def test_mixed_precision_reads_an_fp32_weight(checked):
    args = head(35, 24, 131, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = _oracle.run(linear_logps, args, grads={"logps": upstream(35)}, backend="triton")
    narrow = {**args, "hidden": args["hidden"].bfloat16().float(), "weight": args["weight"].bfloat16().float()}
    true = _oracle.run(_oracle.truth, narrow, grads={"logps": upstream(35)}, dtype=torch.float64)
    assert_logps(ours[0]["logps"], true[0]["logps"])
    for name, gradient in ours[1].items():
        assert gradient.dtype == torch.float32
        error = (gradient.double() - true[1][name]).norm() / true[1][name].norm()
        assert error <= 3e-3, f"{name}: {error:.1e}"


def test_same_bits_in_either_order_and_beside_any_rows(small_tiles):
    args = head(70, 40, 300, torch.bfloat16, ignored=0.2)
    given = {"grads": {"logps": upstream(70)}, "backend": "triton"}
    with sanitized():
        first = _oracle.run(linear_logps, args, **given)
    with sanitized(reverse=True):
        again = _oracle.run(linear_logps, args, **given)
    assert_same_bits(first[0]["logps"], again[0]["logps"])
    for name in first[1]:
        assert_same_bits(first[1][name], again[1][name])
    few = {"hidden": args["hidden"][41:], "weight": args["weight"], "targets": args["targets"][41:]}
    assert_same_bits(first[0]["logps"][41:], linear_logps(**few, backend="triton"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["none", "all"])
def test_selective_logps(checked, monkeypatch, name, dtype):
    monkeypatch.setattr(selective, "BLOCK", 64)
    args, options = option_case(name, 35, 131, 131, dtype)
    args.pop("bias", None)
    args["weight"] = torch.eye(131, dtype=dtype)  # hidden are logits then
    args["hidden"] = (4 * args["hidden"].float()).to(dtype)
    args["hidden"][3] *= 30  # labels far below, and far above
    args["targets"][3], args["targets"][4] = args["hidden"][3].argmin(), args["hidden"][4].argmax()
    args["hidden"][args["targets"] == IGNORE] = math.nan
    logits = args["hidden"].clone().requires_grad_()
    given = {"temperature": args.pop("temperature", 1.0), **options}
    names = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    found = selective_logps(logits, args["targets"], outputs=names, backend="triton", **given)
    grads = {"logps": upstream(35), "entropy": upstream(35, seed=2)}
    true, of_hidden = _oracle.run(_oracle.truth, args, grads=grads, trained=("hidden",), dtype=torch.float64, **given)
    largest = max(64.0, float(true["mean_logits"].abs().max()), float(args["hidden"].nan_to_num().abs().max()))
    assert_logps(found.logps, true["logps"], largest)
    for name in names[1:3]:
        torch.testing.assert_close(getattr(found, name).double(), true[name], rtol=2e-6, atol=2e-5)
    assert_same_bits(found.is_top1, true["is_top1"].bool() & (args["targets"] != IGNORE))
    (gradient,) = torch.autograd.grad([found.logps, found.entropy], logits, list(grads.values()))
    assert_gradient(gradient, of_hidden["hidden"])


class NoWait(TorchDispatchMode):
    """Refuses what makes the host wait for the device: values read, and shapes that depend on them.

    And what CUDA adds up in any order: float sums by an index that repeats.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique_dim"), (
            name
        )
        if name in ("aten::index.Tensor", "aten::index_put", "aten::index_put_"):
            assert not any(x is not None and x.dtype == torch.bool for x in args[1]), f"{name} by a mask"
        if name.startswith(("aten::index_add", "aten::scatter_add")) and args[0].is_floating_point():
            assert args[2].unique().numel() == args[2].numel(), f"{name} of floats, in any order"
        return function(*args, **(kwargs or {}))


def launches_only(monkeypatch):
    """The interpreter itself reads what it is given: here launches do nothing, which leaves the host's own steps."""

    class Launch:
        def __getitem__(self, grid):
            return lambda *arguments, **options: None

    for name in vars(kernels):
        if name.endswith("_kernel"):
            monkeypatch.setattr(kernels, name, Launch())


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("trained", [_oracle.TRAINED, ("hidden",)])
@pytest.mark.parametrize("workspace", [2**20, 2**28])
def test_host_never_waits(small_tiles, monkeypatch, workspace, trained, entropy):
    if workspace == 2**20:  # of several chunks: that they are is asked of the device, once
        monkeypatch.setattr("fastpref.ops.linear_logps.rows_of_one_chunk", lambda flat, extra: None)
    launches_only(monkeypatch)
    args = head(220, 16, 1003, torch.float32, bias=True)
    leaves = {name: x.requires_grad_(name in trained) for name, x in args.items() if x.is_floating_point()}
    with NoWait():
        outputs = ("entropy",) if entropy else ()
        found = linear_logps(**{**args, **leaves}, outputs=outputs, workspace=workspace, backend="triton")
        total = found[0].sum() + found[1].sum() if entropy else found.sum()
        total.backward()


def test_host_never_waits_for_a_loss_in_one_chunk(small_tiles, monkeypatch):
    launches_only(monkeypatch)
    args = _oracle.pairs(3, 9, 16, 131)
    args["hidden"].requires_grad_(), args["weight"].requires_grad_()
    with NoWait():
        linear_preference_loss(**args, ref_logps=torch.zeros(6), backend="triton").loss.backward()
        linear_policy_loss(**args, advantages=torch.ones(6), loss_type="gspo", backend="triton").loss.backward()


def test_compiles_whole(small_tiles):
    args = head(*RAGGED, torch.bfloat16)
    leaf = args["weight"].requires_grad_()
    compiled = torch.compile(lambda **a: linear_logps(**a, backend="triton"), fullgraph=True, backend="aot_eager")
    logps = compiled(**args)
    assert_same_bits(logps, linear_logps(**args, backend="triton"))
    (gradient,) = torch.autograd.grad(logps, leaf, upstream(35))
    (eager,) = torch.autograd.grad(linear_logps(**args, backend="triton"), leaf, upstream(35))
    assert_same_bits(gradient, eager)
