"""Makes preferences: samples several completions of each prompt, scores them, keeps the best and the worst.

    fastpref pairs --model_name_or_path MODEL --dataset prompts.jsonl --reward_model_path REWARD
    fastpref dpo --model_name_or_path MODEL --dataset pairs.jsonl

A line of the file is {"prompt", "chosen", "rejected", "score_chosen", "score_rejected"}: texts, or messages where the
dataset has messages. `chosen` alone is best-of-n; the two commands in turn are iterative DPO (Xu et al. 2023,
arXiv:2312.16682). What is drawn for a prompt depends on model, prompt and seed, and on nothing else of the run.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from fastpref.trainer.config import given_options, option, settle
from fastpref.trainer.data_files import load_rows
from fastpref.trainer.demo import demo_model
from fastpref.trainer.pretrained import check_positions, check_vocabulary, from_pretrained
from fastpref.trainer.prompts import Prompt, prompt_columns, room_for_prompt, tokenize_prompts
from fastpref.trainer.rewards import Rewards, completion_of
from fastpref.trainer.rollout import Sample, Sampling, check_sampling, drawn, stop_ids_of
from fastpref.trainer.start import padding_id


@dataclass(kw_only=True)
class PairsOptions:
    recipe: ClassVar[str] = "pairs"

    model_name_or_path: str | None = option(
        None, "a model's folder or hub name; none: SmolLM2-135M-Instruct, fetched once"
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = option("float32", "the weights' type")
    trust_remote_code: bool = option(False, "run the Python code that a model brings along")
    dataset_name: str | None = option(
        None, "prompts: a .jsonl, .json, .parquet or .csv file, a folder, or a hub name", alias="dataset"
    )
    dataset_config: str | None = option(None, "the hub dataset's configuration")
    dataset_train_split: str = option("train", "the split whose prompts are completed")
    max_prompts: int | None = option(None, "complete so many of them; none: all")
    max_length: int | None = option(1024, "longer prompts, with room for a completion, are left out; none: no limit")
    output_file: str = option("pairs.jsonl", "where the pairs go; it is there whole or not at all")

    reward_model_path: str | None = option(None, "a trained reward model")
    reward_funcs: list[str | Callable[..., Any]] | None = option(
        None, "rewards: module:function, or reward models; their sum counts"
    )
    reward_weights: list[float] | None = option(None, "weights of several rewards; none: 1 each")
    num_generations: int = option(8, "completions of a prompt")
    max_completion_length: int = option(512, "tokens of the longest completion")
    temperature: float = option(1.0, "of sampling")
    top_p: float = option(1.0, "draw from the likeliest tokens that together have this probability")
    top_k: int = option(0, "draw from so many of the likeliest tokens; 0: all")
    min_p: float | None = option(None, "draw from tokens at least this times as likely as the likeliest; none: all")
    min_margin: float = option(0.0, "pairs whose scores differ by no more than this are left out")
    per_device_eval_batch_size: int = option(64, "completions a device draws or scores at once")
    seed: int = option(42, "seed of what is drawn")

    def __post_init__(self) -> None:
        settle(self)
        for name in "max_prompts max_length max_completion_length per_device_eval_batch_size".split():
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"pairs: {name} must be at least 1; got {getattr(self, name)}")
        if self.num_generations < 2:
            raise ValueError(f"pairs: num_generations must be at least 2, to be compared; got {self.num_generations}")
        check_sampling("pairs", self.temperature, self.top_p, self.top_k, self.min_p)
        if not self.min_margin >= 0:
            raise ValueError(f"pairs: min_margin must be at least 0; got {self.min_margin}")
        if self.dataset_name is None:
            raise ValueError("pairs: dataset wants the prompts to complete; got none")


class Made(NamedTuple):
    """What `make` wrote and left out."""

    pairs: int
    prompts: int
    mean_score: float  # of all completions
    mean_chosen: float  # of the best of each prompt


def main(argv: Sequence[str]) -> int:
    """`fastpref pairs ARGV...`."""
    given = given_options(PairsOptions, argv, prog="fastpref pairs", description=(__doc__ or "").partition("\n")[0])
    transformers.utils.logging.disable_progress_bar()
    make(PairsOptions(**given))
    return 0


@torch.no_grad()
def make(options: PairsOptions) -> Made:
    """Writes `output_file` and returns what it holds."""
    o, state = options, PartialState()
    with state.main_process_first():
        name = o.model_name_or_path or demo_model()
        tokenizer = from_pretrained(AutoTokenizer, name, o.recipe, trust_remote_code=o.trust_remote_code)
        prompts = load(o, tokenizer)
    how_read = {"dtype": o.dtype, "trust_remote_code": o.trust_remote_code}
    model = from_pretrained(AutoModelForCausalLM, name, o.recipe, **how_read).to(state.device).eval()
    check_vocabulary(o.recipe, model, prompts)
    check_positions(o.recipe, model, max(prompt.longest for prompt in prompts), o.max_completion_length)
    sources = [*([o.reward_model_path] if o.reward_model_path else []), *(o.reward_funcs or [])]
    rewards = Rewards(sources, o.reward_weights, tokenizer, state.device, o.per_device_eval_batch_size)
    pad = padding_id(tokenizer)
    stop = stop_ids_of(tokenizer, model)
    kept: dict[str, Any] = {"top_p": o.top_p, "top_k": o.top_k, "min_p": o.min_p}
    how = Sampling(o.max_completion_length, o.temperature, stop, pad, o.per_device_eval_batch_size, **kept)

    mine = range(len(prompts))[state.process_index :: state.num_processes]
    size = max(1, how.batch_size // o.num_generations)  # prompts at once
    rows: list[tuple[int, dict[str, Any] | None, list[float]]] = []
    shown = None if state.is_main_process else True  # None: on a terminal only
    for first in tqdm(range(0, len(mine), size), desc="pairs", unit="batch", disable=shown):
        some = mine[first : first + size]
        wanted = [(i, k) for i in some for k in range(o.num_generations)]
        samples = drawn(model, prompts, wanted, how, o.seed, 0)
        rewards([prompts[i] for i, _ in wanted], samples)
        scores = rewards.totals(samples).view(-1, o.num_generations)
        for i, own, group in zip(some, scores, _groups(samples, o.num_generations), strict=True):
            rows.append((i, pair_of(tokenizer, prompts[i], group, own, o.min_margin), own.tolist()))
    rows = sorted(gather_object(rows), key=lambda row: row[0])
    pairs = [pair for _, pair, _ in rows if pair is not None]
    if not pairs:
        raise ValueError(f"pairs: no prompt has completions whose scores differ by more than {o.min_margin:g}")
    if state.is_main_process:
        write(Path(o.output_file), pairs)
    state.wait_for_everyone()
    every = torch.tensor([scores for _, _, scores in rows])
    best = torch.where(every.isnan(), -torch.inf, every).amax(1)
    made = Made(len(pairs), len(rows), float(every.nanmean()), float(best[best.isfinite()].mean()))
    state.print(
        f"{o.output_file}: {made.pairs} pairs of {made.prompts} prompts; mean score {made.mean_score:.4g}, "
        f"best of {o.num_generations} {made.mean_chosen:.4g}"
    )
    return made


def load(o: PairsOptions, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The prompts that leave room for a completion."""
    assert o.dataset_name is not None
    room = room_for_prompt("pairs", o.max_length, o.max_completion_length)
    split, config = o.dataset_train_split, o.dataset_config
    rows = load_rows(o.dataset_name, columns=prompt_columns, split=split, config=config)
    prompts, told = tokenize_prompts(rows, tokenizer, max_length=room)
    PartialState().print(f"prompts   {told}", flush=True)
    return prompts[: o.max_prompts]


def pair_of(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, samples: Sequence[Sample], scores: torch.Tensor, margin: float
) -> dict[str, Any] | None:
    """The best and the worst of a prompt's samples as a row; None where they do not differ enough, or not at all."""
    known = [i for i in range(len(samples)) if not scores[i].isnan()]
    if not known:
        return None
    best, worst = (choose(known, key=lambda i: float(scores[i])) for choose in (max, min))
    chosen, rejected = (completion_of(tokenizer, prompt, samples[i]) for i in (best, worst))
    if not scores[best] - scores[worst] > margin or chosen == rejected:
        return None
    row = {"prompt": prompt.prompt, "chosen": chosen, "rejected": rejected}
    return {**row, "score_chosen": float(scores[best]), "score_rejected": float(scores[worst])}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One row a line, under another name first."""
    aside = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(aside, path)


def _groups(samples: Sequence[Sample], size: int) -> list[Sequence[Sample]]:
    return [samples[first : first + size] for first in range(0, len(samples), size)]
