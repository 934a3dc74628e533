"""What a call of the fused head will cost, before it is made."""

from dataclasses import dataclass

import torch

from fastpref.kernels import why_not
from fastpref.kernels.chunks import MIB, accumulator, chunk_dtype, chunk_tokens, default_workspace
from fastpref.kernels.head_gradients import tile_formed_again
from fastpref.kernels.head_unit import unit_tile
from fastpref.losses._protocol import COUPLINGS
from fastpref.ops._head import check_max_extra_bytes, check_workspace

# rows of a chunk from which reading the head and its gradient's sum for each chunk costs less than a fourth pass, and
# bytes of that sum below which a processor's cache holds it
MIN_ROWS, IN_CACHE = 192, 32 * MIB


@dataclass(frozen=True)
class Plan:
    """One pass is 2 N H V FLOPs, N counting unskipped tokens."""

    passes: int
    chunk_tokens: int  # rows whose exponentials are stored at a time; 0 if none are
    chunks: int
    flops: int
    chunk_bytes: int  # of stored exponentials at a time, in the workspace
    # kept until the upstream factor is known: fp32 gradients, or in the place of the weight's, where that takes less,
    # the exponentials that the workspace has no room for
    accumulator_bytes: int
    why: str

    @property
    def peak_bytes(self) -> int:
        """Beyond inputs, outputs and the gradients returned."""
        return self.chunk_bytes + self.accumulator_bytes


def plan(
    n_tokens: int,
    hidden_size: int,
    vocab_size: int,
    *,
    dtype: torch.dtype,
    trainable_head: bool,
    couples: str | None,
    device: torch.device | str | None = None,
    workspace: int | None = None,
    max_extra_bytes: int | None = None,
) -> Plan:
    """Passes, FLOPs and memory of one loss call on the head, forward and backward.

    Args:
        n_tokens: tokens that are scored; prompt and padding tokens are skipped and do not count.
        hidden_size, vocab_size: of the head's weight (V, H).
        dtype: of hidden and weight.
        trainable_head: the head's weight gets a gradient, or carries a LoRA of its own: `fused_lm_head` then joins the
            two in a copy, V (H + r) numbers that are not counted here.
        couples: what a term of the loss depends on: "token", "sequence", "pair" or "batch". None: no gradient at all.
        device: where; None: cpu.
        workspace: bytes for a chunk; None: the default of the device.
        max_extra_bytes: bytes that an fp32 copy of the weight's gradient may take, or exponentials in its place; None:
            what it takes.
    Raises:
        ValueError: a size is negative, couples is unknown, or workspace is None for a device that is not here.
    """
    for name, value in (("n_tokens", n_tokens), ("hidden_size", hidden_size), ("vocab_size", vocab_size)):
        if not isinstance(value, int):
            raise TypeError(f"plan: {name} must be an int; got {type(value).__name__}")
        if value < (0 if name == "n_tokens" else 1):
            raise ValueError(f"plan: {name} must be {'>= 0' if name == 'n_tokens' else '>= 1'}; got {value}")
    if couples is not None and couples not in COUPLINGS:
        raise ValueError(f"plan: couples must be None or one of {', '.join(COUPLINGS)}; got {couples!r}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"plan: dtype must be a floating torch.dtype; got {dtype!r}")
    device = torch.device(device or "cpu")
    if workspace is None:
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"plan: workspace must be given for device {str(device)!r}, which this machine does not have; "
                "the default is 1/32 of its memory"
            )
        workspace = default_workspace(device)
    check_workspace("plan", workspace, vocab_size, dtype)
    check_max_extra_bytes("plan", max_extra_bytes)

    fits = chunk_tokens(hidden_size, vocab_size, dtype, workspace)
    wide = accumulator(dtype).itemsize
    d_hidden, d_weight = wide * n_tokens * hidden_size, wide * vocab_size * hidden_size
    columns, stored, kept = vocab_size, min(fits, n_tokens), d_hidden
    beside = 0  # rows of exponentials that the workspace has no room for
    if couples is None:
        passes, stored, kept, why = 1, 0, 0, "no gradient: one pass, nothing stored"
    elif not trainable_head:
        passes, why = 2, "frozen head: dlogp/dhidden is formed in forward, its rows scaled in backward"
        slabs = device.type == "cpu" and why_not("cpu") is None
        columns, rows = unit_tile(hidden_size, vocab_size, dtype, workspace, slabs=slabs)
        stored = min(rows, n_tokens)
    elif n_tokens <= fits:
        passes, why = 3, "all tokens fit one chunk: it is kept, and backward forms the gradients from it"
    elif (reason := why_not_in_forward(couples, fits, d_weight, max_extra_bytes)) is not None:
        columns, rows = tile_formed_again(hidden_size, vocab_size, dtype, workspace, d_weight=True)
        passes, stored, kept = 4, min(rows, n_tokens), d_hidden + wide * columns * hidden_size
        why = f"{reason}, and {n_tokens} tokens do not fit one chunk of {fits}: logits are formed again, "
        why += f"{columns} columns at a time"
    elif n_tokens <= chunk_tokens(hidden_size, vocab_size, dtype, workspace, d_weight):
        passes, stored, beside = 3, n_tokens, n_tokens - fits
        why = "all tokens fit one chunk and what an fp32 copy of the weight's gradient would take: no copy is kept"
    else:
        passes, kept = 3, d_hidden + d_weight
        why = f"couples = {couples}: gradients are formed in forward from each chunk of whole {couples}s"
        why += "" if couples == "token" else f", if each {couples} has at most {fits} tokens"
    row = columns * chunk_dtype(dtype).itemsize
    return Plan(
        passes=passes,
        chunk_tokens=stored,
        chunks=-(-n_tokens // stored) if stored else 0,
        flops=passes * 2 * n_tokens * hidden_size * vocab_size,
        chunk_bytes=(stored - beside) * row,
        accumulator_bytes=kept + beside * row,
        why=why,
    )


def why_not_in_forward(couples: str, rows_of_chunk: int, copy_bytes: int, max_extra_bytes: int | None) -> str | None:
    """Why a loss over several chunks, of a trained head, does not form its gradients in forward; None: it does.

    That saves a pass, and needs an fp32 copy of the weight's gradient, of copy_bytes.
    """
    if couples == "batch":
        return "couples = batch"
    if max_extra_bytes is not None and copy_bytes > max_extra_bytes:
        return f"max_extra_bytes is below {copy_bytes}"
    if rows_of_chunk < MIN_ROWS and copy_bytes > IN_CACHE:
        return f"a chunk of {rows_of_chunk} tokens is too small to add {copy_bytes} bytes of gradient for each"
    return None
