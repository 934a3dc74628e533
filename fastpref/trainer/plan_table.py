"""`fastpref plan`: what the head costs for a batch of preference pairs, beside the peers by their formulas."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fastpref import Plan, plan
from fastpref.trainer.config import given_options, option, settle
from fastpref.trainer.pretrained import from_pretrained

FOOTNOTE = """One pass is 2 N H V FLOP. Peak memory is beyond inputs, outputs and the gradients returned. The row of
fastpref is its plan. The other rows are formula, not measured, read from the source for GPUs of TRL 1.16 (which, of
them, leaves out what is not scored), Liger-Kernel 0.8.5 (compiled, a pair at a time) and torch 2.13
(linear_cross_entropy, reduction none). T is max_length, s the bytes of a weight."""


@dataclass(kw_only=True)
class PlanOptions:
    recipe: ClassVar[str] = "plan"

    model_name_or_path: str | None = option(None, "a model's folder or hub name, for the sizes of its head")
    hidden_size: int | None = option(None, "H, width of the hidden states; in place of a model")
    vocab_size: int | None = option(None, "V, tokens of the vocabulary; in place of a model")
    per_device_train_batch_size: int = option(8, "pairs a device sees at once")
    max_length: int = option(1024, "tokens of each of a pair's two sequences")
    prompt_length: int = option(0, "how many of them are prompt, which is not scored")
    dtype: Literal["bfloat16", "float16", "float32"] = option("bfloat16", "type of hidden states and head")
    use_peft: bool = option(False, "the head is frozen, as where LoRA adapts other layers")
    device: Literal["cpu", "cuda"] = option("cuda" if torch.cuda.is_available() else "cpu", "where it runs")
    workspace: int | None = option(None, "MiB for the buffers of a chunk; none: 256 on CPU, 1/32 of a GPU's memory")

    def __post_init__(self) -> None:
        settle(self)
        if self.model_name_or_path is None and (self.hidden_size is None or self.vocab_size is None):
            raise ValueError("plan: give model_name_or_path, or hidden_size and vocab_size")
        if not 0 <= self.prompt_length < self.max_length:
            raise ValueError(
                f"plan: prompt_length must be in [0, max_length={self.max_length}); got {self.prompt_length}"
            )
        if self.per_device_train_batch_size < 1:
            raise ValueError(
                f"plan: per_device_train_batch_size must be at least 1; got {self.per_device_train_batch_size}"
            )


@dataclass(frozen=True)
class Peer:
    """Another way to the same loss; memory beyond its inputs, outputs and the gradients returned."""

    name: str
    tokens: int
    passes: int
    bytes: int
    formula: str


def main(argv: Sequence[str]) -> int:
    """`fastpref plan ARGV...`."""
    options = PlanOptions(**given_options(PlanOptions, argv, prog="fastpref plan", description=(__doc__ or "")))
    print(table(options))
    return 0


def table(options: PlanOptions) -> str:
    """The head's passes, FLOPs and peak memory: fastpref's by its own plan, the others' by formula."""
    h, v = head_sizes(options)
    sequences = 2 * options.per_device_train_batch_size
    n = sequences * options.max_length
    scored = n - sequences * options.prompt_length
    dtype = getattr(torch, options.dtype)
    ours = plan(
        scored,
        h,
        v,
        dtype=dtype,
        trainable_head=not options.use_peft,
        couples="pair",
        device=options.device,
        workspace=None if options.workspace is None else options.workspace * 2**20,
    )
    rows = [("", "passes", "compute", "peak", "of which")]
    rows.append(("fastpref", str(ours.passes), *_figures(ours.flops, ours.peak_bytes), _parts(ours)))
    for peer in peers(n, scored, options.max_length, h, v, dtype.itemsize, trainable_head=not options.use_peft):
        computed = scored if peer.name.startswith("TRL") else n
        rows.append(
            (peer.name, str(peer.passes), *_figures(peer.passes * 2 * computed * h * v, peer.bytes), peer.formula)
        )
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        f"{row[0]:<{widths[0]}}" + "".join(f"  {row[i]:>{widths[i]}}" for i in (1, 2, 3)) + f"  {row[4]}"
        for row in rows
    ]
    frozen = "frozen" if options.use_peft else "trained"
    what = f"{options.per_device_train_batch_size} pairs of 2 x {options.max_length} tokens"
    return "\n".join(
        [
            f"head {v:,} x {h:,}, {frozen}, {options.dtype} on {options.device}; {what}, {scored:,} of {n:,} scored",
            "",
            *lines,
            "",
            f"why {ours.passes} passes: {ours.why}",
            *textwrap.wrap(FOOTNOTE, 100),
        ]
    )


def head_sizes(options: PlanOptions) -> tuple[int, int]:
    """(H, V), from the model's configuration where it is not given."""
    h, v = options.hidden_size, options.vocab_size
    if h is None or v is None:
        try:
            from transformers import AutoConfig
        except ImportError as error:
            needs = "pip install 'fastpref[train]'. Or give hidden_size and vocab_size"
            raise ImportError(f"plan: model_name_or_path needs transformers: {needs}") from error
        config = from_pretrained(AutoConfig, str(options.model_name_or_path), "plan").get_text_config()
        h, v = h or config.hidden_size, v or config.vocab_size
    return h, v


def peers(n: int, scored: int, length: int, h: int, v: int, itemsize: int, *, trainable_head: bool) -> list[Peer]:
    """What other implementations hold at their peak, by formulas read from their source.

    n: tokens of the batch; scored: those that are not prompt; length: tokens of a sequence; itemsize: of a weight.
    """
    passes = 3 if trainable_head else 2
    weight = v * h if trainable_head else 0  # what its gradient adds
    chunk = _torch_chunk(n, h, v)
    return [
        Peer("eager", n, passes, 12 * n * v, "12 N V: logits, their log-softmax and its gradient in fp32"),
        Peer("Liger DPO", n, passes, 8 * 2 * length * v + itemsize * weight, "8 (2 T) V + s V H, V H if trained"),
        Peer("TRL", scored, passes + 1, 2**28 + 6 * scored * h + 6 * weight, "1/4 GiB + 6 N H + 6 V H"),
        Peer("torch", n, passes + 1, 6 * chunk * v + 2 * n * h + 2 * weight, f"6 c V + 2 N H + 2 V H, c = {chunk}"),
    ]


def _torch_chunk(n: int, h: int, v: int) -> int:
    """next_pow2(ceil(n / ceil(v / h))) / 2: linear_cross_entropy's rows on a GPU."""
    rows = -(-n // -(-v // h))
    return max(1, (1 << (rows - 1).bit_length()) // 2)


def _figures(flops: int, peak: int) -> tuple[str, str]:
    return _scaled(flops, 1000, ("MFLOP", "GFLOP", "TFLOP", "PFLOP")), _scaled(peak, 1024, ("MiB", "GiB", "TiB"))


def _scaled(value: float, step: int, units: Sequence[str]) -> str:
    """The value in the largest of the units (step^2, step^3, ...) that leaves at least 1."""
    value /= step**2
    for unit in units[:-1]:
        if value < step:
            return f"{value:.3g} {unit}"
        value /= step
    return f"{value:.3g} {units[-1]}"


def _parts(ours: Plan) -> str:
    chunk = f"{ours.chunk_tokens} tokens at a time {_figures(0, ours.chunk_bytes)[1]}"
    return f"{chunk}, kept beside {_figures(0, ours.accumulator_bytes)[1]}"
