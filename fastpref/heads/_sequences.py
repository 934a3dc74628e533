"""What losses of whole completions share on the fused head: which sequence a target is of, its reference, averages."""

import torch
from torch import Tensor

from fastpref.ops import _check, _head
from fastpref.ops.linear_logps import token_outputs


def sequences(fn: str, hidden: Tensor, targets: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, int]:
    """(M,) the sequence of each target, and how many sequences there are."""
    if hidden.dim() == 3:
        n = hidden.shape[0]
        return torch.arange(n, device=targets.device)[:, None].expand(targets.shape).reshape(-1), n
    if cu_seqlens is None:
        raise ValueError(f"{fn}: packed hidden (N, H) needs cu_seqlens, (S + 1,) int32 for S sequences")
    bounds, total = cu_seqlens.long(), targets.shape[0]
    position = torch.arange(total, device=targets.device)
    return torch.searchsorted(bounds[1:], position, right=True), cu_seqlens.shape[0] - 1


def reference(
    fn: str,
    flat: _head.FlatHead,
    targets: Tensor,
    n_sequences: int,
    ref_logps: Tensor | None,
    ref_token_logps: Tensor | None,
    reference_free: bool,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    head: _head.HeadOptions,
) -> tuple[Tensor | None, Tensor | None]:
    """(sums (n_sequences,), per token (M,)) under the reference, at most one of them; None where not known."""
    if (ref_hidden is None) != (ref_weight is None):
        raise ValueError(f"{fn}: ref_hidden and ref_weight go together; got only one")
    given = {
        "ref_logps": ref_logps is not None,
        "ref_token_logps": ref_token_logps is not None,
        "ref_hidden": ref_hidden is not None,
        "reference_free=True": reference_free,
    }
    if sum(given.values()) > 1:
        raise ValueError(
            f"{fn}: give one reference; got {' and '.join(name for name, there in given.items() if there)}"
        )
    _check.tensors(
        fn, ref_logps=ref_logps, ref_token_logps=ref_token_logps, ref_hidden=ref_hidden, ref_weight=ref_weight
    )
    _check.same_device(fn, hidden=flat.hidden, ref_logps=ref_logps, ref_token_logps=ref_token_logps)
    _check.floating(fn, (*_check.FLOATS, torch.float64), ref_logps=ref_logps, ref_token_logps=ref_token_logps)
    dtype = flat.inv_temperature.dtype
    if reference_free:
        return None, torch.zeros_like(flat.inv_temperature)
    if ref_logps is not None:
        if ref_logps.shape != (n_sequences,):
            raise ValueError(
                f"{fn}: ref_logps must be ({n_sequences},), one sum a sequence; got {tuple(ref_logps.shape)}"
            )
        return ref_logps.detach().to(dtype), None
    if ref_token_logps is not None:
        _check.same_shape(fn, targets=targets, ref_token_logps=ref_token_logps)
        return None, ref_token_logps.detach().reshape(-1).to(dtype)
    if ref_hidden is not None and ref_weight is not None:
        with torch.no_grad():
            ref = _head.flatten(fn, ref_hidden, ref_weight, targets, head)
            return None, token_outputs(fn, ref, only_logps=True)["logps"]
    return None, None


def mean(x: Tensor, where: Tensor | None = None) -> Tensor:
    """0-d, detached; 0 where nothing is averaged."""
    where = torch.ones_like(x, dtype=torch.bool) if where is None else where
    return torch.where(where, x.detach().float(), 0.0).sum() / where.sum().clamp(min=1)
