"""gae against an independent recursion, and the float64 reference within eager's own error."""

import pytest
import torch

import fastpref
from fastpref import gae, kernels
from fastpref.kernels.reference import gae as reference
from tests._gae import check, check_moments, inputs, run

SHAPES = [(1, 1), (3, 7), (2, 256), (3, 257), (5, 1025)]  # one, odd, a CUDA block's steps, one past it, one past four
BACKENDS = [name for name in ("torch", "cpu") if kernels.why_not(name) is None]
DISCOUNTS = {"gamma": 0.99, "lam": 0.95}


def oracle(args, gamma, lam):
    """The recursion on Python's floats, over what is left of each row when its masked steps are cut out."""
    results = torch.zeros(2, *args["rewards"].shape, dtype=torch.float64)
    for row, mask in enumerate(args["mask"].tolist()):
        next_value, next_advantage = float(args["bootstrap"][row]), 0.0
        for t in [t for t, live in enumerate(mask) if live][::-1]:
            going = 0.0 if args["dones"][row, t] else 1.0
            reward, value = float(args["rewards"][row, t]), float(args["values"][row, t])
            delta = reward + gamma * going * next_value - value
            next_advantage = delta + gamma * lam * going * next_advantage
            next_value = value
            results[:, row, t] = torch.tensor([next_advantage, next_advantage + value])
    return results


@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (1.0, 1.0), (0.0, 0.5), (0.9, 0.0)])
def test_reference_is_the_recursion_of_the_paper(gamma, lam):
    args = inputs((4, 23), torch.float64)
    torch.testing.assert_close(run(reference.gae, args, None, gamma, lam), oracle(args, gamma, lam))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_eager(shape, dtype, backend):
    check(kernels.choose("gae", "cpu", backend).gae, inputs(shape, dtype))


@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
@pytest.mark.parametrize("shape", SHAPES)
def test_moments(shape, backend):
    check_moments(kernels.choose("gae", "cpu", backend).gae, inputs(shape))
    args = {name: x.nan_to_num() for name, x in inputs(shape).items()}
    check_moments(kernels.choose("gae", "cpu", backend).gae, {**args, "mask": None})


LIKENESSES = {  # of a row's masked and terminal steps: each is another path of the C++ kernel
    "all live": {},
    "a prompt and padding": {"live": lambda t, n: (t > n // 5) & (t < n * 4 // 5)},
    "random masks": {"live": lambda t, n: torch.rand(3, n, generator=torch.Generator().manual_seed(1)) > 0.3},
    "terminal steps": {"done": lambda t, n: t % 37 == 5},
    "masked terminal steps": {"live": lambda t, n: t % 3 > 0, "done": lambda t, n: t % 3 == 0},
    "all masked": {"live": lambda t, n: t < 0},
}


@pytest.mark.skipif("cpu" not in BACKENDS, reason="built without a C++ compiler")
@pytest.mark.parametrize("isa", fastpref._cpu.isas() if "cpu" in BACKENDS else ["none"])
@pytest.mark.parametrize("likeness", LIKENESSES)
def test_every_path_of_every_instruction_set(likeness, isa, monkeypatch):
    monkeypatch.setenv("FASTPREF_CPU_ISA", isa)
    for n in (1, 3, 4, 15, 16, 17, 67, 256):  # below, at and past vectors of 4, 8 and 16 steps
        args, rows = inputs((3, n)), LIKENESSES[likeness]
        args["rewards"], args["values"] = args["rewards"].nan_to_num(0.5), args["values"].nan_to_num(0.7)
        t = torch.arange(n).expand(3, n)
        args["mask"] = rows.get("live", lambda t, n: t >= 0)(t, n)
        args["dones"] = rows.get("done", lambda t, n: t < 0)(t, n)
        args["rewards"][~args["mask"]] = float("nan")
        function = kernels.choose("gae", "cpu", "cpu").gae
        check(function, args)
        check_moments(function, args)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="built without a C++ compiler")
def test_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("FASTPREF_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match=r"gae: FASTPREF_CPU_ISA .* got mmx"):
        gae(torch.ones(2, 3), torch.ones(2, 3))


def test_error_does_not_grow_with_the_length():
    args = inputs((2, 60_000))
    args["mask"][:], args["dones"][:] = True, False
    args["rewards"], args["values"] = args["rewards"].nan_to_num(), args["values"].nan_to_num()
    ours = run(kernels.choose("gae", "cpu").gae, args, None, 1.0, 1.0)
    truth = run(reference.gae, args, torch.float64, 1.0, 1.0)
    if "cpu" in BACKENDS:  # a few roundings of a result, whatever its sum was made of
        assert (ours - truth).abs().max() <= 3 * torch.finfo(torch.float32).eps * truth.abs().max()


@pytest.mark.parametrize("absent", ["mask", "dones", "bootstrap"])
def test_an_argument_left_out_is_its_neutral_value(absent):
    neutral = {"mask": torch.ones(3, 50), "dones": torch.zeros(3, 50), "bootstrap": torch.zeros(3)}
    args = inputs((3, 50))
    args["rewards"], args["values"] = args["rewards"].nan_to_num(), args["values"].nan_to_num()
    with_it = gae(**{**args, absent: neutral[absent]}, **DISCOUNTS)
    without = gae(**{name: x for name, x in args.items() if name != absent}, **DISCOUNTS)
    torch.testing.assert_close(with_it, without, rtol=0, atol=0)
    left_out = {**args, absent: None}
    for backend in ("reference", *BACKENDS):
        torch.testing.assert_close(run(kernels.choose("gae", "cpu", backend).gae, left_out), torch.stack(without))


def test_strided_views_and_masks_of_any_dtype():
    args = inputs((6, 40))
    wanted = gae(**args, **DISCOUNTS)
    views = {name: torch.repeat_interleave(x, 3, dim=-1)[..., ::3] for name, x in args.items()}
    assert not views["rewards"].is_contiguous()
    views["mask"], views["dones"] = views["mask"].float() * 0.5, views["dones"].long() * 7
    torch.testing.assert_close(gae(**views, **DISCOUNTS), wanted, rtol=0, atol=0)
    transposed = {name: x.t().contiguous().t() if x.dim() == 2 else x for name, x in args.items()}
    torch.testing.assert_close(gae(**transposed, **DISCOUNTS), wanted, rtol=0, atol=0)


def test_one_row_without_a_batch():
    args = inputs((2, 9))
    advantages, returns = gae(**{name: x[1] for name, x in args.items()}, **DISCOUNTS)
    torch.testing.assert_close((advantages, returns), tuple(x[1] for x in gae(**args, **DISCOUNTS)), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (0,)])
@pytest.mark.parametrize("whiten", [False, True])
def test_empty(shape, whiten):
    args = inputs(shape)
    for result in gae(**args, whiten=whiten):
        assert result.shape == shape and result.dtype == torch.float32
    if len(shape) == 2:
        for backend in ("reference", *BACKENDS):
            assert run(kernels.choose("gae", "cpu", backend).gae, args).shape == (2, *shape)


def test_undiscounted_advantage_is_the_reward_to_go_less_the_value():
    args = inputs((4, 60))
    rewards, values = args["rewards"].nan_to_num(), args["values"].nan_to_num()
    advantages, returns = gae(rewards, values, gamma=1.0, lam=1.0)
    to_go = rewards.double().flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(advantages.double(), to_go - values, rtol=0, atol=1e-5)
    torch.testing.assert_close(returns.double(), to_go, rtol=0, atol=1e-5)


def test_masked_steps_are_passed_over():
    args = inputs((1, 64))
    live = args["mask"][0]
    short = {name: x[:, live] if x.dim() == 2 else x for name, x in args.items()}
    for whole, cut in zip(gae(**args, **DISCOUNTS), gae(**short, **DISCOUNTS), strict=True):
        # the same sums, in another order
        torch.testing.assert_close(whole[:, live], cut, rtol=1e-6, atol=1e-6)


def test_nothing_crosses_a_terminal_step():
    args = inputs((2, 300))
    args["mask"][:, :150], args["dones"][:, 149] = True, True
    args["rewards"][:, :150] = args["values"][:, :150] = 1.0
    wanted = gae(**args, **DISCOUNTS)
    args["rewards"][:, 150:], args["bootstrap"][:] = float("nan"), float("inf")
    args["mask"][:, 150:] = True
    for backend in ("reference", *BACKENDS):
        for got, expected in zip(run(kernels.choose("gae", "cpu", backend).gae, args), wanted, strict=True):
            torch.testing.assert_close(got[:, :150], expected[:, :150])
            assert got[:, 299].isnan().all()


def test_same_bits_whatever_the_other_rows_and_threads():
    args = inputs((9, 200))
    wanted = gae(**args, **DISCOUNTS)
    threads = torch.get_num_threads()
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            torch.testing.assert_close(gae(**args, **DISCOUNTS), wanted, rtol=0, atol=0)
    finally:
        torch.set_num_threads(threads)
    alone = gae(**{name: x[4:5] for name, x in args.items()}, **DISCOUNTS)
    torch.testing.assert_close(alone, tuple(x[4:5] for x in wanted), rtol=0, atol=0)


@pytest.mark.parametrize("masked", [True, False])
def test_whitened_advantages(masked):
    args = inputs((5, 40), seed=3)
    if not masked:
        args["rewards"], args["values"] = args["rewards"].nan_to_num(), args["values"].nan_to_num()
        args["mask"] = None
    plain, returns = gae(**args, **DISCOUNTS)
    whitened, same_returns = gae(**args, **DISCOUNTS, whiten=True)
    live = torch.ones_like(plain, dtype=torch.bool) if args["mask"] is None else args["mask"]
    truth = plain[live].double()
    truth = (truth - truth.mean()) / (truth.var(unbiased=True) + 1e-8).sqrt()
    torch.testing.assert_close(whitened[live].double(), truth, rtol=1e-5, atol=1e-5)
    assert (whitened[~live] == 0).all()
    assert torch.equal(returns, same_returns)


@pytest.mark.parametrize("n_live", [0, 1])
def test_whitening_too_few_live_steps_is_zero_not_nan(n_live):
    args = inputs((2, 6))
    args["mask"][:] = False
    args["mask"].view(-1)[:n_live] = True
    args["rewards"].view(-1)[:n_live] = args["values"].view(-1)[:n_live] = 2.0
    assert torch.equal(gae(**args, whiten=True)[0], torch.zeros(2, 6))


def test_results_are_not_differentiable():
    args = inputs((2, 6))
    args["rewards"], args["values"] = args["rewards"].requires_grad_(), args["values"].requires_grad_()
    for whiten in (False, True):
        assert [x.requires_grad for x in gae(**args, whiten=whiten)] == [False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_opcheck(dtype):
    args = {name: x.nan_to_num() for name, x in inputs((3, 8), dtype).items()}
    for absent in (None, "mask", "bootstrap"):
        torch.library.opcheck(
            torch.ops.fastpref.gae.default, [*{**args, **({absent: None} if absent else {})}.values(), 0.99, 0.95, True]
        )


def test_compiles_into_one_graph():
    args = inputs((3, 8))
    compiled = torch.compile(gae, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**args, whiten=True), gae(**args, whiten=True), rtol=0, atol=1e-6)


ROW = torch.zeros(4, 8)
REFUSED = {
    "rewards must be a tensor; got list": {"rewards": [0.0]},
    "rewards must be one of bfloat16, float16, float32; got int64": {"rewards": ROW.long()},
    "rewards must be one of bfloat16, float16, float32; got float64": {"rewards": ROW.double()},
    r"rewards must have 1 or 2 dimensions; got shape \(\)": {"rewards": ROW[0, 0]},
    r"values must have the shape of rewards, \(4, 8\); got \(4, 9\)": {"values": torch.zeros(4, 9)},
    r"mask must have the shape of rewards, \(4, 8\); got \(8, 4\)": {"mask": torch.ones(8, 4)},
    r"dones must have the shape of rewards, \(4, 8\); got \(4,\)": {"dones": torch.ones(4)},
    "values must have the dtype of rewards, float32; got bfloat16": {"values": ROW.bfloat16()},
    "bootstrap must have the dtype of rewards, float32; got int64": {"bootstrap": torch.zeros(4).long()},
    r"bootstrap must have the shape of rewards less the last dimension, \(4,\); got \(4, 1\)": {
        "bootstrap": ROW[:, :1]
    },
    "values must be on the device of rewards, cpu; got meta": {"values": ROW.to("meta")},
    r"gamma must be in \[0, 1\]; got 1.5": {"gamma": 1.5},
    r"gamma must be in \[0, 1\]; got nan": {"gamma": float("nan")},
    "gamma must be a number; got str": {"gamma": "a"},
    r"lam must be in \[0, 1\]; got -0.1": {"lam": -0.1},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses(message):
    with pytest.raises((TypeError, ValueError), match=f"^gae: {message}$"):
        gae(**{"rewards": ROW, "values": ROW, **REFUSED[message]})
