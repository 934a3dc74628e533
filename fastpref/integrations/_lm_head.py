"""The linear layer at the end of a causal LM, called for a loss: whole, in parts over processes, or under LoRA."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FusedLinear(nn.Linear):
    """nn.Linear; called with `head`, returns head(input, weight, bias=bias if there is one, **options) instead."""

    def forward(self, input: Tensor, head: Callable[..., Any] | None = None, **options: Any) -> Any:
        if head is None:
            return super().forward(input)
        weight, bias, split = _rows(self.weight, self.bias)
        return _call(head, _whole(input), weight, bias, {**options, **split})


def call_head(module: Any, hidden: Tensor, head: Callable[..., Any], options: dict[str, Any]) -> Any:
    """head(hidden, weight, **options) by the output embeddings of a model, hooks of theirs included."""
    if hasattr(module, "base_layer"):
        return _call_adapted(module, hidden, head, options)
    if is_sharded(module) and not _is_fsdp(module):
        # a tensor-parallel plan acts on what goes into the layer and comes out of it, and takes both for tensors
        return FusedLinear.forward(module, hidden, head, **options)
    return module(hidden, head=head, **options)


def why_not_low_rank(module: Any) -> str | None:
    """Why an adapted head is not hidden @ weight.T plus a term of low rank; None if it is."""
    if (type(module).__module__, type(module).__name__) != ("peft.tuners.lora.layer", "Linear"):
        return f"is adapted by {type(module).__name__}"
    variants = {name for name in module.active_adapters if name in module.lora_variant}
    if variants:
        return f"has an adapter that is more than two matrices ({type(module.lora_variant[variants.pop()]).__name__})"
    if any(module.lora_B[name].bias is not None for name in module.active_adapters if name in module.lora_B):
        return "has an adapter with a bias"
    return None


def is_sharded(module: Any) -> bool:
    return _is_dtensor(getattr(module, "weight", None))


def _call(
    head: Callable[..., Any], hidden: Tensor, weight: Tensor, bias: Tensor | None, options: dict[str, Any]
) -> Any:
    if bias is not None:
        options = {**options, "bias": bias}
    # as models do that end in float32 above a 16-bit head (Mamba); autocast is left to whoever multiplies
    if not torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(weight.dtype)
    return head(hidden, weight, **options)


def _call_adapted(module: Any, hidden: Tensor, head: Callable[..., Any], options: dict[str, Any]) -> Any:
    """LoRA: x W^T + s dropout(x) A^T B^T = [x, s dropout(x) A^T] [W, B]^T, W and B side by side in a copy."""
    if module.disable_adapters or module.merged:
        return module.base_layer(hidden, head=head, **options)
    base, columns, rows = module.base_layer, [], []
    if is_sharded(base):
        raise ValueError("fused_lm_head: a sharded LM head must carry no adapter")
    for name in module.active_adapters:
        if name in module.lora_A:
            a, dropout = module.lora_A[name].weight, module.lora_dropout[name]
            columns.append(F.linear(dropout(hidden.to(a.dtype)), a) * module.scaling[name])
            rows.append(module.lora_B[name].weight)
    joined = torch.cat([base.weight, *(b.to(base.weight.dtype) for b in rows)], dim=1)
    return _call(head, torch.cat([hidden, *(x.to(hidden.dtype) for x in columns)], dim=-1), joined, base.bias, options)


def _rows(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """(weight, bias, {}), or of a vocabulary in parts this process's own and {"process_group": whose parts they are}.

    A weight that is split in another way is gathered.
    """
    if not _is_dtensor(weight):
        return weight, bias, {}
    from torch.distributed.tensor import Shard

    sharded: Any = weight
    biases: Any = None if bias is None else bias.redistribute(placements=sharded.placements)  # type: ignore[attr-defined]
    split = [dim for dim, placement in enumerate(sharded.placements) if not placement.is_replicate()]
    if len(split) > 1 or any(sharded.placements[dim] != Shard(0) for dim in split):
        return sharded.full_tensor(), None if bias is None else biases.full_tensor(), {}
    group = {"process_group": sharded.device_mesh.get_group(split[0])} if split else {}
    return sharded.to_local(), None if bias is None else biases.to_local(), group


def _whole(hidden: Any) -> Tensor:
    """The same on every process, as a plain tensor."""
    if not _is_dtensor(hidden):
        return hidden
    from torch.distributed.tensor import Replicate

    return hidden.redistribute(placements=[Replicate()] * hidden.device_mesh.ndim).to_local()


def _is_dtensor(x: object) -> bool:
    # by name: torch.distributed.tensor takes time to import, and who has one has imported it
    return type(x).__name__ == "DTensor"


def _is_fsdp(module: object) -> bool:
    return type(module).__name__.startswith("FSDP")  # the class that fully_shard gives it
