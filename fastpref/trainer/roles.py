"""Actor, critic, reward and reference: four roles on one set of base weights, or each a model of its own.

With LoRA the base stays frozen, and a role is what lies on it:

    actor      adapter "default"                      its log-probabilities are trained
    critic     adapter "critic" and a value head      V of every token's state is trained
    reward     adapter "reward" and a score head      a trained reward model, as it is
    reference  nothing: the base itself               what the actor was before training

Beyond the actor's own weights that takes two adapters and two vectors: of SmolLM2-135M with rank 16, 0.7 % each.
Without LoRA the actor is trained whole, and critic and reference are further models.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastpref.trainer.pretrained import is_adapter

ADAPTERS = {"actor": "default", "critic": "critic", "reward": "reward"}
CRITIC_FILE = "critic.safetensors"


class Roles(nn.Module):
    """The model of an online recipe: called, it answers as the role that is playing; the actor, if none is named.

        with roles.playing("critic"):
            value_loss(roles.apply_head(hidden), ...).backward()

    Args:
        actor: a causal LM under `fused_lm_head`; a PeftModel shares its base with the other roles.
        critic: whether there is one.
        reference: a model of its own; None: the base under the actor's adapter, if it has one.
        reward: the folder of a reward adapter on the actor's base (see `is_adapter_of`); the critic then starts as a
            copy of it, as in Ouyang et al. 2022, arXiv:2203.02155, appendix C.4, else at 0.
    """

    def __init__(self, actor: Any, *, critic: bool, reference: Any = None, reward: str | Path | None = None) -> None:
        super().__init__()
        self.actor, self.shared = actor, isinstance(actor, PeftModel)
        self.others, self.heads = nn.ModuleDict(), nn.ModuleDict()
        self._role = "actor"
        if reward is not None:
            self._load_reward(Path(reward))
        if critic:
            self.heads["critic"] = deepcopy(self.heads["reward"]) if reward is not None else self._zero_head()
            if self.shared:
                self._add_adapter("critic", copy_of="default" if reward is None else "reward")
            else:
                self.others["critic"] = deepcopy(actor)
        if reference is not None:
            self.others["reference"] = reference.requires_grad_(False)
        if self.shared:
            actor.set_adapter(ADAPTERS["actor"])
        for weight in self.trained:  # that of an adapter which is not playing is off, and an optimizer would not see it
            weight.requires_grad_(True)

    @contextmanager
    def playing(self, role: str) -> Iterator[None]:
        """Within, calls are answered by this role.

        Backward belongs inside: recomputed activations (gradient checkpointing) are the role's there only.
        """
        if role not in ("actor", *self.others, *self.heads) and not (role == "reference" and self.shared):
            raise ValueError(f"Roles: there is no {role} here")
        self._role = role
        try:
            if not self.shared or role in self.others:
                yield
            elif role == "reference":
                with self.actor.disable_adapter():
                    yield
            else:
                self.actor.set_adapter(ADAPTERS[role])
                yield
        finally:
            self._role = "actor"
            if self.shared:
                self.actor.set_adapter(ADAPTERS["actor"])

    def forward(self, **inputs: Any) -> Any:
        return self._model(self._role)(**inputs)

    def apply_head(self, hidden: Tensor) -> Tensor:
        """(...) what the head of the playing role, critic or reward, makes of hidden states (..., H); float32."""
        head: Any = self.heads[self._role]
        with torch.autocast(hidden.device.type, enabled=False):
            return head(hidden.float())[..., 0]

    @property
    def trained(self) -> list[nn.Parameter]:
        """The weights of actor and critic that training changes."""
        return self._weights("actor") + (self._weights("critic") if "critic" in self.heads else [])

    def _weights(self, role: str) -> list[nn.Parameter]:
        head = [*self.heads[role].parameters()] if role in self.heads else []
        if self.shared:
            return [*_lora_weights(self.actor, ADAPTERS[role]).values(), *head]
        return [*self._model(role).parameters(), *head]

    def _model(self, role: str) -> Any:
        if role in self.others:
            return self.others[role]
        return self.actor

    @property
    def config(self) -> Any:
        return self.actor.config

    def get_input_embeddings(self) -> nn.Module:
        return self.actor.get_input_embeddings()

    @property
    def device(self) -> torch.device:
        return self.actor.device

    def save_pretrained(self, folder: Path) -> None:
        """The actor as a model (its adapter, with LoRA) that transformers and peft load; the critic beside it."""
        selected = {"selected_adapters": [ADAPTERS["actor"]]} if self.shared else {}
        self.actor.save_pretrained(folder, **selected)
        if "critic" in self.heads:
            critic = {str(i): weight.detach().contiguous() for i, weight in enumerate(self._weights("critic"))}
            save_file(critic, Path(folder) / CRITIC_FILE)

    def load_critic(self, folder: Path) -> None:
        """Puts back the critic that `save_pretrained` wrote."""
        saved = load_file(Path(folder) / CRITIC_FILE)
        with torch.no_grad():
            for i, weight in enumerate(self._weights("critic")):
                weight.copy_(saved[str(i)])

    def _zero_head(self) -> nn.Linear:
        # not the configuration's hidden_size: OPT-350m's last states are projected to half of it
        head = nn.Linear(self.actor.get_output_embeddings().weight.shape[-1], 1)
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
        return head.to(self.actor.device)

    def _load_reward(self, folder: Path) -> None:
        config, weights = PeftConfig.from_pretrained(str(folder)), load_peft_weights(str(folder), device="cpu")
        score = [name for name in weights if name.endswith("score.weight")]
        if len(score) != 1 or len(weights[score[0]]) != 1:
            raise ValueError(f"Roles: {folder} must hold one score head (1, H); got {score or 'none'}")
        head = self._zero_head()
        with torch.no_grad():
            head.weight.copy_(weights.pop(score[0]))
        self.heads["reward"] = head.requires_grad_(False)
        # without the head, which is ours: the adapter of a causal LM like the others
        config.task_type, config.modules_to_save, config.inference_mode = TaskType.CAUSAL_LM, None, True
        self.actor.add_adapter("reward", config)
        set_peft_model_state_dict(self.actor, weights, adapter_name="reward")

    def _add_adapter(self, name: str, *, copy_of: str) -> None:
        self.actor.add_adapter(name, deepcopy(self.actor.peft_config[copy_of]))
        if copy_of == "default":
            return  # a fresh adapter: the actor's may be one that was trained
        source, target = (_lora_weights(self.actor, adapter) for adapter in (copy_of, name))
        with torch.no_grad():
            for key, weight in target.items():
                weight.copy_(source[key])


def is_adapter_of(folder: str | Path, base: str) -> bool:
    """Whether a folder holds an adapter that was trained on this model."""
    if not is_adapter(folder):
        return False
    own = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path or ""
    return own == base or (Path(own).is_dir() and Path(base).is_dir() and Path(own).samefile(base))


def _lora_weights(model: Any, adapter: str) -> dict[str, nn.Parameter]:
    """An adapter's weights, under names that other adapters of the model have too."""
    part = f".{adapter}."
    return {name.replace(part, "."): p for name, p in model.named_parameters() if "lora_" in name and part in name}
