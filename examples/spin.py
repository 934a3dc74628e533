"""SPIN: a model learns to prefer people's answers to its own, again and again (Chen et al. 2024, arXiv:2401.01335).

    python examples/spin.py --model_name_or_path MODEL --dataset answers.jsonl --rounds 3

Rows hold prompt and completion, both text. Each round the model of the last one answers every prompt once; people's
answer is the chosen one, its own the rejected, and DPO does the rest, with that model as reference (their eq. 4.7, beta
for lambda).
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from fastpref.trainer import dpo
from fastpref.trainer.data_files import load_rows
from fastpref.trainer.prompts import tokenize_prompts
from fastpref.trainer.rewards import text_of
from fastpref.trainer.rollout import Sampling, drawn, stop_ids_of
from fastpref.trainer.start import padding_id

AT_ONCE = 64  # prompts that are answered together


def own_answers(model_name: str, dataset: str, max_new_tokens: int, seed: int, path: Path) -> str:
    """Writes pairs, the dataset's completion chosen, the model's own rejected; returns what there is to say of them."""
    rows = load_rows(dataset, columns=lambda names: None if {"prompt", "completion"} <= {*names} else "both")
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    prompts, _ = tokenize_prompts(rows, tokenizer, max_length=None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_name).to(device).eval()
    how = Sampling(max_new_tokens, 1.0, stop_ids_of(tokenizer, model), padding_id(tokenizer), AT_ONCE)
    samples = []
    for first in tqdm(range(0, len(prompts), AT_ONCE), desc="own answers", unit="batch", disable=None):
        wanted = [(i, 0) for i in range(first, min(first + AT_ONCE, len(prompts)))]
        samples += drawn(model, prompts, wanted, how, seed, 0)
    pairs = [
        {"prompt": prompt.prompt, "chosen": prompt.columns["completion"], "rejected": text_of(tokenizer, sample)}
        for prompt, sample in zip(prompts, samples, strict=True)
    ]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    cut, empty = sum(not sample.stopped for sample in samples), sum(not pair["rejected"] for pair in pairs)
    return f"{len(pairs)} answers of its own, {cut} cut at {max_new_tokens} tokens, {empty} empty; in {path}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max_steps", type=int, default=-1, help="of DPO in a round; -1: one pass")
    parser.add_argument("--batch", type=int, default=8, help="pairs a step")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/spin"))
    given = parser.parse_args()
    logging.disable_progress_bar()
    model = given.model_name_or_path
    for number in range(given.rounds):
        folder = given.output_dir / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        told = own_answers(model, given.dataset, given.max_new_tokens, number, folder / "pairs.jsonl")
        print(f"\nround {number + 1} of {given.rounds}: {told}", flush=True)
        how = {"beta": given.beta, "max_steps": given.max_steps, "num_train_epochs": 1.0, "learning_rate": 5e-7}
        how |= {"per_device_train_batch_size": given.batch, "output_dir": str(folder), "overwrite_output_dir": True}
        done = dpo.train(dpo.DPOOptions(model_name_or_path=model, dataset_name=str(folder / "pairs.jsonl"), **how))
        model = str(done.model_dir)
    print(f"\nafter {given.rounds} rounds: {model}")


if __name__ == "__main__":
    main()
