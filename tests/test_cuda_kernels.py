"""csrc/*.cu emulated on the CPU, in both orders of blocks and threads: values, and what the heads do with them."""

import importlib
import sys

import pytest
import torch

import fastpref
from fastpref import kernels, linear_policy_loss, linear_preference_loss
from fastpref.heads import _rows
from fastpref.kernels.cuda import _launch
from fastpref.kernels.reference import gae as reference
from fastpref.losses.dpo import bind
from tests._cuda_emu import build_module
from tests._gae import check, check_moments, inputs, run
from tests._oracle import head
from tests._rows import PAIR_LOSSES, PAIR_SIZES, SIZES, TOKEN_LOSSES, batch, check_pairs, check_tokens, pairs, tokens

MODULES = [f"fastpref.kernels.cuda.{name}" for name in ("gae", "dpo_row", "ppo_row")]


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    return build_module(tmp_path_factory.mktemp("cuda_emu"))


@pytest.fixture(params=["0", "1"], ids=["ascending", "descending"])
def emulated(module, monkeypatch, request):
    """fastpref's CUDA kernels on tensors of the CPU; how often each was called."""
    calls = dict.fromkeys(("gae", "dpo_row", "ppo_row"), 0)

    def launch(entry, tensors, *rest):
        assert all(x is None or x.is_contiguous() for x in tensors)
        calls[entry.__name__] += 1
        entry(*(0 if x is None else x.data_ptr() for x in tensors), *rest, 0, 0)

    monkeypatch.setenv("CUDA_EMU_REVERSE", request.param)
    monkeypatch.setitem(sys.modules, "fastpref._cuda", module)
    monkeypatch.setattr(fastpref, "_cuda", module, raising=False)
    monkeypatch.setattr(_launch, "launch", launch)
    monkeypatch.setattr(_rows, "_on_cuda", lambda x: x.dtype == torch.float32)
    before = {name: sys.modules.pop(name, None) for name in MODULES}
    choose = kernels.choose
    monkeypatch.setattr(
        kernels,
        "choose",
        lambda op, device, backend=None: (
            importlib.import_module(f"fastpref.kernels.cuda.{op}") if backend == "cuda" else choose(op, device, backend)
        ),
    )
    yield calls
    for name, was in before.items():
        sys.modules.pop(name, None)
        if was is not None:
            sys.modules[name] = was


def gae(*args):
    return kernels.choose("gae", "cuda", "cuda").gae(*args)


# a lane's steps; a warp's, one past them; warps; two stretches, in fours and not; 1,024 threads
GAE_SHAPES = [(1, 1), (3, 7), (2, 128), (3, 129), (2, 512), (2, 1030), (1, 2052), (1, 8197)]


@pytest.mark.parametrize("shape", GAE_SHAPES)
def test_gae(emulated, shape):
    args = inputs(shape)
    check(gae, args)
    check_moments(gae, args)
    left_out = {**args, "dones": None, "bootstrap": None}
    torch.testing.assert_close(run(gae, left_out), run(reference.gae, left_out))
    all_live = {**args, "rewards": args["rewards"].nan_to_num(), "values": args["values"].nan_to_num(), "mask": None}
    torch.testing.assert_close(run(gae, all_live), run(reference.gae, all_live))
    check_moments(gae, all_live)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_gae_of_nothing(emulated, shape):
    results, sums = gae(*inputs(shape).values(), 0.99, 0.95, True)
    assert results.shape == (2, *shape) and torch.equal(sums, torch.zeros(shape[0], 3).double())


def test_gae_has_the_same_bits_whatever_the_other_rows_and_the_alignment(emulated):
    args = inputs((3, 1032))
    wanted = run(gae, args)
    alone = run(gae, {name: x[1:2] for name, x in args.items()})
    assert torch.equal(alone, wanted[:, 1:2])
    # fours of steps no longer start at multiples of 16 bytes
    off = {k: torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape) for k, x in args.items()}
    assert off["rewards"].data_ptr() % 16 and torch.equal(run(gae, off), wanted)


def test_gae_lets_no_nan_cross_a_terminal_step(emulated):
    args = inputs((1, 1200))
    args["mask"][:], args["dones"][:] = True, False
    args["rewards"][:] = args["values"][:] = 1.0
    args["dones"][:, 298] = True
    wanted = run(reference.gae, args)
    args["rewards"][:, 299:] = float("nan")
    for got, expected in zip(run(gae, args), wanted, strict=True):
        torch.testing.assert_close(got[:, :299], expected[:, :299])


def test_gae_error_does_not_grow_with_the_length(emulated):
    args = inputs((1, 60_000))
    args["mask"][:], args["dones"][:] = True, False
    args["rewards"], args["values"] = args["rewards"].nan_to_num(), args["values"].nan_to_num()
    truth = run(reference.gae, args, torch.float64, 1.0, 1.0)
    error = (run(gae, args, None, 1.0, 1.0) - truth).abs().max()
    assert error <= 8 * torch.finfo(torch.float32).eps * truth.abs().max()  # of sums in a tree of 13 levels


@pytest.mark.parametrize(("loss_type", "options"), PAIR_LOSSES)
@pytest.mark.parametrize(("n", "spread"), PAIR_SIZES)
def test_dpo_row_is_the_function(emulated, loss_type, options, n, spread):
    check_pairs(loss_type, options, n, spread)
    assert emulated["dpo_row"] == 1


def test_dpo_row_of_no_pairs_and_of_nan(emulated):
    loss = bind("test", "sigmoid", None, 0.3, "reverse_kl", None, None, False, {})
    some, _ = pairs(0, 1.0)
    rows = _rows.pair_rows(loss, some)
    assert rows.losses.shape == (0,) and all(float(x) == 0 for x in rows.metrics.values())
    for loss_type, options in PAIR_LOSSES:
        loss = bind("test", loss_type, None, 0.3, "reverse_kl", None, None, False, options)
        some, _ = pairs(3, 1.0)
        with torch.no_grad():
            some.chosen_logps[1] = float("nan")
        losses = _rows.pair_rows(loss, some).losses
        assert losses.isnan().tolist() == [False, True, False], loss_type


UNCOVERED_PAIRS = {
    "another loss": ("apo_zero", {}, {}),
    "two losses": (["sigmoid", "sft"], {}, {}),
    "a divergence": ("sigmoid", {}, {"f_divergence_type": "js_divergence"}),
    "weighted": ("sigmoid", {}, {"use_weighting": True}),
    "discounted": ("sigmoid", {}, {"ld_alpha": 0.5}),
    "no reference": ("simpo", {}, {"reference": False}),
}


def preference(loss_type, options, changes, workspace, dtype=torch.float32):
    args = head(24, 13, 61, dtype, ignored=0)
    args["hidden"].requires_grad_(), args["weight"].requires_grad_()
    cu_seqlens = torch.tensor([0, 5, 12, 20, 24], dtype=torch.int32)
    ref = {"ref_token_logps": args["hidden"].detach().float().mean(1) - 3} if changes.pop("reference", True) else {}
    out = linear_preference_loss(
        **args, loss_type=loss_type, beta=0.3, cu_seqlens=cu_seqlens, workspace=workspace, **ref, **changes, **options
    )
    (out.loss * 1.7).backward()
    return [*out[:-1], args["hidden"].grad, args["weight"].grad, *out.metrics.values()], list(out.metrics)


@pytest.mark.parametrize("workspace", [None, 2**20])  # in one chunk, and where F is formed in forward
@pytest.mark.parametrize(("loss_type", "options"), PAIR_LOSSES)
def test_linear_preference_loss_by_the_kernel(emulated, monkeypatch, loss_type, options, workspace):
    got, names = preference(loss_type, options, {}, workspace)
    assert emulated["dpo_row"]
    monkeypatch.setattr(_rows, "_on_cuda", lambda x: False)
    want, same_names = preference(loss_type, options, {}, workspace)
    assert names == same_names
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("case", UNCOVERED_PAIRS)
def test_other_preference_losses_go_by_the_function(emulated, case):
    loss_type, options, changes = UNCOVERED_PAIRS[case]
    preference(loss_type, options, dict(changes), None)
    assert emulated["dpo_row"] == 0


def test_a_refused_option_is_refused_as_ever(emulated):
    with pytest.raises(ValueError, match=r"sigmoid: label_smoothing must be in \[0, 0.5\); got 0.7"):
        preference("sigmoid", {"label_smoothing": 0.7}, {}, None)
    with pytest.raises(ValueError, match=r"ppo: delta must be > 1, or None; got 0.5"):
        policy({"delta": 0.5}, 2**20)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", TOKEN_LOSSES)
def test_ppo_row_is_the_function(emulated, options, size):
    check_tokens(options, size)


@pytest.mark.parametrize("lengths", [[], [0, 0], [5]])
def test_ppo_row_of_nothing_live(emulated, lengths):
    b = batch(lengths)
    b["mask"][:] = False
    goal, *leaves = tokens(b, {"kl_coef": 0.1, "entropy_coef": 0.1}, torch.float32)
    rows = _rows.token_rows(goal, *leaves, b["cu_seqlens"].long())
    assert not rows.losses.any() and all(float(x) == 0 for x in rows.metrics.values())


def test_bounds_that_are_wrong_touch_nothing_else(emulated):
    """On a device nobody checks cu_seqlens; the address sanitizer would not see tensors' neighbours, a canary does."""
    b = batch([9])
    goal, *leaves = tokens(b, {}, torch.float32)
    rows = _rows.token_rows(goal, *leaves, torch.tensor([-5, 4, 1000]))
    assert torch.equal(rows.losses, _rows.token_rows(goal, *leaves).losses)


def policy(options, workspace, packed=True):
    args = head(24, 13, 61, torch.float32, ignored=4)
    args["hidden"].requires_grad_(), args["weight"].requires_grad_()
    b, options = batch([24]), dict(options)
    old = -4 + 0.3 * b["logps"].nan_to_num()
    if options.pop("token_weights", False):
        options["token_weights"] = b["token_weights"].nan_to_num()
    given = {"advantages": b["advantages"].nan_to_num(1.0), "old_logps": old, "ref_logps": old - 0.1}
    if packed:
        layout = {"cu_seqlens": torch.tensor([0, 5, 5, 17, 24], dtype=torch.int32)}
    else:
        layout = {}
        args = {k: x.unflatten(0, (2, 12)) if k != "weight" else x for k, x in args.items()}
        args["hidden"].retain_grad()
        given = {k: x.unflatten(0, (2, 12)) for k, x in given.items()}
        options = {k: x.unflatten(0, (2, 12)) if isinstance(x, torch.Tensor) else x for k, x in options.items()}
    out = linear_policy_loss(**args, **{**given, **options}, **layout, workspace=workspace)
    (out.loss * 1.7).backward()
    return [*out[:3], args["hidden"].grad, args["weight"].grad, *out.metrics.values()], list(out.metrics)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("workspace", [None, 2**20])
@pytest.mark.parametrize("options", TOKEN_LOSSES)
def test_linear_policy_loss_by_the_kernel(emulated, monkeypatch, options, workspace, packed):
    got, names = policy(TOKEN_LOSSES[options], workspace, packed)
    assert emulated["ppo_row"]
    monkeypatch.setattr(_rows, "_on_cuda", lambda x: False)
    want, same_names = policy(TOKEN_LOSSES[options], workspace, packed)
    assert names == same_names
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "gspo"},
        {"loss_type": ["ppo", "sapo"], "reduction": "mean"},
        {"importance_sampling_level": "sequence"},
        {"kl_coef": 0.1, "use_bias_correction_kl": True},
    ],
)
def test_other_policy_losses_go_by_the_function(emulated, options):
    policy(options, None)
    assert emulated["ppo_row"] == 0
