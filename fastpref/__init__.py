"""Preference-tuning losses of a language model without the logits matrix."""

from fastpref.heads.cross_entropy import linear_cross_entropy
from fastpref.heads.plan import Plan, plan
from fastpref.heads.policy import linear_policy_loss
from fastpref.heads.preference import PreferenceOutput, linear_preference_loss
from fastpref.heads.unpaired import UnpairedOutput, linear_unpaired_loss
from fastpref.integrations.transformers import fused_lm_head
from fastpref.losses._protocol import couples
from fastpref.losses.dpo import dpo_loss
from fastpref.losses.pairs import Pairs, Tokens
from fastpref.losses.policy import PolicyOutput, policy_loss
from fastpref.losses.reward_loss import reward_loss
from fastpref.losses.shaping import (
    AdaptiveKL,
    RunningMoments,
    normalize_rewards,
    shape_rewards,
    update_kl_coef,
    update_moments,
)
from fastpref.losses.surrogates import Rollout
from fastpref.losses.unpaired import Unpaired, kto_kl, kto_loss
from fastpref.losses.value import value_loss
from fastpref.modules import LinearDPOLoss, LinearKTOLoss, LinearPPOLoss
from fastpref.ops.gae import gae
from fastpref.ops.linear_divergence import linear_divergence
from fastpref.ops.linear_logps import LogPs, linear_logps
from fastpref.ops.masked_whiten import masked_whiten
from fastpref.ops.selective_logps import selective_logps

__version__ = "0.1.0"

__all__ = [
    "AdaptiveKL",
    "LinearDPOLoss",
    "LinearKTOLoss",
    "LinearPPOLoss",
    "LogPs",
    "Pairs",
    "Plan",
    "PolicyOutput",
    "PreferenceOutput",
    "Rollout",
    "RunningMoments",
    "Tokens",
    "Unpaired",
    "UnpairedOutput",
    "couples",
    "dpo_loss",
    "fused_lm_head",
    "gae",
    "kto_kl",
    "kto_loss",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_logps",
    "linear_policy_loss",
    "linear_preference_loss",
    "linear_unpaired_loss",
    "masked_whiten",
    "normalize_rewards",
    "plan",
    "policy_loss",
    "reward_loss",
    "selective_logps",
    "shape_rewards",
    "update_kl_coef",
    "update_moments",
    "value_loss",
]
