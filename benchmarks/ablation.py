"""Each optimisation of the head turned off by its switch, and the factor it costs beside the one that was predicted.

stored      the logits of log-probs under any loss, formed again for the backward where two chunks take the place of
            one that stays: plan() says 4 passes for 3
declared    PPO from a loss that does not declare what it couples: its gradients wait for the whole batch, and plan()
            says 4 passes for 3. The workspace has room for half of the tokens; the 3 keep all exponentials in place of
            an fp32 gradient
rows        prompt targets scored instead of ignored, as many as completion targets; their upstream gradient is 0, so
            they still leave the two products of the backward, where a copy of the others costs a quarter of these:
            (2 + 2 x 1.25) / 3
rows, all   the same with an upstream gradient of 1e-20, which keeps them in every product: 6 / 3
exponentials  backend="torch": the same products in fp32, exponentials and sums by separate operations. Predicted from
            the products' own time: what both backends take on a head of H = 8, where next to nothing but the
            exponentials is left, added and taken off
padding     a backbone on padded sequences in place of a packed row: FLOPs by hand, 6 a weight and token, with the head
            on the same tokens in both
shared prompt  the same packed row with a prompt for each completion, in place of one for both

`on` and `off` run in turn; `factor` is the median of their ratio, `over` what it is over the prediction; one further
from it than TOLERANCE has missed.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref import linear_logps, linear_policy_loss, plan
from fastpref.benchmarks._inputs import IGNORE, Batch, Shape, batch
from fastpref.benchmarks._losses import CLIP
from fastpref.benchmarks._measure import Absent, Row, Table, against
from fastpref.benchmarks._settings import Settings
from fastpref.losses import surrogates
from fastpref.losses.surrogates import Rollout

COLUMNS = (
    ("on s", "bare_s", ".4f"),
    ("off s", "seconds", ".4f"),
    ("predicted", "predicted", ".2f"),
    ("factor", "ratio", ".2f"),
    ("lowest", "ratio_min", ".2f"),
    ("highest", "ratio_max", ".2f"),
    ("over", "over_predicted", ".2f"),
    ("prediction", "verdict", ""),
)
TOLERANCE = 0.2  # of the prediction: rounds of one machine differ by a tenth

BACKBONES = {False: (8, 576), True: (2, 576)}  # layers and width; with --quick or without


class Switch(NamedTuple):
    name: str
    dtype: torch.dtype
    predicted: Callable[[], float]
    on: Callable[[], object]
    off: Callable[[], object]


def run(settings: Settings) -> list[Row]:
    """The first shape; bf16, and fp32 for the exponentials, so that both backends multiply the same way."""
    table = Table("ablation", COLUMNS, ("torch", "transformers"), settings.json)
    shape = settings.shapes[0]
    table.heading(f"one optimisation off at a time; head of {shape.model}, trained, and a small Llama for packing")
    pairs, length = settings.pairs or 4, settings.length or (128 if settings.quick else 256)
    parts = (partial(switches, shape, pairs, length, settings), partial(packing, settings))
    for part in parts:
        try:
            for switch in part():
                about: Row = {"contender": switch.name, "dtype": str(switch.dtype).removeprefix("torch.")}
                if part is parts[0]:
                    about |= {"model": shape.model, "H": shape.hidden, "V": shape.vocab, "tokens": pairs * length}
                measured = against(switch.on, switch.off, settings.rounds)
                table.add({**about, **judged(switch.predicted(), measured)})
        except (Absent, ImportError) as error:  # transformers is an extra
            table.add({"contender": "packing", "reason": f"not measured: {error}"})
    return table.rows


def judged(predicted: float, measured: Row) -> Row:
    over = measured["ratio"] / predicted
    return {
        **measured,
        "predicted": predicted,
        "over_predicted": over,
        "verdict": "met" if abs(over - 1) <= TOLERANCE else "missed",
    }


def switches(shape: Shape, pairs: int, length: int, settings: Settings) -> Iterator[Switch]:
    half = torch.bfloat16
    inputs = batch(shape, pairs, length, half, sampled=True).to(settings.device)
    n = len(inputs.live)
    row = 2 * shape.vocab + shape.vocab // 12 + 16 * shape.hidden + 64  # of a chunk, and beside it
    whole, parts = {"workspace": 5 * n * row}, {"workspace": n * row * 2 // 3}  # the latter: half of the tokens
    sizes: dict[str, Any] = {"dtype": half, "trainable_head": True, **parts}
    passes = {how: plan(n, *shape, **sizes, couples=how).passes for how in ("token", "batch")}
    weighted = inputs.upstream.where(inputs.targets != IGNORE, 0.0)
    stored, formed_again = (partial(logps, inputs, inputs.targets, weighted, **size) for size in (whole, parts))
    yield Switch("stored", half, lambda: passes["batch"] / 3, stored, formed_again)
    saving, waiting = (partial(ppo, inputs, loss, **parts) for loss in ("ppo", undeclared))
    yield Switch("declared", half, lambda: passes["batch"] / passes["token"], saving, waiting)

    few = batch(shape, max(pairs // 2, 1), length, half).to(settings.device)  # twice as many fit one chunk as well
    live = few.targets != IGNORE
    every = few.targets.where(live, few.targets.roll(length // 2, dims=1))
    zeros = few.upstream.where(live, 0.0)
    skipping = partial(logps, few, few.targets, zeros)
    yield Switch("rows", half, lambda: 4.5 / 3, skipping, partial(logps, few, every, zeros))
    yield Switch("rows, all", half, lambda: 2.0, skipping, partial(logps, few, every, zeros.where(live, 1e-20)))

    wide = batch(shape, pairs, length, torch.float32).to(settings.device)
    fused = partial(logps, wide, wide.targets, weighted, **whole)
    eager = partial(fused, backend="torch")
    yield Switch("exponentials", torch.float32, partial(eager_exponentials, fused, wide, **whole), fused, eager)


def undeclared(rollout: Rollout, *, epsilon: float) -> Tensor:
    """PPO's, without saying what it couples."""
    return surrogates.ppo(rollout, epsilon=epsilon)


def ppo(inputs: Batch, loss: str | Callable[..., Tensor], **options: Any) -> None:
    hidden, weight = inputs.hidden.detach().requires_grad_(), inputs.weight.detach().requires_grad_()
    sampled: dict[str, Any] = {"advantages": inputs.advantages, "old_logps": inputs.old_logps, "epsilon": CLIP}
    how: dict[str, Any] = {"loss_type": loss, "reduction": "mean", **options}
    linear_policy_loss(hidden, weight, inputs.targets, **sampled, **how).loss.backward()


def logps(inputs: Batch, targets: Tensor, upstream: Tensor, **options: Any) -> None:
    leaves = inputs.hidden.detach().requires_grad_(), inputs.weight.detach().requires_grad_()
    torch.autograd.grad(linear_logps(*leaves, targets, **options), leaves, upstream)


def eager_exponentials(fused: Callable[[], object], wide: Batch, **options: Any) -> float:
    """1 + (what eager exponentials take more than fused ones) / (a fused step)."""
    narrow = replace(wide, hidden=wide.hidden[..., :8].contiguous(), weight=wide.weight[:, :8].contiguous())
    step = partial(logps, narrow, wide.targets, wide.upstream, **options)
    extra = against(step, partial(step, backend="torch"), 3)
    return 1 + (extra["seconds"] - extra["bare_s"]) / against(fused, fused, 3)["bare_s"]


def packing(settings: Settings) -> Iterator[Switch]:
    """A Llama of SmolLM2-135M's width, few layers and a small vocabulary, on pairs of uneven lengths; in fp32."""
    layers, width = BACKBONES[settings.quick]
    from transformers import LlamaConfig, LlamaForCausalLM

    from fastpref import fused_lm_head, linear_cross_entropy
    from fastpref.trainer.collate import collate
    from fastpref.trainer.packing import enable_packing, pack, through_rows

    heads: dict[str, Any] = {"num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": layers}
    config = LlamaConfig(hidden_size=width, intermediate_size=width * 8 // 3, vocab_size=2048, **heads)
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    model = fused_lm_head(model.to(settings.device))
    if reason := enable_packing(model):
        raise Absent(reason)
    prompts, answers = [30, 120, 60, 90], [60, 20, 130, 40, 25, 80, 50, 110]
    sequences = [([i % 4 + 5] * prompts[i % 4], [7] * n) for i, n in enumerate(answers)]
    device = torch.device(settings.device)
    shared, alone = (pack(sequences, share=share).to(device) for share in (True, False))
    padded = {name: tensor.to(device) for name, tensor in collate(sequences, 0).items()}
    targets = padded.pop("targets")
    weights = sum(p.numel() for p in model.model.layers.parameters())
    head = config.hidden_size * config.vocab_size * sum(answers)

    def cost(ids: Tensor) -> int:
        return weights * ids.numel() + head

    def row(batch: Any) -> None:
        through_rows(model, batch, linear_cross_entropy).backward()

    def rows() -> None:
        model(**padded, head=lambda hidden, weight: linear_cross_entropy(hidden, weight, targets)).backward()

    tokens = cost(padded["input_ids"]), cost(alone.inputs["input_ids"]), cost(shared.inputs["input_ids"])
    yield Switch("padding", torch.float32, lambda: tokens[0] / tokens[1], partial(row, alone), rows)
    yield Switch(
        "shared prompt", torch.float32, lambda: tokens[1] / tokens[2], partial(row, shared), partial(row, alone)
    )
