"""Packed rows with shared prompts against each answer run alone: states, log-probabilities and all gradients."""

import ctypes
import json
import subprocess
import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import transformers
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from fastpref import fused_lm_head, linear_logps
from fastpref.trainer.packing import Packed, enable_packing, pack, through_rows
from fastpref.trainer.start import keep_products
from tests.test_fused_lm_head import ARCHITECTURES, tiny

# a prompt longer, and one shorter, than its second completion take two forms of attention; no prompt; one token
LONG, SHORT = [3, 4, 5, 6, 7, 8, 9, 10], [22, 23]
SEQUENCES = [
    (LONG, [11, 12, 13]),
    ([], [16, 17]),
    (SHORT, [24]),
    (LONG, [14, 15]),
    ([], [18, 19, 20, 21]),
    (SHORT, [25, 26, 27, 28, 29, 30, 31]),
    (LONG, [40]),
]
N_TARGETS = 18
WINDOW = {"sliding_window": 4}
MODELS = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, **WINDOW},  # a layer of either kind
    "qwen3": {},
    "mistral": WINDOW,
    "gemma2": {"attn_logit_softcapping": 2.0, **WINDOW},
    "gemma3_text": WINDOW,
    "gpt2": {},
    "gpt_neox": {},
    "opt": {},
    "phi3": {},
    "mixtral": {},
}


def loud(name: str, **options: object) -> torch.nn.Module:
    """A model of `tiny` in which a token that should not be seen shows."""
    dropout = {key: 0.0 for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "attention_dropout")}
    model = fused_lm_head(tiny(name, **{**MODELS.get(name, {}), **options}, **dropout))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.base_model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3, generator=generator)
    return model


def upstream() -> Tensor:
    return torch.randn(N_TARGETS, generator=torch.Generator().manual_seed(2))


def head(hidden: Tensor, weight: Tensor, targets: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    logps = linear_logps(hidden, weight, targets, **options)
    return (logps * upstream()).sum(), logps


def padded(sequences: list[tuple[list[int], list[int]]]) -> Packed:
    """The same sequences a row each, with a prompt of their own, padded on the right."""
    longest = max(len(prompt + completion) for prompt, completion in sequences)
    packed = pack(sequences)
    input_ids, attention_mask = torch.zeros(2, len(sequences), longest, dtype=torch.long)
    rows = []
    for i, (prompt, completion) in enumerate(sequences):
        ids = prompt + completion
        input_ids[i, : len(ids)], attention_mask[i, : len(ids)] = torch.tensor(ids), 1
        rows += range(i * longest + max(len(prompt), 1) - 1, i * longest + len(ids) - 1)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    return Packed(inputs, packed.targets, torch.tensor(rows), packed.cu_seqlens, ())


def gradients(model: torch.nn.Module) -> Tensor:
    found = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def run(model: torch.nn.Module, batch: Packed) -> tuple[Tensor, Tensor]:
    """(log-probabilities, all gradients)."""
    loss, logps = through_rows(model, batch, head)
    loss.backward()
    return logps.detach(), gradients(model)


def run_alone(model: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """The same, a sequence at a time from the model's own logits: no padding, no mask, no position ids."""
    found, weights = [], iter(upstream())
    for prompt, completion in SEQUENCES:
        ids = prompt + completion
        logps = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        found.append(torch.stack([logps[t - 1, ids[t]] for t in range(max(len(prompt), 1), len(ids))]))
        (found[-1] * torch.stack([next(weights) for _ in found[-1]])).sum().backward()
    return torch.cat(found).detach(), gradients(model)


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = 2e-5) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).norm() <= tolerance * e.norm(), f"{(a - e).norm() / e.norm():.1e}"


def test_layout():
    a, b, c, d = [1, 2], [3], [4, 5], [6, 7, 8]
    batch = pack([(a, b), ([], d), (a, c)])
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 2, 3, 0, 1, 2]]
    # both first tokens are predicted by the prompt's last row; without a prompt the first is predicted by none
    assert batch.targets.tolist() == [3, 7, 8, 4, 5]
    assert batch.rows.tolist() == [1, 5, 6, 1, 3]
    assert batch.cu_seqlens.tolist() == [0, 1, 3, 5]
    assert batch.cu_seqlens.dtype == torch.int32
    apart = pack([(a, b), ([], d), (a, c)], share=False)
    assert apart.inputs["input_ids"].tolist() == [[1, 2, 3, 6, 7, 8, 1, 2, 4, 5]]
    assert apart.targets.equal(batch.targets)
    assert apart.rows.tolist() == [1, 3, 4, 7, 8]


@pytest.mark.parametrize("name", MODELS)
def test_packed_is_each_sequence_alone(name):
    model = loud(name)
    expected = run_alone(model)
    assert_same(run(model, padded(SEQUENCES)), expected)
    assert enable_packing(model) is None
    assert_same(run(model, pack(SEQUENCES)), expected)
    assert_same(run(model, pack(SEQUENCES, share=False)), expected)
    # and unpacked it still does what it did
    assert_same(run(model, padded(SEQUENCES)), expected)
    assert_same(run_alone(model), expected)


def flops_of_backward(model: torch.nn.Module) -> tuple[int, tuple[Tensor, Tensor]]:
    """(products in the backward pass, recomputed ones among them; log-probabilities and gradients)."""
    loss, logps = through_rows(model, pack(SEQUENCES), head)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return counter.get_total_flops(), (logps.detach(), gradients(model))


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_under_checkpointing(name):
    model = loud(name).train()
    expected = run_alone(model)
    assert enable_packing(model) is None
    assert model.training
    least, _ = flops_of_backward(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    most, found = flops_of_backward(model)
    assert_same(found, expected)
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": keep_products})
    some, found = flops_of_backward(model)
    assert_same(found, expected)
    assert some == least < most


def test_freed_memory_stays():
    if not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        pytest.skip("this libc is not glibc")
    code = """
import torch
from fastpref.trainer.start import keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

keep_freed_memory()
before = resident()
for _ in range(3):
    x = [torch.ones(2**20) for _ in range(32)]
    del x
print(resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.9 * 2**27 < int(done.stdout) < 1.5 * 2**27


def test_under_autocast():
    model = loud("llama")
    truth = run_alone(model)
    with torch.autocast("cpu", torch.bfloat16):
        plain = run(model, padded(SEQUENCES))
        assert enable_packing(model) is None
        packed = run(model, pack(SEQUENCES))
    for ours, theirs, true in zip(packed, plain, truth, strict=True):
        assert (ours - true).norm() <= 1.5 * (theirs - true).norm()


def test_under_lora_and_ddp(tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.0)
    model = peft.get_peft_model(loud("llama"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    expected = run(model, padded(SEQUENCES))
    assert enable_packing(model) is None
    assert_same(run(model, pack(SEQUENCES)), expected)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert_same(run(DistributedDataParallel(model), pack(SEQUENCES)), expected)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_generates_as_before(name):
    model = loud(name)
    prompts = {"input_ids": torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])}
    prompts["attention_mask"] = (prompts["input_ids"] != 0).long()
    before = model.generate(**prompts, max_new_tokens=8, do_sample=False)
    assert enable_packing(model) is None
    assert model.generate(**prompts, max_new_tokens=8, do_sample=False).equal(before)


def test_saved_model_is_plain(tmp_path):
    model = loud("llama")
    assert enable_packing(model) is None
    model.save_pretrained(tmp_path)
    assert "fastpref" not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def ignores_positions(model: torch.nn.Module) -> torch.nn.Module:
    rotate = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: rotate(x, torch.arange(x.shape[1])[None])
    return model


def one_answer_sees_the_other(model: torch.nn.Module) -> torch.nn.Module:
    """A running mean over the row, as a state-space layer has."""
    layer = model.model.layers[0].mlp
    forward = layer.forward
    layer.forward = lambda x: forward(x) + x.cumsum(1)
    return model


@pytest.mark.parametrize(
    ("name", "options", "change", "reason"),
    [
        ("bloom", {}, None, "attention interface"),
        ("mamba", {}, None, "packed row"),
        ("llama", {}, ignores_positions, "packed row"),
        ("llama", {}, one_answer_sees_the_other, "packed row"),
        ("llama4_text", {"num_local_experts": 2, "attention_chunk_size": 64}, None, "sliding window"),
    ],
)
def test_refused_and_left_as_it_was(name, options, change, reason):
    if name == "llama4_text":
        sizes = {**ARCHITECTURES["llama"][0], **options, "pad_token_id": 0}
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(name, **sizes)).eval()
    else:
        model = loud(name, **options)
    model = model if change is None else change(model)
    ids = {"input_ids": torch.arange(3, 10)[None]}
    before, implementation = model(**ids).logits, model.config._attn_implementation
    assert reason in enable_packing(model)
    assert model.config._attn_implementation == implementation
    assert model(**ids).logits.equal(before)


def test_refused_under_another_attention():
    model = loud("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert enable_packing(model) == "its attention is flash_attention_2, and packing is by SDPA"


def test_dropout_still_drops():
    model = loud("llama").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert enable_packing(model) is None
    dropped = run(model, pack(SEQUENCES))[0]
    whole = run(model.eval(), pack(SEQUENCES))[0]
    assert (dropped - whole).norm() > 0.01 * whole.norm()


def test_refusals():
    with pytest.raises(ValueError, match="at least one; got none"):
        pack([])
    with pytest.raises(ValueError, match="at least one token; got an empty one"):
        pack([([1], [2]), ([1], [])])
