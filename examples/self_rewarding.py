"""Self-rewarding: a model samples answers, judges them itself, and learns from its judgement (Yuan et al. 2024,
arXiv:2401.10020).

    python examples/self_rewarding.py --model_name_or_path MODEL --dataset prompts.jsonl --rounds 2

The judge is the model of the round with a prompt that asks for points from 0 to 5. Where they sample several verdicts
and average, here the verdict's expectation is read off: the sum of k p(k) over the probabilities of the six digits.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpref.trainer import dpo, pairs

ASK = (
    "Review the user's question and the answer. Give points from 0 (useless) to 5 (a perfect, helpful answer).\n\n"
    "Question: {prompt}\n\nAnswer: {answer}\n\nPoints: "
)


class Judge:
    """A reward function: the points that a model expects an answer to get from itself."""

    def __init__(self, name: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(name).to(device).eval()
        self.digits = [self.tokenizer(str(k), add_special_tokens=False)["input_ids"][-1] for k in range(6)]

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        found = []
        for prompt, answer in zip(prompts, completions, strict=True):
            texts = {"prompt": _text(prompt), "answer": _text(answer)}
            ids = self.tokenizer(ASK.format(**texts), return_tensors="pt")["input_ids"].to(self.model.device)
            logits = self.model(ids, logits_to_keep=1).logits[0, -1, self.digits].float()
            found.append(float(torch.softmax(logits, -1) @ torch.arange(6.0, device=logits.device)))
        return found


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
    model = given.model_name_or_path
    for number in range(given.rounds):
        folder = given.output_dir / str(number)
        how: dict[str, Any] = {"num_generations": given.num_generations, "seed": number, "reward_funcs": [Judge(model)]}
        how |= {"max_completion_length": given.max_completion_length, "output_file": str(folder / "pairs.jsonl")}
        pairs.make(pairs.PairsOptions(model_name_or_path=model, dataset_name=given.dataset, **how))
        how = {"max_steps": given.max_steps, "num_train_epochs": 1.0, "per_device_train_batch_size": given.batch}
        how |= {"output_dir": str(folder), "overwrite_output_dir": True, "dataset_name": str(folder / "pairs.jsonl")}
        model = str(dpo.train(dpo.DPOOptions(model_name_or_path=model, **how)).model_dir)
    print(f"after {given.rounds} rounds: {model}")


if __name__ == "__main__":
    main()
