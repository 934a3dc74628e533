"""Launchers of the kernels on logits that exist. Which rows count is told by their inverse temperature, 0 where not."""

import torch
import triton
from torch import Tensor

from fastpref.kernels.head import Sums, finish
from fastpref.kernels.triton._selective import selective_gradient_kernel, selective_sums_kernel
from fastpref.kernels.triton.head import COMPILE, on_device_of

STATIC = True
BLOCK, WARPS = 4096, 8  # columns at a time


def selective_logps(
    logits: Tensor,  # (M, V)
    targets: Tensor,  # (M,)
    index: None,
    inv_temperature: Tensor,  # (M,)
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, ...]:
    """(M,) each: logps, entropy, log_sum_sq_probs, mean_logits, is_top1; zero at what does not count.

    And (2, M), what a backward needs of the rows: the logit that stood for 0, and the sum of exponentials.
    """
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    m, vocab_size = logits.shape
    z_y = torch.empty(m, dtype=torch.float32, device=logits.device)
    parts = z_y.new_empty(len(Sums._fields), m)
    if m:
        with on_device_of(logits):
            selective_sums_kernel[(m,)](
                logits,
                targets.contiguous(),
                inv_temperature.contiguous(),
                z_y,
                parts,
                m,
                vocab_size,
                logits.stride(0),
                softcap or 0.0,
                logit_scale,
                BLOCK=min(BLOCK, triton.next_power_of_2(vocab_size)),
                HAS_CAP=softcap is not None,
                num_warps=WARPS,
                **COMPILE,
            )
    exp, exp_d, exp_sq, z, highest = parts.double()
    # of a row of one column, or of nothing but -inf beside its label, there is no highest
    anchor = torch.where(highest.isneginf(), z_y.nan_to_num(neginf=0.0).double(), highest)
    sums = Sums(exp, exp_d, exp_sq, z, highest - anchor)
    scores = finish(anchor.float(), z_y.double() - anchor, sums, vocab_size).where(inv_temperature != 0)
    state = torch.stack((scores.anchor, scores.total))
    return scores.logps, scores.entropy, scores.log_sum_sq_probs, scores.mean_logits, scores.is_top1, state


def d_logits(
    grad_logps: Tensor,  # (M,)
    grad_entropy: Tensor | None,  # (M,)
    logits: Tensor,
    targets: Tensor,
    index: None,
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
    m, vocab_size = logits.shape
    if not m:
        return
    at_label = -grad_logps * torch.expm1(logps)
    if grad_entropy is not None:
        at_label = at_label - grad_entropy * logps.exp() * (logps.clamp(min=-200.0) + entropy)
        grad_entropy = grad_entropy.contiguous()
    anchor, total = state
    block = min(BLOCK, triton.next_power_of_2(vocab_size))
    with on_device_of(logits):
        selective_gradient_kernel[(m, triton.cdiv(vocab_size, block))](
            logits,
            targets.contiguous(),
            inv_temperature.contiguous(),
            anchor,
            total,
            grad_logps.contiguous(),
            grad_entropy,
            at_label,
            entropy.contiguous(),
            out,
            vocab_size,
            logits.stride(0),
            out.stride(0),
            softcap or 0.0,
            logit_scale,
            BLOCK=block,
            HAS_CAP=softcap is not None,
            num_warps=WARPS,
            **COMPILE,
        )
