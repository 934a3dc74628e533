"""The contenders, each called as its own documentation says, and the two losses that all of them are given.

A contender is a function (hidden (2B, T, H), weight, targets (2B, T)) -> log-probs (2B, T), 0 where the target is
ignored, and, where it has a fused loss of its own, that too. Who takes flat rows is given the unskipped ones only.
`load` raises ImportError where a peer is not installed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _inputs import IGNORE, Batch
from torch import Tensor
from torch.nn import functional as F

from fastpref import linear_logps, linear_policy_loss, linear_preference_loss

BETA = 0.1
CLIP = 0.2

Logps = Callable[[Tensor, Tensor, Tensor], Tensor]
Step = Callable[[Batch], Tensor]  # -> the loss, differentiable in hidden and weight


def dpo_of_sums(sums: Tensor, ref_sums: Tensor) -> Tensor:
    """-log sigmoid(beta (chosen - rejected log-ratio)), mean over pairs; both (2B,)."""
    chosen, rejected = (sums - ref_sums).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def clipped_of_tokens(logps: Tensor, batch: Batch) -> Tensor:
    """PPO's -min(r A, clip(r) A), mean over completion tokens. Schulman et al. 2017, arXiv:1707.06347, eq. 7."""
    assert batch.old_logps is not None
    ratio = (logps - batch.old_logps.to(logps.dtype)).exp()
    advantages = batch.advantages.to(logps.dtype)[:, None]
    losses = -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    live = batch.targets != IGNORE
    return torch.where(live, losses, 0.0).sum() / live.sum()


def dpo_step(logps: Logps, batch: Batch) -> Tensor:
    with torch.no_grad():
        ref = logps(batch.ref_hidden, batch.ref_weight, batch.targets).float().sum(-1)
    return dpo_of_sums(logps(batch.hidden, batch.weight, batch.targets).float().sum(-1), ref)


def ppo_step(logps: Logps, batch: Batch) -> Tensor:
    return clipped_of_tokens(logps(batch.hidden, batch.weight, batch.targets).float(), batch)


@dataclass(frozen=True)
class Contender:
    """`dpo` and `ppo` are the contender's own fused losses; None: the loss is built from its log-probs."""

    logps: Logps
    dpo: Step | None = None
    ppo: Step | None = None
    all_positions: bool = False  # it projects prompt tokens too

    def step(self, loss: str) -> Step:
        own = {"dpo": self.dpo, "ppo": self.ppo}[loss]
        return own or partial({"dpo": dpo_step, "ppo": ppo_step}[loss], self.logps)


def _fastpref() -> Contender:
    def dpo(batch: Batch) -> Tensor:
        options: dict[str, Any] = {"ref_hidden": batch.ref_hidden, "ref_weight": batch.ref_weight, "beta": BETA}
        return linear_preference_loss(batch.hidden, batch.weight, batch.targets, **options).loss

    def ppo(batch: Batch) -> Tensor:
        options: dict[str, Any] = {"advantages": batch.advantages, "old_logps": batch.old_logps}
        options["num_items"] = int((batch.targets != IGNORE).sum())
        return linear_policy_loss(batch.hidden, batch.weight, batch.targets, **options).loss

    return Contender(linear_logps, dpo, ppo)


def naive_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As it is written by hand: all logits, log-softmax in fp32."""
    logits = hidden @ weight.T
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    picked = logps.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return torch.where(targets != IGNORE, picked, 0.0)


def _naive() -> Contender:
    return Contender(naive_logps, all_positions=True)


def _naive_compiled() -> Contender:
    return Contender(torch.compile(naive_logps), all_positions=True)


def _of_rows(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Logps:
    """Of a function of flat rows: the ignored ones are left out, and 0 put in their place."""

    def logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        live = targets != IGNORE
        rows = function(hidden[live], weight, targets[live])
        return rows.new_zeros(targets.shape).masked_scatter(live, rows)

    return logps


def _trl() -> Contender:
    # trl 1.16, trainer/utils.py, add_fused_lm_head: how DPOTrainer calls its kernel, and its width of a tile. It leaves
    # ignored rows out on a GPU and scores them on a CPU; here it may leave them out. No extra outputs: they cost time
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def rows(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        options = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",))
        return ChunkedLogProbFunction.apply(hidden, weight, None, targets, *options)[0]

    return Contender(_of_rows(rows))


def _liger_logps() -> Contender:
    # liger-kernel 0.8.5, ops/fused_linear_scaled_cross_entropy.py: NLL of flat rows
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    def rows(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets)

    return Contender(_of_rows(rows))


def _liger(whole: bool) -> Contender:
    """Its fused losses: a pair (DPO) or a sequence (PPO) a chunk, its default, or the whole batch, which is faster."""
    # liger-kernel 0.8.5, README and chunked_loss/dpo_loss.py, grpo_loss.py; compiled, as is the default
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss, LigerFusedLinearGRPOLoss

    # beta 0 and no reference: GRPO's token term is PPO's; bnpo is the mean over completion tokens
    options: dict[str, Any] = {"epsilon_low": CLIP, "epsilon_high": CLIP, "loss_type": "bnpo"}

    def dpo(batch: Batch) -> Tensor:
        loss = LigerFusedLinearDPOLoss(beta=BETA, chunk_size=len(batch.targets) // 2 if whole else 1)
        ref = {"ref_input": batch.ref_hidden, "ref_weight": batch.ref_weight}
        return loss(batch.weight, batch.hidden, batch.targets, **ref)[0]

    def ppo(batch: Batch) -> Tensor:
        chunk_size = len(batch.targets) if whole else 1
        loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, chunk_size=chunk_size, **options)
        live, chosen = batch.targets != IGNORE, batch.targets.clamp(min=0)
        old = {"old_per_token_logps": batch.old_logps}
        return loss(batch.hidden, batch.weight, chosen, live.long(), batch.advantages, **old)[0]

    return Contender(_liger_logps().logps, dpo, ppo, all_positions=True)


def _torch_lce(chunked: bool) -> Contender:
    # torch 2.13, nn.functional.linear_cross_entropy: options=None forms all logits; LinearCrossEntropyOptions() picks
    # chunk and precision for the device. A preference loss needs reduction="none"
    from torch.nn import LinearCrossEntropyOptions

    options = LinearCrossEntropyOptions() if chunked else None

    def rows(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)

    return Contender(_of_rows(rows))


def _cce() -> Contender:
    # cut-cross-entropy 25.1.1, linear_cross_entropy.py: the implementation that runs without a GPU. It leaves ignored
    # rows out itself
    from cut_cross_entropy import linear_cross_entropy

    def logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden, weight, targets, reduction="none", impl="torch_compile")

    return Contender(logps)


CONTENDERS: dict[str, Callable[[], Contender]] = {
    "fastpref": _fastpref,
    "naive": _naive,
    "naive-compiled": _naive_compiled,
    "liger": partial(_liger, False),
    "liger-whole": partial(_liger, True),
    "liger-logps": _liger_logps,
    "trl": _trl,
    "torch-lce": partial(_torch_lce, False),
    "torch-lce-chunked": partial(_torch_lce, True),
    "cce": _cce,
}
PACKAGES = ("torch", "trl", "liger-kernel", "cut-cross-entropy", "transformers")


def load(name: str) -> Contender:
    """Raises ImportError, saying what is missing, if the peer or what it needs is not installed."""
    # past 8 compilations of one function, for the shapes of earlier tables, torch would run it uncompiled
    torch.compiler.reset()
    return CONTENDERS[name]()


def gradients(step: Step, batch: Batch, trained_head: bool) -> tuple[float, list[Tensor]]:
    """(the loss, [d_hidden (2B, T, H), d_weight if the head is trained]) of one forward and backward."""
    leaves = [batch.hidden.detach().requires_grad_(), batch.weight.detach().requires_grad_(trained_head)]
    fields = {**vars(batch), "hidden": leaves[0], "weight": leaves[1]}
    loss = step(Batch(**fields))
    return loss.item(), list(torch.autograd.grad(loss, [x for x in leaves if x.requires_grad]))
