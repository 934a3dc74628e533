"""Preference-tuning losses of a language model without the logits matrix."""

from fastpref.heads.plan import Plan, plan
from fastpref.heads.preference import PreferenceOutput, linear_preference_loss
from fastpref.heads.unpaired import UnpairedOutput, linear_unpaired_loss
from fastpref.integrations.transformers import fused_lm_head
from fastpref.losses._protocol import couples
from fastpref.losses.dpo import dpo_loss
from fastpref.losses.pairs import Pairs, Tokens
from fastpref.losses.reward import reward_loss
from fastpref.losses.unpaired import Unpaired, kto_kl, kto_loss
from fastpref.modules import LinearDPOLoss, LinearKTOLoss
from fastpref.ops.gae import gae
from fastpref.ops.linear_logps import LogPs, linear_logps
from fastpref.ops.selective_logps import selective_logps

__version__ = "0.1.0"

__all__ = [
    "LinearDPOLoss",
    "LinearKTOLoss",
    "LogPs",
    "Pairs",
    "Plan",
    "PreferenceOutput",
    "Tokens",
    "Unpaired",
    "UnpairedOutput",
    "couples",
    "dpo_loss",
    "fused_lm_head",
    "gae",
    "kto_kl",
    "kto_loss",
    "linear_logps",
    "linear_preference_loss",
    "linear_unpaired_loss",
    "plan",
    "reward_loss",
    "selective_logps",
]
