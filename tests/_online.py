"""What the tests of the online recipes share: a tiny model, prompts of two letters, a reward with a known optimum."""

import json

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from fastpref.trainer.metrics import read_metrics
from tests._trainer import run_and_kill

LETTERS = "abcdefgh"
WORDS = ["<unk>", "<eos>", "<pad>", *LETTERS, *(f"w{i}" for i in range(21))]
LENGTH = 4  # tokens of a completion
REPEATS, AGREES = "tests._online:repeats", "tests._online:agrees"


def make_tiny(folder):
    """Fills a folder with `model`, a random Llama of 20 thousand weights, and `prompts.jsonl`; returns the folder."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / "model")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": len(WORDS), "eos_token_id": 1, "pad_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes, **ids, initializer_range=0.1, tie_word_embeddings=False))
    model.save_pretrained(folder / "model")
    rows = [{"prompt": f"{a} {b}", "letter": a} for a in LETTERS for b in LETTERS]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def online_options(kind, folder, output_dir, **given):
    """Small and fast; the completions always have LENGTH tokens under PPO, and mostly under GRPO."""
    of_ppo = {"response_length": LENGTH, "stop_token": None, "temperature": 1.0, "use_peft": False, "kl_coef": 0.0}
    of_grpo = {"max_completion_length": LENGTH, "num_generations": 8}
    small = {"gradient_checkpointing": False, "logging_steps": 2, "max_length": 16, "learning_rate": 1e-2}
    sources = {"model_name_or_path": str(folder / "model"), "dataset_name": str(folder / "prompts.jsonl")}
    sources |= {"reward_funcs": [REPEATS], "output_dir": str(output_dir)}
    return kind(**{**small, **(of_ppo if kind.recipe == "ppo" else of_grpo), **sources, **given})


def assert_resumes(train, options, folder, at, **given):
    """Killed past step `at` and resumed, a run leaves the metrics and rollouts, to the letter, of one left alone."""
    train(options(folder / "whole", **given))
    run_and_kill(options(folder / "killed", **given), at)
    assert at <= read_metrics(folder / "killed/metrics.jsonl")[-1]["step"] < given["max_steps"]
    train(options(folder / "killed", **given, resume_from_checkpoint=True))
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert (folder / "killed" / name).read_text() == (folder / "whole" / name).read_text()


def repeats(prompts, completions, letter, **_):
    """The share of LENGTH words that repeat the prompt's first letter; 1 at best."""
    return [text.split().count(one) / LENGTH for text, one in zip(completions, letter, strict=True)]


def agrees(prompts, completions, letter, **_):
    """The share of LENGTH words that are even-numbered where the prompt's first letter is, odd where it is odd."""
    return [
        sum(WORDS.index(word) % 2 == WORDS.index(one) % 2 for word in text.split()) / LENGTH
        for text, one in zip(completions, letter, strict=True)
    ]


def unsure(completions, **_):
    """Cannot tell where a completion begins with a letter."""
    return [None if text[:1] in LETTERS else 1.0 for text in completions]


async def later(completions, completion_ids, trainer_state, **_):
    """Longer completions are better towards the end of the run."""
    done = trainer_state.global_step / trainer_state.max_steps
    return [done * len(ids) / LENGTH for ids in completion_ids]
