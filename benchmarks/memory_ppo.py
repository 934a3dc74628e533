"""Peak resident memory of a PPO step with four roles on one base, beside training the actor alone; Linux.

    python benchmarks/memory_ppo.py [--contenders actor roles] [--optim adamw_torch_fused] [--json FILE]
    python benchmarks/memory_ppo.py --contenders whole-actor separate --optim adafactor

SmolLM2-135M in float32; a step draws 8 completions of 32 tokens and makes one update on all of them, without
activation checkpointing. Each contender is the recipe as it is, in a process of its own, and its figure is the
process's high-water mark, libraries and loading included.

    actor         GRPO without a reference, LoRA: sampling, and the policy's gradient
    roles         PPO, LoRA: actor, critic, reward and reference on one base
    whole-actor   as actor, but all weights are trained: no LoRA
    separate      PPO, four models: actor and critic trained whole

By hand, of LoRA with rank 16 on all linear layers, 4.9 M weights: 20 MB an adapter, 78 MB with its gradient and AdamW's
two moments. Critic and reward so add 98 MB to the base's 538 MB; nobody can keep four models of 538 MB in less than
2.2 GB, before gradients and optimizer. The actor's 8 completions are of one prompt, which it reads once, those of PPO
of 8 prompts: 262 positions beside 304. `beside` is the memory beside the first contender's.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpref.benchmarks._measure import MIB, Row, Table
from fastpref.benchmarks.trainer_trl import peak_bytes

COMPLETIONS, LENGTH = 8, 32
RECIPES = {"actor": "grpo", "roles": "ppo", "whole-actor": "grpo", "separate": "ppo"}
COLUMNS = (("peak MiB", "peak_MiB", ".0f"), ("beside", "ratio", ".3f"), ("tokens", "tokens", "d"))


def brevity(completions: list[str], **_: Any) -> list[float]:
    return [-float(len(text)) for text in completions]


def save_reward(model: str, folder: Path) -> None:
    """An untrained reward model as an adapter: what it says does not matter to memory."""
    import peft
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base: Any = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=16, target_modules="all-linear", exclude_modules=["score"])
    peft.get_peft_model(base, lora).save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(model).save_pretrained(str(folder))


def step(contender: str, model: str, optim: str, folder: Path) -> Row:
    """What a step of the contender takes; the reward adapter is in folder/reward."""
    from fastpref.trainer import grpo, ppo

    class ToTheEnd(grpo.GRPOOptions):
        """GRPO whose completions have their full length, as PPO's have with stop_token none."""

        def stop_ids(self, tokenizer: Any, model: Any) -> tuple[int, ...]:
            return ()

    prompts = folder / "prompts.jsonl"
    rows = [{"prompt": f"Review of the movie {letter}:"} for letter in "ABCDEFGHIJKLMNOP"]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common: dict[str, Any] = {"model_name_or_path": model, "dataset_name": str(prompts), "optim": optim, "max_steps": 1}
    common |= {"per_device_train_batch_size": COMPLETIONS, "gradient_checkpointing": False, "max_length": 64}
    common |= {"output_dir": str(folder / "run"), "temperature": 1.0, "logging_steps": 1}
    common |= {"use_peft": contender in ("actor", "roles"), "lora_target_modules": "all-linear"}
    if RECIPES[contender] == "grpo":
        own: dict[str, Any] = {"max_completion_length": LENGTH, "num_generations": COMPLETIONS}
        own["reward_funcs"] = [brevity]
        grpo.train(ToTheEnd(**common, **own))
    else:
        own = {"response_length": LENGTH, "stop_token": None, "num_ppo_epochs": 1}
        ppo.train(ppo.PPOOptions(**common, **own, reward_model_path=str(folder / "reward")))
    (line,) = (json.loads(text) for text in (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return {"peak_MiB": peak_bytes() / MIB, "tokens": line["num_tokens"]}


def alone(contender: str, optim: str, folder: Path) -> Row:
    """The same from a process of its own."""
    result = folder / "result.json"
    line = [sys.executable, __file__, "--alone", str(folder), "--contenders", contender, "--optim", optim]
    done = subprocess.run([*line, "--json", str(result)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{contender}: {done.stderr[-2000:]}")
    return json.loads(result.read_text())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", choices=list(RECIPES), default=["actor", "roles"])
    parser.add_argument("--optim", default="adamw_torch_fused")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    from fastpref.trainer.demo import demo_model

    if chosen.alone:
        chosen.json.write_text(json.dumps(step(chosen.contenders[0], demo_model(), chosen.optim, chosen.alone)))
        return
    table = Table("memory_ppo", COLUMNS, ("torch", "transformers", "peft"), chosen.json)
    table.heading(f"SmolLM2-135M, float32, {COMPLETIONS} completions of {LENGTH} tokens, {chosen.optim}")
    about = {"completions": COMPLETIONS, "length": LENGTH, "optim": chosen.optim}
    first: Row | None = None
    with tempfile.TemporaryDirectory() as reward:
        save_reward(demo_model(), Path(reward))
        for contender in chosen.contenders:
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "reward").symlink_to(reward)
                found = alone(contender, chosen.optim, Path(folder))
            first = first or found
            table.add({"contender": contender, **about, **found, "ratio": found["peak_MiB"] / first["peak_MiB"]})


if __name__ == "__main__":
    main()
