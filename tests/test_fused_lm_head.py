"""fused_lm_head: `head` must get the hidden and weight of the model's own logits, and nothing else may change."""

import copy
import inspect
import pickle
import re
import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastpref

transformers = pytest.importorskip("transformers")

from fastpref.integrations.transformers import FusedLinear, HeadOutput, fused_lm_head  # noqa: E402

V = 67  # no multiple of anything
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
LLAMA_LIKE = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
GPT_LIKE = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MOE = {**LLAMA_LIKE, "num_experts_per_tok": 2}
# Falcon-H1's Mamba half, in small
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}

# model type: (configuration, head options it must be found to have)
ARCHITECTURES: dict[str, tuple[dict, set[str]]] = {
    "llama": (LLAMA_LIKE, set()),
    "mistral": (LLAMA_LIKE, set()),
    "qwen2": (LLAMA_LIKE, set()),
    "qwen3": (LLAMA_LIKE, set()),
    "smollm3": (LLAMA_LIKE, set()),
    "olmo2": (LLAMA_LIKE, set()),
    "phi3": (LLAMA_LIKE, set()),
    "stablelm": (LLAMA_LIKE, set()),
    "starcoder2": (LLAMA_LIKE, set()),
    "glm4": (LLAMA_LIKE, set()),
    "phi": (LLAMA_LIKE, {"bias"}),
    "gemma": (LLAMA_LIKE, set()),
    "gemma2": ({**LLAMA_LIKE, "final_logit_softcapping": 30.0}, {"softcap"}),
    "gemma3_text": (LLAMA_LIKE, set()),
    "nanochat": ({**LLAMA_LIKE, "final_logit_softcapping": 15.0}, {"softcap"}),
    "recurrent_gemma": ({**SIZES, "intermediate_size": 48, "logits_soft_cap": 30.0}, {"softcap"}),
    "cohere": ({**LLAMA_LIKE, "logit_scale": 0.25}, {"logit_scale"}),
    "granite": ({**LLAMA_LIKE, "logits_scaling": 8.0}, {"logit_scale"}),
    "falcon_h1": ({**LLAMA_LIKE, **MAMBA, "lm_head_multiplier": 0.5}, {"logit_scale"}),
    "gpt2": (GPT_LIKE, set()),
    "gptj": ({**GPT_LIKE, "rotary_dim": 4}, {"bias"}),
    "gpt_bigcode": (GPT_LIKE, set()),
    "gpt_neox": ({**SIZES, "intermediate_size": 48}, set()),
    "opt": ({**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16}, set()),  # its last hidden state is projected to 16
    "bloom": ({"vocab_size": V, "hidden_size": 32, "n_layer": 2, "n_head": 4}, set()),
    "mamba": ({**SIZES, "state_size": 8}, set()),
    "mixtral": ({**MOE, "num_local_experts": 4}, set()),
    "qwen3_moe": ({**MOE, "num_experts": 4, "moe_intermediate_size": 16}, set()),
    "granitemoe": ({**MOE, "num_local_experts": 4, "logits_scaling": 8.0}, {"logit_scale"}),
    "llama4_text": ({**MOE, "num_local_experts": 4, "intermediate_size_mlp": 48, "attention_chunk_size": 64}, set()),
    "gpt_oss": ({**MOE, "num_local_experts": 4}, set()),
    "cohere2": ({**LLAMA_LIKE, "logit_scale": 0.25}, {"logit_scale"}),
    "falcon": (SIZES, set()),
    "olmo": (LLAMA_LIKE, set()),
    "olmo3": (LLAMA_LIKE, set()),
    "nemotron": (LLAMA_LIKE, set()),
    "ernie4_5": (LLAMA_LIKE, set()),
    "lfm2": (LLAMA_LIKE, set()),
    "codegen": ({**GPT_LIKE, "rotary_dim": 4}, {"bias"}),
    "mpt": ({"vocab_size": V, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 32}, set()),
}


def tiny(model_type="llama", seed=0, **options):
    """A random model in eval mode, its head scaled up to logits that a softcap bends, its bias random."""
    config = transformers.AutoConfig.for_model(model_type, **{**ARCHITECTURES[model_type][0], **SPECIAL, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            head = model.get_output_embeddings()
            head.weight.mul_(30.0)
            if head.bias is not None:
                head.bias.normal_()
    return model


def tokens(batch=2, length=7, seed=0):
    return torch.randint(3, V, (batch, length), generator=torch.Generator().manual_seed(seed))


def own_logits(model, input_ids):
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=False).logits


def logits_of(hidden, weight, bias=None, logit_scale=1.0, softcap=None):
    logits = logit_scale * F.linear(hidden, weight, bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


FACTORS = torch.randn(100, generator=torch.Generator().manual_seed(7))


def random_loss(hidden, weight, targets, **options):
    """A loss with another factor on every token: log-probs of the targets, weighted."""
    logps = -F.cross_entropy(logits_of(hidden, weight, **options).flatten(0, 1), targets.flatten(), reduction="none")
    return logps @ FACTORS[: logps.numel()]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_head_gets_the_models_own_logits(model_type):
    model = tiny(model_type)
    before = own_logits(model, tokens())
    assert fused_lm_head(model) is model
    assert torch.equal(own_logits(model, tokens()), before)
    options = {}

    def head(hidden, weight, **found):
        options.update(found)
        return logits_of(hidden, weight, **found)

    with torch.no_grad():
        logits = model(tokens(), head=head)
    assert (logits - before).abs().max() <= 1e-5 * before.abs().max()
    assert set(options) == ARCHITECTURES[model_type][1]


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite", "mixtral", "mamba"])
def test_bfloat16_model_is_recognised(model_type):
    model = tiny(model_type).to(torch.bfloat16)  # Mamba then ends in float32
    expected = own_logits(model, tokens())
    logits = fused_lm_head(model)(tokens(), head=logits_of)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected.float(), rtol=2**-7, atol=0.05)


def test_tied_weight_gets_both_gradients():
    model, targets = tiny(tie_word_embeddings=True), tokens(seed=1)
    random_loss(model.model(tokens())[0], model.lm_head.weight, targets).backward()
    expected = gradients(model)
    model.zero_grad()
    fused_lm_head(model)
    model(tokens(), head=partial(random_loss, targets=targets)).backward()
    assert "model.embed_tokens.weight" in expected and "lm_head.weight" not in expected
    assert_same_gradients(gradients(model), expected)


def test_positional_masked_and_padded_arguments_reach_the_base_model():
    model = fused_lm_head(tiny("gpt2"))  # past_key_values is its second argument
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    expected = model(input_ids=tokens(), attention_mask=mask).logits
    torch.testing.assert_close(model(tokens(), None, mask, head=logits_of), expected)
    with pytest.raises(TypeError, match="given twice"):
        model(tokens(), input_ids=tokens(), head=logits_of)


def test_no_cache_is_made_under_head(monkeypatch):
    model = fused_lm_head(tiny())
    seen = []
    forward = type(model.model).forward

    def spy(self, *args, **kwargs):
        seen.append(kwargs["use_cache"])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", spy)
    for given in ({}, {"use_cache": None}, {"use_cache": True}):
        model(tokens(), head=logits_of, **given)
    assert seen == [False, False, True]


def test_generate_and_what_others_inspect_stay_as_they_were():
    model, plain = fused_lm_head(tiny()), tiny()
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert type(model).__name__ == type(plain).__name__ and isinstance(model, type(plain))
    assert list(model.state_dict()) == list(plain.state_dict())
    generated = [m.generate(tokens(), max_new_tokens=5, do_sample=False) for m in (model, plain)]
    assert torch.equal(*generated)


def test_fusing_twice_changes_nothing():
    model = fused_lm_head(tiny())
    cls = type(model)
    assert fused_lm_head(model) is model and type(model) is cls


def test_check_leaves_modes_and_random_state_alone():
    model = tiny()
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    fused_lm_head(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copy_runs_on_its_own_weights(clone):
    model = fused_lm_head(tiny())
    expected = own_logits(model, tokens())
    twin = clone(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        torch.testing.assert_close(twin(tokens(), head=logits_of), expected, rtol=0, atol=1e-5)


def test_save_and_load(tmp_path):
    model = fused_lm_head(tiny())
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert torch.equal(own_logits(loaded, tokens()), own_logits(model, tokens()))


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss"])
def test_router_loss_comes_with_the_result(model_type):
    sizes = {**MOE, "num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 16}
    sizes |= {"shared_expert_intermediate_size": 16}
    config = transformers.AutoConfig.for_model(model_type, **sizes, **SPECIAL)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    expected = model(input_ids=tokens(), attention_mask=mask, output_router_logits=True)
    fused_lm_head(model)
    arguments = {"input_ids": tokens(), "attention_mask": mask, "head": logits_of}
    output = model(**arguments, output_router_logits=True)
    assert isinstance(output, HeadOutput)
    torch.testing.assert_close(output.aux_loss, expected.aux_loss)
    torch.testing.assert_close(output.result, expected.logits)
    assert output.aux_loss.requires_grad
    assert isinstance(model(**arguments), torch.Tensor)
    model.config.output_router_logits = True
    assert torch.equal(model(**arguments).aux_loss, output.aux_loss)


def test_unknown_router_loss_is_refused():
    with pytest.raises(ValueError, match="output_router_logits with head wants a model whose router loss"):
        fused_lm_head(tiny())(tokens(), head=logits_of, output_router_logits=True)


def lora(model, **options):
    peft = pytest.importorskip("peft")
    chosen = {"r": 2, "init_lora_weights": False, "target_modules": ["q_proj", "v_proj"], **options}
    config = peft.LoraConfig(**chosen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}], ids=["lora", "saved head"])
@pytest.mark.parametrize("first", ["fuse", "peft"])
def test_peft_before_and_after(first, options):
    model = lora(fused_lm_head(tiny()), **options) if first == "fuse" else fused_lm_head(lora(tiny(), **options))
    plain, targets = lora(tiny(), **options), tokens(seed=1)
    for peft_model in (model, plain):
        if options:  # the copy that trains is the one that must be read
            peft_model.get_output_embeddings().modules_to_save["default"].weight.data.mul_(1.5)
    torch.testing.assert_close(model(input_ids=tokens(), head=logits_of), own_logits(plain, tokens()))
    model(input_ids=tokens(), head=partial(random_loss, targets=targets)).backward()
    random_loss(plain.get_base_model().model(tokens())[0], read_weight(plain), targets).backward()
    assert_same_gradients(gradients(model), gradients(plain))
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=tokens(), head=logits_of), own_logits(tiny(), tokens()))


def read_weight(peft_model):
    head = peft_model.get_output_embeddings()
    return head.modules_to_save["default"].weight if hasattr(head, "modules_to_save") else head.weight


def test_gradient_checkpointing():
    model, targets = fused_lm_head(tiny()).train(), tokens(seed=1)
    model(tokens(), head=partial(random_loss, targets=targets)).backward()
    expected = gradients(model)
    model.zero_grad()
    calls = []
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable()
    model(tokens(), head=partial(random_loss, targets=targets)).backward()
    assert len(calls) == 2  # once more in backward
    assert_same_gradients(gradients(model), expected)


def test_head_that_is_whole_only_between_the_hooks_of_its_module():
    """As under ZeRO-3: DeepSpeed, which is not a dependency, fills and empties each layer's parameters so."""
    model, targets = fused_lm_head(tiny()), tokens(seed=1)
    head = partial(fastpref.linear_logps, targets=targets)
    model(tokens(), head=head).sum().backward()
    expected = gradients(model)
    model.zero_grad()
    whole, weight = model.lm_head.weight.data, model.lm_head.weight

    def fill(*_):
        weight.data = whole

    def empty(*_):
        weight.data = whole.new_empty(0)

    model.lm_head.register_forward_pre_hook(fill)
    model.lm_head.register_forward_hook(empty)
    model.lm_head.register_full_backward_pre_hook(fill)
    empty()
    model(tokens(), head=head).sum().backward()
    assert_same_gradients(gradients(model), expected)


def test_compiles_into_one_graph():
    model, targets = fused_lm_head(tiny()), tokens(seed=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = model(tokens(), head=partial(random_loss, targets=targets))
    torch.testing.assert_close(compiled(tokens(), head=lambda h, w, **o: random_loss(h, w, targets, **o)), expected)


def test_accelerate_autocasts_the_head_and_unwraps_to_it():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    try:
        prepared = accelerator.prepare_model(fused_lm_head(tiny()))

        def head(hidden, weight):
            assert torch.is_autocast_enabled("cpu")
            return F.linear(hidden, weight)

        assert prepared(tokens(), head=head).dtype == torch.float32  # computed in bf16, and returned so by accelerate
        with pytest.raises(ValueError, match="forward of LlamaForCausalLM was replaced on the instance"):
            fused_lm_head(accelerator.prepare_model(tiny()))
        unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        torch.testing.assert_close(unwrapped(tokens(), head=logits_of), own_logits(tiny(), tokens()))
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_model_on_meta_device_is_fused_unchecked():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_LIKE))
    fused_lm_head(model)
    model.to_empty(device="cpu").load_state_dict(tiny().state_dict())
    model.model.rotary_emb = tiny().model.rotary_emb  # its buffer is not in a state dict
    torch.testing.assert_close(model.eval()(tokens(), head=logits_of), own_logits(tiny(), tokens()))


def test_replaced_head_needs_fusing_again():
    model = fused_lm_head(tiny())
    model.resize_token_embeddings(V + 5)
    with pytest.raises(ValueError, match="call fused_lm_head again"):
        model(tokens(), head=logits_of)
    assert fused_lm_head(model)(tokens(), head=logits_of).shape == (2, 7, V + 5)


@pytest.mark.parametrize("head", ["sigmoid", 3, {}])
def test_head_must_be_callable(head):
    with pytest.raises(TypeError, match=r"LlamaForCausalLM.forward: head must be a function .* got"):
        fused_lm_head(tiny())(tokens(), head=head)


@pytest.mark.parametrize("name, value", [("labels", tokens()), ("logits_to_keep", 2), ("logits_to_keep", tokens()[0])])
def test_arguments_that_head_replaces_are_refused(name, value):
    model = fused_lm_head(tiny())
    with pytest.raises(TypeError, match=f"{name} cannot be given with head"):
        model(tokens(), head=logits_of, **{name: value})
    model(tokens(), head=logits_of, labels=None, logits_to_keep=0, return_dict=True)


class DoubledLogits(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


class BentLogits(transformers.LlamaForCausalLM):
    """A softcap of 200 under another name: 5e-6 of these random logits, 8 % of logits of 100."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 200 * torch.tanh(output.logits / 200)
        return output


class ScaledHidden(transformers.LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.lm_head.register_forward_pre_hook(lambda module, args: (args[0] / 2,))


class HeadlessLogits(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = self.model(*args, **kwargs)
        return output[0] @ self.lm_head.weight.T, output


@pytest.mark.parametrize(
    "cls, why",
    [
        (DoubledLogits, "its logits are not its LM head's with the options in its config"),
        (BentLogits, "its logits are not its LM head's with the options in its config"),
        (ScaledHidden, "what reaches its LM head is not its base model's last hidden state"),
        (HeadlessLogits, "what reaches its LM head is not its base model's last hidden state"),
    ],
)
def test_unknown_logits_are_refused_and_the_model_left_alone(cls, why):
    model = cls(transformers.LlamaConfig(**LLAMA_LIKE))
    with pytest.raises(ValueError, match=f"the logits of {cls.__name__} must be .*{why}"):
        fused_lm_head(model)
    assert type(model) is cls and type(model.lm_head) is nn.Linear


def test_what_is_no_causal_lm_is_refused():
    llama = transformers.LlamaConfig(**LLAMA_LIKE)
    with pytest.raises(TypeError, match=r"must be a transformers causal LM .* got Linear"):
        fused_lm_head(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got Wrapped"):
        fused_lm_head(type("Wrapped", (nn.Sequential,), {})(tiny()))
    for model in (transformers.LlamaModel(llama), transformers.LlamaForSequenceClassification(llama)):
        with pytest.raises(ValueError, match=f"got {type(model).__name__}, which is not a decoder under an LM head"):
            fused_lm_head(model)
    t5 = transformers.T5Config(vocab_size=V, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="got T5ForConditionalGeneration, which is not a decoder"):
        fused_lm_head(transformers.T5ForConditionalGeneration(t5))
    model = tiny()
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match=r"must be an nn.Linear with its own forward; got Sequential"):
        fused_lm_head(model)


def test_fused_linear_is_a_linear():
    linear, x = FusedLinear(5, 3), torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))
    assert linear(x, head=lambda *a, **k: (a, k), beta=2) == ((x, linear.weight), {"beta": 2, "bias": linear.bias})


def test_importing_does_not_import_transformers():
    code = "import sys, fastpref.integrations.transformers as t; assert 'transformers' not in sys.modules, 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_docstring_example_runs(monkeypatch):
    linear_preference_loss = pytest.importorskip("fastpref").linear_preference_loss
    example = re.search(r"\n\n((?: {8}.+\n)+)", fused_lm_head.__doc__).group(1)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: tiny())
    names = {"partial": partial, "torch": torch, "AutoModelForCausalLM": transformers.AutoModelForCausalLM, "name": ""}
    names |= {"linear_preference_loss": linear_preference_loss, "fused_lm_head": fused_lm_head}
    names |= {
        "input_ids": tokens(4),
        "attention_mask": torch.ones_like(tokens(4)),
        "ref_logps": torch.full((4,), -20.0),
    }
    names |= {"completion_mask": torch.arange(7).expand(4, 7) >= 3}
    exec(textwrap.dedent(example), names)
    assert all(p.grad is not None for p in names["model"].parameters())
