"""The losses that all contenders are given, from log-probs; what of the head each of them needs is in LOSSES."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpref.benchmarks._inputs import IGNORE, Batch

BETA = 0.1
CLIP = 0.2
KL = 0.5  # KTO's reference point, nats


@dataclass(frozen=True)
class Loss:
    of: Callable[[Tensor, Batch, Tensor], Tensor]  # (log-probs (2B, T), batch, the reference's sums (2B,)) -> ()
    couples: str | None  # as in fastpref.plan; None: no gradient is asked for
    reference: bool = False  # the reference's log-probs are part of the step

    def products(self, trained_head: bool) -> int:
        """Of 2 n H V FLOPs that a step cannot avoid: logits, d_hidden, d_weight, logits of the reference."""
        return 1 + (0 if self.couples is None else 1 + trained_head) + self.reference


def live(batch: Batch) -> Tensor:
    return batch.targets != IGNORE


def dpo_of_sums(sums: Tensor, ref_sums: Tensor) -> Tensor:
    """-log sigmoid(beta (chosen - rejected log-ratio)), mean over pairs; both (2B,)."""
    chosen, rejected = (sums - ref_sums).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def dpo(logps: Tensor, batch: Batch, ref_sums: Tensor) -> Tensor:
    """Rafailov et al. 2023, arXiv:2305.18290, eq. 7."""
    return dpo_of_sums(logps.sum(-1), ref_sums)


def kto(logps: Tensor, batch: Batch, ref_sums: Tensor) -> Tensor:
    """1 - sigmoid(+-beta (r - kl)), chosen are desirable, mean. Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7."""
    good, bad = (BETA * (logps.sum(-1) - ref_sums - KL)).chunk(2)
    return 1 - torch.sigmoid(torch.cat((good, -bad))).mean()


def clipped(logps: Tensor, batch: Batch) -> Tensor:
    """(2B, T) -min(r A, clip(r) A), 0 where ignored. Schulman et al. 2017, arXiv:1707.06347, eq. 7."""
    assert batch.old_logps is not None
    ratio = (logps - batch.old_logps.to(logps.dtype)).exp()
    advantages = batch.advantages.to(logps.dtype)[:, None]
    losses = -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    return torch.where(live(batch), losses, 0.0)


def clipped_of_tokens(logps: Tensor, batch: Batch) -> Tensor:
    """PPO's, mean over completion tokens."""
    return clipped(logps, batch).sum() / live(batch).sum()


def clipped_of_sequences(logps: Tensor, batch: Batch) -> Tensor:
    """GRPO's without KL, mean over each sequence, then over sequences. Shao et al. 2024, arXiv:2402.03300, eq. 3."""
    return (clipped(logps, batch).sum(-1) / live(batch).sum(-1)).mean()


LOSSES = {
    # log-probs alone, as of a reference or an old policy: one pass
    "score": Loss(lambda logps, batch, _: (logps * batch.upstream).sum(), None),
    # log-probs under a gradient that differs from token to token, as for a loss of one's own
    "logps": Loss(lambda logps, batch, _: (logps * batch.upstream).sum(), "batch"),
    "sft": Loss(lambda logps, batch, _: -logps.sum() / live(batch).sum(), "token"),
    "dpo": Loss(dpo, "pair", reference=True),
    "kto": Loss(kto, "sequence", reference=True),
    "ppo": Loss(lambda logps, batch, _: clipped_of_tokens(logps, batch), "token"),
    "grpo": Loss(lambda logps, batch, _: clipped_of_sequences(logps, batch), "token"),
}
