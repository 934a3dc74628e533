"""Value loss, shaped rewards, whitening, running moments and the KL weight; and the PPO of textbooks out of them."""

import math

import pytest
import torch

from fastpref import (
    AdaptiveKL,
    RunningMoments,
    gae,
    masked_whiten,
    normalize_rewards,
    policy_loss,
    shape_rewards,
    update_kl_coef,
    update_moments,
    value_loss,
)
from tests._oracle import upstream


def masked(b=4, t=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(b, t, generator=generator) > 0.3
    mask[-1] = False
    return mask


def poisoned(x, mask):
    return torch.where(mask, x, math.nan)


def test_value_loss():
    mask = masked()
    values, old, returns = (poisoned(upstream(*mask.shape, seed=i), mask) for i in range(3))
    values.requires_grad_()
    loss, fraction = value_loss(values, old, returns, mask, epsilon=0.3)
    (gradient,) = torch.autograd.grad(1.7 * loss, values)
    terms, slopes, clipped = [], torch.zeros(mask.shape, dtype=torch.float64), 0
    for i, j in mask.nonzero().tolist():
        v, o, r = (float(x.detach()[i, j]) for x in (values, old, returns))
        c = min(max(v, o - 0.3), o + 0.3)
        terms.append(0.5 * max((v - r) ** 2, (c - r) ** 2))
        cut = (c - r) ** 2 > (v - r) ** 2
        clipped += cut
        slopes[i, j] = 0.0 if cut else v - r
    torch.testing.assert_close(loss.item(), sum(terms) / len(terms), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), 1.7 * slopes / len(terms), rtol=1e-5, atol=1e-7)
    assert 0 < clipped < len(terms) and fraction.item() == pytest.approx(clipped / len(terms))
    assert not fraction.requires_grad


def test_value_loss_of_no_clipping_is_half_the_mean_squared_error():
    values, old, returns = (upstream(3, 5, seed=i) for i in range(3))
    mask = torch.ones(3, 5)
    loss, fraction = value_loss(values, old, returns, mask, epsilon=math.inf)
    torch.testing.assert_close(loss, 0.5 * (values - returns).square().mean())
    assert fraction == 0
    torch.testing.assert_close(value_loss(values, values, returns, mask)[0], loss)  # inside the range everywhere


def test_value_loss_over_micro_batches():
    mask = masked()
    values, old, returns = (poisoned(upstream(*mask.shape, seed=i), mask) for i in range(3))
    whole, items = value_loss(values, old, returns, mask)[0], int(mask.sum())
    parts = [value_loss(*(x[i : i + 1] for x in (values, old, returns, mask)), num_items=items)[0] for i in range(4)]
    torch.testing.assert_close(sum(parts), whole)


def test_value_loss_of_nothing_is_zero():
    values = torch.full((2, 3), math.nan).requires_grad_()
    loss, fraction = value_loss(values, values, values, torch.zeros(2, 3))
    loss.backward()
    assert loss == 0 and fraction == 0 and bool((values.grad == 0).all())


def test_value_loss_gradcheck():
    old, returns = (upstream(2, 4, seed=i).double() for i in (1, 2))
    values = upstream(2, 4, seed=3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: value_loss(v, old, returns, torch.ones(2, 4))[0], values)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_shape_rewards(estimator):
    mask = masked()
    logps, ref = (poisoned(-upstream(*mask.shape, seed=i).abs(), mask) for i in (1, 2))
    scores = upstream(4, seed=5)
    rewards = shape_rewards(scores, logps.requires_grad_(), ref, mask, kl_coef=0.2, kl_estimator=estimator)
    assert not rewards.requires_grad and bool((rewards[~mask] == 0).all())
    for i, row in enumerate(mask):
        live = row.nonzero()[:, 0].tolist()
        for j in live:
            d = float(ref[i, j] - logps[i, j])
            kl = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - 1 - d}[estimator]
            expected = -0.2 * kl + (float(scores[i]) if j == live[-1] else 0.0)
            assert rewards[i, j].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_shape_rewards_of_extreme_log_ratios_is_finite():
    for estimator in ("k1", "k2", "k3"):
        for nats in (200.0, -200.0):
            given = torch.full((1, 3), nats), torch.zeros(1, 3), torch.ones(1, 3)
            assert bool(shape_rewards(torch.ones(1), *given, kl_coef=0.1, kl_estimator=estimator).isfinite().all())


def test_masked_whiten():
    mask = masked()
    x = poisoned(5 + 3 * upstream(*mask.shape), mask)
    white = masked_whiten(x.requires_grad_(), mask)
    live = x.detach()[mask].double()
    expected = (live - live.mean()) / (live.var() + 1e-8).sqrt()
    torch.testing.assert_close(white[mask].double(), expected, rtol=1e-5, atol=1e-6)
    assert bool((white[~mask] == 0).all()) and not white.requires_grad
    assert torch.equal(masked_whiten(torch.full((3,), 7.0), torch.tensor([0, 1, 0])), torch.zeros(3))
    assert torch.equal(masked_whiten(x, torch.zeros_like(x)), torch.zeros_like(x))


def test_masked_whiten_of_a_large_mean():
    x = 1e4 + upstream(200, seed=1)
    white = masked_whiten(x, torch.ones(200))
    expected = (x.double() - x.double().mean()) / x.double().std()
    torch.testing.assert_close(white.double(), expected, rtol=0, atol=1e-3)


def test_gae_whitens_as_masked_whiten_does():
    mask = masked(5, 40)
    rewards, values = (poisoned(upstream(5, 40, seed=i), mask) for i in (1, 2))
    plain, _ = gae(rewards, values, mask=mask)
    torch.testing.assert_close(gae(rewards, values, mask=mask, whiten=True)[0], masked_whiten(plain, mask))


def test_whitening_keeps_nan_out_of_masked_steps():
    rewards, mask = torch.ones(1, 4), torch.tensor([[1, 1, 0, 0]])
    rewards[0, 0] = math.nan
    assert bool((gae(rewards, torch.zeros(1, 4), mask=mask, whiten=True)[0][0, 2:] == 0).all())


def test_running_moments_are_those_of_all_that_was_seen():
    moments, seen = RunningMoments(), []
    for size in (1, 5, 0, 7, 100):
        x, mask = 1e3 + upstream(size, seed=size), torch.arange(size) % 3 != 1
        moments = update_moments(moments, poisoned(x, mask), mask)
        seen.append(x[mask])
    every = torch.cat(seen).double()
    assert moments.n == len(every)
    torch.testing.assert_close(moments.mean, every.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.sum_sq / (moments.n - 1), every.var(), rtol=1e-9, atol=0)
    x = upstream(6)
    normal = (x.double() - every.mean()) / every.std()
    torch.testing.assert_close(normalize_rewards(x, moments).double(), normal, rtol=1e-5, atol=1e-4)
    scaled = normalize_rewards(x, moments, center=False)
    torch.testing.assert_close(scaled.double(), x.double() / every.std(), rtol=1e-5, atol=1e-6)
    assert normalize_rewards(x, moments, clip=0.5).abs().max() <= 0.5


def test_normalize_before_anything_was_seen():
    x = upstream(4)
    assert torch.equal(normalize_rewards(x, RunningMoments()), x)
    one = update_moments(RunningMoments(), torch.tensor([3.0]))
    torch.testing.assert_close(normalize_rewards(x, one), x - 3)


@pytest.mark.parametrize(
    ("kl", "factor"), [(6.0, 1.0), (6.6, 1.01), (60.0, 1.02), (5.4, 0.99), (0.0, 0.98), (-3.0, 0.98)]
)
def test_kl_weight_of_ziegler_et_al(kl, factor):
    state = update_kl_coef(AdaptiveKL(0.2, target=6.0), kl)
    assert state.coef == pytest.approx(0.2 * factor) and state[1:] == (6.0, 0.1)


def test_textbook_ppo():
    """Reward log pi_sft - log pi at each token, and the score at the last; advantage: rewards to come less the value;
    actor: -mean(A r); critic: half the mean squared error. gamma = lam = 1, no clipping."""
    b, t, generator = 3, 7, torch.Generator().manual_seed(0)
    lengths = torch.tensor([7, 4, 1])
    mask = torch.arange(t) < lengths[:, None]
    logps, sft, old = (-torch.rand(b, t, generator=generator) for _ in range(3))
    values, scores = torch.randn(b, t, generator=generator), torch.randn(b, generator=generator)
    logps.requires_grad_(), values.requires_grad_()

    rewards = shape_rewards(scores, old, sft, mask, kl_coef=1.0)
    advantages, returns = gae(rewards, values, mask=mask, gamma=1.0, lam=1.0)
    actor = policy_loss(logps, old, advantages, mask, loss_type="ppo", epsilon=math.inf).loss
    critic, _ = value_loss(values, values, returns, mask, epsilon=math.inf)
    got = torch.autograd.grad(actor + critic, (logps, values))

    gains, errors = [], []
    for i, n in enumerate(lengths.tolist()):
        reward = (sft[i, :n] - old[i, :n]).double()
        reward[-1] += scores[i].double()
        for j in range(n):
            to_come = reward[j:].sum()
            ratio = torch.exp(logps[i, j].double() - old[i, j].double())
            gains.append((to_come - values[i, j].detach().double()) * ratio)
            errors.append((values[i, j].double() - to_come) ** 2)
    true_actor, true_critic = -torch.stack(gains).mean(), 0.5 * torch.stack(errors).mean()
    expected = torch.autograd.grad(true_actor + true_critic, (logps, values))
    torch.testing.assert_close(actor.double(), true_actor, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(critic.double(), true_critic, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


X = torch.zeros(2, 3)
REFUSED = {
    r"value_loss: returns must have the shape of values, \(2, 3\); got \(3,\)": lambda: value_loss(X, X, X[0], X),
    "value_loss: epsilon must be >= 0; got -1": lambda: value_loss(X, X, X, X, epsilon=-1),
    "value_loss: num_items must be > 0 and finite; got 0": lambda: value_loss(X, X, X, X, num_items=0),
    r"shape_rewards: scores must be \(2,\), one a row of logps; got \(3,\)": lambda: shape_rewards(
        X[0], X, X, X, kl_coef=0.1
    ),
    "shape_rewards: kl_coef must be >= 0 and finite; got -1": lambda: shape_rewards(X[:, 0], X, X, X, kl_coef=-1),
    "shape_rewards: kl_estimator must be one of k1, k2, k3; got 'abs'": lambda: shape_rewards(
        X[:, 0], X, X, X, kl_coef=0.1, kl_estimator="abs"
    ),
    r"masked_whiten: mask must have the shape of x, \(2, 3\); got \(3,\)": lambda: masked_whiten(X, X[0]),
    "masked_whiten: x must be one of .*; got int64": lambda: masked_whiten(X.long(), X),
    "normalize_rewards: clip must be > 0, or None; got 0": lambda: normalize_rewards(X, RunningMoments(), clip=0),
    "normalize_rewards: clip must be a number; got str": lambda: normalize_rewards(X, RunningMoments(), clip="a"),
    "update_kl_coef: gain must be finite; got inf": lambda: update_kl_coef(AdaptiveKL(0.1, 6.0, math.inf), 1.0),
    "update_moments: x must be a tensor; got list": lambda: update_moments(RunningMoments(), [1.0]),
    "update_kl_coef: target must be > 0; got 0": lambda: update_kl_coef(AdaptiveKL(0.1, 0), 1.0),
    "update_kl_coef: kl must be finite; got nan": lambda: update_kl_coef(AdaptiveKL(0.1, 6.0), math.nan),
    "update_kl_coef: kl must be a number; got Tensor": lambda: update_kl_coef(AdaptiveKL(0.1, 6.0), X[0, 0]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses(message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        REFUSED[message]()
