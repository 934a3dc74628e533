"""Four roles on one base: who changes whom, what is saved, and how few bytes they take."""

import copy

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

import peft
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fastpref import fused_lm_head
from fastpref.trainer.roles import Roles, is_adapter_of
from tests import test_fused_lm_head
from tests._online import make_tiny

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def reward(tiny):
    """A folder with a reward adapter on the tiny model, and what peft itself says with it."""
    base = AutoModelForSequenceClassification.from_pretrained(tiny / "model", num_labels=1)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["q_proj", "v_proj", "up_proj"])
    model = peft.get_peft_model(base, config)
    shake(model, "default")
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.normal_()
    model.save_pretrained(tiny / "reward")
    model.eval()
    with torch.no_grad():
        return tiny / "reward", model(IDS).logits[:, 0]


def lora(tiny):
    base = AutoModelForCausalLM.from_pretrained(tiny / "model")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    return fused_lm_head(peft.get_peft_model(base, config))


def shake(model, adapter):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if f".{adapter}." in name and "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator))


def hidden(roles, role):
    with torch.no_grad(), roles.playing(role):
        return roles(input_ids=IDS, head=lambda hidden, weight, **_: hidden.clone())


def values(roles, role):
    with roles.playing(role):
        return roles(input_ids=IDS, head=lambda hidden, weight, **_: roles.apply_head(hidden))


def test_roles_share_a_base_and_nothing_else(tiny):
    roles = Roles(lora(tiny), critic=True)
    plain = AutoModelForCausalLM.from_pretrained(tiny / "model").base_model(IDS)[0]
    for role in ("actor", "critic", "reference"):  # fresh adapters change nothing
        torch.testing.assert_close(hidden(roles, role), plain)
    assert not values(roles, "critic").any()
    shake(roles, "default")
    assert not torch.allclose(hidden(roles, "actor"), plain, atol=1e-3)
    torch.testing.assert_close(hidden(roles, "critic"), plain)
    torch.testing.assert_close(hidden(roles, "reference"), plain)
    shake(roles, "critic")
    assert not torch.allclose(hidden(roles, "critic"), plain, atol=1e-3)
    torch.testing.assert_close(hidden(roles, "reference"), plain)


@pytest.mark.parametrize("shared", [True, False])
def test_a_backward_reaches_the_role_that_plays(tiny, shared):
    actor = lora(tiny) if shared else fused_lm_head(AutoModelForCausalLM.from_pretrained(tiny / "model"))
    roles = Roles(actor, critic=True, reference=None if shared else copy.deepcopy(actor))
    assert all(weight.requires_grad for weight in roles.trained)
    before = {id(weight) for weight in roles.trained}
    with torch.no_grad():
        roles.heads["critic"].weight.normal_()
    values(roles, "critic").square().sum().backward()
    assert touched(roles) and all("critic" in name for name in touched(roles))
    roles.zero_grad()
    roles(input_ids=IDS, head=lambda hidden, weight, **_: hidden.square().sum()).backward()
    assert touched(roles) and not any("critic" in name or "reference" in name for name in touched(roles))
    assert {id(weight) for weight in roles.trained} == before


def touched(roles):
    return [name for name, weight in roles.named_parameters() if weight.grad is not None and weight.grad.any()]


def test_a_reward_adapter_says_what_it_says_alone_and_the_critic_starts_from_it(tiny, reward):
    folder, expected = reward
    roles = Roles(lora(tiny), critic=True, reward=folder).eval()
    torch.testing.assert_close(values(roles, "reward")[:, -1].detach(), expected)
    torch.testing.assert_close(values(roles, "critic")[:, -1].detach(), expected)
    assert not any(weight.requires_grad for name, weight in roles.named_parameters() if ".reward." in name)
    shake(roles, "critic")
    torch.testing.assert_close(values(roles, "reward")[:, -1].detach(), expected)


def test_whose_adapter_it_is(tiny, reward, tmp_path):
    assert is_adapter_of(reward[0], str(tiny / "model"))
    assert is_adapter_of(reward[0], f"{tiny}/reward/../model")
    assert not is_adapter_of(reward[0], str(tmp_path))
    assert not is_adapter_of(tiny / "model", str(tiny / "model"))


@pytest.mark.parametrize("shared", [True, False])
def test_saved_is_a_plain_actor_and_a_critic_that_comes_back(tiny, tmp_path, shared):
    fresh = lora if shared else lambda _: fused_lm_head(AutoModelForCausalLM.from_pretrained(tiny / "model"))
    roles = Roles(fresh(tiny), critic=True)
    with torch.no_grad():
        for weight in roles.trained:
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    roles.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny / "model" if shared else tmp_path)
    actor = peft.PeftModel.from_pretrained(base, tmp_path) if shared else base
    torch.testing.assert_close(actor(IDS).logits, roles.actor(IDS).logits)
    again = Roles(fresh(tiny), critic=True)
    again.load_critic(tmp_path)
    torch.testing.assert_close(values(again, "critic"), values(roles, "critic"), rtol=0, atol=0)


def test_four_roles_take_two_adapters_and_two_heads_more_than_the_actor(tiny, reward):
    def size(model):
        return sum(weight.numel() for weight in model.parameters())

    alone, roles = lora(tiny), Roles(lora(tiny), critic=True, reward=reward[0])
    of_reward = sum(w.numel() for name, w in roles.named_parameters() if ".reward." in name and "lora_" in name)
    assert size(roles) == size(alone) + 2 * of_reward + 2 * (32 + 1)


def test_a_role_that_is_not_there(tiny):
    with (
        pytest.raises(ValueError, match=r"^Roles: there is no critic here$"),
        Roles(lora(tiny), critic=False).playing("critic"),
    ):
        pass


def test_a_critic_reads_states_that_are_narrower_than_the_layers():
    model = fused_lm_head(test_fused_lm_head.tiny("opt"))
    peft_model = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj"]))
    for roles in (Roles(model, critic=True), Roles(peft_model, critic=True)):
        states = hidden(roles, "critic")
        assert states.shape[-1] == 16 < model.config.hidden_size
        with roles.playing("critic"):
            assert roles.apply_head(states).shape == IDS.shape
