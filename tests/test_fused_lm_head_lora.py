"""fused_lm_head where the head carries LoRA, and above a backbone that is quantised: against autograd on the logits."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastpref import linear_logps, linear_policy_loss, linear_preference_loss

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from fastpref.integrations.transformers import fused_lm_head  # noqa: E402
from tests.test_fused_lm_head import V, gradients, lora, tiny, tokens  # noqa: E402

ON_HEAD = {"target_modules": ["q_proj", "lm_head"], "r": 3, "lora_alpha": 5}


def targets():
    y = tokens(4, seed=1)
    y[:, :2] = -100
    return y


def eager_loss(model):
    """DPO without a reference on the logits of the model's own forward."""
    logits = model(input_ids=tokens(4), use_cache=False).logits.float()
    chosen, rejected = F.cross_entropy(logits.mT, targets(), reduction="none").neg().sum(1).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def fused_loss(model):
    head = partial(linear_preference_loss, targets=targets(), reference_free=True)
    return model(input_ids=tokens(4), head=head).loss


def assert_as_eager(model, plain, tolerance=1e-5):
    expected, actual = eager_loss(plain), fused_loss(model)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    expected.backward()
    actual.backward()
    want, got = gradients(plain), gradients(model)
    assert got.keys() == want.keys() and any("lm_head" in name for name in want)
    for name, g in want.items():
        error = (got[name] - g).norm() / g.norm()
        assert error <= 10 * tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite", "phi"])
@pytest.mark.parametrize("first", ["fuse", "peft"])
def test_lora_on_the_head(model_type, first):
    """With a softcap, a scale and a bias as well; only its two matrices get gradients."""
    modules = {"phi": ["q_proj", "lm_head"]}.get(model_type, ON_HEAD["target_modules"])
    options = {**ON_HEAD, "target_modules": modules}
    fused = fused_lm_head(tiny(model_type)) if first == "fuse" else tiny(model_type)
    model = lora(fused, **options)
    if first == "peft":
        fused_lm_head(model)
    plain = lora(tiny(model_type), **options)
    assert_as_eager(model, plain)
    assert {n.split(".")[-3] for n in gradients(model) if "lm_head" in n} == {"lora_A", "lora_B"}
    torch.testing.assert_close(model(input_ids=tokens()).logits, plain(input_ids=tokens()).logits)


def test_two_adapters_one_disabled_one_merged():
    models = []
    for make in (lambda: fused_lm_head(tiny()), tiny):
        model = lora(make(), **ON_HEAD)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            model.add_adapter("other", peft.LoraConfig(init_lora_weights=False, **{**ON_HEAD, "r": 5}))
        models.append(model)
    model, plain = models
    for one in models:
        one.base_model.set_adapter(["default", "other"])
    assert_as_eager(model, plain)
    with model.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(fused_loss(model), eager_loss(plain))
    for one in models:
        one.merge_adapter()
    torch.testing.assert_close(fused_loss(model), eager_loss(plain), rtol=1e-5, atol=1e-5)


def test_dropout_of_the_adapter():
    model, plain = (lora(make(tiny()), **ON_HEAD, lora_dropout=0.5) for make in (fused_lm_head, lambda m: m))
    losses = []
    for one, loss_of in ((model, fused_loss), (plain, eager_loss)):
        one.get_output_embeddings().train()  # its dropout alone: both draw the same numbers
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            losses.append(loss_of(one))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    assert abs(losses[0] - fused_loss(model.eval())) > 1e-3


def test_lora_on_a_bfloat16_head():
    """PEFT keeps the two matrices in fp32."""
    model = lora(fused_lm_head(tiny().to(torch.bfloat16)), **ON_HEAD)
    plain = lora(tiny().to(torch.bfloat16), **ON_HEAD)
    assert model.get_output_embeddings().lora_A["default"].weight.dtype == torch.float32
    assert_as_eager(model, plain, tolerance=3e-2)  # eager rounds its logits, up to 100, to bf16


def test_what_is_more_than_low_rank_is_refused():
    with pytest.raises(
        ValueError, match=r"the LM head of LlamaForCausalLM has an adapter that is more than two matrices"
    ):
        fused_lm_head(lora(tiny(), **ON_HEAD, use_dora=True))
    with pytest.raises(ValueError, match="has an adapter with a bias"):
        fused_lm_head(lora(tiny(), **ON_HEAD, lora_bias=True))
    later = peft.get_peft_model(
        fused_lm_head(tiny()), peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[])
    )
    with pytest.raises(ValueError, match=r"is adapted by Linear.*leave it out of target_modules"):
        fused_loss(later)


class Int8Linear(nn.Module):
    """A stand-in for bitsandbytes, which is not a dependency: int8 rows with a scale, no parameter but buffers."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight_int8", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return F.linear(x, (self.weight_int8 * self.scale).to(x.dtype))


def test_quantised_backbone_under_a_16_bit_head():
    """QLoRA's shape: integers below, adapters on them in fp32, a head in bf16."""

    def quantised():
        model = tiny().to(torch.bfloat16)
        for layer in model.model.layers:
            layer.mlp.down_proj = Int8Linear(layer.mlp.down_proj)
            layer.self_attn.k_proj = Int8Linear(layer.self_attn.k_proj)
        return model

    model, plain = lora(fused_lm_head(quantised())), lora(quantised())
    expected, actual = eager_loss(plain), fused_loss(model)
    torch.testing.assert_close(actual, expected, rtol=3e-2, atol=3e-2)
    actual.backward()
    assert any("lora_A" in name for name in gradients(model))
    model.get_base_model().lm_head = Int8Linear(nn.Linear(32, V))
    with pytest.raises(ValueError, match=r"must be an nn.Linear with its own forward; got Int8Linear"):
        fused_loss(model)


@pytest.mark.parametrize("on_head", [False, True])
def test_lora_training_step_compiled_whole(on_head):
    """Forward, loss and backward of a step in torch.compile; in one graph where the head carries no adapter."""
    options = ON_HEAD if on_head else {}
    model, plain = lora(fused_lm_head(tiny()), **options), lora(fused_lm_head(tiny()), **options)
    advantages = torch.tensor([0.5, -1.0, 1.5, -0.3])

    input_ids, y = tokens(4), targets()

    def step(one):
        head = partial(linear_policy_loss, targets=y, advantages=advantages)
        return one(input_ids=input_ids, head=head).loss

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=not on_head)
    expected, actual = step(plain), compiled(model)
    torch.testing.assert_close(actual, expected)
    expected.backward()
    actual.backward()
    want, got = gradients(plain), gradients(model)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6)


def test_token_outputs_of_an_adapted_head():
    model = lora(fused_lm_head(tiny()), **ON_HEAD)
    found = model(input_ids=tokens(4), head=partial(linear_logps, targets=targets(), outputs=("entropy",)))
    every = model(input_ids=tokens(4)).logits.float().log_softmax(-1)
    live = targets() != -100
    torch.testing.assert_close(found.entropy[live], -(every.exp() * every).sum(-1)[live], rtol=1e-4, atol=1e-5)
