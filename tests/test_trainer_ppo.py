"""`fastpref ppo` on a tiny model: it finds a known optimum, resumes, splits over processes, counts as papers do."""

import dataclasses
import json
import math
from functools import partial

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

import peft
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fastpref.trainer import ppo
from fastpref.trainer.metrics import read_metrics
from fastpref.trainer.online import draw, open_online
from fastpref.trainer.ppo import PPOOptions, train
from fastpref.trainer.rewards import RewardModel
from fastpref.trainer.rollout import Sample
from tests._online import AGREES, LENGTH, assert_resumes, make_tiny, online_options
from tests._trainer import assert_same_metrics, assert_same_weights, run_processes

options = partial(online_options, PPOOptions)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_reaches_95_percent_of_the_optimum(tiny, tmp_path, seed):
    """The best policy answers even letters with even words only, and gets 1; a random one gets 1/2."""
    given = {"per_device_train_batch_size": 64, "num_mini_batches": 2, "num_ppo_epochs": 2, "reward_funcs": [AGREES]}
    train(options(tiny, tmp_path, seed=seed, lr_scheduler_type="linear", max_steps=40, learning_rate=5e-3, **given))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[0]["objective/scores"] < 0.7
    assert lines[-1]["objective/scores"] >= 0.95


LORA = {"use_peft": True, "lora_target_modules": "all-linear", "kl_coef": 0.05, "per_device_train_batch_size": 8}
LORA |= {"gradient_accumulation_steps": 2, "num_mini_batches": 2, "max_steps": 6, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    """The run that others are compared with."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, train(options(tiny, folder, **LORA))


def test_metrics_have_the_names_of_trl(plain):
    lines = read_metrics(plain[0] / "metrics.jsonl")
    named = "objective/kl objective/entropy objective/non_score_reward objective/rlhf_reward objective/scores "
    named += "policy/approxkl_avg policy/clipfrac_avg loss/policy_avg loss/value_avg val/clipfrac_avg "
    named += "policy/entropy_avg val/ratio val/ratio_var val/num_eos_tokens"
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert set(named.split()) <= line.keys()
        assert line["objective/rlhf_reward"] == pytest.approx(
            line["objective/scores"] + line["objective/non_score_reward"]
        )
        assert line["objective/non_score_reward"] == pytest.approx(-0.05 * line["objective/kl"])
    assert lines[-1]["objective/kl"] > 1e-3


def test_what_is_saved_is_the_actors_adapter_and_changes_the_model(plain, tiny):
    base = AutoModelForCausalLM.from_pretrained(tiny / "model")
    ids = torch.tensor([[3, 4, 3]])
    before = base(ids).logits
    actor = peft.PeftModel.from_pretrained(base, plain[1].model_dir)
    assert not torch.allclose(actor(ids).logits, before, atol=1e-3)
    assert (plain[0] / "training.png").stat().st_size > 10_000


def test_rollouts_are_there_to_read(plain):
    lines = [json.loads(line) for line in (plain[0] / "rollouts.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 2, 4, 4, 6, 6]
    assert all(len(line["completion"].split()) == LENGTH for line in lines)
    for line in lines:
        assert line["reward"] == line["completion"].split().count(line["prompt"].split()[0]) / LENGTH


def test_first_pass_is_on_policy(tiny, tmp_path):
    """Generation, the scoring pass and the training pass agree on what was sampled: every ratio is 1."""
    train(
        options(
            tiny, tmp_path, **{**LORA, "num_ppo_epochs": 1, "num_mini_batches": 1, "temperature": 0.6, "max_steps": 2}
        )
    )
    for line in read_metrics(tmp_path / "metrics.jsonl"):
        assert line["val/ratio"] == pytest.approx(1, abs=1e-5)
        assert line["policy/approxkl_avg"] < 1e-9


def test_gradient_checkpointing_changes_nothing(plain, tiny, tmp_path):
    train(options(tiny, tmp_path, **LORA, gradient_checkpointing=True))
    assert_same_metrics(tmp_path, plain[0], abs=1e-4)


def test_padding_changes_nothing(plain, tiny, tmp_path):
    train(options(tiny, tmp_path, **LORA, padding_free=False))
    assert_same_metrics(tmp_path, plain[0], abs=1e-4)


def test_two_processes_make_the_run_of_one(plain, tiny, tmp_path):
    given = options(tiny, tmp_path, **{**LORA, "gradient_accumulation_steps": 1})
    run_processes(given, 2)
    assert_same_metrics(tmp_path, plain[0], abs=2e-4)


def test_killed_and_resumed_is_uninterrupted(tiny, tmp_path):
    """SIGKILL past step 5: metrics and rollouts are those of a run left alone, KL weight and critic included."""
    long = {**LORA, "max_steps": 20, "save_steps": 2, "adaptive_kl_target": 0.5, "adaptive_kl_horizon": 200}
    assert_resumes(train, partial(options, tiny), tmp_path, 5, **long)
    coefficients = [line["objective/kl_coef"] for line in read_metrics(tmp_path / "whole/metrics.jsonl")]
    assert len(set(coefficients)) == len(coefficients)


def test_whole_models_resume_too(tiny, tmp_path):
    given = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 8, "kl_coef": 0.1}
    train(options(tiny, tmp_path / "whole", **given))
    train(options(tiny, tmp_path / "half", **given))
    again = {**given, "resume_from_checkpoint": str(tmp_path / "half/checkpoint-2")}
    train(options(tiny, tmp_path / "half", **again))
    assert_same_weights(tmp_path / "half/model", tmp_path / "whole/model", rtol=0, atol=0)


def samples(*lengths, stopped=True):
    draw = torch.Generator().manual_seed(0)
    found = []
    for i, n in enumerate(lengths):
        tokens = {name: torch.randn(n, generator=draw) for name in ("logps", "ref_logps", "values")}
        found.append(Sample(i, [3, 4], list(range(3, 3 + n)), stopped if i else True, tokens))
    return found


def judge(these, scores, state=None, **given):
    o = PPOOptions(**{"gamma": 0.9, "lam": 0.8, "kl_coef": 0.3, **given})
    return ppo.judged(o, torch.tensor(scores), these, {"kl_coef": o.kl_coef} if state is None else state)


def test_advantages_are_those_of_the_papers():
    these, scores = samples(3, 1, 5), [1.0, -2.0, 0.5]
    batch, sums = judge(these, scores)
    every = []
    for i, sample in enumerate(these):
        logps, ref, values = (sample.tokens[name].tolist() for name in ("logps", "ref_logps", "values"))
        rewards = [-0.3 * (p - q) for p, q in zip(logps, ref, strict=True)]
        rewards[-1] += scores[i]
        advantage, own = 0.0, []
        for t in reversed(range(len(rewards))):
            after = values[t + 1] if t + 1 < len(values) else 0.0
            advantage = rewards[t] + 0.9 * after - values[t] + 0.9 * 0.8 * advantage
            own.insert(0, advantage)
        returns = [a + v for a, v in zip(own, values, strict=True)]
        assert batch.returns[i, : len(own)].tolist() == pytest.approx(returns, abs=1e-5)
        assert not batch.advantages[i, len(own) :].any()
        every += own
    mean = sum(every) / len(every)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in every) / (len(every) - 1))
    assert batch.advantages[batch.mask].tolist() == pytest.approx([(a - mean) / deviation for a in every], abs=1e-4)
    kl = sum(float((s.tokens["logps"] - s.tokens["ref_logps"]).sum()) for s in these)
    assert sums["objective/kl"] == pytest.approx([kl, 3.0], abs=1e-4)
    assert sums["objective/non_score_reward"] == pytest.approx([-0.3 * kl, 3.0], abs=1e-4)


def test_a_completion_without_eos_pays():
    cut = samples(3, 2, stopped=False)  # the second was cut
    paid, sums = judge(cut, [1.0, 1.0], missing_eos_penalty=5.0)
    free, _ = judge(cut, [1.0, 1.0])
    assert float((free.returns - paid.returns)[0].abs().max()) == 0
    assert float((free.returns - paid.returns)[1, 1]) == pytest.approx(5.0, abs=1e-5)
    assert sums["objective/scores"] == [-3.0, 2.0]
    assert sums["val/num_eos_tokens"] == [1.0, 1.0]


def test_whitened_rewards_keep_their_mean():
    these = samples(4, 2)
    scores = [4.0, 2.0]
    plain, _ = judge(these, scores, gamma=0.0)
    white, _ = judge(these, scores, gamma=0.0, whiten_rewards=True)
    # with gamma 0 a return is the token's own reward
    old, new = plain.returns[plain.mask], white.returns[white.mask]
    torch.testing.assert_close(new, (old - old.mean()) / old.std() + old.mean(), rtol=1e-4, atol=1e-4)


def test_the_kl_weight_is_steered():
    state = {"kl_coef": 0.3}
    these = samples(3, 1)
    kl = sum(float((s.tokens["logps"] - s.tokens["ref_logps"]).sum()) for s in these) / 2
    judge(these, [1.0, 1.0], state, adaptive_kl_target=abs(kl) * 100, adaptive_kl_horizon=100)
    assert state["kl_coef"] == pytest.approx(0.3 * (1 - 0.2 * 2 / 100))


@pytest.fixture(scope="module")
def reward(tiny):
    """A reward model as an adapter on the tiny model."""
    base = AutoModelForSequenceClassification.from_pretrained(tiny / "model", num_labels=1)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(tiny / "reward")
    AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(tiny / "reward")
    return str(tiny / "reward")


@pytest.mark.parametrize(("pad", "padding_free"), [("<pad>", True), ("<eos>", True), ("<eos>", False)])
def test_the_shared_reward_is_that_of_the_model_by_itself(tiny, reward, tmp_path, pad, padding_free):
    given = {"reward_model_path": reward, "reward_funcs": None, "stop_token": "eos", "max_steps": 1}
    given["padding_free"] = padding_free
    run, rewards = open_online(options(tiny, tmp_path, **{**LORA, **given}))
    assert "reward" in run.bare_model.heads and rewards.names == ["reward_model"]
    run.tokenizer.pad_token = pad
    samples = draw(run, rewards, run.items, [(i, 0) for i in range(40)], 1, lambda some: {})
    assert any(sample.stopped for sample in samples)
    alone = RewardModel(reward, run.tokenizer, torch.device("cpu"), 16)
    alone._model.config.pad_token_id = run.tokenizer.pad_token_id
    expected = alone([run.items[sample.prompt] for sample in samples], samples)
    assert torch.tensor(expected).std() > 1e-3
    assert rewards.totals(samples).tolist() == pytest.approx(expected, abs=1e-5)


def test_a_reward_model_of_another_base_stands_apart(tiny, reward, tmp_path):
    given = {"reward_model_path": reward, "reward_funcs": None, "use_peft": False, "max_steps": 2}
    train(options(tiny, tmp_path, **{**LORA, **given}))
    assert math.isfinite(read_metrics(tmp_path / "metrics.jsonl")[-1]["objective/scores"])


def test_a_reward_that_cannot_tell_is_refused():
    with pytest.raises(ValueError, match=r"^ppo: every completion needs a reward"):
        judge(samples(3, 1), [1.0, math.nan])


def test_a_step_ends_early_and_the_schedule_goes_on(tiny, tmp_path):
    given = {**LORA, "max_steps": 2, "logging_steps": 1, "learning_rate": 0.1, "lr_scheduler_type": "linear"}
    train(options(tiny, tmp_path, **given, target_kl=1e-4))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[0]["val/num_updates"] < 8
    # the rate is that of the last update taken; at the second step half of the schedule is over
    assert 0.1 * 7 / 16 <= lines[1]["learning_rate"] <= 0.1 / 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"beta": 0.1, "kl_coef": 0.1}, "the KL counts in the loss (beta) or in the reward (kl_coef), not in both"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"target_kl": 0.0}, "target_kl must be above 0; got 0.0"),
        ({"missing_eos_penalty": 1.0}, "missing_eos_penalty needs a stop token"),
        ({"adaptive_kl_target": 1.0}, "adaptive_kl_target steers kl_coef, and both must be above 0"),
        ({"num_ppo_epochs": 0}, "num_ppo_epochs must be at least 1"),
        ({"adaptive_kl_horizon": 0}, "adaptive_kl_horizon must be at least 1"),
        ({"gamma": 1.5}, "gamma must be in [0, 1]; got 1.5"),
        ({"lam": -0.1}, "lam must be in [0, 1]; got -0.1"),
        ({"cliprange": -0.2}, "cliprange must be 0 or more; got -0.2"),
        ({"cliprange_value": float("nan")}, "cliprange_value must be 0 or more; got nan"),
        ({"vf_coef": -0.1}, "vf_coef must be 0 or more; got -0.1"),
    ],
)
def test_refuses(tiny, tmp_path, given, message):
    with pytest.raises(ValueError) as refused:
        options(tiny, tmp_path, **given)
    assert str(refused.value).startswith("ppo: ") and message in str(refused.value)


def test_refuses_more_minibatches_than_completions(tiny, tmp_path):
    message = r"^ppo: num_mini_batches must be at most the completions of a step, 4; got 5"
    with pytest.raises(ValueError, match=message):
        train(options(tiny, tmp_path, per_device_train_batch_size=4, num_mini_batches=5, max_steps=1))


def test_refuses_an_adapter_prompts_without_room_and_a_run_without_reward(tiny, plain, tmp_path):
    with pytest.raises(ValueError, match=r"^ppo: max_length must leave room for a prompt beside 4 new tokens; got 4$"):
        train(options(tiny, tmp_path, max_length=4))
    with pytest.raises(ValueError, match=r"^ppo: model_name_or_path must be a whole model; .* is an adapter\. Merge"):
        train(dataclasses.replace(options(tiny, tmp_path), model_name_or_path=str(plain[1].model_dir)))
    with pytest.raises(ValueError, match=r"^Rewards: a reward is wanted"):
        train(options(tiny, tmp_path, reward_funcs=None, max_steps=1))
