"""Launchers of csrc/selective*.cpp: the logits are read once; in backward, again, and the gradient is written once."""

import torch
from torch import Tensor

from fastpref import _cpu
from fastpref.kernels.cpu._isa import DTYPES, isa

STATIC = False


def selective_logps(
    logits: Tensor,  # (M, V)
    targets: Tensor,  # (M,)
    index: Tensor,  # (K,) of the targets that count
    inv_temperature: Tensor,  # (M,)
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, ...]:
    """(M,) each: logps, entropy, log_sum_sq_probs, mean_logits, is_top1; zero at what is not in `index`.

    And (2, M), what a backward needs of the rows: the logit that stood for 0, and the sum of exponentials.
    """
    out = [inv_temperature.new_zeros(targets.shape) for _ in range(4)]
    state = inv_temperature.new_zeros(2, *targets.shape)
    top1 = torch.zeros_like(targets, dtype=torch.bool)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    targets, live, inv_temperature = targets.contiguous(), _live(targets, index), inv_temperature.contiguous()
    rows = _rows(logits, targets, live, inv_temperature, softcap, logit_scale)
    addresses = (x.data_ptr() for x in (*out, top1, *state))
    _cpu.selective_logps(isa(), rows, *addresses, DTYPES[logits.dtype], torch.get_num_threads())
    return *out, top1, state


def d_logits(
    grad_logps: Tensor,  # (M,)
    grad_entropy: Tensor | None,  # (M,)
    logits: Tensor,
    targets: Tensor,
    index: Tensor,
    inv_temperature: Tensor,
    softcap: float | None,
    logit_scale: float,
    logps: Tensor,  # (M,), as returned
    entropy: Tensor,
    state: Tensor,  # (2, M)
    out: Tensor,  # (M, V) contiguous, all written; may be `logits`
) -> None:
    """g (1[v = y] - p_v) - h p_v (log p_v + entropy), through temperature, cap and scale."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    targets, live, inv_temperature = targets.contiguous(), _live(targets, index), inv_temperature.contiguous()
    rows = _rows(logits, targets, live, inv_temperature, softcap, logit_scale)
    grad_logps, logps, entropy, state = (x.contiguous() for x in (grad_logps, logps, entropy, state))
    grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
    addresses = (0 if x is None else x.data_ptr() for x in (grad_logps, grad_entropy, logps, entropy, *state, out))
    _cpu.selective_d_logits(isa(), rows, *addresses, DTYPES[logits.dtype], torch.get_num_threads())


def _live(targets: Tensor, index: Tensor) -> Tensor:
    return torch.zeros_like(targets, dtype=torch.bool).index_fill_(0, index, True)


def _rows(
    logits: Tensor, targets: Tensor, live: Tensor, inv_temperature: Tensor, softcap: float | None, logit_scale: float
) -> "_cpu.Logits":
    """Addresses only: the tensors must outlive it."""
    addresses = (x.data_ptr() for x in (logits, targets, live, inv_temperature))
    return _cpu.Logits(*addresses, *logits.shape, logits.stride(0), logit_scale, softcap or 0.0)
