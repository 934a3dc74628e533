"""linear_preference_loss against float64 formulas: values, gradients, references, metrics, reductions, empty input."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastpref import dpo_loss, linear_logps, linear_preference_loss
from tests import _oracle
from tests._oracle import (
    BACKENDS,
    IGNORE,
    LOSSES,
    assert_close,
    assert_gradient,
    assert_gradients,
    assert_same_bits,
    our_loss,
    pairs,
    reference_of,
    run,
    true_loss,
    truth,
    upstream,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MIB = 1 << 20


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("hidden", "weight")])
def test_values_and_gradients(trained, name, dtype, backend):
    args = pairs(dtype=dtype)
    ref = reference_of(args)
    given = {"grads": {"loss": torch.tensor(1.7)}, "trained": trained}
    values, gradients = our_loss(args, name, ref_logps=ref, backend=backend, **given)
    truths, d_truths = true_loss(args, name, ref_logps=ref, **given)
    assert all(values[k].dtype == torch.float32 for k in ("loss", "chosen_logps", "rejected_rewards"))
    assert_close(values, truths)
    assert_gradients(gradients, d_truths)
    assert all(gradients[k].dtype == dtype for k in trained)
    if "hidden" in trained:
        assert bool((gradients["hidden"][args["targets"] == IGNORE] == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_options(dtype, backend):
    args = pairs(dtype=dtype, bias=True)
    options = {"softcap": 5.0, "logit_scale": 1.3, "temperature": 0.8}
    ref = reference_of(args)
    values, gradients = our_loss(args, ref_logps=ref, backend=backend, **options)
    truths, d_truths = true_loss(args, ref_logps=ref, **options)
    assert_close(values, truths)
    assert_gradients(gradients, d_truths)


@pytest.mark.parametrize("backend", BACKENDS)
def test_temperature_per_token(backend):
    args = pairs()
    temperature = 0.5 + torch.rand(6, 9, generator=torch.Generator().manual_seed(2))
    temperature[args["targets"] == IGNORE] = math.nan
    ref = reference_of(args)
    values, gradients = our_loss(args, ref_logps=ref, backend=backend, temperature=temperature)
    truths, d_truths = true_loss(args, ref_logps=ref, temperature=temperature)
    assert_close(values, truths)
    assert_gradients(gradients, d_truths)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")])
def test_sum_of_a_thousand_tokens(trained, backend):
    """Eight thousand nats, within 1e-3: an fp32 running sum is off by several times that."""
    args = _oracle.head(2 * 1024, 32, 3001, torch.bfloat16, ignored=0.0)
    args = {k: x if k == "weight" else x.unflatten(0, (2, 1024)) for k, x in args.items()}
    ref = torch.zeros(2)
    values = our_loss(args, ref_logps=ref, trained=trained, backend=backend)[0]
    truths = true_loss(args, ref_logps=ref, trained=trained)[0]
    for name in ("chosen_logps", "rejected_logps"):
        assert truths[name] < -5000
        assert (values[name].double() - truths[name]).abs() <= 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
def test_many_chunks_are_one(name, dtype, backend):
    """A mebibyte holds a pair or two of these, so that the gradients come from several chunks."""
    args = pairs(6, 40, 24, 4099, dtype)
    ref = reference_of(args)
    truths, d_truths = true_loss(args, name, ref_logps=ref)
    small, large = (our_loss(args, name, ref_logps=ref, backend=backend, workspace=size) for size in (MIB, 64 * MIB))
    for values, gradients in (small, large):
        torch.testing.assert_close(values["loss"].double(), truths["loss"], rtol=1e-5, atol=1e-5)
        assert_gradients(gradients, d_truths)
    errors = [(x[1]["weight"].double() - d_truths["weight"]).norm() for x in (small, large)]
    assert errors[0] <= 1.1 * errors[1]
    if backend == "cpu":
        assert_same_bits(small[0]["chosen_logps"], large[0]["chosen_logps"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")])
def test_pair_longer_than_the_workspace(trained, backend):
    args = pairs(2, 200, 16, 4099, torch.bfloat16)
    ref = reference_of(args)
    values, gradients = our_loss(args, ref_logps=ref, backend=backend, workspace=MIB, trained=trained)
    truths, d_truths = true_loss(args, ref_logps=ref, trained=trained)
    torch.testing.assert_close(values["loss"].double(), truths["loss"], rtol=1e-5, atol=2e-4)
    assert_gradients(gradients, d_truths)


def packed(args, *, shared_prompt=False):
    """The same sequences without prompt and padding; or with each prompt's last row once, serving both answers."""
    live = args["targets"] != IGNORE
    bounds = F.pad(live.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    result = {**args, "hidden": args["hidden"][live], "targets": args["targets"][live], "cu_seqlens": bounds}
    if shared_prompt:
        b = len(bounds) // 2
        rows = torch.arange(int(bounds[-1]))
        rows[bounds[b:-1].long()] = bounds[:b].long()
        result["rows"] = rows
    return result


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
@pytest.mark.parametrize("workspace", [MIB, None])
def test_packed_is_batched(workspace, name, dtype, backend):
    args = pairs(4, 30, 24, 4099, dtype)
    ref = reference_of(args)
    call = {"ref_logps": ref, "backend": backend, "workspace": workspace, "deterministic": True}
    batched = our_loss(args, name, **call)[0]
    lean, d_lean = our_loss(packed(args), name, **call)
    keys = ("loss", "chosen_logps", "rejected_logps", "chosen_rewards", "rejected_rewards")
    for x, y in [(lean[k], batched[k]) for k in keys] + [
        (lean["metrics"][k], y) for k, y in batched["metrics"].items()
    ]:
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    live = args["targets"] != IGNORE
    d_want = true_loss(args, name, ref_logps=ref)[1]
    assert_gradient(d_lean["hidden"], d_want["hidden"][live])
    assert_gradient(d_lean["weight"], d_want["weight"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_let_both_answers_share_a_prompt(dtype, trained, backend):
    args = pairs(dtype=dtype)
    b = 3
    args["hidden"][b:, 3] = args["hidden"][:b, 3]  # the row that predicts the first token of both
    ref = reference_of(args)
    call = {"ref_logps": ref, "backend": backend, "trained": trained}
    two, d_two = our_loss(packed(args), **call)
    one, d_one = our_loss(packed(args, shared_prompt=True), **call)
    for key in ("loss", "chosen_logps", "rejected_logps"):
        assert_same_bits(one[key], two[key])
    merged = d_two["hidden"].double()
    bounds = packed(args)["cu_seqlens"].long()
    merged[bounds[:b]] += merged[bounds[b:-1]]
    merged[bounds[b:-1]] = 0
    assert_gradient(d_one["hidden"], merged)
    if "weight" in trained:
        assert_gradient(d_one["weight"], d_two["weight"].double())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_chosen_and_rejected_that_nearly_cancel(dtype, backend):
    args = pairs(1, 9, dtype=dtype)
    args["hidden"][1], args["targets"][1] = args["hidden"][0], args["targets"][0]
    args["targets"][1, 4] = (args["targets"][1, 4] + 1) % 67
    parts = [
        run(
            lambda **given: {"sum": truth(**given)["logps"].sum()},
            {**args, "hidden": args["hidden"][i], "targets": args["targets"][i]},
            grads={"sum": torch.tensor(0.05)},
            dtype=torch.float64,
        )[1]["weight"].norm()
        for i in range(2)
    ]
    ref = torch.zeros(2)
    gradients, d_truths = our_loss(args, ref_logps=ref, backend=backend)[1], true_loss(args, ref_logps=ref)[1]
    assert_gradient(gradients["weight"], d_truths["weight"], scale=sum(parts))
    assert_gradient(gradients["hidden"], d_truths["hidden"])


def test_gradient_identity_of_dpo():
    """Rafailov et al. section 4: -beta sigmoid(r_l - r_w) (grad log pi(y_w) - grad log pi(y_l)), mean over pairs."""
    args = pairs()
    ref = reference_of(args)
    values, gradients = our_loss(args, ref_logps=ref, beta=0.3)
    wrong = torch.sigmoid(values["rejected_rewards"] - values["chosen_rewards"])
    weights = 0.3 * torch.cat([-wrong, wrong])[:, None].expand(6, 9) / 3
    expected = run(truth, args, grads={"logps": weights}, dtype=torch.float64)[1]
    assert_gradients(gradients, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LOSSES)
def test_is_dpo_loss_of_linear_logps(name, backend):
    args = pairs()
    ref = reference_of(args)
    loss_type, own = LOSSES[name]

    def by_hand(**given):
        sums = linear_logps(**given, backend=backend).sum(1)
        lengths = (args["targets"] != IGNORE).sum(1).chunk(2)
        losses, *rewards = dpo_loss(
            *sums.chunk(2),
            *ref.chunk(2),
            loss_type=loss_type,
            chosen_lengths=lengths[0],
            rejected_lengths=lengths[1],
            **own,
        )
        return {"loss": losses.mean(), "chosen_rewards": rewards[0], "rejected_rewards": rewards[1]}

    expected, d_expected = run(by_hand, args, grads={"loss": torch.tensor(1.0)})
    values, gradients = our_loss(args, name, ref_logps=ref, backend=backend)
    for key in expected:
        torch.testing.assert_close(values[key], expected[key], rtol=1e-6, atol=1e-6)
    for key in gradients:
        torch.testing.assert_close(gradients[key], d_expected[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")])
def test_gradcheck(trained, name, backend):
    args = pairs(2, 5, 3, 7, torch.float64)
    args["hidden"] = args["hidden"].nan_to_num()
    ref, (loss_type, own) = torch.randn(4, generator=torch.Generator().manual_seed(0)).double(), LOSSES[name]

    def outputs(*leaves):
        result = linear_preference_loss(
            **{**args, **dict(zip(trained, leaves, strict=True))},
            ref_logps=ref,
            loss_type=loss_type,
            backend=backend,
            **own,
        )
        return result.loss, result.chosen_logps, result.rejected_logps

    assert torch.autograd.gradcheck(outputs, [args[k].requires_grad_() for k in trained])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
def test_references_agree(name, backend):
    args = pairs()
    head = {"bias": torch.randn(67, generator=torch.Generator().manual_seed(3)), "temperature": 0.8, "softcap": 9.0}
    other = pairs(seed=5)
    ref_hidden = other["hidden"].nan_to_num().masked_fill((args["targets"] == IGNORE)[..., None], math.nan)
    tokens = linear_logps(ref_hidden, other["weight"], args["targets"], **head, backend=backend)
    hostile = tokens.masked_fill(args["targets"] == IGNORE, math.nan)
    call = {"backend": backend, **head}
    by_sum, d_by_sum = our_loss(args, name, ref_logps=tokens.sum(1), **call)
    for reference in (
        {"ref_token_logps": hostile},
        {"ref_hidden": ref_hidden, "ref_weight": other["weight"]},
    ):
        values, gradients = our_loss(args, name, **reference, **call)
        for key in ("loss", "chosen_rewards", "rejected_rewards"):
            torch.testing.assert_close(values[key], by_sum[key], rtol=1e-6, atol=1e-6)
        for key in gradients:
            torch.testing.assert_close(gradients[key], d_by_sum[key], rtol=1e-5, atol=1e-6)


def test_reference_gets_no_gradient():
    args = pairs()
    args["weight"].requires_grad_()
    reference = {"ref_hidden": args["hidden"].clone().requires_grad_(), "ref_weight": args["weight"]}
    loss = linear_preference_loss(**args, **reference).loss
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    loss.backward()
    assert reference["ref_hidden"].grad is None
    sums = reference_of(args).requires_grad_()
    linear_preference_loss(**args, ref_logps=sums).loss.backward()
    assert sums.grad is None


def test_reference_free_is_a_uniform_reference():
    args = pairs()
    free, d_free = our_loss(args, reference_free=True)
    zero, d_zero = our_loss(args, ref_logps=torch.zeros(6))
    assert_same_bits(free["loss"], zero["loss"])
    assert_same_bits(d_free["weight"], d_zero["weight"])
    torch.testing.assert_close(free["chosen_rewards"], 0.1 * free["chosen_logps"])


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("trained", [(), ("hidden",), ("hidden", "weight")])
def test_rewards_and_metrics(trained, backend):
    """TRL's names and meanings: sequences are averaged for log-probs, tokens for logits and entropy."""
    args = pairs(b=5)
    ref = reference_of(args)
    args = {k: x.requires_grad_(k in trained) if x.is_floating_point() else x for k, x in args.items()}
    result = linear_preference_loss(**args, ref_logps=ref, beta=0.3, backend=backend)
    with torch.no_grad():
        exact = truth(**{k: x.double() if x.is_floating_point() else x for k, x in args.items()})
    live = args["targets"] != IGNORE
    rewards = 0.3 * (exact["logps"].sum(1) - ref)
    chosen, rejected = rewards.chunk(2)
    expected = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/accuracies": (chosen > rejected).double().mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "logps/chosen": exact["logps"][:5].sum(1).mean(),
        "logps/rejected": exact["logps"][5:].sum(1).mean(),
        "logits/chosen": exact["mean_logits"][:5][live[:5]].mean(),
        "logits/rejected": exact["mean_logits"][5:][live[5:]].mean(),
        "entropy": exact["entropy"][live].mean(),
        "mean_token_accuracy": exact["is_top1"][:5][live[:5]].double().mean(),
    }
    assert set(result.metrics) == set(expected)
    for name, metric in result.metrics.items():
        assert metric.shape == () and not metric.requires_grad and metric.dtype == torch.float32
        torch.testing.assert_close(metric.double(), expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: n + m)
    torch.testing.assert_close(result.chosen_rewards.double(), chosen, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.rejected_rewards.double(), rejected, rtol=1e-5, atol=1e-5)
    assert not result.chosen_rewards.requires_grad and not result.rejected_rewards.requires_grad
    assert result.loss.requires_grad == result.chosen_logps.requires_grad == bool(trained)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("hidden", "weight")])
@pytest.mark.parametrize("used", [("chosen_logps",), ("rejected_logps",), ("loss", "chosen_logps", "rejected_logps")])
def test_gradients_through_logps(used, trained, backend):
    """A user's own term beside the loss: an SFT term on chosen_logps, say."""
    args = pairs(dtype=torch.bfloat16)
    ref = reference_of(args)
    grads = {name: upstream(*(() if name == "loss" else (3,)), seed=i) for i, name in enumerate(used)}
    call = {"grads": grads, "trained": trained, "ref_logps": ref}
    assert_gradients(our_loss(args, backend=backend, **call)[1], true_loss(args, **call)[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_through_logps_of_many_chunks(backend):
    args = pairs(6, 40, 24, 4099, torch.bfloat16)
    grads = {"loss": torch.tensor(2.0), "chosen_logps": upstream(6)}
    call = {"grads": grads, "ref_logps": reference_of(args)}
    assert_gradients(our_loss(args, backend=backend, workspace=MIB, **call)[1], true_loss(args, **call)[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(reduction, trained, backend):
    args = pairs(dtype=torch.bfloat16)
    ref = reference_of(args)
    grads = {"loss": upstream(3) if reduction == "none" else torch.tensor(0.7)}
    call = {"grads": grads, "trained": trained, "ref_logps": ref, "reduction": reduction}
    values, gradients = our_loss(args, backend=backend, **call)
    truths, d_truths = true_loss(args, **call)
    assert values["loss"].shape == truths["loss"].shape
    assert_close(values, truths)
    assert_gradients(gradients, d_truths)


@pytest.mark.parametrize("num_items", [7, 7.0, torch.tensor(7), torch.tensor(7.0)])
def test_num_items_makes_accumulation_exact(num_items):
    args = pairs(b=7)
    ref = reference_of(args)
    whole, d_whole = our_loss(args, ref_logps=ref)
    total, d_total = 0.0, {name: 0.0 for name in d_whole}
    for chosen in (slice(0, 4), slice(4, 7)):
        some = torch.cat([torch.arange(7)[chosen], torch.arange(7, 14)[chosen]])
        part = {**args, "hidden": args["hidden"][some], "targets": args["targets"][some]}
        values, gradients = our_loss(part, ref_logps=ref[some], num_items=num_items)
        total = total + values["loss"]
        d_total["weight"] = d_total["weight"] + gradients["weight"]
    torch.testing.assert_close(total, whole["loss"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(d_total["weight"], d_whole["weight"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(0, 9), (0, 0)])
def test_empty_batch(shape, name, backend):
    args = {"hidden": torch.zeros(*shape, 5), "weight": torch.ones(7, 5), "targets": torch.zeros(shape).long()}
    values, gradients = our_loss(args, name, ref_logps=torch.zeros(0), backend=backend)
    assert values["loss"].shape == () and values["loss"] == 0
    assert gradients["hidden"].shape == (*shape, 5)
    assert bool((gradients["weight"] == 0).all())
    assert all(bool((x == 0).all()) for x in values["metrics"].values())


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_empty_packed_batch(backend):
    args = {"hidden": torch.zeros(0, 5), "weight": torch.ones(7, 5), "targets": torch.zeros(0).long()}
    args["cu_seqlens"] = torch.zeros(1, dtype=torch.int32)
    values, gradients = our_loss(args, ref_logps=torch.zeros(0), backend=backend)
    assert values["loss"] == 0 and bool((gradients["weight"] == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")])
def test_pairs_without_tokens(trained, backend):
    """All ignored: log-probs 0, the loss log 2, no gradient; nothing is NaN."""
    args = pairs()
    args["targets"][:] = IGNORE
    args["hidden"][:] = math.nan
    values, gradients = our_loss(args, reference_free=True, backend=backend, trained=trained)
    assert values["loss"].item() == pytest.approx(math.log(2))
    assert bool((values["chosen_logps"] == 0).all())
    assert all(bool((x == 0).all()) for x in gradients.values())
    assert not any(bool(torch.isnan(x)) for x in values["metrics"].values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")])
def test_one_completion_without_tokens_does_not_spoil_the_rest(trained, name, backend):
    args = pairs()
    args["targets"][1] = IGNORE
    values, gradients = our_loss(args, name, ref_logps=torch.zeros(6), backend=backend, trained=trained)
    assert bool(torch.isfinite(values["loss"])) and values["chosen_logps"][1] == 0
    assert all(bool(torch.isfinite(x).all()) for x in gradients.values())
