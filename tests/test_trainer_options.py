"""Options of all recipes: made in Python, those of TrainingArguments and ModelConfig, and what a model allows."""

import importlib
import shutil
from functools import partial

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import transformers
from peft import load_peft_weights
from transformers import LlamaConfig, LlamaForCausalLM

from fastpref.kernels import memory
from fastpref.trainer import eval, pairs, run
from fastpref.trainer.config import as_command, given_options
from fastpref.trainer.dpo import DPOOptions, load_pairs, train
from fastpref.trainer.eval import EvalOptions
from fastpref.trainer.grpo import GRPOOptions
from fastpref.trainer.metrics import read_metrics
from fastpref.trainer.packing import packs
from fastpref.trainer.pretrained import check_positions
from fastpref.trainer.start import causal_lm
from tests import test_fused_lm_head
from tests._trainer import make_tiny

RECIPES = {"sft": "SFT", "reward": "Reward", "dpo": "DPO", "kto": "KTO", "ppo": "PPO", "grpo": "GRPO"}
DROPPING = {
    "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.0, "attn_pdrop": 0.0},  # modules
    "opt": {"dropout": 0.5, "max_position_embeddings": 32},  # functions
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny(folder)
    for name, options in DROPPING.items():
        shutil.copytree(folder / "model", folder / name)
        test_fused_lm_head.tiny(name, **options).save_pretrained(folder / name)
    return folder


def options(tiny, output_dir, model="model", **given):
    small = {"max_steps": 3, "per_device_train_batch_size": 4, "test_split_size": 0, "cache_ref_log_probs": False}
    sources = {"model_name_or_path": tiny / model, "dataset_name": tiny / "pairs.jsonl", "output_dir": output_dir}
    return DPOOptions(**{"gradient_checkpointing": False, **small, **sources, **given})


def own_loss(pairs, *, beta):
    return pairs.policy_chosen_logps


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rate": "fast"}, "learning_rate: wanted a number; got 'fast'"),
        ({"per_device_train_batch_size": 2.5}, "per_device_train_batch_size: wanted a whole number; got 2.5"),
        ({"max_length": 0}, "max_length must be at least 1; got 0"),
        ({"max_extra_bytes": -1}, "max_extra_bytes must be 0 or more; got -1"),
        ({"bf16": "maybe"}, "bf16: wanted true or false; got 'maybe'"),
        ({"seed": None}, "seed: wanted a whole number; got None"),
        ({"dataset_name": [{"prompt": "a"}]}, r"dataset_name: wanted text or none; got \[{'prompt': 'a'}\]"),
        ({"learning_rate": print}, "learning_rate: wanted a number; got <built-in function print>"),
        ({"loss_weights": [1.0, "x"]}, r"loss_weights: wanted a list of a number or none; got \[1.0, 'x'\]"),
        ({"lr_scheduler_kwargs": "min_lr"}, "lr_scheduler_kwargs: wanted a mapping, as JSON or none; got 'min_lr'"),
        ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"a": 1}}, "lr_scheduler_type constant has no opti"),
        ({"lr_scheduler_kwargs": {"floor": 1}}, "lr_scheduler_type cosine with .* unexpected keyword argument 'floor'"),
        ({"lr_scheduler_type": "greedy"}, "unknown lr_scheduler_type 'greedy'; one of linear, cosine"),
        ({"optim": "adafactor", "adam_beta1": 0.8}, "adam_beta1 is AdamW's, and optim adafactor has no such option"),
        ({"adam_beta2": 1.0}, r"adam_beta2 must be in \[0, 1\); got 1.0"),
    ],
)
def test_what_no_option_can_be_is_refused_as_on_the_command_line(given, message):
    with pytest.raises(ValueError, match=f"^dpo: {message}"):
        DPOOptions(**given)


def test_values_become_what_the_command_line_makes_of_them():
    made = DPOOptions(learning_rate="1e-5", dtype=torch.bfloat16, loss_weights=(1, 2), loss_type=("sigmoid", "sft"))
    assert made.learning_rate == 1e-5 and made.dtype == "bfloat16"
    assert made.loss_weights == [1.0, 2.0] and made.loss_type == ["sigmoid", "sft"]
    assert DPOOptions(loss_type=[own_loss, "sft"]).loss_type == [own_loss, "sft"]
    assert DPOOptions(loss_type=own_loss).loss_type is own_loss


@pytest.mark.parametrize("reward", ["tests._online:repeats", print])
def test_one_reward_is_a_list_of_one(reward):
    judged = EvalOptions(model_name_or_path="m", dataset_name="d", reward_funcs=reward)
    assert judged.reward_funcs == GRPOOptions(reward_funcs=reward).reward_funcs == judged.sources == [reward]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_heads_buffers_stay_again_after_a_run(recipe, monkeypatch):
    """They were off in a notebook for good."""
    module = importlib.import_module(f"fastpref.trainer.{recipe}")
    seen = []

    def stops(_):
        seen.append(memory._most)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "start", stops)
    before = memory._most
    with pytest.raises(KeyboardInterrupt):
        module.train(getattr(module, f"{RECIPES[recipe]}Options")())
    assert seen == [0] and memory._most == before > 0


def test_optimizer_and_schedule_are_as_asked(tiny, tmp_path):
    (tmp_path / "c.yaml").write_text("lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 0.5}\n")
    words = [
        "--config",
        str(tmp_path / "c.yaml"),
        "--adam_beta1",
        "0.8",
        "--adam_beta2",
        "0.95",
        "--adam_epsilon",
        "1e-6",
    ]
    parse = partial(given_options, DPOOptions, prog="dpo", description="")
    given = parse(words)
    made = options(tiny, tmp_path, **given, learning_rate=1e-3)
    assert "--lr_scheduler_kwargs '{\"min_lr_rate\": 0.5}'" in as_command("dpo", made)
    assert parse(["--lr_scheduler_kwargs", '{"min_lr_rate": 0.5}'])["lr_scheduler_kwargs"] == made.lr_scheduler_kwargs
    opened = run.open_run(made, unit="pairs", load=load_pairs)
    group = opened.optimizer.param_groups[0]
    assert (*group["betas"], group["eps"]) == (0.8, 0.95, 1e-6)
    for _ in range(opened.steps):
        opened.optimizer.step()
        opened.scheduler.step()
    assert opened.scheduler.get_last_lr()[0] == pytest.approx(5e-4)


def test_first_step_epochs_and_the_trackers_name(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    given = {"max_steps": 4, "per_device_train_batch_size": 32, "report_to": "tensorboard", "run_name": "mine"}
    train(options(tiny, tmp_path, **given, logging_first_step=True, save_strategy="epoch", save_steps=1))
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 4]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert [*(tmp_path / "mine").glob("events*")]
    again = {"save_strategy": "no", "run_name": None, "resume_from_checkpoint": tmp_path / "checkpoint-2"}
    train(options(tiny, tmp_path, **{**given, **again}, logging_first_step=True))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_another_attention_than_sdpa_is_left_as_it_is_and_reads_padding(tiny, tmp_path, capsys):
    for name, packed in {"sdpa": True, "eager": False}.items():
        model = causal_lm(options(tiny, tmp_path, attn_implementation=name), str(tiny / "model"), None)
        assert packs(model) is packed
    assert model.config._attn_implementation == "eager"
    assert "attention is to be eager" in capsys.readouterr().out
    for name, why in {"flash_attention_2": "FlashAttention2 has been toggled on", "nonsense": "nonsense"}.items():
        with pytest.raises(ValueError, match="dpo: no model to be had from .*" + why):
            causal_lm(options(tiny, tmp_path, attn_implementation=name), str(tiny / "model"), None)


def test_weights_keep_the_checkpoints_type_if_asked(tiny, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    kinds = {d: causal_lm(DPOOptions(dtype=d), str(tmp_path / "bf16"), None).dtype for d in ("auto", "float32")}
    assert kinds == {"auto": torch.bfloat16, "float32": torch.float32}


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_models_own_code_runs_only_if_trusted(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    shutil.copytree(tiny / "model", folder)
    (folder / "own.py").write_text(CODE)
    config = (folder / "config.json").read_text().replace('"model_type": "llama"', '"model_type": "own"')
    places = '"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"},'
    (folder / "config.json").write_text(config.replace("{", "{" + places, 1))
    with pytest.raises(ValueError, match=r"^dpo: no \w+ to be had from .*own.*with --trust_remote_code only"):
        train(options(tiny, tmp_path / "run", model=folder))
    train(options(tiny, tmp_path / "run", model=folder, trust_remote_code=True, max_steps=1))


@pytest.mark.parametrize("model", DROPPING)
def test_dropout_is_off_as_in_trl(model, tiny):
    for kind, same in ((DPOOptions, True), (GRPOOptions, False)):
        policy = causal_lm(kind(gradient_checkpointing=False), str(tiny / model), None).train()
        ids = torch.arange(3, 13)[None]
        first, second = (policy(input_ids=ids).logits for _ in range(2))
        assert torch.equal(first, second) is same


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"lora_target_modules": "nosuch"},
            r"no adapter for lora_target_modules \['nosuch'\] .* matrices are .*, q_proj, ",
        ),
        ({"lora_target_modules": ".*nosuch"}, r"no adapter for lora_target_modules .*; all-linear takes"),
        ({"output_dir": "{}/model/config.json"}, r"output_dir .*config.json cannot be .*config.json is not a folder"),
        ({"output_dir": "{}/pairs.jsonl/run"}, r"output_dir .*run cannot be .*pairs.jsonl is not a folder"),
    ],
)
def test_what_cannot_be_is_refused_before_a_step(wrong, message, tiny, tmp_path):
    given = {"output_dir": tmp_path, "use_peft": True, **{name: value.format(tiny) for name, value in wrong.items()}}
    with pytest.raises(ValueError, match=rf"^dpo: {message}"):
        train(options(tiny, **given))


def test_a_bare_name_is_a_layer_to_adapt(tiny, tmp_path):
    train(options(tiny, tmp_path, use_peft=True, lora_target_modules="q_proj", max_steps=1))
    adapted = load_peft_weights(str(tmp_path / "model"), device="cpu")
    assert adapted and all("q_proj" in name for name in adapted)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tiny, tmp_path):
    shutil.copytree(tiny / "model", tmp_path / "model")
    config = LlamaConfig.from_pretrained(tiny / "model", vocab_size=5)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    message = "the model has embeddings of 5 tokens, and the tokenizer makes token 1."
    sources = {"model_name_or_path": str(tmp_path / "model"), "dataset_name": str(tiny / "pairs.jsonl")}
    with pytest.raises(ValueError, match=f"^dpo: {message}"):
        train(options(tiny, tmp_path / "run", **sources))
    with pytest.raises(ValueError, match=f"^eval: {message}"):
        eval.evaluate(EvalOptions(**sources))
    with pytest.raises(ValueError, match=f"^pairs: {message}"):
        pairs.make(
            pairs.PairsOptions(**sources, reward_funcs="tests._online:repeats", output_file=tmp_path / "out.jsonl")
        )


@pytest.mark.parametrize("model", DROPPING)
def test_sequences_longer_than_the_models_positions_are_refused(model, tiny, tmp_path):
    rows = '{"prompt": "%s", "chosen": " good", "rejected": " bad film"}\n'
    (tmp_path / "pairs.jsonl").write_text("".join(rows % " ".join(["very"] * n) for n in (3, 4, 5, 29)))
    given = {"model": model, "dataset_name": tmp_path / "pairs.jsonl", "max_steps": 1}
    train(options(tiny, tmp_path / "run", **given))  # 29 and 3 tokens fit
    (tmp_path / "pairs.jsonl").write_text("".join(rows % " ".join(["very"] * n) for n in (3, 4, 5, 30)))
    message = r"the model has 32 positions \(.*\), and a sequence of 33 tokens does not fit; --max_length 32 cuts"
    with pytest.raises(ValueError, match=f"^dpo: {message}"):
        train(options(tiny, tmp_path / "longer", **given))
    train(options(tiny, tmp_path / "cut", **given, max_length=32))
    sources = {"model_name_or_path": tiny / model, "dataset_name": tmp_path / "pairs.jsonl"}
    with pytest.raises(ValueError, match=f"^eval: {message}"):
        eval.evaluate(EvalOptions(**sources))
    sampled = {"reward_funcs": "tests._online:repeats", "max_completion_length": 3, "num_generations": 2}
    drawn = message.replace("33 tokens", "30 tokens and 3 to be drawn").replace(
        "--max", "with fewer to be drawn, --max"
    )
    with pytest.raises(ValueError, match=f"^pairs: {drawn}"):
        pairs.make(pairs.PairsOptions(**sources, **sampled, output_file=tmp_path / "out.jsonl"))


def test_a_table_of_positions_of_no_known_length_refuses_nothing():
    config = transformers.PreTrainedConfig()
    assert getattr(config, "max_position_embeddings", None) is None
    model = torch.nn.ModuleDict({"wpe": torch.nn.Embedding(4, 2)})
    model.config = config
    check_positions("grpo", model, 3, 2)
