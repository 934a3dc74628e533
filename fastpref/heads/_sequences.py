"""What losses of whole completions share on the fused head: which sequence a target is of, its reference, averages."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.losses.pairs import Tokens
from fastpref.ops import _check, _head
from fastpref.ops.linear_logps import token_outputs


class Sequences(NamedTuple):
    """The targets of n sequences, and what a reference says of them: sums, or log-probs of tokens, or neither."""

    n: int
    live: Tensor  # (M,) bool: the target counts
    of: Tensor  # (M,) its sequence
    ref_sums: Tensor | None  # (n,)
    ref_tokens: Tensor | None  # (M,)

    def part(self, index: Tensor, which: Tensor) -> "Sequences":
        """The live targets at `index`, which are all of the sequences `which`, ascending; numbered from 0."""
        return Sequences(
            which.numel(),
            torch.ones_like(index, dtype=torch.bool),
            torch.searchsorted(which, self.of[index]),
            None if self.ref_sums is None else self.ref_sums[which],
            None if self.ref_tokens is None else self.ref_tokens[index],
        )

    def summed(self, outputs: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor, Tokens]:
        """(log-probs (n,), those of the reference, lengths, the tokens they are of); `outputs` (M,) each."""
        ref_tokens = None if self.ref_tokens is None else torch.where(self.live, self.ref_tokens, 0.0)
        extra = {name: outputs[name].detach() for name in _head.OUTPUTS}
        tokens = Tokens(outputs["logps"], ref_tokens, self.live, self.of, extra)
        ref_sums = self.ref_sums if ref_tokens is None else tokens.sums(ref_tokens, self.n)
        return tokens.sums(tokens.logps, self.n), ref_sums, tokens.lengths(self.n), tokens


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
    _check.flag(fn, reference_free=reference_free)
    if (ref_hidden is None) != (ref_weight is None):
        only = "ref_weight" if ref_hidden is None else "ref_hidden"
        raise ValueError(f"{fn}: ref_hidden and ref_weight go together; got only {only}")
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
    _check.floating(fn, _check.WIDE_FLOATS, ref_logps=ref_logps, ref_token_logps=ref_token_logps)
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
        if head.bias is not None and head.bias.requires_grad:
            raise ValueError(
                f"{fn}: ref_hidden is scored with the same bias, which must then be frozen; got one that requires "
                "grad: give ref_token_logps, which linear_logps computes with the reference's own"
            )
        with torch.no_grad():
            ref = _head.flatten(fn, ref_hidden, ref_weight, targets, head, "ref_")
            return None, token_outputs(fn, ref, only_logps=True)["logps"]
    return None, None


def mean(x: Tensor, where: Tensor | None = None) -> Tensor:
    """0-d, detached; 0 where nothing is averaged."""
    where = torch.ones_like(x, dtype=torch.bool) if where is None else where
    return torch.where(where, x.detach().float(), 0.0).sum() / where.sum().clamp(min=1)


def token_metrics(tokens: Tokens, chosen: Tensor) -> dict[str, Tensor]:
    """TRL's, over this call, all tokens alike; chosen (M,) bool."""
    logits, live = tokens.outputs["mean_logits"], tokens.mask
    return {
        "logits/chosen": mean(logits, live & chosen),
        "logits/rejected": mean(logits, live & ~chosen),
        "entropy": mean(tokens.outputs["entropy"], live),
    }
