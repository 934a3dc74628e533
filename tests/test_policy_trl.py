"""policy_loss beside TRL's own GRPO and RLOO loss code on one batch: value, gradient and metrics, fp32 to 1e-5.

Deliberate differences, which the calls below make up for:
- cispo: our cap is 1 + epsilon_high, as in eq. 5 of the MiniMax-M1 paper; TRL's epsilon_high is the cap itself.
- entropy_coef: our bonus is reduced as the policy term is, and so is exact over micro-batches; TRL's is always a mean
  over the tokens of the micro-batch. The two are one for losses reduced by "mean".
- kl: TRL multiplies it by the ratio unless told otherwise; here that is use_bias_correction_kl=True.
- gspo, luspo: with advantages per token ours move each token by its own (GSPO-token), TRL's all by their sum.
- Beyond 20 nats TRL's ratios overflow and give NaN; ours go on along a tangent.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from fastpref import policy_loss
from tests._policy import rollout

grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="trl is not installed")
rloo_trainer = pytest.importorskip("trl.trainer.rloo_trainer", reason="trl is not installed")

MAX_LENGTH = 16
ACCELERATOR = SimpleNamespace(num_processes=1, sync_gradients=True, reduce=lambda x, reduction: x, gather=lambda x: x)
# name: (TRL's loss_type, TRL's options, ours)
BOTH = {
    "grpo": ("grpo", {}, {}),
    "grpo, clip higher and dual clip": ("grpo", {"epsilon_high": 0.28, "delta": 1.5}, {}),
    "grpo, sequence level": ("grpo", {"importance_sampling_level": "sequence", "epsilon_low": 0.03}, {}),
    "dr_grpo": ("dr_grpo", {}, {"max_length": MAX_LENGTH}),
    "bnpo": ("bnpo", {}, {}),
    "dapo": ("dapo", {"epsilon_high": 0.28}, {}),
    "cispo": ("cispo", {"epsilon_high": 1.3}, {"epsilon_high": 0.3}),
    "sapo": ("sapo", {}, {}),
    "vespo": ("vespo", {}, {}),
    "gspo": ("grpo", {"importance_sampling_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.04}, {}),
    "luspo": ("luspo", {"importance_sampling_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.03}, {}),
}


def trl_inputs(batch):
    b, t = batch["mask"].shape
    return {
        "prompt_ids": torch.zeros(b, 1, dtype=torch.long),
        "prompt_mask": torch.ones(b, 1, dtype=torch.long),
        "completion_ids": torch.zeros(b, t, dtype=torch.long),
        "completion_mask": batch["mask"].long(),
        "advantages": batch["advantages"][:, 0],
        "old_per_token_logps": batch["old_logps"],
        "ref_per_token_logps": batch["ref_logps"],
        "num_items_in_batch": batch["mask"].sum(),
    }


def trl_loss(loss_type, batch, logps, entropy, *, beta=0.0, bias_correction=False, entropy_coef=0.0, **options):
    options = {"epsilon_low": 0.2, "importance_sampling_level": "token", "delta": None, **options}
    options.setdefault("epsilon_high", options["epsilon_low"])
    args = SimpleNamespace(
        delta=options.pop("delta"),
        use_bias_correction_kl=bias_correction,
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        vespo_k_pos=2.0,
        vespo_lambda_pos=3.0,
        vespo_k_neg=3.0,
        vespo_lambda_neg=2.0,
        steps_per_generation=1,
    )
    metrics = defaultdict(lambda: defaultdict(list))
    trainer = SimpleNamespace(
        args=args,
        beta=beta,
        loss_type=loss_type,
        model=SimpleNamespace(training=True),
        accelerator=ACCELERATOR,
        max_completion_length=MAX_LENGTH,
        current_gradient_accumulation_steps=1,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        use_adaptive_entropy=False,
        entropy_coef=entropy_coef,
        _entropy_bonus_enabled=bool(entropy_coef),
        _metrics=metrics,
        get_gamma_weights=grpo_trainer.GRPOTrainer.get_gamma_weights,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, entropy, None),
        **options,
    )
    return grpo_trainer.GRPOTrainer._compute_loss(trainer, None, trl_inputs(batch)), metrics["train"]


def filled():
    """A batch in which every sequence has a token: TRL's low_min is NaN elsewhere."""
    batch = rollout(poisoned=False)
    batch["mask"][-1, :4] = True
    batch["advantages"] = batch["advantages"][:, :1].expand(batch["mask"].shape)
    entropy = torch.rand(batch["mask"].shape, generator=torch.Generator().manual_seed(5))
    return batch, entropy


def our_options(name):
    _kind, theirs, own = BOTH[name]
    loss_type = name.split(",")[0]
    shared = {key.replace("epsilon_low", "epsilon"): value for key, value in theirs.items()}
    if loss_type in ("gspo", "luspo"):
        shared.pop("importance_sampling_level")
    return {"loss_type": loss_type, **shared, **own}


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.2])
@pytest.mark.parametrize("name", BOTH)
def test_the_same_as_trl(name, beta, bias_correction):
    if bias_correction and (not beta or BOTH[name][1].get("importance_sampling_level") == "sequence"):
        pytest.skip("corrects a KL of tokens")
    batch, entropy = filled()
    kind, theirs, _ = BOTH[name]
    theirs_logps, ours_logps = (batch["logps"].clone().requires_grad_() for _ in range(2))
    given = {"beta": beta, "bias_correction": bias_correction}
    expected, their_metrics = trl_loss(kind, batch, theirs_logps, entropy, **given, **theirs)
    kl = {"ref_logps": batch["ref_logps"], "kl_coef": beta, "use_bias_correction_kl": bias_correction}
    arguments = batch["old_logps"], batch["advantages"][:, 0], batch["mask"]
    out = policy_loss(ours_logps, *arguments, entropy=entropy, **kl, **our_options(name))

    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)
    got, wanted = torch.autograd.grad(out.loss, ours_logps), torch.autograd.grad(expected, theirs_logps)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)
    assert their_metrics.keys() <= out.metrics.keys() | {"policy_loss", "entropy_coef"}
    for key in their_metrics.keys() & out.metrics.keys():
        assert out.metrics[key].item() == pytest.approx(their_metrics[key][0], rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("name", ["bnpo", "dapo"])
def test_entropy_bonus_of_losses_reduced_by_mean(name):
    batch, entropy = filled()
    kind, theirs, _ = BOTH[name]
    theirs_leaf, ours_leaf = (entropy.clone().requires_grad_() for _ in range(2))
    expected, _ = trl_loss(
        kind, batch, batch["logps"].clone().requires_grad_(), theirs_leaf, entropy_coef=0.1, **theirs
    )
    arguments = batch["old_logps"], batch["advantages"][:, 0], batch["mask"]
    out = policy_loss(batch["logps"], *arguments, entropy=ours_leaf, entropy_coef=0.1, **our_options(name))
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)
    got, wanted = torch.autograd.grad(out.loss, ours_leaf), torch.autograd.grad(expected, theirs_leaf)
    torch.testing.assert_close(got, wanted)


def test_rloo_is_trls():
    batch, entropy = filled()
    theirs, ours = (batch["logps"].clone().requires_grad_() for _ in range(2))
    metrics = defaultdict(lambda: defaultdict(list))
    trainer = SimpleNamespace(
        epsilon_low=0.2,
        epsilon_high=0.3,
        model=SimpleNamespace(training=True),
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        _metrics=metrics,
        _get_per_token_logps_and_entropies=lambda *_, **__: (theirs, entropy, None),
    )
    old_sums = torch.where(batch["mask"], batch["old_logps"], 0.0).sum(1)
    expected = rloo_trainer.RLOOTrainer._compute_loss(trainer, None, {**trl_inputs(batch), "old_logps": old_sums})
    arguments = batch["old_logps"], batch["advantages"][:, 0], batch["mask"]
    out = policy_loss(ours, *arguments, loss_type="rloo", epsilon=0.2, epsilon_high=0.3)
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)
    got, wanted = torch.autograd.grad(out.loss, ours), torch.autograd.grad(expected, theirs)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)
    for key in (k for k in out.metrics if k.startswith("clip_ratio")):
        assert out.metrics[key].item() == pytest.approx(metrics["train"][key][0]), key
