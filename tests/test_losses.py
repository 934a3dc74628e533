"""Every loss of pairs against its formula: on log-probs and on the head, at ordinary and extreme margins; what each
couples."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

from fastpref import dpo_loss, linear_preference_loss
from fastpref.losses.preference import PREFERENCE_LOSSES
from tests._losses import EXTREME, ROWS, Case, case, tokens_of, value_and_slope
from tests._oracle import IGNORE, assert_gradient, pairs, run, truth, upstream

MIB = 1 << 20
MARGINS = ["ordinary", "extreme"]


def test_every_loss_has_a_row():
    named = {name for row in ROWS.values() for name in ([row.loss_type] if isinstance(row.loss_type, str) else [])}
    assert named == set(PREFERENCE_LOSSES)


def sums_and_tokens(row, c, logps):
    """(arguments, keywords) of dpo_loss for a Case, what the row has no need of left out."""
    chosen, rejected = logps.sum(1).chunk(2)
    reference = c.ref.to(logps.dtype).sum(1).chunk(2) if "reference" in row.needs else ()
    given = {}
    if "tokens" in row.needs:
        square = {"log_sum_sq_probs": c.log_sum_sq.to(logps.dtype).reshape(-1)}
        given["tokens"] = tokens_of(c, square, logps=logps, ref_logps=c.ref.to(logps.dtype))
    elif "lengths" in row.needs:
        given = dict(zip(("chosen_lengths", "rejected_lengths"), c.n, strict=True))
    return (chosen, rejected, *reference), given


def losses_of(row, c, logps):
    args, given = sums_and_tokens(row, c, logps)
    return dpo_loss(*args, loss_type=row.loss_type, beta=c.beta, **given, **row.options)[0]


@pytest.mark.parametrize("margins", MARGINS)
@pytest.mark.parametrize("name", ROWS)
def test_on_log_probs(name, margins):
    row, c = ROWS[name], case(margins)
    logps = c.logps.clone().requires_grad_()
    losses = losses_of(row, c, logps)
    g = upstream(4).double()
    want, d_want = value_and_slope(row.formula, c, g)
    torch.testing.assert_close(losses, want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(losses, logps, g)[0] * c.mask, d_want * c.mask, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ROWS)
def test_gradcheck(name):
    row, c = ROWS[name], case(b=2, t=3)
    live = c.mask.nonzero(as_tuple=True)
    if row.options.get("use_weighting"):
        # a detached factor is no function of the log-probs, so it is taken out
        weight = c.wpo()
        free = {**row.options, "use_weighting": False}
        row = type(row)(row.formula, row.loss_type, free, row.couples, row.needs)
    else:
        weight = 1.0

    def losses(tokens):
        return weight * losses_of(row, c, torch.zeros_like(c.logps).index_put(live, tokens))

    assert torch.autograd.gradcheck(losses, [c.logps[live].clone().requires_grad_()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ROWS)
def test_finite_everywhere(name, dtype):
    """Certain and hopeless tokens, log-ratios of +-200 and +-1e4, an empty completion: finite values and gradients."""
    extremes = [0.0, -1e-30, -1e-9, -200.0, -1e4]
    values = torch.cartesian_prod(*[torch.tensor(extremes)] * 4).to(dtype)  # chosen, rejected, and their references
    b = len(values)
    row = ROWS[name]
    for length in (1, 0):
        mask = torch.full((2 * b, 1), bool(length))
        logps = torch.cat([values[:, 0], values[:, 1]])[:, None].clone().requires_grad_()
        c = Case(logps, torch.cat([values[:, 2], values[:, 3]])[:, None], mask, torch.zeros_like(logps), 0.1)
        losses = losses_of(row, c, logps)
        assert losses.dtype == torch.float32 and bool(torch.isfinite(losses).all())
        (slope,) = torch.autograd.grad(losses, logps, torch.ones(b), allow_unused=True)
        # ORPO's and unlikelihood's true slope at a certain token is infinite, and fp16 ends at 65504
        assert dtype == torch.float16 or bool(torch.isfinite(slope).all())


def test_certain_completions_keep_their_precision():
    """-1e-9 nats, where 1 - exp rounded to fp32 is 0."""
    one, tiny = torch.tensor([-1.0]), torch.tensor([-1e-9], requires_grad=True)
    lengths = {"chosen_lengths": torch.ones(1), "rejected_lengths": torch.ones(1)}
    loss = dpo_loss(one, tiny, loss_type="orpo", beta=1.0, **lengths)[0]
    true = 1 + math.log1p(math.exp(-1e-9 - math.log(-math.expm1(-1e-9)) + 1 + math.log(-math.expm1(-1))))
    assert loss.item() == pytest.approx(true, rel=1e-6)
    loss.backward()
    assert tiny.grad.item() == pytest.approx(1e9, rel=1e-4)


@pytest.mark.parametrize("name", ROWS)
def test_couples_what_it_declares(name):
    """Other log-probs in one pair change that pair's loss and no other's, or are declared to."""
    row, c = ROWS[name], case(b=5)
    losses = losses_of(row, c, c.logps)
    spread = False
    for i in range(5):
        moved = c.logps.clone()
        moved[[i, i + 5]] += torch.where(c.mask[[i, i + 5]], torch.tensor([[-4.3], [-1.0]]).double(), 0.0)
        changed = losses_of(row, c, moved) != losses
        assert changed[i] or row.couples == "batch"
        spread |= bool(changed[torch.arange(5) != i].any())
    assert spread == (row.couples == "batch")
    losses = [
        PREFERENCE_LOSSES[loss] for loss in ([row.loss_type] if isinstance(row.loss_type, str) else row.loss_type)
    ]
    assert ("batch" in {loss.couples for loss in losses}) == spread and {loss.couples for loss in losses} <= {
        "pair",
        "batch",
    }


# the paths through the head: what is trained, and the shape and workspace that make one chunk or several
SEVERAL = ({"b": 5, "t": 18, "h": 8, "v": 4099}, MIB)  # four chunks, one of them of two pairs
PATHS = {
    "frozen": (("hidden",), {}, None),
    "trained": (("hidden", "weight"), {}, None),
    "several chunks": (("hidden", "weight"), *SEVERAL),
    "packed": (("hidden", "weight"), *SEVERAL),
}


@functools.cache
def batch(path, margins):
    """(arguments, reference, live, leaves in float64, truth on them): the head's part, the same for every loss."""
    trained, shape, _ = PATHS[path]
    args = pairs(**shape)
    live = args["targets"] != IGNORE
    wide = {k: x.double() if x.is_floating_point() else x for k, x in args.items()}
    leaves = {k: wide[k].requires_grad_() for k in trained}
    found = truth(**wide)
    tokens, b = found["logps"].detach(), len(live) // 2
    if margins == "extreme":
        apart = EXTREME[:, torch.arange(b) + 1].reshape(-1, 1) / live.sum(1, keepdim=True)
    else:
        apart = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(3)) - 0.5
    return args, ((tokens - apart) * live).float(), live, leaves, found


def packed(args, ref, live):
    bounds = F.pad(live.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    flat = {**args, "hidden": args["hidden"][live], "targets": args["targets"][live], "cu_seqlens": bounds}
    return flat, ref[live]


@pytest.mark.parametrize("margins", MARGINS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ROWS)
def test_on_the_head(name, path, margins):
    row, (trained, _, workspace) = ROWS[name], PATHS[path]
    args, ref, live, leaves, found = batch(path, margins)
    want = row.formula(Case(found["logps"], ref.double(), live, found["log_sum_sq_probs"], 0.3)).mean()
    factor = upstream(1, seed=len(name))[0] + 2
    gradients = torch.autograd.grad(want, list(leaves.values()), factor.double(), retain_graph=True)
    d_want = dict(zip(leaves, gradients, strict=True))
    if path == "packed":
        args, ref = packed(args, ref, live)
        d_want["hidden"] = d_want["hidden"][live]
    reference = {"ref_token_logps": ref} if "reference" in row.needs else {}
    got, d_got = run(
        linear_preference_loss,
        args,
        grads={"loss": factor},
        trained=trained,
        loss_type=row.loss_type,
        beta=0.3,
        workspace=workspace,
        **reference,
        **row.options,
    )
    # sums of 100 nats and log-ratios of 200 are rounded to 4e-6 and 1.5e-5 nats in fp32, and exp(beta r) with them
    slack = row.slack * (1.0 if margins == "ordinary" else 5.0)
    torch.testing.assert_close(got["loss"].double(), want.detach(), rtol=3e-6 * slack, atol=1e-5 * slack)
    for key in d_want:
        # of saturated losses (1e-25) no digit matters
        assert_gradient(d_got[key], d_want[key], scale=slack * d_want[key].norm().clamp(min=1e-3))


def test_reward_is_of_the_loss():
    """beta times the log-ratio; SimPO's and ORPO's beta times the mean log-prob of a token, reference or none."""
    c = case()
    lengths = dict(zip(("chosen_lengths", "rejected_lengths"), c.n, strict=True))
    ref = c.ref.sum(1).chunk(2)
    expected = {
        "sigmoid": (c.rw, c.rl),
        "ipo": (c.rw, c.rl),
        "sft": (c.rw, c.rl),
        "simpo": (c.mean_w, c.mean_l),
        "orpo": (c.mean_w, c.mean_l),
    }
    for name, rewards in expected.items():
        got = dpo_loss(c.lw, c.ll, *ref, loss_type=name, beta=0.3, **lengths)[1:]
        for x, y in zip(got, rewards, strict=True):
            torch.testing.assert_close(x, 0.3 * y)
    for name in ("cpo", "sft"):
        torch.testing.assert_close(dpo_loss(c.lw, c.ll, loss_type=name, beta=0.3, **lengths)[1], 0.3 * c.lw)


def test_ld_dpo_rewards_are_discounted_and_log_probs_are_not():
    args, ref, live, _, found = batch("trained", "ordinary")
    tokens = Case(found["logps"].detach(), ref.double(), live, found["log_sum_sq_probs"], 0.1)
    out = linear_preference_loss(**args, ref_token_logps=ref, ld_alpha=0.3)
    torch.testing.assert_close(out.chosen_rewards.double(), 0.1 * tokens.shortened(0.3).rw, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.chosen_logps.double(), tokens.lw, rtol=1e-5, atol=1e-5)
    whole, one = (linear_preference_loss(**args, ref_token_logps=ref, ld_alpha=alpha) for alpha in (None, 1.0))
    torch.testing.assert_close(whole.loss, one.loss)


def test_ld_dpo_without_a_reference_counts_it_as_uniform():
    c = case()
    free = Case(c.logps, torch.zeros_like(c.ref), c.mask, c.log_sum_sq, 0.1)
    chosen, rejected = c.logps.sum(1).chunk(2)
    got = dpo_loss(chosen, rejected, reference_free=True, tokens=tokens_of(c, ref_logps=None), ld_alpha=0.5)
    torch.testing.assert_close(got[0], ROWS["sigmoid"].formula(free.shortened(0.5)))
