"""`fastpref grpo` on a tiny model: GRPO and RLOO find a known optimum; groups, and what a dead one costs."""

import json
import math
import shutil
from functools import partial

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

from transformers import GenerationConfig

from fastpref.losses.surrogates import POLICY_LOSSES
from fastpref.trainer import forward, grpo
from fastpref.trainer.config import given_options
from fastpref.trainer.grpo import GRPOOptions, group_advantages, train
from fastpref.trainer.metrics import Tally, read_metrics
from fastpref.trainer.online import draw, facts_of, open_online
from fastpref.trainer.packing import pack
from fastpref.trainer.rewards import Rewards
from fastpref.trainer.rollout import Sample
from tests._online import AGREES, REPEATS, assert_resumes, make_tiny, online_options, repeats
from tests._trainer import assert_same_metrics, assert_same_weights, run_processes
from tests.test_plan import measured_passes

options = partial(online_options, GRPOOptions)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("loss_type", ["grpo", "rloo"])
def test_reaches_95_percent_of_the_optimum(tiny, tmp_path, loss_type, seed):
    given = {"per_device_train_batch_size": 128, "lr_scheduler_type": "linear", "max_steps": 50}
    given |= {"reward_funcs": [AGREES]}
    train(options(tiny, tmp_path, loss_type=loss_type, seed=seed, **given))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[0]["reward"] < 0.7
    assert lines[-1]["reward"] >= 0.95


@pytest.mark.parametrize("loss_type", ["dr_grpo", "gspo", "cispo", "sapo", "vespo", "luspo", "reinforce", "bnpo"])
def test_every_loss_improves(tiny, tmp_path, loss_type):
    given = {"per_device_train_batch_size": 64, "max_steps": 10, "beta": 0.01, "num_iterations": 2}
    given |= {} if loss_type == "reinforce" else {"steps_per_generation": 2}
    train(options(tiny, tmp_path, loss_type=loss_type, **given))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[-1]["reward"] > lines[0]["reward"] + 0.03
    assert lines[-1]["objective/kl"] > 0.1


def test_advantages_by_hand():
    rewards = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    found, deviations = group_advantages(rewards, 3, "paper", "grpo")
    std = math.sqrt((4 + 1 + 9) / 2)
    torch.testing.assert_close(deviations, torch.tensor([std, 0.0]))
    torch.testing.assert_close(found, torch.tensor([-2.0, -1.0, 3.0, 0, 0, 0]) / (std + 1e-4))
    found, _ = group_advantages(rewards, 3, "paper", "rloo")  # less the mean of the others
    torch.testing.assert_close(found, torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5, 0, 0, 0]))
    found, _ = group_advantages(rewards, 3, "paper", "dr_grpo")
    torch.testing.assert_close(found, torch.tensor([-2.0, -1.0, 3.0, 0, 0, 0]))
    found, _ = group_advantages(rewards, 3, "batch", "dr_grpo")
    torch.testing.assert_close(found, torch.tensor([-2.0, -1.0, 3.0, 0, 0, 0]) / (rewards.std() + 1e-4))


def test_a_completion_that_no_reward_can_tell_is_left_out_of_its_group():
    rewards = torch.tensor([1.0, math.nan, 3.0, math.nan, math.nan, math.nan])
    found, _ = group_advantages(rewards, 3, "none", "rloo")
    torch.testing.assert_close(found, torch.tensor([-2.0, 0.0, 2.0, 0, 0, 0]))


@pytest.mark.parametrize("estimator", [None, "k1", "k2", "k3"])
def test_the_kl_in_the_reward_is_that_of_the_estimator_asked_for(tiny, tmp_path, estimator):
    rows = [([-1.0, -2.0], [-1.5, -1.0]), ([-0.5], [-2.5])]  # logps, ref_logps of completions of unequal length

    def sample(logps, ref_logps):
        tokens = {"logps": torch.tensor(logps), "ref_logps": torch.tensor(ref_logps)}
        return Sample(0, [3], [4] * len(logps), True, tokens=tokens, rewards=[1.0])

    given = options(tiny, tmp_path, loss_type="rloo", num_generations=2, kl_coef=0.1, kl_estimator=estimator)
    rewards = Rewards([REPEATS], None, None, torch.device("cpu"), 1)
    batch, sums = grpo.judged(given, rewards, [sample(*row) for row in rows])
    d = [[a - b for a, b in zip(*row, strict=True)] for row in rows]
    each = {"k1": lambda x: x, "k2": lambda x: x * x / 2, "k3": lambda x: math.expm1(-x) + x}[estimator or "k1"]
    totals = [1 - 0.1 * sum(map(each, row)) for row in d]
    assert sums["reward"] == pytest.approx([sum(totals), 2.0], abs=1e-6)
    assert batch.advantages.tolist() == pytest.approx([totals[0] - totals[1], totals[1] - totals[0]], abs=1e-6)
    assert sums["objective/kl"] == pytest.approx([sum(map(sum, d)), 2.0])  # k1 whatever the reward takes


def passes_of_a_step(tiny, folder, equal, **given):
    """Passes over the head, 2 N H V each, of a step's loss and backward; a share of the groups has equal rewards."""
    run, rewards = open_online(options(tiny, folder, per_device_train_batch_size=64, max_steps=1, **given))
    wanted = [(i, k) for i in range(8) for k in range(8)]
    samples = draw(run, rewards, run.items, wanted, 1, partial(facts_of, run))
    for place, sample in enumerate(samples):
        sample.rewards = [0.0 if place < equal * 64 else float(place % 8)]
    batch, sums = grpo.judged(run.options, rewards, samples)
    assert sums["frac_reward_zero_std"] == [equal * 8, 8.0]
    n_tokens = int(batch.mask.sum())
    run.bare_model.train()
    run.bare_model.actor.base_model.requires_grad_(False)  # what is left is the head
    hidden_size, vocab_size = 32, run.bare_model.actor.lm_head.weight.shape[0]
    call = partial(grpo.backward_of_batch, run, batch, n_tokens, list(range(64)), Tally())
    return measured_passes(call, 2 * n_tokens * hidden_size * vocab_size)


def test_groups_without_a_difference_cost_no_backward_in_the_head(tiny, tmp_path, monkeypatch):
    # the backend whose GEMMs the profiler sees
    monkeypatch.setattr(GRPOOptions, "head_options", property(lambda _: {"backend": "torch"}))
    half = passes_of_a_step(tiny, tmp_path, 0.5)
    none = passes_of_a_step(tiny, tmp_path, 0.0)
    # the base's own GEMMs are the same in both
    assert none - half == pytest.approx(0.5, abs=0.02)


def test_completions_end_with_any_token_that_the_model_names(tiny, tmp_path):
    shutil.copytree(tiny / "model", tmp_path / "model")
    GenerationConfig(eos_token_id=[1, *range(3, 32)]).save_pretrained(tmp_path / "model")
    given = {"model_name_or_path": tmp_path / "model", "per_device_train_batch_size": 16, "max_steps": 1}
    train(options(tiny, tmp_path / "run", test_split_size=0, logging_steps=1, **given))
    (line,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert line["completions/mean_length"] < 2
    assert line["completions/clipped_ratio"] == 0


def test_masked_truncated_completions_have_no_loss(tiny, tmp_path):
    given = {"per_device_train_batch_size": 64, "max_steps": 1, "logging_steps": 1}
    train(options(tiny, tmp_path / "all", **given))
    train(options(tiny, tmp_path / "none", **given, mask_truncated_completions=True, max_completion_length=1))
    every, masked = (read_metrics(tmp_path / name / "metrics.jsonl")[0] for name in ("all", "none"))
    assert every["grad_norm"] > 1e-2
    assert masked["completions/clipped_ratio"] > 0.8
    assert masked["grad_norm"] < every["grad_norm"]


def silent(completions, **_):
    return [None] * len(completions)


def same(completions, **_):
    return [1.0] * len(completions)


def logs(completions, log_metric, log_extra, trainer_state, **_):
    log_extra("length", [len(text) for text in completions])
    for value in (1.0, 2.0):
        log_metric("mine", value + trainer_state.global_step)
    return [float(len(text)) for text in completions]


def test_what_rewards_log_is_in_the_metrics(tiny, tmp_path):
    given = {"per_device_train_batch_size": 16, "max_steps": 2, "logging_steps": 2, "test_split_size": 4}
    train(options(tiny, tmp_path, reward_funcs=[logs], **given))
    lines = {line["step"]: line for line in read_metrics(tmp_path / "metrics.jsonl") if "mine" in line}
    assert {step: line["mine"] for step, line in lines.items()} == {2: 2.0}


@pytest.mark.parametrize("reward", [silent, same])
def test_where_no_completion_is_better_than_another_the_model_stays(tiny, tmp_path, reward):
    """One prompt, one group, no difference and with `silent` no reward at all."""
    (tmp_path / "one.jsonl").write_text('{"prompt": "a b", "letter": "a"}\n')
    given = {"dataset_name": str(tmp_path / "one.jsonl"), "max_steps": 2, "logging_steps": 1}
    train(options(tiny, tmp_path / "run", **given, reward_funcs=reward, mask_truncated_completions=True))
    for line in read_metrics(tmp_path / "run/metrics.jsonl"):
        # no loss is logged where every completion was cut short
        assert line.get("loss", 0) == 0 and line["grad_norm"] == 0 and line["frac_reward_zero_std"] == 1
        assert line.get("reward") == (1.0 if reward is same else None)
    assert_same_weights(tmp_path / "run/model", tiny / "model", rtol=0, atol=0)


def test_several_rewards_with_weights(tiny, tmp_path):
    both = {"reward_funcs": ["tests._online:repeats", "tests._online:unsure"], "reward_weights": [2.0, -1.0]}
    train(options(tiny, tmp_path, **both, per_device_train_batch_size=64, max_steps=1, logging_steps=1))
    line = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert line["rewards/unsure/mean"] == 1.0
    assert line["reward"] < 2 * line["rewards/repeats/mean"]


def test_held_out_prompts_show_what_training_changed(tiny, tmp_path, capsys):
    given = {"per_device_train_batch_size": 128, "max_steps": 20, "reward_funcs": [AGREES], "beta": 0.01}
    outcome = train(options(tiny, tmp_path, **given, test_split_size=16))
    assert outcome.before["eval_kl"] == pytest.approx(0, abs=1e-5)
    assert outcome.after["eval_reward"] > outcome.before["eval_reward"] + 0.1
    assert outcome.after["eval_kl"] > 0.1
    said = capsys.readouterr().out
    assert "held out (16 prompts)     before     after" in said and "[reward " in said
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[0]["step"] == 0 and lines[0]["eval_reward"] == outcome.before["eval_reward"]


@pytest.mark.parametrize("of_loss", [{"loss_type": "gspo"}, {"mask_truncated_completions": True}])
def test_padding_changes_nothing_and_a_group_reads_its_prompt_once(tiny, tmp_path, monkeypatch, of_loss):
    """The losses of sequences and of tokens, whole groups apart in two batches, completions of several lengths."""
    given = {"max_steps": 3, "beta": 0.05, "logging_steps": 1, "num_iterations": 2, **of_loss}
    given |= {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "num_generations": 16}
    read = []
    monkeypatch.setattr(forward, "pack", lambda sequences: read.append(pack(sequences)) or read[-1])
    train(options(tiny, tmp_path / "packed", **given))
    for batch in read:
        assert batch.branches and all(len(branch.completions) == 16 for branch in batch.branches)
    train(options(tiny, tmp_path / "padded", **given, padding_free=False))
    assert_same_metrics(tmp_path / "packed", tmp_path / "padded", abs=1e-4)


@pytest.mark.parametrize(
    "given",
    [{"loss_type": "grpo"}, {"loss_type": "dr_grpo"}, {"loss_type": "dapo"}, {"mask_truncated_completions": True}],
    ids=lambda given: str(next(iter(given.values()))),
)
def test_the_loss_that_is_logged_is_that_of_the_step_however_it_is_split(tiny, tmp_path, given):
    """Means over sequences were weighed by tokens, and a batch without a token counted as one."""
    given |= {"num_generations": 16, "max_steps": 1, "logging_steps": 1, "max_completion_length": 12, "beta": 0.1}
    given |= {"num_iterations": 2}
    train(options(tiny, tmp_path / "one", **given, per_device_train_batch_size=16))
    train(options(tiny, tmp_path / "many", **given, per_device_train_batch_size=2, gradient_accumulation_steps=8))
    (one,), (many,) = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "many"))
    assert many["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert abs(one["loss"]) > 1e-4


def test_killed_and_resumed_is_uninterrupted(tiny, tmp_path):
    given = {"max_steps": 20, "save_steps": 2, "num_iterations": 2, "steps_per_generation": 2, "beta": 0.05}
    given |= {"use_peft": True, "lora_target_modules": "all-linear", "learning_rate": 3e-3}
    assert_resumes(train, partial(options, tiny), tmp_path, 5, **given, reward_funcs=[REPEATS, "tests._online:later"])


def test_two_processes_make_the_run_of_one(tiny, tmp_path):
    given = {"max_steps": 3, "num_iterations": 2, "steps_per_generation": 4, "beta": 0.05, "logging_steps": 1}
    train(options(tiny, tmp_path / "one", **given, per_device_train_batch_size=16, gradient_accumulation_steps=2))
    given = options(tiny, tmp_path / "two", **given, per_device_train_batch_size=8, gradient_accumulation_steps=2)
    run_processes(given, 2)
    assert_same_metrics(tmp_path / "two", tmp_path / "one", abs=2e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"beta": 0.1, "kl_coef": 0.1}, "the KL counts in the loss"),
        ({"num_generations": 1}, "num_generations must be at least 2"),
        ({"scale_rewards": "groups"}, "scale_rewards: wanted true or false or one of paper,"),
        ({"top_p": 0.0}, "top_p must be in (0, 1]"),
        ({"loss_type": "grop"}, "loss_type must be a function or one of ppo, grpo"),
        ({"epsilon": -0.1}, "grpo: dapo: epsilon and epsilon_high must be >= 0; got -0.1"),
        ({"delta": 0.5}, "grpo: dapo: delta must be > 1, or None; got 0.5"),
        ({"loss_type": "sapo", "sapo_temperature_neg": 0.0}, "grpo: sapo: temperatures must be > 0"),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "steps_per_generation must be a multiple"),
    ],
)
def test_refuses(tiny, tmp_path, given, message):
    with pytest.raises(ValueError) as refused:
        options(tiny, tmp_path, **given)
    assert str(refused.value).startswith("grpo: ") and message in str(refused.value)


def test_an_option_of_another_loss_is_refused(tiny, tmp_path):
    with pytest.raises(TypeError, match=r"^grpo: 'epsilon' is no option of reinforce"):
        options(tiny, tmp_path, loss_type="reinforce", epsilon=0.1)


def test_takes_what_trl_takes(tiny, tmp_path):
    assert options(tiny, tmp_path, scale_rewards=False).scale_rewards == "none"
    assert options(tiny, tmp_path, scale_rewards=True).scale_rewards == "group"
    line = given_options(GRPOOptions, ["--scale_rewards", "False"], prog="grpo", description="")
    assert options(tiny, tmp_path, **line).scale_rewards == "none"
    assert options(tiny, tmp_path, reward_funcs=same).reward_funcs == [same]
    given = {"sapo_temperature_pos": 0.9, "sapo_temperature_neg": 1.3}
    assert options(tiny, tmp_path, loss_type="sapo", **given).of_loss == given
    given = {"vespo_k_pos": 1.0, "vespo_k_neg": 2.0, "vespo_lambda_pos": 2.5, "vespo_lambda_neg": 1.5}
    assert options(tiny, tmp_path, loss_type="vespo", **given).of_loss == given


class Judge:
    """A reward that has neither a name nor, like a model on a device, a copy."""

    def __call__(self, completions, **_):
        return [float(len(text)) for text in completions]

    def __deepcopy__(self, _):
        raise TypeError("copied")


@pytest.mark.parametrize(
    "given",
    [
        {"reward_funcs": [Judge(), partial(repeats)]},
        {"loss_type": partial(POLICY_LOSSES["dapo"], epsilon=0.1)},
    ],
    ids=["rewards", "loss"],
)
def test_functions_without_a_name_train_and_resume(tiny, tmp_path, given, capsys):
    given |= {"per_device_train_batch_size": 16, "max_steps": 2, "save_steps": 1, "logging_steps": 1}
    train(options(tiny, tmp_path, **given))
    whole = (tmp_path / "metrics.jsonl").read_text()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    train(options(tiny, tmp_path, **given, resume_from_checkpoint=str(tmp_path / "checkpoint-1")))
    assert f"resuming  after step 1, from {tmp_path}/checkpoint-1" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_text() == whole


def test_prompts_may_repeat_and_must_fill_a_step(tiny, tmp_path, capsys):
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps({"prompt": "a b", "letter": "a"}) + "\n")
    given = {"dataset_name": file, "max_steps": 1, "per_device_train_batch_size": 16, "test_split_size": 1}
    with pytest.raises(ValueError, match="1 training prompts do not fill one optimizer step of 2 prompts"):
        train(options(tiny, tmp_path / "run", **{**given, "test_split_size": 0}))
    file.write_text(file.read_text() * 8)
    train(options(tiny, tmp_path / "run", **given))
    assert "7 to train on, 1 held out" in capsys.readouterr().out


def test_refuses_half_a_group(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"^grpo: the completions of a step must be whole groups of 8; got 12 = 12 a"):
        train(options(tiny, tmp_path, per_device_train_batch_size=12))
