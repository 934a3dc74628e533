"""Pairs and tokens for the CUDA kernels of losses, and the functions of fastpref.losses in float64 to hold them to."""

import torch

from fastpref.heads import _rows
from fastpref.losses._sums import place
from fastpref.losses.dpo import bind
from fastpref.losses.objective import objective
from fastpref.losses.pairs import Pairs
from tests._gae import assert_no_worse
from tests._oracle import upstream


def pairs(n, spread, dtype=torch.float32, device="cpu", seed=0):
    """(pairs, the leaves that have a gradient)."""
    generator = torch.Generator().manual_seed(seed)
    sums = [-30 + spread * torch.randn(n, generator=generator) for _ in range(4)]
    lengths = [torch.randint(0, 40, (n,), generator=generator) for _ in range(2)]
    *leaves, ref_chosen, ref_rejected = (x.to(device, dtype) for x in sums)
    leaves = [x.requires_grad_() for x in leaves]
    return Pairs(*leaves, ref_chosen, ref_rejected, *(x.to(device) for x in lengths)), leaves


PAIR_LOSSES = [("sigmoid", {}), ("sigmoid", {"label_smoothing": 0.2}), ("robust", {"label_smoothing": 0.1})]
PAIR_LOSSES += [("robust", {}), ("hinge", {}), ("ipo", {})]
PAIR_SIZES = [(1, 2.0), (7, 2.0), (300, 100.0)]  # pairs, and the spread of their log-probs


def check_pairs(loss_type, options, n, spread, device="cpu"):
    loss = bind("test", [loss_type], [0.7], 0.3, "reverse_kl", None, None, False, options)
    given = upstream(n).to(device)

    def functions(dtype):
        some, leaves = pairs(n, spread, dtype, device)
        losses = loss(some)
        return [losses.detach(), *loss.rewards(some), *torch.autograd.grad(losses, leaves, given.to(dtype))]

    some, leaves = pairs(n, spread, device=device)
    rows = _rows.pair_rows(loss, some)
    slopes = torch.autograd.grad(rows.losses, leaves, given)
    got = [rows.losses.detach(), rows.chosen_rewards, rows.rejected_rewards, *slopes]
    for ours, eager, truth in zip(got, functions(torch.float32), functions(torch.float64), strict=True):
        assert_no_worse(ours, eager, truth)
    chosen, rejected = (x.double() for x in loss.rewards(some))
    wanted = (chosen, rejected, (chosen > rejected).double(), chosen - rejected, *(x.detach().double() for x in leaves))
    for (name, metric), values in zip(rows.metrics.items(), wanted, strict=True):
        torch.testing.assert_close(metric.double(), values.mean(), rtol=1e-6, atol=1e-6, msg=name)


TOKEN_LOSSES = {
    "ppo": {},
    "ppo, on-policy": {"old_logps": None},
    "dual clip, k1": {"delta": 1.5, "kl_coef": 0.2, "kl_estimator": "k1"},
    "clip higher, k2, entropy": {"epsilon_high": 0.4, "kl_coef": 0.2, "kl_estimator": "k2", "entropy_coef": 0.03},
    "grpo, k3, weights": {"loss_type": "grpo", "kl_coef": 0.2, "token_weights": True, "loss_weights": [0.6]},
    "dr_grpo, entropy": {"loss_type": "dr_grpo", "reduction": "constant", "max_length": 9, "entropy_coef": -0.1},
    "dapo, sum": {"loss_type": "dapo", "reduction": "sum"},
    "bnpo, reference for the metric alone": {"loss_type": "bnpo", "kl_coef": 0.0},
}


def batch(lengths, spread=0.4, device="cpu", seed=0):
    """Packed: log-probs, old and reference's, advantages, weights, entropy, mask, cu_seqlens; NaN where masked."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)

    def rand():
        return torch.randn(n, generator=generator)

    logps, mask = -1 + spread * rand(), torch.rand(n, generator=generator) > 0.3
    made = {
        "logps": logps,
        "old_logps": logps + spread * rand(),
        "advantages": rand(),
        "ref_logps": logps + spread * rand(),
        "token_weights": torch.rand(n, generator=generator) * 2,
        "entropy": rand().abs(),
    }
    for x in made.values():
        x[~mask] = float("nan")
    made |= {"mask": mask, "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int()}
    return {name: x.to(device) for name, x in made.items()}


def tokens(b, options, dtype):
    """(objective, logps, entropy) as linear_policy_loss has them."""
    chosen = {"loss_type": "ppo", "loss_weights": None, "reduction": None, "max_length": None, "kl_coef": 0.0}
    chosen |= {"kl_estimator": "k3", "entropy_coef": 0.0, "old_logps": b["old_logps"], "token_weights": None, **options}
    own = {k: chosen.pop(k) for k in ("epsilon", "epsilon_high", "delta") if k in chosen}
    if chosen["token_weights"]:
        chosen["token_weights"] = b["token_weights"]
    loss_type = [chosen.pop("loss_type")]
    goal = objective(
        "test",
        b["mask"],
        place("test", "logps", b["logps"], b["cu_seqlens"]),
        dtype,
        advantages=b["advantages"],
        ref_logps=b["ref_logps"],
        loss_type=loss_type,
        importance_sampling_level="token",
        use_bias_correction_kl=False,
        num_items=None,
        options=own,
        **chosen,
    )
    return goal, b["logps"].to(dtype).requires_grad_(), b["entropy"].to(dtype).requires_grad_()


SIZES = {  # lengths of the sequences, and the spread of the log-ratios
    "short ones, an empty one": ([7, 0, 30, 1], 0.4),
    "longer than a block's share": ([2300], 0.4),
    "ratios beyond 20 nats": ([40, 9], 30.0),
}


def check_tokens(options, size, device="cpu"):
    b, options = batch(*SIZES[size], device=device), TOKEN_LOSSES[options]
    given = upstream(b["mask"].numel()).to(device)

    def slopes(losses, leaves):
        found = torch.autograd.grad(losses, leaves, given.to(losses), allow_unused=True)
        return [torch.zeros((), device=device) if x is None else x for x in found]

    def functions(dtype):
        goal, *leaves = tokens(b, options, dtype)
        losses = goal.losses(*leaves)
        return [losses.detach(), *slopes(losses, leaves)], goal.metrics(*leaves)

    goal, *leaves = tokens(b, options, torch.float32)
    rows = _rows.token_rows(goal, *leaves, b["cu_seqlens"].long())
    got = [rows.losses.detach(), *slopes(rows.losses, leaves)]
    (eager, measured), (truth, metrics) = functions(torch.float32), functions(torch.float64)
    for ours, e, t in zip(got, eager, truth, strict=True):
        assert_no_worse(ours, e, t)
        assert ours.shape == t.shape and not (ours.dim() and ours[~b["mask"]].any())
    assert list(rows.metrics) == list(metrics)
    for name in metrics:
        assert_no_worse(rows.metrics[name], measured[name], metrics[name], factor=4.0)
    # without metrics the same
    alone = _rows.token_rows(goal, *leaves)
    assert torch.equal(alone.losses, rows.losses) and alone.metrics == {}
