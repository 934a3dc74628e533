"""The iterative examples, two rounds each, on a random Llama of a few words."""

import importlib.util
import json
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from transformers import GenerationConfig

from tests import _trainer
from tests._trainer import ROOT, make_tiny, weights


def run(name, monkeypatch, tmp_path, *words):
    """What `python examples/NAME.py ...` does, with the pairs of its rounds."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    given = ["--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "run")]
    given += ["--rounds", "2", "--max_steps", "1", "--batch", "4"]
    monkeypatch.setattr(sys, "argv", [name, *given, *words])
    monkeypatch.setenv("FASTPREF_CACHE", str(tmp_path / "cache"))
    module.main()
    lines = [(tmp_path / "run" / str(i) / "pairs.jsonl").read_text().splitlines() for i in range(2)]
    return [[json.loads(line) for line in of_round] for of_round in lines]


def learned(tmp_path):
    """Each round left another model."""
    heads = [weights(tmp_path / folder)["lm_head.weight"] for folder in ("model", "run/0/model", "run/1/model")]
    return not heads[0].equal(heads[1]) and not heads[1].equal(heads[2])


def test_spin_prefers_peoples_answers_to_its_own(tmp_path, monkeypatch, capsys):
    make_tiny(tmp_path)
    ends = [1, _trainer.WORDS.index("the")]
    GenerationConfig(eos_token_id=ends).save_pretrained(tmp_path / "model")
    rounds = run("spin", monkeypatch, tmp_path, "--dataset", str(tmp_path / "examples.jsonl"), "--max_new_tokens", "8")
    rows = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    for pairs in rounds:
        assert [(pair["prompt"], pair["chosen"]) for pair in pairs] == [(r["prompt"], r["completion"]) for r in rows]
        own = [pair["rejected"].split() for pair in pairs]
        ended = [answer for answer in own if "the" in answer]
        assert ended and all(answer.index("the") == len(answer) - 1 for answer in ended)  # the model's own end, too
    assert rounds[0] != rounds[1] and learned(tmp_path)
    assert "round 2 of 2: 64 answers of its own, " in capsys.readouterr().out


def test_self_rewarding_judges_and_learns(tmp_path, monkeypatch, capsys):
    # few words beside the digits: a random judge puts more than half of its probability on them
    monkeypatch.setattr(_trainer, "WORDS", ["<unk>", "<eos>", "<pad>", *"012345", "good", "bad"])
    make_tiny(tmp_path)
    prompts = [{"prompt": f"{word} film is"} for word in ("good", "bad", *"012345")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    words = ["--dataset", str(tmp_path / "prompts.jsonl"), "--max_completion_length", "4"]
    rounds = run("self_rewarding", monkeypatch, tmp_path, *words)
    for pairs in rounds:
        assert pairs and all(5 >= pair["score_chosen"] > pair["score_rejected"] >= 0 for pair in pairs)
    assert learned(tmp_path)
    assert "32 of 32 judgements usable, from 2." in capsys.readouterr().out
