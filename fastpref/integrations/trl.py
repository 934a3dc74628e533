"""TRL's trainers on our head: what stands in for TRL's chunked log-prob kernel, and the switch.

    with fastpref.integrations.trl.patched():
        DPOTrainer(...).train()

DPO, KTO, GRPO, RLOO and SFT trainers of TRL 1.16 call one function for the log-probs of the labels and what their
metrics need; while the switch is on it is ours. Their loss code, their metrics, generation and the trainers that build
logits are left as they are. Only labels that count are scored, on a CPU too, where TRL scores every position.

The importing of TRL waits for the switch.
"""

import contextlib
import importlib
import importlib.metadata
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastpref.ops import _head
from fastpref.ops.linear_logps import token_outputs

TESTED = ("1.16.0",)
# of trl.trainer.utils: the kernel, and whether labels that do not count are left out before it is called
KERNEL, COMPACT = "_ChunkedLogProbFunction", "_use_triton"


class LogProbs:
    """Called as TRL calls its kernel, an autograd function."""

    @staticmethod
    def apply(
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = _head.OUTPUTS,
    ) -> tuple[Tensor | None, ...]:
        """(log-probs, entropy, log_sum_sq_probs, mean_logits, is_top1), (N,) each; None where not among `outputs`."""
        if hasattr(weight, "ds_id"):
            # ZeRO-3 empties the parameter between here and backward, which reads it: a view holds what was gathered
            weight, bias = weight.view_as(weight), None if bias is None else bias.view_as(bias)
        if not torch.is_autocast_enabled(hidden.device.type):
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        options = _head.HeadOptions(bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale)
        flat = _head.flatten("trl", hidden, weight, targets, options)
        # entropy=False: mostly it is only logged, and with a frozen head the log-probs' gradient then costs a pass less
        found = token_outputs("trl", flat, entropy=False)
        return found["logps"], *(found[name] if name in outputs else None for name in _head.OUTPUTS)


_before: dict[str, Any] = {}  # what TRL had under the two names; empty while the switch is off


def patch() -> None:
    """Switches TRL to our head, until `unpatch`; also for models that its trainers have already prepared.

    Raises:
        ImportError: TRL is not installed, or its version is not one that this was tested with.
    """
    if _before:
        return
    try:
        found = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError("fastpref.integrations.trl: TRL is not installed: pip install trl==1.16.0") from None
    if found not in TESTED:
        raise ImportError(f"fastpref.integrations.trl: trl must be one of {', '.join(TESTED)}, tested; got {found}")
    utils = importlib.import_module("trl.trainer.utils")
    _before.update({name: getattr(utils, name) for name in (KERNEL, COMPACT)})
    setattr(utils, KERNEL, LogProbs)
    setattr(utils, COMPACT, lambda device: True)


def unpatch() -> None:
    """Gives TRL its own kernel back; does nothing where `patch` was not called."""
    utils = importlib.import_module("trl.trainer.utils") if _before else None
    while _before:
        setattr(utils, *_before.popitem())


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """TRL on our head within the block; within another one it changes nothing."""
    if _before:
        yield
        return
    patch()
    try:
        yield
    finally:
        unpatch()
