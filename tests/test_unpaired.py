"""kto_loss, linear_unpaired_loss and kto_kl: formulas in float64, paths through the head, normalisers, refusals."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

from fastpref import couples, kto_kl, kto_loss, linear_unpaired_loss
from fastpref.losses.unpaired import UNPAIRED_LOSSES
from tests._losses import sigma
from tests._oracle import IGNORE, as_dict, assert_gradient, assert_same_bits, pairs, run, truth, upstream

MIB = 1 << 20
WEIGHTS = {"desirable_weight": 1.3, "undesirable_weight": 0.6}
BETA, KL = 0.3, 0.7


def kto(r, desirable, good=1.0, bad=1.0, kl=KL):
    return torch.where(desirable, good * (1 - sigma(BETA * (r - kl))), bad * (1 - sigma(BETA * (kl - r))))


# name: (loss_type, its options, and the loss of log-ratios and labels)
ROWS = {
    "kto": ("kto", {}, kto),
    "kto weighted": ("kto", WEIGHTS, functools.partial(kto, good=1.3, bad=0.6)),
    "apo_zero_unpaired": ("apo_zero_unpaired", {}, functools.partial(kto, kl=0.0)),
    "apo_zero_unpaired weighted": (
        "apo_zero_unpaired",
        WEIGHTS,
        lambda r, d: torch.where(d, 1.3 * (1 - sigma(BETA * r)), 0.6 * sigma(BETA * r)),
    ),
    "sum": (
        ["kto", "apo_zero_unpaired"],
        {"loss_weights": [0.5, 2.0]},
        lambda r, d: 0.5 * kto(r, d) + 2 * kto(r, d, kl=0),
    ),
}
# log-ratios, nats
EXTREME = torch.tensor([200.0, -200.0, 190.0, -190.0, 0.0, 0.7, 1e4, -1e4])
LABELS = torch.tensor([True, True, False, False, True, False, True, False])


def test_every_loss_has_a_row():
    assert {row[0] for row in ROWS.values() if isinstance(row[0], str)} == set(UNPAIRED_LOSSES)


@pytest.mark.parametrize("margins", ["ordinary", "extreme"])
@pytest.mark.parametrize("name", ROWS)
def test_on_log_probs(name, margins):
    loss_type, options, formula = ROWS[name]
    ratios = (3 * upstream(8) if margins == "ordinary" else EXTREME).double()
    ref = -30 * upstream(8, seed=2).double().abs()
    logps = (ref + ratios).requires_grad_()
    losses, rewards = kto_loss(logps, ref, LABELS, loss_type=loss_type, beta=BETA, kl=KL, **options)
    want = formula(logps - ref, LABELS)
    torch.testing.assert_close(losses, want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(rewards, BETA * ratios)
    assert not rewards.requires_grad
    g = upstream(8, seed=3).double()
    for x, y in zip(torch.autograd.grad(losses, logps, g), torch.autograd.grad(want, logps, g), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ROWS)
def test_gradcheck(name):
    loss_type, options, _ = ROWS[name]
    logps, ref = upstream(8).double().requires_grad_(), torch.zeros(8, dtype=torch.float64)

    def losses(x):
        return kto_loss(x, ref, LABELS, loss_type=loss_type, beta=BETA, kl=KL, **options)[0]

    assert torch.autograd.gradcheck(losses, [logps])


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_everywhere_and_steep_where_saturated(name, dtype):
    loss_type, options, _ = ROWS[name]
    logps = EXTREME.clone().to(dtype).requires_grad_()
    losses, _ = kto_loss(logps, torch.zeros(8, dtype=dtype), LABELS, loss_type=loss_type, kl=KL, **options)
    assert losses.dtype == torch.float32 and bool(torch.isfinite(losses).all())
    losses.sum().backward()
    assert bool(torch.isfinite(logps.grad).all())
    if dtype == torch.float32:  # sigmoid(20) is 1 in fp32, and its slope by s (1 - s) would be 0 on one side alone
        assert bool((logps.grad[:4] != 0).all())


@pytest.mark.parametrize("name", ROWS)
def test_couples_sequences_alone(name):
    loss_type, options, _ = ROWS[name]
    ref, logps = torch.zeros(8), upstream(8)
    call = {"loss_type": loss_type, "beta": BETA, "kl": KL, **options}
    losses = kto_loss(logps, ref, LABELS, **call)[0]
    for i in range(8):
        moved = kto_loss(logps.index_add(0, torch.tensor([i]), torch.tensor([-2.0])), ref, LABELS, **call)[0]
        assert (moved != losses).nonzero()[:, 0].tolist() == [i]
    assert all(loss.couples == "sequence" for loss in UNPAIRED_LOSSES.values())


SEVERAL = ({"b": 3, "t": 30, "h": 8, "v": 4099}, MIB)  # four chunks, one of them of two sequences
PATHS = {
    "frozen": (("hidden",), {}, None),
    "trained": (("hidden", "weight"), {}, None),
    "several chunks": (("hidden", "weight"), *SEVERAL),
    "packed": (("hidden", "weight"), *SEVERAL),
}


def batch(path, margins="ordinary", sequences=5):
    """(arguments, reference sums (5,), what is trained, workspace), an odd number of sequences."""
    trained, shape, workspace = PATHS[path]
    args = pairs(**shape)
    args = {**args, "hidden": args["hidden"][:sequences], "targets": args["targets"][:sequences]}
    args["desirable"] = LABELS[[1, 2, 0, 3, 4]][:sequences]
    clean = {k: x.double() for k, x in args.items() if k in ("hidden", "weight")}
    sums = truth(**clean, targets=args["targets"])["logps"].sum(1)
    return (
        args,
        (sums - (EXTREME[:5] if margins == "extreme" else 3 * upstream(5))[:sequences]).float(),
        trained,
        workspace,
    )


def exact(args, ref, formula, **options):
    """(values, gradients) in float64 of the mean over sequences."""

    def whole(hidden, weight, targets, desirable):
        logps = truth(hidden, weight, targets)["logps"].sum(1)
        losses = formula(logps - ref.double(), desirable)
        return {"loss": losses.mean(), "losses": losses, "logps": logps}

    return run(whole, args, dtype=torch.float64, **options)


def assert_close(got, d_got, want, d_want, slack=1.0):
    torch.testing.assert_close(got["loss"].double(), want["loss"], rtol=3e-6 * slack, atol=1e-6 * slack)
    for key in d_want:
        # of saturated losses no digit matters
        assert_gradient(d_got[key], d_want[key], scale=slack * d_want[key].norm().clamp(min=1e-3))


@pytest.mark.parametrize("margins", ["ordinary", "extreme"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ROWS)
def test_on_the_head(name, path, margins):
    loss_type, options, formula = ROWS[name]
    args, ref, trained, workspace = batch(path, margins)
    grads = {"loss": torch.tensor(1.7)}
    want, d_want = exact(args, ref, formula, grads=grads, trained=trained)
    live = args["targets"] != IGNORE
    if path == "packed":
        bounds = F.pad(live.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        args = {**args, "hidden": args["hidden"][live], "targets": args["targets"][live], "cu_seqlens": bounds}
        d_want["hidden"] = d_want["hidden"][live]
    call = {"loss_type": loss_type, "beta": BETA, "kl": torch.tensor(KL), "workspace": workspace, **options}
    got, d_got = run(linear_unpaired_loss, args, grads=grads, trained=trained, ref_logps=ref, **call)
    assert_close(got, d_got, want, d_want, slack=1.0 if margins == "ordinary" else 5.0)
    torch.testing.assert_close(got["logps"].double(), want["logps"], rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("path", ["frozen", "trained", "several chunks"])
def test_gradients_through_logps_and_each_loss(path):
    args, ref, trained, workspace = batch(path)
    grads = {"loss": torch.tensor(0.7), "logps": upstream(5)}
    want, d_want = exact(args, ref, kto, grads=grads, trained=trained)
    call = {"beta": BETA, "kl": KL, "ref_logps": ref, "workspace": workspace, "trained": trained}
    got, d_got = run(linear_unpaired_loss, args, grads=grads, **call)
    assert_close(got, d_got, want, d_want)
    each = {"loss": upstream(5, seed=4)}
    _, d_each = run(linear_unpaired_loss, args, grads=each, reduction="none", **call)
    for key, d_want_of in exact(args, ref, kto, grads={"losses": each["loss"]}, trained=trained)[1].items():
        assert_gradient(d_each[key], d_want_of)


@pytest.mark.parametrize("path", ["trained", "several chunks"])
@pytest.mark.parametrize("form", ["tokens", "hidden"])
def test_references_agree(form, path):
    args, _, trained, workspace = batch(path)
    other = {**args, "hidden": args["hidden"] * 0.9}
    tokens = truth(**{k: x for k, x in other.items() if k != "desirable"})["logps"]
    call = {"beta": BETA, "kl": KL, "workspace": workspace, "trained": trained, "grads": {"loss": torch.tensor(1.0)}}
    by_sum, d_by_sum = run(linear_unpaired_loss, args, ref_logps=tokens.sum(1), **call)
    hostile = tokens.masked_fill(args["targets"] == IGNORE, math.nan)
    given = {"ref_token_logps": hostile}
    if form == "hidden":
        given = {"ref_hidden": other["hidden"], "ref_weight": args["weight"]}
    got, d_got = run(linear_unpaired_loss, args, **given, **call)
    torch.testing.assert_close(got["rewards"], by_sum["rewards"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d_got["weight"], d_by_sum["weight"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("path", ["trained", "several chunks"])
def test_micro_batches_of_any_size_add_up_to_the_whole(path):
    """A loss divided by what a chunk or a micro-batch holds would be B times too large, as one of Liger's modes is."""
    args, ref, _, workspace = batch(path)
    call = {"beta": BETA, "kl": torch.tensor(KL), "workspace": workspace, "grads": {"loss": torch.tensor(1.0)}}
    whole, d_whole = run(linear_unpaired_loss, args, ref_logps=ref, **call)
    want, _ = exact(args, ref, kto)
    torch.testing.assert_close(whole["loss"].double(), want["loss"], rtol=3e-6, atol=1e-6)
    for parts in ([1, 1, 1, 1, 1], [4, 1], [2, 0, 3]):
        total, d_weight, first = 0.0, 0.0, 0
        for size in parts:
            some = slice(first, first + size)
            part = {k: x if k == "weight" else x[some] for k, x in args.items()}
            got, d_got = run(linear_unpaired_loss, part, ref_logps=ref[some], num_items=torch.tensor(5), **call)
            total, d_weight, first = total + got["loss"], d_weight + d_got["weight"], first + size
        torch.testing.assert_close(total, whole["loss"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(d_weight, d_whole["weight"], rtol=1e-4, atol=1e-6)
    summed = run(linear_unpaired_loss, args, ref_logps=ref, **{**call, "reduction": "sum"})[0]["loss"]
    torch.testing.assert_close(summed, 5 * whole["loss"])


def test_a_function_of_your_own():
    @couples("sequence")
    def mean_ratio(unpaired, *, beta, shift=0.0):
        sign = torch.where(unpaired.desirable, -1.0, 1.0)
        return beta * sign * (unpaired.logratios / unpaired.lengths + unpaired.need("kl")) + shift

    args, ref, trained, workspace = batch("several chunks")
    lengths = (args["targets"] != IGNORE).sum(1)
    grads = {"loss": torch.tensor(1.3)}

    def formula(r, desirable):
        return BETA * torch.where(desirable, -1.0, 1.0) * (r / lengths + KL) + 0.25

    want, d_want = exact(args, ref, formula, grads=grads, trained=trained)
    call = {"loss_type": mean_ratio, "shift": 0.25, "beta": BETA, "kl": KL, "workspace": workspace}
    got, d_got = run(linear_unpaired_loss, args, grads=grads, trained=trained, ref_logps=ref, **call)
    assert_close(got, d_got, want, d_want)


@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")])
def test_empty_input(trained):
    nothing = {"hidden": torch.zeros(0, 3, 5), "weight": torch.ones(7, 5), "targets": torch.zeros(0, 3).long()}
    nothing["desirable"] = torch.zeros(0, dtype=torch.bool)
    grads = {"loss": torch.tensor(1.0)}
    call = {"ref_logps": torch.zeros(0), "kl": 0.0, "grads": grads, "trained": trained}
    values, gradients = run(linear_unpaired_loss, nothing, **call)
    assert values["loss"] == 0 and all(bool((x == 0).all()) for x in gradients.values())
    assert all(bool(x == 0) for x in values["metrics"].values())
    args, _, _, _ = batch("trained")
    args["targets"] = torch.full_like(args["targets"], IGNORE)
    values, gradients = run(linear_unpaired_loss, args, **{**call, "ref_logps": torch.zeros(5)})
    assert values["loss"].item() == 0.5 and all(bool((x == 0).all()) for x in gradients.values())


def test_metrics_of_one_kind_alone():
    args, ref, _, _ = batch("trained")
    args["desirable"] = torch.ones(5, dtype=torch.bool)
    metrics = as_dict(linear_unpaired_loss(**args, ref_logps=ref, kl=KL))["metrics"]
    assert metrics["count/chosen"] == 5 and metrics["count/rejected"] == 0
    for name in ("rewards/rejected", "rewards/margins", "logps/rejected", "logits/rejected"):
        assert metrics[name] == 0
    assert metrics["kl"].item() == pytest.approx(KL)


def test_reference_free_is_a_uniform_reference():
    args, _, _, _ = batch("trained")
    call = {"kl": 0.0, "grads": {"loss": torch.tensor(1.0)}}
    free, d_free = run(linear_unpaired_loss, args, reference_free=True, **call)
    zero, d_zero = run(linear_unpaired_loss, args, ref_logps=torch.zeros(5), **call)
    assert_same_bits(free["loss"], zero["loss"])
    assert_same_bits(d_free["weight"], d_zero["weight"])


def test_kto_kl():
    policy, reference = upstream(6).requires_grad_(), upstream(6, seed=2)
    kl = kto_kl(policy, reference)
    assert kl.shape == () and not kl.requires_grad and kl.dtype == torch.float32
    assert kl.item() == pytest.approx(max(0.0, (policy - reference).mean().item()), rel=1e-6)
    above, below = kto_kl(reference + 0.5, reference), kto_kl(reference - 0.5, reference)
    assert above.item() == pytest.approx(0.5, rel=1e-6) and below == 0
    assert kto_kl(torch.zeros(0), torch.zeros(0)) == 0
    with pytest.raises(ValueError, match=r"^kto_kl: ref_kl_logps must have the shape of policy_kl_logps, \(6,\); got"):
        kto_kl(policy, reference[:5])
    with pytest.raises(ValueError, match=r"^kto_kl: policy_kl_logps must have 1 dimensions; got shape \(1, 6\)"):
        kto_kl(policy[None], reference[None])
