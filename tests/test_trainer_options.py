"""Options made in Python, and what holds for the options of every recipe alike."""

import importlib

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from fastpref.kernels import memory
from fastpref.trainer import run
from fastpref.trainer.dpo import DPOOptions
from fastpref.trainer.eval import EvalOptions
from fastpref.trainer.grpo import GRPOOptions

RECIPES = {"sft": "SFT", "reward": "Reward", "dpo": "DPO", "kto": "KTO", "ppo": "PPO", "grpo": "GRPO"}


def own_loss(pairs, *, beta):
    return pairs.policy_chosen_logps


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rate": "fast"}, "learning_rate: wanted a number; got 'fast'"),
        ({"per_device_train_batch_size": 2.5}, "per_device_train_batch_size: wanted a whole number; got 2.5"),
        ({"max_length": 0}, "max_length must be at least 1; got 0"),
        ({"max_extra_bytes": -1}, "max_extra_bytes must be 0 or more; got -1"),
        ({"bf16": "maybe"}, "bf16: wanted true or false; got 'maybe'"),
        ({"seed": None}, "seed: wanted a whole number; got None"),
        ({"dataset_name": [{"prompt": "a"}]}, r"dataset_name: wanted text or none; got \[{'prompt': 'a'}\]"),
        ({"learning_rate": print}, "learning_rate: wanted a number; got <built-in function print>"),
        ({"loss_weights": [1.0, "x"]}, r"loss_weights: wanted a list of a number or none; got \[1.0, 'x'\]"),
    ],
)
def test_values_of_another_type_are_refused_as_on_the_command_line(given, message):
    with pytest.raises(ValueError, match=f"^dpo: {message}"):
        DPOOptions(**given)


def test_values_become_what_the_command_line_makes_of_them():
    made = DPOOptions(
        learning_rate="1e-5", warmup_steps=10, dtype=torch.bfloat16, loss_weights=(1, 2), loss_type=("sigmoid", "sft")
    )
    assert made.learning_rate == 1e-5 and made.dtype == "bfloat16"
    assert made.loss_weights == [1.0, 2.0] and made.loss_type == ["sigmoid", "sft"]
    assert DPOOptions(loss_type=[own_loss, "sft"]).loss_type == [own_loss, "sft"]
    assert DPOOptions(loss_type=own_loss).loss_type is own_loss


@pytest.mark.parametrize("reward", ["tests._online:repeats", print])
def test_one_reward_is_a_list_of_one(reward):
    judged = EvalOptions(model_name_or_path="m", dataset_name="d", reward_funcs=reward)
    assert judged.reward_funcs == GRPOOptions(reward_funcs=reward).reward_funcs == judged.sources == [reward]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_heads_buffers_stay_again_after_a_run(recipe, monkeypatch):
    """They were off in a notebook for good."""
    module = importlib.import_module(f"fastpref.trainer.{recipe}")
    seen = []

    def stops(_):
        seen.append(memory._most)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "start", stops)
    before = memory._most
    with pytest.raises(KeyboardInterrupt):
        module.train(getattr(module, f"{RECIPES[recipe]}Options")())
    assert seen == [0] and memory._most == before > 0
