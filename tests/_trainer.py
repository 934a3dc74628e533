"""What the trainer's tests share: a tiny random Llama, preferences, and runs in processes of their own."""

import importlib
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fastpref
from fastpref.trainer import start
from fastpref.trainer.config import as_command
from fastpref.trainer.metrics import read_metrics

ROOT = Path(fastpref.__file__).parents[1]
WORDS = ["<unk>", "<eos>", "<pad>", *"a b c d e f g h good bad film is very the".split()]
TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def make_tiny(folder):
    """Fills a folder with `model`, and "good" preferred to "bad", each after nought to three words: `pairs.jsonl`.

    Beside them `examples.jsonl`, the chosen of each pair, and `labelled.jsonl`, the pairs taken apart.
    """
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
    examples = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    sides = [("chosen", True), ("rejected", False)]
    labelled = [{"prompt": row["prompt"], "completion": row[side], "label": ok} for side, ok in sides for row in rows]
    for name, found in {"pairs": rows, "examples": examples, "labelled": labelled[:96]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


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


def run_command(given, *extra, launcher=()):
    """The recipe by its command, in a process of its own."""
    words = as_command(given.recipe, given).split()
    command = [sys.executable, *launcher, "-m", "fastpref", *words, *extra]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        command, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def start_processes(given, n=1, fsdp=False):
    """Starts the recipe in n processes, ranks of one run; they come of a server that has imported everything once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastpref.trainer.dpo", "fastpref.trainer.reward", "tests._trainer"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"ACCELERATE_USE_CPU": "true"}
    if n > 1:
        shared |= {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [shared | ({"RANK": str(i), "LOCAL_RANK": str(i)} if n > 1 else {}) for i in range(n)]
    threads = torch.get_num_threads()
    processes = [context.Process(target=_train, args=(given, rank, threads, fsdp)) for rank in ranks]
    for process in processes:
        process.start()
    return processes


def run_processes(given, n=1, fsdp=False):
    for process in start_processes(given, n, fsdp):
        process.join(120)
        assert process.exitcode == 0


def run_and_kill(given, at):
    """Runs the recipe in a process of its own and kills it when its metrics reach the step `at`."""
    (process,) = start_processes(given)
    metrics = Path(given.output_dir, "metrics.jsonl")
    while process.is_alive():
        if metrics.exists() and any(line["step"] >= at for line in read_metrics(metrics)):
            process.kill()
            break
        time.sleep(0.002)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def _train(given, environment, threads, fsdp):
    os.environ.update(environment)
    torch.set_num_threads(threads)
    if fsdp:
        start.Accelerator = _accelerator_with_fsdp2
    importlib.import_module(f"fastpref.trainer.{given.recipe}").train(given)


def _accelerator_with_fsdp2(**options):
    """As `accelerate launch --use_fsdp --fsdp_version 2` makes it on GPUs; it has no FSDP on CPUs, where gloo has."""
    accelerator = Accelerator(**options)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    accelerator.state.fsdp_plugin = plugin
    # each AcceleratorState() takes up what PartialState says, here as where accelerate itself has made it FSDP
    PartialState._shared_state["distributed_type"] = accelerator.state.distributed_type = DistributedType.FSDP
    return accelerator
