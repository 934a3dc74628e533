"""The contenders, each called as its own documentation says.

A contender is a function (hidden (2B, T, H), weight, targets (2B, T)) -> log-probs (2B, T), 0 where the target is
ignored, and whatever losses of its own it has fused. Who takes flat rows is given the unskipped ones only. `load`
raises ImportError where a peer is not installed, and Absent where it does not run.
"""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpref import (
    linear_cross_entropy,
    linear_logps,
    linear_policy_loss,
    linear_preference_loss,
    linear_unpaired_loss,
)
from fastpref.benchmarks._inputs import IGNORE, Batch
from fastpref.benchmarks._losses import BETA, CLIP, KL, LOSSES
from fastpref.benchmarks._measure import Absent

Logps = Callable[[Tensor, Tensor, Tensor], Tensor]
Step = Callable[[Batch], Tensor]  # -> the loss, differentiable in hidden and weight


def step_of(loss: str, logps: Logps, batch: Batch) -> Tensor:
    """The loss built from a contender's log-probs, the reference's among them where the loss has one."""
    ref = torch.empty(0)
    if LOSSES[loss].reference:
        with torch.no_grad():
            ref = logps(batch.ref_hidden, batch.ref_weight, batch.targets).float().sum(-1)
    return LOSSES[loss].of(logps(batch.hidden, batch.weight, batch.targets).float(), batch, ref)


@dataclass(frozen=True)
class Contender:
    logps: Logps | None  # None: it has none, only losses of its own
    own: Mapping[str, Step] = field(default_factory=dict)  # its fused losses; the others are built from its log-probs
    all_positions: bool = False  # it projects prompt tokens too

    def step(self, loss: str) -> Step:
        if loss in self.own:
            return self.own[loss]
        if self.logps is None:
            raise ValueError(f"has no {loss}, only {', '.join(self.own)}")
        return partial(step_of, loss, self.logps)


def _fastpref(**options: Any) -> Contender:
    """options: head options, of all its functions."""

    def of(batch: Batch, **more: Any) -> dict[str, Any]:
        return {"hidden": batch.hidden, "weight": batch.weight, "targets": batch.targets, **options, **more}

    def referred(batch: Batch, **more: Any) -> dict[str, Any]:
        return of(batch, ref_hidden=batch.ref_hidden, ref_weight=batch.ref_weight, beta=BETA, **more)

    def dpo(batch: Batch) -> Tensor:
        return linear_preference_loss(**referred(batch)).loss

    def kto(batch: Batch) -> Tensor:
        n = len(batch.targets)
        desirable = torch.arange(n, device=batch.targets.device) < n // 2
        return linear_unpaired_loss(**referred(batch, desirable=desirable, kl=KL)).loss

    def policy(name: str, batch: Batch) -> Tensor:
        sampled: dict[str, Any] = {"advantages": batch.advantages, "old_logps": batch.old_logps, "epsilon": CLIP}
        return linear_policy_loss(**of(batch, loss_type=name, **sampled)).loss

    def sft(batch: Batch) -> Tensor:
        return linear_cross_entropy(**of(batch))

    own: dict[str, Step] = {"dpo": dpo, "kto": kto, "sft": sft}
    own |= {name: partial(policy, name) for name in ("ppo", "grpo")}
    return Contender(partial(linear_logps, **options), own)


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


def _mean_of_rows(function: Callable[[Tensor, Tensor, Tensor], Tensor], batch: Batch) -> Tensor:
    live = batch.targets != IGNORE
    return function(batch.hidden[live], batch.weight, batch.targets[live])


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
    # liger-kernel 0.8.5, README and chunked_loss/*.py; compiled, as is the default
    from liger_kernel import chunked_loss

    # beta 0 and no reference: GRPO's token term is PPO's; bnpo is the mean over completion tokens
    options: dict[str, Any] = {"epsilon_low": CLIP, "epsilon_high": CLIP, "beta": 0.0, "use_ref_model": False}

    def dpo(batch: Batch) -> Tensor:
        chunk_size = len(batch.targets) // 2 if whole else 1
        loss = chunked_loss.LigerFusedLinearDPOLoss(beta=BETA, chunk_size=chunk_size)
        ref = {"ref_input": batch.ref_hidden, "ref_weight": batch.ref_weight}
        return loss(batch.weight, batch.hidden, batch.targets, **ref)[0]

    def kto(batch: Batch) -> Tensor:
        n = len(batch.targets)
        loss = chunked_loss.LigerFusedLinearKTOLoss(beta=BETA, use_ref_model=True, chunk_size=n if whole else 1)
        desirable = torch.arange(n, device=batch.targets.device) < n // 2
        ref = {"ref_input": batch.ref_hidden, "ref_weight": batch.ref_weight, "kl": batch.upstream.new_tensor(KL)}
        return loss(batch.hidden, batch.weight, batch.targets, preference_labels=desirable, **ref)[0]

    def policy(name: str, batch: Batch) -> Tensor:
        chunk_size = len(batch.targets) if whole else 1
        loss = chunked_loss.LigerFusedLinearGRPOLoss(loss_type=name, chunk_size=chunk_size, **options)
        live, chosen = batch.targets != IGNORE, batch.targets.clamp(min=0)
        old = {"old_per_token_logps": batch.old_logps}
        return loss(batch.hidden, batch.weight, chosen, live.long(), batch.advantages, **old)[0]

    own: dict[str, Step] = {"dpo": dpo, "kto": kto, "ppo": partial(policy, "bnpo"), "grpo": partial(policy, "grpo")}
    return Contender(None, own, all_positions=True)


def _liger_ce() -> Contender:
    # liger-kernel 0.8.5, README: the SFT loss in Triton
    _needs_gpu()
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return Contender(None, {"sft": partial(_mean_of_rows, lambda x, w, y: loss(w, x, y))})


def _torch_lce(chunked: bool) -> Contender:
    # torch 2.13, nn.functional.linear_cross_entropy: options=None forms all logits; LinearCrossEntropyOptions() picks
    # chunk and precision for the device. A preference loss needs reduction="none"; the mean saves it a pass
    if not hasattr(F, "linear_cross_entropy"):
        raise Absent(f"torch {torch.__version__} has no linear_cross_entropy")
    from torch.nn import LinearCrossEntropyOptions

    options = LinearCrossEntropyOptions() if chunked else None

    def rows(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)

    mean = partial(_mean_of_rows, partial(F.linear_cross_entropy, options=options))
    return Contender(_of_rows(rows), {"sft": mean})


def _cce(exact: bool) -> Contender:
    # cut-cross-entropy 25.1.1, linear_cross_entropy.py. On a CPU only its compiled implementation runs, which filters
    # nothing; on a GPU filter_eps=None is its exact mode. It leaves ignored rows out itself
    from cut_cross_entropy import linear_cross_entropy

    if exact:
        _needs_gpu()
    options: dict[str, Any] = {"impl": "cce"} if torch.cuda.is_available() else {"impl": "torch_compile"}
    call = partial(linear_cross_entropy, **options, **({"filter_eps": None} if exact else {}))

    def logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -call(hidden, weight, targets, reduction="none")

    return Contender(logps, {"sft": lambda batch: call(batch.hidden, batch.weight, batch.targets)})


def _quack() -> Contender:
    # quack-kernels 0.6.5, linear_cross_entropy.py: the mean or the sum alone; rows in multiples of 8
    _needs_gpu()
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return Contender(None, {"sft": partial(_mean_of_rows, chunked_linear_cross_entropy)})


def _verl_torch() -> Contender:
    # verl 0.9.1, utils/experimental/torch_functional.py; its file alone, since its package imports ray
    function = _file_of("verl", "utils/experimental/torch_functional.py").FusedLinearForPPOFunction

    def rows(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return function.apply(hidden, weight, targets)[0]

    return Contender(_of_rows(rows))


def _verl_triton() -> Contender:
    # verl 0.9.1, utils/kernel/linear_cross_entropy.py
    _needs_gpu()
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return Contender(_of_rows(lambda x, w, y: linear_cross_entropy(x, w, y, 1.0, "none")[0]))


def _needs_gpu() -> None:
    if not torch.cuda.is_available():
        raise Absent("its kernels are for GPUs")


def _file_of(package: str, path: str) -> ModuleType:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {package!r}")
    name = f"_{package}_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, Path(found.submodule_search_locations[0], path))
    assert spec and spec.loader
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CONTENDERS: dict[str, Callable[[], Contender]] = {
    "fastpref": _fastpref,
    "naive": _naive,
    "naive-compiled": _naive_compiled,
    "liger": partial(_liger, False),
    "liger-whole": partial(_liger, True),
    "liger-logps": _liger_logps,
    "liger-ce": _liger_ce,
    "trl": _trl,
    "torch-lce": partial(_torch_lce, False),
    "torch-lce-chunked": partial(_torch_lce, True),
    "cce": partial(_cce, False),
    "cce-exact": partial(_cce, True),
    "quack": _quack,
    "verl-torch": _verl_torch,
    "verl-triton": _verl_triton,
}
# another way to call a peer that is there already: --quick asks each once
SECOND = ("liger-whole", "torch-lce-chunked")
# some seconds of torch.compile before each first call
COMPILED = ("naive-compiled", "liger", "liger-whole", "cce")
LOSSES_ONLY = {  # who has no log-probs, and which losses instead
    "liger": ("dpo", "kto", "ppo", "grpo"),
    "liger-whole": ("dpo", "kto", "ppo", "grpo"),
    "liger-ce": ("sft",),
    "quack": ("sft",),
}
PACKAGES = ("torch", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "verl", "transformers")


def load(name: str) -> Contender:
    """Raises ImportError, saying what is missing, if the peer or what it needs is not installed; see the module."""
    # past 8 compilations of one function, for the shapes of earlier tables, torch would run it uncompiled
    torch.compiler.reset()
    return CONTENDERS[name]()


def gradients(step: Step, batch: Batch, trained_head: bool) -> tuple[float, list[Tensor]]:
    """(the loss, [d_hidden (2B, T, H), d_weight if the head is trained]) of one forward and backward."""
    leaves = [batch.hidden.detach().requires_grad_(), batch.weight.detach().requires_grad_(trained_head)]
    fields = {**vars(batch), "hidden": leaves[0], "weight": leaves[1]}
    loss = step(Batch(**fields))
    return loss.item(), list(torch.autograd.grad(loss, [x for x in leaves if x.requires_grad]))


def value(step: Step, batch: Batch) -> tuple[float, list[Tensor]]:
    """(the loss, []) without gradients."""
    with torch.no_grad():
        return step(batch).item(), []
