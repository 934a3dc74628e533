"""Rewards of completions: functions written for TRL run as they are, what they return is checked, models read text."""

import asyncio
import inspect
import re

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from fastpref.trainer.prompts import Prompt
from fastpref.trainer.rewards import RewardModel, Rewards
from fastpref.trainer.rollout import Sample
from tests._online import WORDS, make_tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = make_tiny(tmp_path_factory.mktemp("tiny"))
    return AutoTokenizer.from_pretrained(folder / "model")


COLUMNS = [{"answer": "c", "completion": "not for it"}, {"answer": "d", "completion": "not for it"}]
SAMPLES = [Sample(0, [3, 4], [5, 1], True), Sample(1, [6, 4, 3], [1], True)]  # c and EOS; EOS alone, an empty text


def prompts_of(*given):
    return [Prompt(prompt, [3], row) for prompt, row in zip(given, COLUMNS, strict=True)]


TEXTS = prompts_of("a b", "d b a")
CHATS = prompts_of([{"role": "user", "content": "a b"}], [{"role": "user", "content": "d b a"}])


def rewards_of(functions, tokenizer, prompts=TEXTS, samples=SAMPLES, weights=None):
    rewards = Rewards(functions, weights, tokenizer, CPU, 4)
    rewards.trainer_state.global_step = 7
    rewards(prompts, samples)
    return rewards.totals(samples).tolist()


def right_answer(completions, answer, **kwargs):
    """As one writes it for TRL: the arguments it needs, the rest in kwargs."""
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [1.0 if text == wanted else 0.0 for text, wanted in zip(texts, answer, strict=True)]


def only_of_long_prompts(prompts, completions, **kwargs):
    texts = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
    return [-1.0 if len(text) > 3 else None for text in texts]


async def judged_elsewhere(prompts, completions, completion_ids, trainer_state, **kwargs):
    await asyncio.sleep(0)
    return [trainer_state.global_step + len(ids) for ids in completion_ids]


class Shortness:
    async def __call__(self, completions, **kwargs):
        return [-len(one) for one in completions]


@pytest.mark.parametrize("prompts", [TEXTS, CHATS])
def test_functions_written_for_trl_run_as_they_are(tokenizer, prompts):
    assert rewards_of([right_answer], tokenizer, prompts) == [1.0, 0.0]
    functions = [right_answer, only_of_long_prompts, judged_elsewhere]
    assert rewards_of(functions, tokenizer, prompts, weights=[2.0, 10.0, 0.5]) == [2.0 + 4.5, -10.0 + 4.0]


def test_what_a_function_gets(tokenizer):
    def see(**given):
        seen.update(given)
        return [0, 0]

    seen = {}
    rewards_of([see], tokenizer, CHATS)
    state = seen.pop("trainer_state")
    assert state.global_step == 7
    assert {*inspect.signature(seen.pop("log_metric")).parameters} == {"name", "value"}
    assert {*inspect.signature(seen.pop("log_extra")).parameters} == {"column", "values"}
    assert seen == {
        "prompts": [[{"role": "user", "content": "a b"}], [{"role": "user", "content": "d b a"}]],
        "completions": [[{"role": "assistant", "content": "c"}], [{"role": "assistant", "content": ""}]],
        "completion_ids": [[5, 1], [1]],
        "answer": ["c", "d"],
    }


@pytest.mark.parametrize("turned", [False, True])
def test_a_column_that_one_row_lacks_is_none_there(tokenizer, turned):
    def see(completions, answer, level, trainer_state, log_metric, log_extra, **given):
        seen.update(answer=answer, level=level, more=given.keys() - {"prompts", "completion_ids"})
        return [0, 0]

    seen = {}
    prompts = [Prompt("a b", [3], {"answer": "c"}), Prompt("d", [3], {"answer": "e", "level": 2})]
    rewards_of([see], tokenizer, prompts[::-1] if turned else prompts)
    rows = [("c", None), ("e", 2)][:: -1 if turned else 1]
    assert seen == {"answer": [row[0] for row in rows], "level": [row[1] for row in rows], "more": set()}


def test_functions_of_one_name_are_numbered(tokenizer):
    rewards = Rewards([lambda **_: [1.0], lambda **_: [2.0], lambda **_: [3.0]], None, tokenizer, CPU, 4)
    assert rewards.names == ["<lambda>", "<lambda>_2", "<lambda>_3"]


def test_a_batch_without_a_reward_is_told(tokenizer):
    with pytest.warns(UserWarning, match=r"^Rewards: None for each of 2 completions, by only_of_long_prompts: nothing"):
        rewards_of([only_of_long_prompts], tokenizer, [Prompt("a", [3], {"answer": "c"})] * 2)


def test_an_async_function_runs_beside_a_loop_that_runs(tokenizer):
    async def in_a_notebook():
        return rewards_of([Shortness()], tokenizer)

    assert asyncio.run(in_a_notebook()) == [-1.0, 0.0]


@pytest.mark.parametrize("convert", [np.array, torch.tensor, tuple, lambda x: torch.tensor(x)[:, None], iter])
def test_what_holds_numbers_will_do(tokenizer, convert):
    def rate(completions, **kwargs):
        return convert([0.5, -2.0])

    assert rewards_of([rate], tokenizer) == [0.5, -2.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "Rewards: rate must return 2 rewards, one each; got 1"),
        (1.0, "Rewards: rate must return 2 rewards, each a number or None; got 1.0"),
        (None, "Rewards: rate must return 2 rewards, each a number or None; got None"),
        (["good", "bad"], "Rewards: rate must return 2 rewards, each a number or None; got ['good', 'bad']"),
        (torch.ones(2, 3), "Rewards: rate must return 2 rewards, each a number or None; got tensor("),
        ([0.0, float("inf")], "Rewards: rate must return finite numbers, or None where it cannot tell; got inf"),
    ],
)
def test_refuses_what_a_function_returns(tokenizer, returned, message):
    def rate(**kwargs):
        return returned

    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
        rewards_of([rate], tokenizer)


def test_what_a_function_raises_comes_through(tokenizer):
    def rate(**kwargs):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match=r"^mine$"):
        rewards_of([rate], tokenizer)


def test_a_reward_model_of_another_vocabulary_reads_the_text(tokenizer, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=len(WORDS), num_labels=1, pad_token_id=2, initializer_range=0.5, **sizes)
        model = LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path / "same")
    tokenizer.save_pretrained(tmp_path / "same")
    # the same words under other ids, and the embeddings moved with them
    order = [0, 1, 2, *reversed(range(3, len(WORDS)))]
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table.copy_(table[order].clone())
    model.save_pretrained(tmp_path / "other")
    for file in (tmp_path / "same").glob("*token*"):
        text = file.read_text()
        if file.name == "tokenizer.json":
            for i, word in enumerate(WORDS):
                text = text.replace(f'"{word}": {i}', f'"{word}": {order[i]}')
        (tmp_path / "other" / file.name).write_text(text)
    assert AutoTokenizer.from_pretrained(tmp_path / "other").get_vocab() != tokenizer.get_vocab()
    same, other = (RewardModel(str(tmp_path / name), tokenizer, CPU, 4) for name in ("same", "other"))
    expected = same(TEXTS, SAMPLES)
    assert abs(expected[0] - expected[1]) > 1e-3
    assert other(TEXTS, SAMPLES) == pytest.approx(expected, abs=1e-6)
