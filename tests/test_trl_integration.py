"""TRL's trainers with and without our head: the same curves, losses, gradients and metrics in fp32.

Tiny random models and a vocabulary of words, so that nothing is downloaded. The trainers' own code runs throughout.
"""

import copy
import importlib.metadata
import subprocess
import sys

import pytest
import torch

import fastpref.integrations.trl as ours

if not pytest.importorskip("trl", reason="TRL is not installed").__version__.startswith("1.16."):
    pytest.skip("the trainers are called as TRL 1.16 has them", allow_module_level=True)

import datasets
import peft
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.trainer import utils

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
V = 67
CURVE = 1e-4
# of TRL's logs, what depends on the clock
CLOCK = ("runtime", "per_second", "step_time", "flos")


def words(*numbers):
    return " ".join(f"w{n % (V - len(SPECIAL))}" for n in numbers)


def tokenizer():
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *(f"w{n}" for n in range(V - len(SPECIAL)))])}
    rules = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=rules, **names)


PAIRS = [
    {"prompt": words(i, i + 1), "chosen": " " + words(i + 2, *range(i % 4)), "rejected": " " + words(i + 5, i)}
    for i in range(12)
]
ROWS = {
    "dpo": PAIRS,
    "kto": [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in PAIRS
        for side in ("chosen", "rejected")
    ],
    "sft": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS],
    "grpo": [{"prompt": row["prompt"]} for row in PAIRS],
    "rloo": [{"prompt": row["prompt"]} for row in PAIRS],
}
SAMPLED = {"num_generations": 2, "max_completion_length": 5, "beta": 0.1, "temperature": 0.9}
TRAINERS = {
    "dpo": (DPOTrainer, DPOConfig, {}),
    "kto": (KTOTrainer, KTOConfig, {}),
    "sft": (SFTTrainer, SFTConfig, {}),
    "grpo": (GRPOTrainer, GRPOConfig, SAMPLED),
    "rloo": (RLOOTrainer, RLOOConfig, SAMPLED),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved random model: TRL loads its reference from where the policy came."""
    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, **special)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        model.lm_head.weight.data.mul_(20.0)  # a flat softmax would hide most mistakes
        model.save_pretrained(folder)
    return folder


def uneven(completions, **_):
    """A reward of what was sampled."""
    return [(len(text) * 7 % 11) / 5 - 1 for text in completions]


def trainer(kind, folder, tmp_path, *, lora=False, **options):
    cls, config, own = TRAINERS[kind]
    common = {"per_device_train_batch_size": 4, "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-2}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    args = config(output_dir=str(tmp_path), **{**common, **quiet, "bf16": False, "seed": 1, **own, **options})
    more = {"reward_funcs": uneven} if kind in ("grpo", "rloo") else {}
    if lora:
        more["peft_config"] = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(2)  # the adapter's start
    return cls(
        transformers.AutoModelForCausalLM.from_pretrained(folder),
        args=args,
        train_dataset=datasets.Dataset.from_list(ROWS[kind]),
        processing_class=tokenizer(),
        **more,
    )


def curves(run):
    with torch.random.fork_rng(devices=[]):
        run.train()
    return [
        {name: value for name, value in row.items() if not any(word in name for word in CLOCK)}
        for row in run.state.log_history
    ]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_same_curves(kind, lora, folder, tmp_path, monkeypatch):
    expected = curves(trainer(kind, folder, tmp_path, lora=lora))
    calls = []
    apply = ours.LogProbs.apply
    monkeypatch.setattr(ours.LogProbs, "apply", staticmethod(lambda *a: calls.append(a[0].shape[0]) or apply(*a)))
    with ours.patched():
        actual = curves(trainer(kind, folder, tmp_path, lora=lora))
    assert calls and len(actual) == len(expected) >= 4
    for a, b in zip(actual, expected, strict=True):
        assert a.keys() == b.keys()
        for name in b:
            assert a[name] == pytest.approx(b[name], rel=CURVE, abs=CURVE), (name, a, b)


def losses(run, inputs, **attributes):
    """(loss, gradients, metrics) of one batch through the trainer's own loss, with these of its attributes changed."""
    run = copy.copy(run)
    run._metrics = {mode: type(of)(list) for mode, of in run._metrics.items()}
    run.args = copy.copy(run.args)
    for name, value in attributes.items():
        where = run if hasattr(run, name) else run.args
        assert hasattr(where, name), name
        setattr(where, name, value)
    run.model.zero_grad()
    loss = run.compute_loss(run.model, copy.copy(inputs))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in run.model.named_parameters()}
    return loss.detach(), gradients, {name: values for name, values in run._metrics["train"].items() if values}


def assert_same(run, inputs, **attributes):
    expected = losses(run, inputs, **attributes)
    with ours.patched():
        actual = losses(run, inputs, **attributes)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-6)
    for name, g in expected[1].items():
        error = (actual[1][name] - g).norm() / g.norm().clamp(min=1e-6)
        assert error <= 1e-4, f"{name}: relative error {error:.1e}"
    assert actual[2].keys() == expected[2].keys()
    for name, values in expected[2].items():
        assert actual[2][name] == pytest.approx(values, rel=1e-5, abs=1e-5), name


def moved(run):
    """The policy some way from the reference and from what sampled, so that no ratio is 1."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in run.model.parameters():
            p += 0.05 * p.abs().mean() * torch.randn(p.shape, generator=generator)


@pytest.fixture(scope="module")
def pairs(folder, tmp_path_factory):
    run = trainer("dpo", folder, tmp_path_factory.mktemp("dpo"))
    moved(run)
    run.model.train()
    return run, next(iter(run.get_train_dataloader()))


PAIR_LOSSES = (
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft "
    "sigmoid_norm"
).split()


@pytest.mark.parametrize("loss_type", PAIR_LOSSES)
def test_every_loss_of_pairs(pairs, loss_type):
    smoothed = {"label_smoothing": 0.1} if loss_type in ("robust", "exo_pair", "aot", "aot_unpaired") else {}
    assert_same(*pairs, loss_types=[loss_type], loss_weights=[1.0], **smoothed)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
        {"use_weighting": True},
        {"ld_alpha": 0.5},
        {"f_divergence_type": "js_divergence"},
    ],
    ids=["weighted sum", "WPO", "LD", "f-divergence"],
)
def test_every_option_of_pairs(folder, tmp_path, pairs, options):
    run, inputs = pairs
    if "use_weighting" in options:  # decides at the trainer's making what its head computes
        run = trainer("dpo", folder, tmp_path, use_weighting=True)
        moved(run)
    assert_same(run, inputs, **options)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_every_unpaired_loss(folder, tmp_path, loss_type):
    run = trainer("kto", folder, tmp_path, loss_type=loss_type, desirable_weight=1.3)
    moved(run)
    run.model.train()
    assert_same(run, next(iter(run.get_train_dataloader())))


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_every_loss_of_sft(folder, tmp_path, loss_type):
    run = trainer("sft", folder, tmp_path, loss_type=loss_type)
    run.model.train()
    assert_same(run, next(iter(run.get_train_dataloader())))


@pytest.fixture(scope="module")
def rollouts(folder, tmp_path_factory):
    """Of a batch that is trained on more than once, whose policy has moved since."""
    made = {}
    for kind in ("grpo", "rloo"):
        run = trainer(kind, folder, tmp_path_factory.mktemp(kind), num_iterations=2)
        run.model.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            inputs = run._prepare_inputs(next(iter(run.get_train_dataloader())))
        moved(run)
        run.current_gradient_accumulation_steps = 1  # as train() sets it
        made[kind] = run, inputs
    return made


POLICY_LOSSES = ["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"]


@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_every_policy_loss(rollouts, loss_type):
    level = {"importance_sampling_level": "sequence"} if loss_type == "luspo" else {}
    assert_same(*rollouts["grpo"], loss_type=loss_type, **level)


@pytest.mark.parametrize(
    "options",
    [
        {"importance_sampling_level": "sequence"},
        {"top_entropy_quantile": 0.5},
        {"entropy_coef": 0.1, "_entropy_bonus_enabled": True},
        {"off_policy_mask_threshold": 0.1},
    ],
    ids=["GSPO", "high-entropy tokens", "entropy bonus", "off-policy mask"],
)
def test_every_option_of_policy_losses(rollouts, options):
    assert_same(*rollouts["grpo"], **options)


def test_rloo(rollouts):
    assert_same(*rollouts["rloo"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_other_dtypes_than_the_heads_and_its_options(dtype, autocast):
    """The head's weight may be wider than what reaches it, or narrower; bias, softcap, scale and temperature too."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(9, 8, generator=generator).to(dtype)
    weight, bias = torch.randn(31, 8, generator=generator), torch.randn(31, generator=generator)
    targets = torch.randint(31, (9,), generator=generator)
    upstream = torch.randn(2, 9, generator=generator)
    found = []
    for kernel in (getattr(utils, ours.KERNEL), ours.LogProbs):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = kernel.apply(*leaves, targets, 0.7, 16, 5.0, 1.3, ("entropy", "is_top1"))
        assert out[2] is None and out[3] is None
        gradients = torch.autograd.grad(upstream[0] @ out[0] + upstream[1] @ out[1], leaves)
        assert [g.dtype for g in gradients] == [x.dtype for x in leaves]
        found.append((out[0], out[1], *gradients))
    narrow = autocast or dtype == torch.bfloat16
    for theirs, mine in zip(*found, strict=True):  # theirs rounds logits to bf16, 2^-9 of up to 4
        error = (theirs.float() - mine.float()).norm() / theirs.float().norm()
        assert error <= (1e-2 if narrow else 1e-5), error


def test_a_batch_without_labels():
    hidden = torch.randn(0, 8, requires_grad=True)
    out = ours.LogProbs.apply(hidden, torch.randn(31, 8), None, torch.empty(0, dtype=torch.long), 1.0, 16)
    assert [x.shape for x in out] == [(0,)] * 5
    out[0].sum().backward()
    assert hidden.grad.shape == (0, 8)


def test_zero_3_head_that_is_emptied_before_backward():
    """A stand-in for DeepSpeed, which is not a dependency: its parameters are emptied and filled by assigning data."""
    generator = torch.Generator().manual_seed(6)
    whole, hidden = torch.randn(31, 8, generator=generator), torch.randn(9, 8, generator=generator)
    targets = torch.randint(31, (9,), generator=generator)
    expected = whole.clone().requires_grad_()
    ours.LogProbs.apply(hidden, expected, None, targets, 1.0, 16)[0].sum().backward()
    head = torch.nn.Parameter(whole.clone())
    head.ds_id = 0
    logps = ours.LogProbs.apply(hidden, head, None, targets, 1.0, 16)[0]
    head.data = torch.empty(0)
    (found,) = torch.autograd.grad(logps.sum(), head)
    torch.testing.assert_close(found, expected.grad)


def test_switch():
    before = [getattr(utils, name) for name in (ours.KERNEL, ours.COMPACT)]
    ours.unpatch()
    ours.patch()
    ours.patch()
    with ours.patched():
        pass
    assert getattr(utils, ours.KERNEL) is ours.LogProbs
    ours.unpatch()
    assert [getattr(utils, name) for name in (ours.KERNEL, ours.COMPACT)] == before
    with pytest.raises(KeyError), ours.patched():
        assert getattr(utils, ours.KERNEL) is ours.LogProbs
        raise KeyError
    assert [getattr(utils, name) for name in (ours.KERNEL, ours.COMPACT)] == before


def test_other_versions_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.17.0")
    with pytest.raises(ImportError, match=r"trl must be one of 1\.16\.0, tested; got 1\.17\.0"):
        ours.patch()

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match="TRL is not installed"), ours.patched():
        pass


def test_importing_does_not_import_trl():
    code = "import sys, fastpref.integrations.trl as t; assert 'trl' not in sys.modules, 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
