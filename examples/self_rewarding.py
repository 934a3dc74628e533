"""Self-rewarding: a model samples answers, judges them itself, and learns from its judgement (Yuan et al. 2024,
arXiv:2401.10020).

    python examples/self_rewarding.py --model_name_or_path MODEL --dataset prompts.jsonl --rounds 2

The judge is the model of the round with a prompt that asks for points from 0 to 5. Where they sample several verdicts
and average, here the verdict's expectation is read off: the sum of k p(k) over the probabilities of the six digits. A
judge that puts less than half of its probability on them has not judged, and that answer is left out.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from fastpref.trainer import dpo, pairs

ASK = (
    "Review the user's question and the answer. Give points from 0 (useless) to 5 (a perfect, helpful answer).\n\n"
    "Question: {prompt}\n\nAnswer: {answer}\n\nPoints: "
)


class Judge:
    """A reward function: the points that a model expects an answer to get from itself; None where it gives none."""

    def __init__(self, name: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(name).to(device).eval()
        self.digits = [self.tokenizer(str(k), add_special_tokens=False)["input_ids"][-1] for k in range(6)]
        self.points: list[float | None] = []  # of all that it was asked

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float | None]:
        found = [self.judge(_text(prompt), _text(answer)) for prompt, answer in zip(prompts, completions, strict=True)]
        self.points += found
        return found

    def judge(self, prompt: str, answer: str) -> float | None:
        ids = self.tokenizer(ASK.format(prompt=prompt, answer=answer), return_tensors="pt")["input_ids"]
        likely = torch.softmax(self.model(ids.to(self.model.device), logits_to_keep=1).logits[0, -1].float(), -1)
        digits = likely[self.digits]
        sure = float(digits.sum())
        return float(digits @ torch.arange(6.0, device=digits.device)) / sure if sure >= 0.5 else None

    def __str__(self) -> str:
        """How many judgements there were, and how far apart: a small model finds all answers much the same."""
        usable = [points for points in self.points if points is not None]
        spread = f", from {min(usable):.2f} to {max(usable):.2f} points" if usable else ""
        return f"{len(usable)} of {len(self.points)} judgements usable{spread}"


def judged_pairs(model: str, number: int, given: argparse.Namespace, path: Path) -> str:
    """Writes the round's pairs, and returns what there is to say of the judge."""
    judge = Judge(model)
    how: dict[str, Any] = {"num_generations": given.num_generations, "seed": number, "reward_funcs": [judge]}
    how |= {"max_completion_length": given.max_completion_length, "output_file": str(path)}
    try:
        pairs.make(pairs.PairsOptions(model_name_or_path=model, dataset_name=given.dataset, **how))
    except ValueError as error:
        raise SystemExit(f"round {number + 1}: {judge}. {error}") from error
    return str(judge)


def _text(value: Any) -> str:
    """Of a text, or of messages, their last."""
    return value if isinstance(value, str) else str(value[-1]["content"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--num_generations", type=int, default=4)
    parser.add_argument("--max_completion_length", type=int, default=256)
    parser.add_argument("--max_steps", type=int, default=-1, help="of DPO in a round; -1: one pass")
    parser.add_argument("--batch", type=int, default=8, help="pairs a step")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/self_rewarding"))
    given = parser.parse_args()
    logging.disable_progress_bar()
    model = given.model_name_or_path
    for number in range(given.rounds):
        folder = given.output_dir / str(number)
        told = judged_pairs(model, number, given, folder / "pairs.jsonl")
        print(f"\nround {number + 1} of {given.rounds}: {told}", flush=True)
        how: dict[str, Any] = {
            "max_steps": given.max_steps,
            "num_train_epochs": 1.0,
            "per_device_train_batch_size": given.batch,
        }
        how |= {"output_dir": str(folder), "overwrite_output_dir": True, "dataset_name": str(folder / "pairs.jsonl")}
        model = str(dpo.train(dpo.DPOOptions(model_name_or_path=model, **how)).model_dir)
    print(f"\nafter {given.rounds} rounds: {model}")


if __name__ == "__main__":
    main()
