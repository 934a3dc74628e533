"""policy_loss against the papers' formulas in float64: values, gradients, reductions, extremes, masks, metrics."""

import math

import pytest
import torch

from fastpref import Rollout, couples, policy_loss
from fastpref.losses.surrogates import POLICY_LOSSES
from tests._policy import MAX_LENGTH, OPTIONS, arguments, packed, rollout, true_loss

EXTRA = {"ref_logps": True, "kl_coef": 0.3}


def ours(name, batch, *, by_sequence=True, grad=True, **options):
    """(output, d loss / d logps)."""
    loss_type, own, reduction = OPTIONS[name]
    if (options.get("reduction") or reduction) == "constant":
        options["max_length"] = MAX_LENGTH
    given = arguments(batch, by_sequence=by_sequence)
    given["logps"] = given["logps"].clone().requires_grad_(grad)
    out = policy_loss(**given, loss_type=loss_type, **{**own, **options})
    return out, torch.autograd.grad(out.loss, given["logps"])[0] if grad else None


def truth(name, batch, **options):
    logps = batch["logps"].double().requires_grad_()
    loss = true_loss(name, logps, batch, **options)
    return loss, torch.autograd.grad(loss, logps)[0]


def assert_same(got, expected, rtol=2e-6):
    loss, gradient = got[0].loss, got[1]
    torch.testing.assert_close(loss.double(), expected[0], rtol=rtol, atol=rtol)
    error = (gradient.double() - expected[1]).norm()
    assert error <= rtol * expected[1].norm() + 1e-9, f"gradient off by {error:.1e} of {expected[1].norm():.1e}"


@pytest.mark.parametrize("name", OPTIONS)
def test_formula(name):
    batch = rollout()
    assert_same(ours(name, batch), truth(name, batch))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_in_the_loss(name, estimator):
    batch = rollout()
    kl = {"kl_coef": 0.3, "kl_estimator": estimator}
    assert_same(ours(name, batch, ref_logps=batch["ref_logps"], **kl), truth(name, batch, **kl))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "sequence_mean", "sequence_sum", "constant"])
def test_every_reduction(name, reduction):
    batch = rollout()
    assert_same(ours(name, batch, reduction=reduction), truth(name, batch, reduction=reduction))


@pytest.mark.parametrize("name", OPTIONS)
def test_none_is_the_terms_of_the_sum(name):
    batch = rollout()
    each, summed = ours(name, batch, grad=False, reduction="none")[0], ours(name, batch, grad=False, reduction="sum")[0]
    assert each.loss.shape == batch["mask"].shape and bool((each.loss[~batch["mask"]] == 0).all())
    torch.testing.assert_close(each.loss.sum(), summed.loss)


@pytest.mark.parametrize("name", OPTIONS)
def test_packed(name):
    batch = rollout()
    flat, cu_seqlens = packed(batch)
    loss_type, own, reduction = OPTIONS[name]
    extra = {"max_length": MAX_LENGTH} if reduction == "constant" else {}
    flat["logps"].requires_grad_()
    given = arguments(batch)["advantages"], flat["mask"]
    out = policy_loss(
        flat["logps"], flat["old_logps"], *given, loss_type=loss_type, cu_seqlens=cu_seqlens, **own, **extra
    )
    gradient = torch.autograd.grad(out.loss, flat["logps"])[0].view(batch["mask"].shape)
    expected, expected_gradient = ours(name, batch)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-8)
    assert out.metrics.keys() == expected.metrics.keys()
    for key, value in out.metrics.items():
        torch.testing.assert_close(value, expected.metrics[key], msg=lambda text, key=key: f"{key}: {text}")


TOKEN_LOSSES = [name for name, (kind, *_) in OPTIONS.items() if kind not in ("gspo", "luspo", "rloo")]


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_advantages_and_weights_of_tokens(name):
    batch = rollout()
    generator = torch.Generator().manual_seed(4)
    batch["advantages"] = torch.randn(batch["mask"].shape, generator=generator)
    weights = torch.rand(batch["mask"].shape, generator=generator)
    weights[2] = 0.0
    kl = {"kl_coef": 0.3}
    got = ours(name, batch, by_sequence=False, token_weights=weights, ref_logps=batch["ref_logps"], **kl)
    assert_same(got, truth(name, batch, weights=weights, **kl))


@pytest.mark.parametrize("name", ["ppo", "cispo", "sapo"])
def test_a_weight_a_sequence_is_that_weight_at_its_tokens(name):
    batch = rollout()
    weights = torch.tensor([0.0, 1.0, 0.5, 2.0, 1.0])
    each = ours(name, batch, token_weights=weights)
    whole = ours(name, batch, token_weights=weights[:, None].expand(batch["mask"].shape))
    assert torch.equal(each[0].loss, whole[0].loss) and torch.equal(each[1], whole[1])
    assert bool((each[1][0] == 0).all())


def test_gspo_moves_each_token_by_its_own_advantage():
    """GSPO-token, eq. 13 and 14: the sequence's ratio, the token's gradient."""
    batch = rollout()
    batch["advantages"] = torch.randn(batch["mask"].shape, generator=torch.Generator().manual_seed(4))
    _, gradient = ours("gspo", batch, by_sequence=False)
    for i, live in enumerate(batch["mask"]):
        log_ratio = (batch["logps"] - batch["old_logps"])[i][live].double()
        if not len(log_ratio):
            continue
        s, advantage = log_ratio.mean().exp(), batch["advantages"][i][live].double()
        cut = ((s > 1.04) & (advantage > 0)) | ((s < 0.97) & (advantage < 0))
        expected = torch.where(cut, 0.0, -s * advantage / len(log_ratio) / 5)
        torch.testing.assert_close(gradient[i][live].double(), expected, rtol=1e-5, atol=1e-7)


def test_sequence_level_grpo_is_gspo():
    batch = rollout()
    epsilon = {"epsilon": 0.03, "epsilon_high": 0.04}
    level = ours("grpo", batch, importance_sampling_level="sequence", **epsilon)
    gspo = ours("gspo", batch)
    torch.testing.assert_close(level[0].loss, gspo[0].loss)
    torch.testing.assert_close(level[1], gspo[1], rtol=1e-5, atol=1e-8)
    assert level[0].metrics.keys() == gspo[0].metrics.keys()


@pytest.mark.parametrize("name", OPTIONS)
def test_on_policy(name):
    """old_logps None: ratios are 1, and for all the gradient is that of the plain policy gradient."""
    batch = rollout()
    batch["old_logps"] = batch["logps"].clone()
    given = ours(name, batch)
    batch["old_logps"] = None
    without = ours(name, batch)
    assert torch.equal(given[0].loss, without[0].loss) and torch.equal(given[1], without[1])
    assert without[0].metrics["policy/approxkl_avg"] == 0
    one_sum = ours(name, batch, reduction="sum")[1]
    if OPTIONS[name][0] != "rloo":  # whose terms each move a whole sequence
        expected = torch.where(batch["mask"], -batch["advantages"], 0.0)
        torch.testing.assert_close(one_sum, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("nats", [200.0, -200.0, 60.0, 25.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_extreme_ratios_stay_finite(name, nats, sign):
    batch = rollout()
    batch["old_logps"] = batch["logps"] - nats
    batch["advantages"] = batch["advantages"].abs() * sign
    got = ours(name, batch, ref_logps=batch["logps"] + nats, kl_coef=0.1)
    batch["ref_logps"] = batch["logps"] + nats
    assert bool(got[0].loss.isfinite()) and bool(got[1].isfinite().all())
    assert all(bool(x.isfinite()) for x in got[0].metrics.values())
    assert_same(got, truth(name, batch, kl_coef=0.1), rtol=1e-5)


CLIPPED = [name for name, (kind, *_) in OPTIONS.items() if kind not in ("cispo", "sapo", "vespo", "reinforce")]


@pytest.mark.parametrize("name", CLIPPED)
@pytest.mark.parametrize(("nats", "sign"), [(2.0, 1.0), (200.0, 1.0), (-2.0, -1.0), (-200.0, -1.0)])
def test_gradients_are_exactly_zero_where_clipped(name, nats, sign):
    batch = rollout()
    batch["old_logps"] = batch["logps"] - nats
    batch["advantages"] = batch["advantages"].abs() * sign
    out, gradient = ours(name, batch)
    assert bool((gradient == 0).all())
    side = "high" if nats > 0 else "low"
    # of the five sequences one is empty
    assert out.metrics[f"clip_ratio/{side}_mean"] in (1.0, pytest.approx(0.8))
    assert out.metrics["clip_ratio/region_mean"] == out.metrics[f"clip_ratio/{side}_mean"]


def test_dual_clip_stops_what_ppo_lets_grow():
    batch = rollout()
    batch["old_logps"], batch["advantages"] = batch["logps"] - 3.0, -batch["advantages"].abs()
    assert bool((ours("ppo", batch)[1][batch["mask"]] > 0).all())
    assert bool((ours("ppo, dual clip", batch)[1] == 0).all())


@pytest.mark.parametrize("name", OPTIONS)
def test_what_stands_at_masked_tokens_is_never_read(name):
    poisoned, clean = rollout(), rollout(poisoned=False)
    extra = {"kl_coef": 0.2, "token_weights": None}
    got = ours(name, poisoned, ref_logps=poisoned["ref_logps"], **extra)
    want = ours(name, clean, ref_logps=clean["ref_logps"], **extra)
    assert bool((got[1][~poisoned["mask"]] == 0).all())
    assert torch.equal(got[0].loss, want[0].loss) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (3, 4)])
def test_nothing_live_is_zero_not_nan(name, shape):
    batch = {key: torch.full(shape, math.nan) for key in ("logps", "old_logps", "advantages", "ref_logps")}
    batch["mask"] = torch.zeros(shape, dtype=torch.bool)
    out, gradient = ours(name, batch, by_sequence=False)
    assert out.loss == 0 and bool((gradient == 0).all())
    assert all(x == 0 for x in out.metrics.values())


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("reduction", [None, "mean", "sequence_mean", "sequence_sum", "constant"])
def test_num_items_makes_micro_batches_exact(name, reduction):
    batch = rollout()
    whole = ours(name, batch, reduction=reduction)
    by_token = (reduction or OPTIONS[name][2]) == "mean"
    items = int(batch["mask"].sum()) if by_token else len(batch["mask"])
    parts = [{key: x[rows] for key, x in batch.items()} for rows in (slice(0, 2), slice(2, 3), slice(3, 5))]
    for num_items in (items, torch.tensor(items)):
        got = [ours(name, part, reduction=reduction, num_items=num_items) for part in parts]
        torch.testing.assert_close(sum(out.loss for out, _ in got), whole[0].loss, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(torch.cat([g for _, g in got]), whole[1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(name):
    batch = {key: x.double() if x.is_floating_point() else x for key, x in rollout(3, 4, poisoned=False).items()}
    loss_type, own, reduction = OPTIONS[name]
    if loss_type in ("cispo", "vespo"):
        pytest.skip("its weight has a stopped gradient: the difference quotient sees through it")
    extra = {"max_length": 8} if reduction == "constant" else {}
    given = arguments(batch)

    def loss(logps, entropy):
        options = {**own, **extra, "ref_logps": batch["ref_logps"], "kl_coef": 0.2}
        arguments_ = {**given, "logps": logps}
        return policy_loss(**arguments_, loss_type=loss_type, entropy=entropy, entropy_coef=0.1, **options).loss

    leaves = [batch["logps"].clone().requires_grad_(), batch["logps"].abs().requires_grad_()]
    assert torch.autograd.gradcheck(loss, leaves, eps=1e-7, atol=1e-6)


def test_bias_corrected_kl():
    """DeepSeek-V3.2: the k3 term times the importance ratio, whose gradient counts."""
    batch = rollout()
    got = ours("ppo", batch, ref_logps=batch["ref_logps"], kl_coef=0.3, use_bias_correction_kl=True)
    logps = batch["logps"].double().requires_grad_()
    live = batch["mask"]
    d = (batch["ref_logps"].double() - logps)[live]
    kl = ((d.exp() - 1 - d) * (logps - batch["old_logps"].double())[live].exp()).mean()
    loss = true_loss("ppo", logps, batch) + 0.3 * kl
    assert_same(got, (loss, torch.autograd.grad(loss, logps)[0]))
    torch.testing.assert_close(got[0].metrics["kl"].double(), kl.detach(), rtol=1e-5, atol=1e-7)


def test_entropy_bonus_and_its_gradient():
    batch = rollout()
    entropy = torch.rand(batch["mask"].shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    given = {**arguments(batch), "entropy": entropy, "entropy_coef": 0.05}
    out = policy_loss(**given, loss_type="grpo")
    (gradient,) = torch.autograd.grad(out.loss, entropy)
    lengths = batch["mask"].sum(1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(gradient, torch.where(batch["mask"], -0.05 / lengths / 5, 0.0))
    torch.testing.assert_close(out.metrics["entropy"], entropy.detach()[batch["mask"]].mean())
    assert not out.metrics["entropy"].requires_grad


def test_metrics_are_detached_scalars_under_trl_names():
    batch = rollout()
    out, _ = ours("ppo", batch, ref_logps=batch["ref_logps"])
    sides = ["low_mean", "low_min", "high_mean", "high_max", "region_mean"]
    assert set(out.metrics) == {f"clip_ratio/{side}" for side in sides} | {"policy/approxkl_avg", "kl"}
    assert all(x.dim() == 0 and not x.requires_grad for x in out.metrics.values())
    assert set(ours("cispo", batch)[0].metrics) == {"cispo_clip_ratio", "policy/approxkl_avg"}


def test_a_function_of_ones_own():
    @couples("token")
    def mine(rollout: Rollout, *, power: float = 1.0):
        return -rollout.advantages * rollout.ratios**power

    batch = rollout()
    out = policy_loss(**arguments(batch), loss_type=mine, power=2.0)
    live = batch["mask"]
    ratio = (batch["logps"] - batch["old_logps"])[live].exp()
    torch.testing.assert_close(out.loss, -(batch["advantages"][live] * ratio**2).mean())
    both = policy_loss(**arguments(batch), loss_type=["ppo", mine], loss_weights=[0.5, 2.0], power=2.0)
    one = policy_loss(**arguments(batch), loss_type="ppo")
    torch.testing.assert_close(both.loss, 0.5 * one.loss + 2 * out.loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    given = {k: x.to(dtype) if x.is_floating_point() else x for k, x in arguments(rollout()).items()}
    wide = {k: x.double() if x.is_floating_point() else x for k, x in given.items()}
    out = policy_loss(**given, entropy=-given["logps"])
    assert {x.dtype for x in out[:3]} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert torch.equal(out.logps.nan_to_num(), given["logps"].to(out.logps.dtype).nan_to_num())
    torch.testing.assert_close(out.loss.double(), policy_loss(**wide).loss, rtol=1e-5, atol=1e-6)


ROW = torch.zeros(2, 3)
GIVEN = {"logps": ROW, "old_logps": ROW, "advantages": torch.zeros(2), "mask": ROW}
REFUSED = {
    "loss_type must be a function or one of ppo, grpo, .*; got 'dapoo' .did you mean 'dapo'": {"loss_type": "dapoo"},
    "'beta' is no option of ppo, whose options .* are: delta, epsilon, epsilon_high": {"beta": 0.1},
    "advantages must be .2,., one a sequence, or .2, 3., one a token; got .3,.": {"advantages": torch.zeros(3)},
    "old_logps must be .2, 3., one a token; got .2,.": {"old_logps": torch.zeros(2)},
    "mask must have the shape of logps, .2, 3.; got .3, 2.": {"mask": torch.ones(3, 2)},
    "kl_coef = 0.1 needs ref_logps, and got none": {"kl_coef": 0.1},
    "kl_coef must be >= 0 and finite; got -0.1": {"kl_coef": -0.1},
    "kl_estimator must be one of k1, k2, k3; got 'k4'": {"kl_estimator": "k4"},
    "kl_estimator must be one of k1, k2, k3; got .'k1'.": {"kl_estimator": ["k1"]},
    "use_bias_correction_kl must be True or False; got 'yes'": {"use_bias_correction_kl": "yes"},
    "loss_weights must be a number; got str": {"loss_weights": ["a"]},
    "loss_weights must be finite; got inf": {"loss_weights": [float("inf")]},
    "loss_type must be a function or one of .*; got .'ppo'.": {"loss_type": [["ppo"]]},
    "entropy_coef = 0.1 needs entropy, and got none": {"entropy_coef": 0.1},
    "reduction must be one of mean, sum, .*; got 'avg'": {"reduction": "avg"},
    "reduction='constant' needs max_length, and got none": {"loss_type": "dr_grpo"},
    "max_length is for reduction='constant'; got 8 and 'mean'": {"max_length": 8},
    "num_items and reduction='sum' were both given": {"num_items": 4, "reduction": "sum"},
    "num_items must be > 0 and finite; got 0": {"num_items": 0},
    "importance_sampling_level must be one of token, sequence; got 'word'": {"importance_sampling_level": "word"},
    "reduction must be given, as the losses differ in theirs: mean, sequence_mean": {"loss_type": ["ppo", "grpo"]},
    "cu_seqlens wants packed logps": {"cu_seqlens": torch.tensor([0, 3])},
    "logps must be one of .*; got int64": {"logps": ROW.long()},
    "kl_coef must be a number; got Tensor": {"kl_coef": torch.tensor(0.1)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses(message):
    with pytest.raises((TypeError, ValueError), match=f"^policy_loss: {message}"):
        policy_loss(**{**GIVEN, **REFUSED[message]})


OPTION_REFUSED = {
    "ppo: epsilon and epsilon_high must be >= 0; got -0.1 and -0.1": ("ppo", {"epsilon": -0.1}),
    "ppo: delta must be > 1, or None; got 0.9": ("ppo", {"delta": 0.9}),
    "sapo: temperatures must be > 0 and finite; got 0 and 1.05": ("sapo", {"sapo_temperature_pos": 0}),
    "sapo: temperatures must be > 0 and finite; got 1.0 and inf": ("sapo", {"sapo_temperature_neg": float("inf")}),
    "vespo: both k must be >= 0 and both lambda > 0, all finite; got .-1, 3.0": ("vespo", {"vespo_k_pos": -1}),
    "vespo: both k must be >= 0 .* got .2.0, 3.0, 3.0, 0": ("vespo", {"vespo_lambda_neg": 0}),
    "cispo: epsilon and epsilon_high must be >= 0; got nan": ("cispo", {"epsilon": float("nan")}),
    "cispo: epsilon and epsilon_high must be >= 0": ("cispo", {"epsilon_high": -1.0}),
    "gspo: epsilon must be a number; got str": ("gspo", {"epsilon": "0.2"}),
}


@pytest.mark.parametrize("message", OPTION_REFUSED)
def test_refuses_options(message):
    loss_type, options = OPTION_REFUSED[message]
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        policy_loss(**GIVEN, loss_type=loss_type, **options)


@pytest.mark.parametrize("bounds", [[0, 2], [1, 6], [0, 4, 2, 6]])
def test_refuses_bounds_that_do_not_fit(bounds):
    flat = {key: x.reshape(-1) for key, x in GIVEN.items() if key != "advantages"}
    with pytest.raises(ValueError, match=r"^policy_loss: cu_seqlens must rise from 0 to the number of logps, 6; got"):
        policy_loss(**flat, advantages=flat["logps"], cu_seqlens=torch.tensor(bounds))
    with pytest.raises(ValueError, match=r"^policy_loss: packed logps .N,. needs cu_seqlens"):
        policy_loss(**flat, advantages=flat["logps"])


def test_every_loss_of_the_table_has_a_row():
    assert {loss_type for loss_type, *_ in OPTIONS.values()} == set(POLICY_LOSSES)
