"""The same batch through the loss code of TRL 1.16's trainers and through ours: losses, gradients and metrics in fp32.

TRL's methods run on a stand-in for the trainer, with a model whose head is a product; TRL is a test extra.
"""

from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from fastpref import kto_kl, linear_preference_loss, linear_unpaired_loss, reward_loss

if not pytest.importorskip("trl", reason="TRL is not installed").__version__.startswith("1.16."):
    pytest.skip("the trainers are called as TRL 1.16 has them", allow_module_level=True)

from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer

B, T, H, V = 4, 9, 12, 31


class Scored(torch.nn.Module):
    """A model of given hidden states: the outputs of TRL's fused head, or logits, of the completion's tokens."""

    is_gradient_checkpointing = False

    def __init__(self, hidden, weight):
        super().__init__()
        self.hidden, self.weight = hidden, weight

    def forward(self, *_, labels=None, **__):
        logits = self.hidden @ self.weight.T  # (S, T + 1, V): the last position predicts nothing
        if labels is None:
            return SimpleNamespace(logits=logits)
        every, target = logits[:, :-1].log_softmax(-1), labels[:, 1:]
        live = target != -100
        found = every.gather(-1, target.clamp(min=0)[..., None])[..., 0]
        return SimpleNamespace(
            log_probs=torch.where(live, found, 0.0),
            log_sum_sq_probs=torch.where(live, (2 * every).logsumexp(-1), 0.0),
            entropy=-(every.exp() * every).sum(-1),
            mean_logits=logits[:, :-1].mean(-1),
            is_top1=every.argmax(-1) == target,
        )


ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)


def trainer(model, reference, **options):
    """What TRL's loss methods read of a trainer, at the defaults of its configurations."""
    defaults = {
        "accelerator": ACCELERATOR,
        "model": model,
        "ref_model": reference,
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05, center_rewards_coefficient=None),
        "aux_loss_enabled": False,
        "precompute_ref_logps": False,
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "label_smoothing": 0.0,
        "use_weighting": False,
        "beta": 0.1,
        "calculate_KL": True,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
        "is_encoder_decoder": False,
        "pad_token_id": 0,
        "padding_value": 0,
        "alpha": 0.0,
        "simpo_gamma": 0.5,
        "cpo_alpha": 1.0,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return SimpleNamespace(**{**defaults, **options})


def batch(equal=False, n=2 * B):
    """(hidden, weight, input_ids, completion mask), n sequences of a prompt of one token and up to T - 1 others."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, T, H, generator=generator, requires_grad=True)
    weight = (torch.randn(V, H, generator=generator) / 2).requires_grad_()
    input_ids = torch.randint(1, V, (n, T), generator=generator)
    length = torch.randint(2, T, (n, 1), generator=generator)
    if equal:
        length[: n // 2] = 5
    position = torch.arange(T)
    return hidden, weight, input_ids, (position >= 1) & (position <= length)


def elsewhere(hidden, weight, seed=1):
    """Hidden states near these, and the head: the reference's."""
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed))
    return hidden.detach() + 0.2 * noise, weight.detach()


def shifted(input_ids, mask):
    """(S, T) targets: position t predicts t + 1."""
    return torch.cat([torch.where(mask, input_ids, -100)[:, 1:], torch.full((len(mask), 1), -100)], dim=1)


def assert_equal(trl, ours, leaves, rtol=1e-5):
    torch.testing.assert_close(ours, trl, rtol=rtol, atol=1e-5)
    for x, y in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(trl, leaves), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))


def trl_dpo(leaves, input_ids, mask, reference, loss_type, loss_weights=None, tau=0.05, **options):
    model = Scored(*leaves)
    types = [loss_type] if isinstance(loss_type, str) else loss_type
    stub = trainer(model, Scored(*reference), loss_types=types, loss_weights=loss_weights or [1.0] * len(types))
    vars(stub).update(options)
    stub.args.discopop_tau = tau
    inputs = {"input_ids": input_ids, "completion_mask": mask.long(), "attention_mask": torch.ones_like(input_ids)}
    return DPOTrainer._compute_loss(stub, model, inputs, False), stub._metrics["train"]


# name: (loss_type, options that both take by this name, chosen completions of equal length)
SMOOTH = {"label_smoothing": 0.1}
DPO = {
    "sigmoid": ("sigmoid", {}),
    "beta": ("sigmoid", {"beta": 0.7}),
    "hinge": ("hinge", {}),
    "ipo": ("ipo", {}),
    "exo_pair": ("exo_pair", {"label_smoothing": 1e-3}),
    "nca_pair": ("nca_pair", {}),
    "robust": ("robust", SMOOTH),
    "bco_pair": ("bco_pair", {}),
    "sppo_hard": ("sppo_hard", {}),
    "aot": ("aot", SMOOTH),
    "aot_unpaired": ("aot_unpaired", SMOOTH),
    "apo_zero": ("apo_zero", {}),
    "apo_down": ("apo_down", {}),
    "discopop": ("discopop", {}),
    "sigmoid_norm": ("sigmoid_norm", {}),
    "sft": ("sft", {}),
    "mpo": (["sigmoid", "bco_pair", "sft"], {"loss_weights": [0.8, 0.2, 1.0]}),
    "forward_kl": ("sigmoid", {"f_divergence_type": "forward_kl"}),
    "js": ("ipo", {"f_divergence_type": "js_divergence"}),
    "alpha": ("hinge", {"f_divergence_type": "alpha_divergence"}),
    "alpha 0.3": ("robust", {**SMOOTH, "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}),
    "alpha 1": ("sigmoid", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}),
    "forward_kl exo": ("exo_pair", {**SMOOTH, "f_divergence_type": "forward_kl"}),
    "js norm": ("sigmoid_norm", {"f_divergence_type": "js_divergence"}),
    "js discopop": ("discopop", {"f_divergence_type": "js_divergence"}),
    "ld": ("sigmoid", {"ld_alpha": 0.4}),
    "ld ipo": (["ipo", "sft"], {"ld_alpha": 0.0}),
    "ld aot": ("aot", {"ld_alpha": 0.5}),
    "wpo": ("sigmoid", {"use_weighting": True}),
    # with sft beside them TRL 1.16 raises: it multiplies an expanded tensor in place
    "wpo of two": (["sigmoid", "bco_pair"], {"use_weighting": True, "loss_weights": [0.8, 0.2]}),
}


@pytest.mark.parametrize("name", DPO)
def test_dpo_trainer(name):
    loss_type, options = DPO[name]
    hidden, weight, input_ids, mask = batch(equal="sft" in loss_type)
    reference = elsewhere(hidden, weight)
    trl, metrics = trl_dpo((hidden, weight), input_ids, mask, reference, loss_type, **options)
    ours = linear_preference_loss(
        hidden,
        weight,
        shifted(input_ids, mask),
        loss_type=loss_type,
        ref_hidden=reference[0],
        ref_weight=reference[1],
        **options,
    )
    assert_equal(trl, ours.loss, (hidden, weight))
    same = set(ours.metrics) - ({"logps/chosen", "logps/rejected"} if "ld_alpha" in options else set())
    for key in same:
        assert ours.metrics[key].item() == pytest.approx(metrics[key][0], rel=1e-5, abs=1e-5), key


# what departs on purpose, and why: (loss_type, options, of equal length)
DEPARTURES = {
    "TRL averages sft over the tokens of the local batch, we over each completion": ("sft", {}),
    "TRL takes label_smoothing and ignores it in sigmoid, which is cDPO in CPO and in its paper": ("sigmoid", SMOOTH),
}


@pytest.mark.parametrize("reason", DEPARTURES)
def test_departures_from_dpo_trainer(reason):
    loss_type, options = DEPARTURES[reason]
    hidden, weight, input_ids, mask = batch()
    reference = elsewhere(hidden, weight)
    trl, _ = trl_dpo((hidden, weight), input_ids, mask, reference, loss_type, **options)
    targets, (ref_hidden, ref_weight) = shifted(input_ids, mask), reference
    call = {"loss_type": loss_type, "ref_hidden": ref_hidden, "ref_weight": ref_weight, **options}
    ours = linear_preference_loss(hidden, weight, targets, **call).loss
    assert abs(trl.item() - ours.item()) > 1e-4


def test_departure_metrics_of_ld_dpo():
    """TRL logs the discounted sums as logps; ours are the log-probs of the completions, as in the output."""
    hidden, weight, input_ids, mask = batch()
    reference = elsewhere(hidden, weight)
    _, metrics = trl_dpo((hidden, weight), input_ids, mask, reference, "sigmoid", ld_alpha=0.4)
    call = {"ref_hidden": reference[0], "ref_weight": reference[1]}
    with_ld, plain = (
        linear_preference_loss(hidden, weight, shifted(input_ids, mask), ld_alpha=alpha, **call)
        for alpha in (0.4, None)
    )
    assert with_ld.metrics["logps/chosen"] == plain.metrics["logps/chosen"] == with_ld.chosen_logps.mean()
    assert abs(metrics["logps/chosen"][0] - plain.metrics["logps/chosen"].item()) > 1e-3


def test_departure_forward_kl_far_from_the_reference():
    """TRL's 1 - exp(-r) overflows at r < -88 in fp32; ours goes on as the tangent at 30 nats."""
    hidden, weight, input_ids, mask = batch()
    far, reference = (20 * hidden, weight), elsewhere(hidden, weight)
    trl, _ = trl_dpo(far, input_ids, mask, reference, "sigmoid", f_divergence_type="forward_kl")
    call = {"ref_hidden": reference[0], "ref_weight": reference[1], "f_divergence_type": "forward_kl"}
    ours = linear_preference_loss(*far, shifted(input_ids, mask), **call).loss
    assert not bool(torch.isfinite(trl)) and bool(torch.isfinite(ours))


def pairs_of_cpo(input_ids, mask):
    """A batch of CPO's and ORPO's data collator: one tensor for each half."""
    found = {}
    for half, rows in (("chosen", slice(0, B)), ("rejected", slice(B, None))):
        found[f"{half}_input_ids"] = input_ids[rows]
        # padding after the completion; the prompt is attended
        live = mask[rows] | (torch.arange(T) == 0)
        found[f"{half}_attention_mask"] = live.long()
        found[f"{half}_labels"] = torch.where(mask[rows], input_ids[rows], -100)
    return found


def trl_of_pairs(cls, leaves, input_ids, mask, **options):
    """(loss, metrics) of CPOTrainer and ORPOTrainer."""
    model = Scored(*leaves)
    stub = trainer(model, None, **options)
    for name in ("get_batch_logps", "concatenated_inputs"):
        setattr(stub, name, getattr(cls, name))
    for name in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
        if hasattr(cls, name):
            setattr(stub, name, partial(getattr(cls, name), stub))
    return cls.get_batch_loss_metrics(stub, model, pairs_of_cpo(input_ids, mask))


CPO = {
    "cpo": ("cpo", {"loss_type": "sigmoid"}, {}),
    "cpo smoothed": (
        "cpo",
        {"loss_type": "sigmoid", "label_smoothing": 0.1, "cpo_alpha": 0.3},
        {"label_smoothing": 0.1, "cpo_alpha": 0.3},
    ),
    "simpo": ("simpo", {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0}, {"beta": 2.0}),
    "simpo gamma": ("simpo", {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.4}, {"simpo_gamma": 1.4}),
    "simpo with sft": (["simpo", "sft"], {"loss_type": "simpo"}, {}),
}


@pytest.mark.parametrize("name", CPO)
def test_cpo_trainer(name):
    loss_type, options, own = CPO[name]
    hidden, weight, input_ids, mask = batch(equal=True)
    trl, metrics = trl_of_pairs(CPOTrainer, (hidden, weight), input_ids, mask, **options)
    ours = linear_preference_loss(hidden, weight, shifted(input_ids, mask), loss_type=loss_type, **own)
    assert_equal(trl, ours.loss, (hidden, weight))
    for key in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"):
        assert ours.metrics[key].item() == pytest.approx(metrics[key], rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_orpo_trainer(beta):
    hidden, weight, input_ids, mask = batch(equal=True)
    trl, metrics = trl_of_pairs(ORPOTrainer, (hidden, weight), input_ids, mask, beta=beta)
    ours = linear_preference_loss(hidden, weight, shifted(input_ids, mask), loss_type="orpo", beta=beta)
    assert_equal(trl, ours.loss, (hidden, weight))
    for key in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"):
        assert ours.metrics[key].item() == pytest.approx(float(metrics[key]), rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("weights", [{}, {"desirable_weight": 1.3, "undesirable_weight": 0.7}])
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("drift", [0.2, -0.2])
def test_kto_trainer(drift, loss_type, weights):
    hidden, weight, input_ids, mask = batch(n=6)
    label = torch.tensor([True, False, True, True, False, True])
    reference = elsewhere(hidden, weight)
    # a flatter reference likes completions of other prompts better: an estimate below 0; a sharper one, above
    reference = (reference[0] * (1 - drift), reference[1])
    model, kl_model = Scored(hidden, weight), Scored(*reference)
    calculate = loss_type == "kto"
    stub = trainer(model, kl_model, loss_type=loss_type, calculate_KL=calculate, **weights)
    stub._compute_kl_logps = partial(KTOTrainer._compute_kl_logps, stub)
    other, other_mask = input_ids.roll(1, 0), mask.roll(1, 0)
    batch_ = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "completion_mask": mask.long(),
        "KL_input_ids": other,
        "KL_attention_mask": torch.ones_like(other),
        "KL_completion_mask": other_mask.long(),
        "label": label,
    }
    trl = KTOTrainer._compute_loss(stub, model, batch_, False)
    mismatched = [
        one(labels=torch.where(other_mask, other, -100)).log_probs.sum(1) for one in (Scored(hidden, weight), kl_model)
    ]
    ours = linear_unpaired_loss(
        hidden,
        weight,
        shifted(input_ids, mask),
        label,
        loss_type=loss_type,
        ref_hidden=reference[0],
        ref_weight=reference[1],
        kl=kto_kl(*mismatched) if calculate else None,
        **weights,
    )
    assert_equal(trl, ours.loss, (hidden, weight))
    metrics = stub._metrics["train"]
    for key in set(metrics) - {"num_tokens", "kl" if not calculate else ""}:
        assert ours.metrics[key].item() == pytest.approx(metrics[key][0], rel=1e-5, abs=1e-5), key
    assert (ours.metrics["kl"].item() > 0) == (drift < 0) if calculate else "kl" not in ours.metrics


@pytest.mark.parametrize("coefficient", [None, 0.02])
@pytest.mark.parametrize("margin", [None, torch.tensor([0.5, 1.0, 0.0, 2.0])])
def test_reward_trainer(margin, coefficient):
    scores = torch.randn(2 * B, 1, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def model(**_):
        return SimpleNamespace(logits=scores)

    model.training = True
    stub = trainer(model, None)
    stub.args.center_rewards_coefficient = coefficient
    inputs = {"attention_mask": torch.ones(2 * B, T), **({} if margin is None else {"margin": margin})}
    trl = RewardTrainer.compute_loss(stub, model, inputs)
    chosen, rejected = scores[:, 0].chunk(2)
    ours = reward_loss(chosen, rejected, margin=margin, center_coef=coefficient or 0.0).mean()
    assert_equal(trl, ours, (scores,))
