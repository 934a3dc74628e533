"""linear_policy_loss against the papers' formulas on fp64 logits: frozen, trained, chunked, packed; passes."""

import pytest
import torch

from fastpref import linear_policy_loss
from tests._oracle import BACKENDS, IGNORE, assert_gradient, head, run
from tests._oracle import truth as true_outputs
from tests._policy import MAX_LENGTH, OPTIONS, rollout, true_loss, with_head
from tests.test_plan import MIB, measured_passes

HEADS = {"frozen": ("hidden",), "trained": ("hidden", "weight")}
# a vocabulary of which 1 MiB holds few rows, so that some sequences fit a chunk together and some do not fit at all
SIZES = {"one chunk": {"b": 5, "t": 9, "v": 61}, "several chunks": {"b": 7, "t": 24, "v": 4099}}


def batch_of(size, seed=0):
    given = SIZES[size]
    args, batch = with_head(rollout(given["b"], given["t"], seed=seed), v=given["v"])
    return args, batch, ({} if size == "one chunk" else {"workspace": MIB})


def ours(name, args, batch, trained, **options):
    loss_type, own, reduction = OPTIONS[name]
    if (options.get("reduction") or reduction) == "constant":
        options["max_length"] = MAX_LENGTH
    live = torch.where(batch["mask"], batch["advantages"], 0.0)
    given = {"advantages": live.sum(1) / batch["mask"].sum(1).clamp(min=1), "old_logps": batch["old_logps"]}
    options = {**given, "loss_type": loss_type, **own, **options}
    return run(
        lambda **leaves: {"loss": (out := linear_policy_loss(**leaves, **options)).loss, "logps": out.logps},
        args,
        grads={"loss": torch.tensor(1.7)},
        trained=trained,
    )


def truth(name, args, batch, trained, *, entropy_coef=0.0, **options):
    def loss(hidden, weight, targets):
        found = true_outputs(hidden, weight, targets)
        entropy = found["entropy"] if entropy_coef else None
        value = true_loss(name, found["logps"], batch, entropy=entropy, entropy_coef=entropy_coef, **options)
        return {"loss": value, "logps": found["logps"]}

    return run(loss, args, grads={"loss": torch.tensor(1.7)}, trained=trained, dtype=torch.float64)


def assert_same(got, expected):
    (values, gradients), (true_values, true_gradients) = got, expected
    torch.testing.assert_close(values["loss"].double(), true_values["loss"], rtol=1e-5, atol=1e-5)
    assert gradients.keys() == true_gradients.keys()
    for key, gradient in gradients.items():
        assert_gradient(gradient, true_gradients[key])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("trained", HEADS)
@pytest.mark.parametrize("name", OPTIONS)
def test_formula(name, trained, size, backend):
    args, batch, workspace = batch_of(size)
    kl = {"kl_coef": 0.2, "entropy_coef": 0.05}
    got = ours(name, args, batch, HEADS[trained], ref_logps=batch["ref_logps"], backend=backend, **workspace, **kl)
    assert_same(got, truth(name, args, batch, HEADS[trained], **kl))


@pytest.mark.parametrize("trained", HEADS)
@pytest.mark.parametrize("name", ["ppo", "grpo", "gspo", "rloo"])
@pytest.mark.parametrize("size", SIZES)
def test_packed(name, trained, size):
    args, batch, workspace = batch_of(size)
    whole = ours(name, args, batch, HEADS[trained], **workspace)
    b, t = batch["mask"].shape
    flat = {"hidden": args["hidden"].flatten(0, 1), "weight": args["weight"], "targets": args["targets"].flatten()}
    bounds = {"cu_seqlens": torch.arange(b + 1, dtype=torch.int32) * t, "old_logps": batch["old_logps"].flatten()}
    got = ours(name, flat, batch, HEADS[trained], **workspace, **bounds)
    torch.testing.assert_close(got[0]["loss"], whole[0]["loss"], rtol=1e-6, atol=1e-7)
    for key, gradient in got[1].items():
        torch.testing.assert_close(gradient, whole[1][key].view(gradient.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["ppo", "gspo"])
def test_none_gives_a_loss_a_token(name):
    args, batch, _ = batch_of("one chunk")
    each, summed = (ours(name, args, batch, (), reduction=reduction)[0]["loss"] for reduction in ("none", "sum"))
    assert each.shape == batch["mask"].shape
    torch.testing.assert_close(each.sum(), summed)


def test_on_policy_and_logps_of_the_output():
    args, batch, workspace = batch_of("several chunks")
    out = linear_policy_loss(**args, advantages=batch["advantages"], loss_type="grpo", **workspace)
    expected = true_outputs(args["hidden"].double(), args["weight"].double(), args["targets"])
    torch.testing.assert_close(out.logps.double(), expected["logps"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.entropy.double(), expected["entropy"], rtol=1e-5, atol=1e-5)
    assert out.metrics["policy/approxkl_avg"] == 0


@pytest.mark.parametrize("trained", HEADS)
def test_a_gradient_may_reach_logps_and_entropy_too(trained):
    args, batch, workspace = batch_of("several chunks")

    def loss(of_loss, **leaves):
        given = {"advantages": batch["advantages"], "old_logps": batch["old_logps"]}
        out = linear_policy_loss(**leaves, **given, **workspace)
        return {"loss": of_loss * out.loss + (out.logps.exp() * out.entropy).mean()}

    def true(hidden, weight, targets):
        found = true_outputs(hidden, weight, targets)
        own = true_loss("ppo", found["logps"], batch)
        return {"loss": 1.3 * own + (found["logps"].exp() * found["entropy"]).mean()}

    grads = {"loss": torch.tensor(0.7)}
    got = run(lambda **leaves: loss(1.3, **leaves), args, grads=grads, trained=HEADS[trained])
    expected = run(true, args, grads=grads, trained=HEADS[trained], dtype=torch.float64)
    for key, gradient in got[1].items():
        assert_gradient(gradient, expected[1][key])


@pytest.mark.parametrize("trained", HEADS)
@pytest.mark.parametrize("workspace", [None, MIB])
def test_nothing_live_is_zero_not_nan(trained, workspace):
    args = head(12, 8, 2053, ignored=0.0)
    args = {"hidden": args["hidden"].view(3, 4, 8) * torch.nan, "weight": args["weight"]}
    args["targets"] = torch.full((3, 4), IGNORE)
    for b in (3, 0):
        few = {**args, "hidden": args["hidden"][:b], "targets": args["targets"][:b]}
        leaves = {key: few[key].clone().requires_grad_() for key in HEADS[trained]}
        out = linear_policy_loss(**{**few, **leaves}, advantages=torch.ones(b), loss_type="gspo", workspace=workspace)
        out.loss.backward()
        assert out.loss == 0 and all(bool((x.grad == 0).all()) for x in leaves.values())


def test_refuses_in_its_own_name():
    args, _batch, _ = batch_of("one chunk")
    with pytest.raises(ValueError, match=r"^linear_policy_loss: advantages must be \(5,\), one a sequence, or"):
        linear_policy_loss(**args, advantages=torch.ones(4))
    with pytest.raises(TypeError, match=r"^linear_policy_loss: 'beta' is no option of ppo"):
        linear_policy_loss(**args, advantages=torch.ones(5), beta=0.1)
    flat = {**args, "hidden": args["hidden"].flatten(0, 1), "targets": args["targets"].flatten()}
    with pytest.raises(ValueError, match=r"^linear_policy_loss: packed targets \(N,\) needs cu_seqlens"):
        linear_policy_loss(**flat, advantages=torch.ones(45))


N, H, V = 144, 16, 2053


def policy_call(name, trained, *, share=1.0, **options):
    """A call, forward and backward; a share of the sequences has an advantage."""
    args = head(N, H, V, ignored=0.0)
    hidden, targets = args["hidden"].view(16, -1, H), args["targets"].view(16, -1)
    leaves = {"hidden": hidden, "weight": args["weight"]}
    leaves = {key: x.requires_grad_(key in trained) for key, x in leaves.items()}
    advantages = (torch.arange(16) < share * 16).float() * (1 + torch.arange(16))
    loss_type, own, reduction = OPTIONS[name]
    own = {**own, "max_length": MAX_LENGTH} if reduction == "constant" else own

    def call():
        given = {"advantages": advantages, "loss_type": loss_type, "backend": "torch"}
        linear_policy_loss(**leaves, targets=targets, **given, **own, **options).loss.backward()

    return call


@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
@pytest.mark.parametrize("workspace", [None, MIB])
@pytest.mark.parametrize("name", ["ppo", "gspo"])  # one that couples tokens, one that couples sequences
@pytest.mark.parametrize(("trained", "passes"), [("frozen", 2), ("trained", 3)])
def test_measured_passes(name, trained, passes, workspace, entropy_coef):
    call = policy_call(name, HEADS[trained], workspace=workspace, entropy_coef=entropy_coef)
    assert measured_passes(call, 2 * N * H * V) == pytest.approx(passes, rel=1e-6)


@pytest.mark.parametrize("workspace", [None, MIB])
@pytest.mark.parametrize(("trained", "passes"), [("frozen", 1.25), ("trained", 1.5)])
def test_tokens_without_an_advantage_cost_one_pass(trained, passes, workspace):
    measured = measured_passes(policy_call("ppo", HEADS[trained], workspace=workspace, share=0.25), 2 * N * H * V)
    # a chunk that holds only a few dead rows keeps them
    assert measured >= passes - 1e-6 and measured <= passes + (1e-6 if workspace is None else 0.2)


def test_passes_without_room_for_the_copy():
    call = policy_call("ppo", HEADS["trained"], workspace=MIB, max_extra_bytes=0)
    assert measured_passes(call, 2 * N * H * V) == pytest.approx(4, rel=1e-6)
