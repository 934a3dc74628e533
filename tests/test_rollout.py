"""Sampling: from the right distribution, the same whatever the batch, and nothing of the model's own settings."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

from transformers import AutoModelForCausalLM, GenerationConfig

from fastpref.trainer.rollout import Sampling, complete, seed_of, stop_ids_of
from fastpref.trainer.start import padding_id
from tests._online import WORDS, make_tiny

EOS, PAD = 1, 2
PROMPTS = [[3, 4], [5], [6, 7, 8, 9, 10], [3], [9, 9, 9]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return AutoModelForCausalLM.from_pretrained(make_tiny(tmp_path_factory.mktemp("tiny")) / "model").eval()


def how(**given):
    return Sampling(
        **{"max_new_tokens": 6, "temperature": 1.0, "stop_ids": (EOS,), "pad_id": PAD, "batch_size": 8, **given}
    )


def test_what_is_drawn_does_not_depend_on_the_batch(model):
    seeds = [seed_of(0, 1, i, 0) for i in range(len(PROMPTS))]
    together = complete(model, PROMPTS, seeds, how())
    assert together == complete(model, PROMPTS, seeds, how(batch_size=2))
    alone = [complete(model, [p], [s], how())[0] for p, s in zip(PROMPTS, seeds, strict=True)]
    assert together == alone
    # and one draw does not repeat another
    assert complete(model, PROMPTS, [s + 1 for s in seeds], how()) != together


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_tokens_come_as_often_as_they_are_likely(model, temperature):
    """Pearson's statistic of 4,000 first tokens, 31 degrees of freedom: above 61.1 once in a thousand times."""
    n = 4000
    drawn = complete(model, [PROMPTS[0]] * n, range(n), how(max_new_tokens=1, temperature=temperature, batch_size=n))
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1].double()
    expected = n * torch.softmax(logits / temperature, -1)
    count = Counter(ids[0] for ids, _ in drawn)
    found = torch.tensor([count[token] for token in range(len(WORDS))]).double()
    assert float(((found - expected).square() / expected).sum()) < 61.1


@pytest.mark.parametrize("kept", [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.5}])
def test_top_k_top_p_and_min_p_leave_the_likeliest(model, kept):
    n = 1000
    given = {"max_new_tokens": 1, "temperature": 0.7, "batch_size": n, **kept}
    drawn = complete(model, [PROMPTS[0]] * n, range(n), how(**given))
    with torch.no_grad():
        p, order = torch.softmax(model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 0.7, -1).sort(descending=True)
    size = {"top_k": 5, "top_p": int((p.cumsum(0) < 0.6).sum()) + 1, "min_p": int((p >= 0.5 * p[0]).sum())}
    size = size[next(iter(kept))]
    assert 1 < size < 20
    count = Counter(ids[0] for ids, _ in drawn)
    assert count.keys() == {*order[:size].tolist()}
    assert count[int(order[0])] / n == pytest.approx(float(p[0] / p[:size].sum()), abs=4 * 0.5 / n**0.5)


def test_temperature_0_is_the_likeliest_token_and_no_stop_token_means_full_length(model):
    drawn = complete(model, PROMPTS, range(5), how(temperature=0.0, stop_ids=()))
    for prompt, (ids, stopped) in zip(PROMPTS, drawn, strict=True):
        assert len(ids) == 6 and not stopped
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == ids


def test_a_stop_token_ends_a_completion_and_stays(model):
    drawn = complete(model, [[3, 4]] * 200, range(200), how(stop_ids=(EOS, 5), batch_size=200))
    ended = [ids for ids, stopped in drawn if stopped]
    assert 20 < len(ended) < 180
    for ids, stopped in drawn:
        assert (ids[-1] in (EOS, 5)) == stopped and not {EOS, 5} & set(ids[:-1])
        assert stopped or len(ids) == 6


@pytest.mark.parametrize(
    ("eos", "named", "stop"),
    [(1, None, (1,)), (1, [7, 1], (1, 7)), (1, 7, (1, 7)), (None, 7, (7,)), (None, None, ())],
)
def test_completions_stop_where_tokenizer_or_model_end_them(eos, named, stop):
    tokenizer = SimpleNamespace(eos_token_id=eos, pad_token_id=None)
    assert stop_ids_of(tokenizer, SimpleNamespace(generation_config=GenerationConfig(eos_token_id=named))) == stop
    assert padding_id(tokenizer) == (eos or 0)


def test_the_models_own_settings_are_left_aside_and_kept(model):
    seeds = list(range(5))
    plain = complete(model, PROMPTS, seeds, how())
    model.generation_config.repetition_penalty, model.generation_config.top_k = 1.8, 1
    try:
        assert complete(model, PROMPTS, seeds, how()) == plain
        assert model.generation_config.repetition_penalty == 1.8
    finally:
        model.generation_config.repetition_penalty = model.generation_config.top_k = None
