"""What the trainer's tests share: a tiny random Llama, preferences, and runs in processes of their own."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fastpref
from fastpref.trainer.config import as_command
from fastpref.trainer.metrics import read_metrics

ROOT = Path(fastpref.__file__).parents[1]
WORDS = ["<unk>", "<eos>", "<pad>", *"a b c d e f g h good bad film is very the".split()]
TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def make_tiny(folder):
    """Fills a folder with `model` and `pairs.jsonl`: "good" is preferred to "bad", each after nought to three words."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / "model")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(WORDS), **sizes, tie_word_embeddings=True, eos_token_id=1, pad_token_id=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder / "model")
    draw = random.Random(0)
    rows = [
        {
            "prompt": " ".join(draw.choices("abcdefgh", k=draw.randint(2, 5))) + " film is",
            "chosen": " very" * draw.randint(0, 3) + " good",
            "rejected": " the" * draw.randint(0, 3) + " bad",
        }
        for _ in range(64)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def assert_same_metrics(a, b, **tolerance):
    """The lines of two runs' metrics, in folders a and b."""
    lines = [read_metrics(Path(folder) / "metrics.jsonl") for folder in (a, b)]
    for ours, theirs in zip(*lines, strict=True):
        assert ours == pytest.approx(theirs, **tolerance)


def assert_same_weights(a, b, **tolerance):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def run_command(given, *extra, launcher=(), kill_at=None):
    """The recipe in a process of its own; killed when its metrics reach the step `kill_at`."""
    words = as_command(given.recipe, given).split()
    command = [sys.executable, *launcher, "-m", "fastpref", *words, *extra]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = str(ROOT)
    with subprocess.Popen(
        command, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        metrics = Path(given.output_dir, "metrics.jsonl")
        while kill_at is not None and process.poll() is None:
            if metrics.exists() and any(line["step"] >= kill_at for line in read_metrics(metrics)):
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == (0 if kill_at is None else -signal.SIGKILL), output
    return output
