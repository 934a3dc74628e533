"""`fastpref pairs`: best and worst of what a model says, the same however it is batched and split; DPO reads it."""

import json
from functools import partial

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

from fastpref.trainer.data import pair_columns
from fastpref.trainer.data_files import load_rows
from fastpref.trainer.pairs import PairsOptions, make
from tests._online import LENGTH, REPEATS, make_tiny, repeats
from tests._trainer import TWO_PROCESSES, run_command


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def options(tiny, path, **given):
    sources = {"model_name_or_path": str(tiny / "model"), "dataset_name": str(tiny / "prompts.jsonl")}
    small = {"max_completion_length": LENGTH, "num_generations": 6, "max_length": 16, "reward_funcs": [REPEATS]}
    return PairsOptions(**{**small, **sources, "output_file": str(path), **given})


def test_pairs_hold_the_best_and_the_worst(tiny, tmp_path):
    made = make(options(tiny, tmp_path / "pairs.jsonl"))
    rows = load_rows(str(tmp_path / "pairs.jsonl"), columns=pair_columns)
    assert 30 < len(rows) == made.pairs < made.prompts == 64
    score = partial(repeats, [None])
    for row in rows:
        letter = row["prompt"].split()[0]
        for side in ("chosen", "rejected"):
            assert score([row[side]], [letter]) == [row[f"score_{side}"]]
        assert row["score_chosen"] > row["score_rejected"] == 0
    assert made.mean_chosen > 2 * made.mean_score
    # where all six got the same there is nothing to prefer
    strict = make(options(tiny, tmp_path / "strict.jsonl", min_margin=0.3))
    assert 0 < strict.pairs < made.pairs


def test_neither_batches_nor_processes_change_what_is_made(tiny, tmp_path):
    make(options(tiny, tmp_path / "one.jsonl"))
    make(options(tiny, tmp_path / "small.jsonl", per_device_eval_batch_size=7))
    run_command(options(tiny, tmp_path / "two.jsonl"), launcher=TWO_PROCESSES)
    one = (tmp_path / "one.jsonl").read_text()
    assert (tmp_path / "small.jsonl").read_text() == one
    assert (tmp_path / "two.jsonl").read_text() == one


def test_messages_stay_messages(tiny, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"{a} b"}], "letter": a} for a in "abcd"]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w0{% endif %}"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(tiny / "model").save_pretrained(tmp_path / "model")
    sources = {"model_name_or_path": str(tmp_path / "model"), "dataset_name": str(tmp_path / "chat.jsonl")}
    make(options(tiny, tmp_path / "pairs.jsonl", **sources, reward_funcs=["tests.test_pairs_command:counts_messages"]))
    for line in (tmp_path / "pairs.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["prompt"][0]["role"] == "user" and row["chosen"][0]["role"] == "assistant"


def counts_messages(prompts, completions, completion_ids, **_):
    assert all(prompt[0]["content"].endswith(" b") for prompt in prompts)
    return [
        len(set(ids)) + len(completion[0]["content"])
        for ids, completion in zip(completion_ids, completions, strict=True)
    ]


def test_refuses(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"^pairs: num_generations must be at least 2"):
        options(tiny, tmp_path / "x", num_generations=1)
    with pytest.raises(ValueError, match=r"^pairs: dataset wants the prompts to complete"):
        options(tiny, tmp_path / "x", dataset_name=None)
    with pytest.raises(ValueError, match=r"^Rewards: tests._online:nothing must name a function"):
        make(options(tiny, tmp_path / "x", reward_funcs=["tests._online:nothing"]))
    with pytest.raises(ValueError, match=r"^Rewards: no module nowhere for nowhere.inside:it, in the current folder"):
        make(options(tiny, tmp_path / "x", reward_funcs=["nowhere.inside:it"]))
    for name, told in {"rewards.brevity": "rewards:brevity", "accuracy_reward": "trl.rewards:accuracy_reward"}.items():
        with pytest.raises(ValueError, match=rf"^Rewards: {name} is neither .* as module:function, as in {told}$"):
            make(options(tiny, tmp_path / "x", reward_funcs=[name]))
    with pytest.raises(ValueError, match=r"^pairs: no prompt has completions whose scores differ by more than 1$"):
        make(options(tiny, tmp_path / "x", min_margin=1.0))
    with pytest.raises(ValueError, match=r"^pairs: no tokenizer to be had from '/nowhere' \(no such folder\)"):
        make(options(tiny, tmp_path / "x", model_name_or_path="/nowhere"))
    with pytest.raises(ValueError, match=r"^RewardModel: no model to be had from '/nowhere' \(no such folder\)"):
        make(options(tiny, tmp_path / "x", reward_funcs=["/nowhere"]))
    with pytest.raises(
        ValueError, match=r"^pairs: max_length must leave room for a prompt beside 4 new tokens; got 4$"
    ):
        make(options(tiny, tmp_path / "x", max_length=4))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a b"}\n{"prompt": null}\n')
    with pytest.raises(ValueError, match=r"^tokenize_prompts: .*bad.jsonl, line 2: prompt must be a text or a list"):
        make(options(tiny, tmp_path / "x", dataset_name=str(tmp_path / "bad.jsonl")))
    assert not (tmp_path / "x").exists()
