"""One DPO step of SmolLM2-135M on real pairs, fused head against eager PyTorch: gradients, then memory and time.

    python benchmarks/smollm2_head.py [--pairs 8] [--dtype float32 bfloat16] [--json benchmarks/results/FILE.jsonl]

The bound: 3 passes over the head, 2 N H V FLOPs each, N completion tokens, H 576, V 49,152, which is what the bare
GEMMs cost. Eager holds (2B, T, V) logits, a log-softmax of them in fp32, and the gradients of both. Memory is what a
fresh process adds to its resident set during the head's forward and backward alone, on the model's own hidden states;
the two gradients it returns are part of it.
"""

import argparse
import copy
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpref import fused_lm_head, linear_logps, linear_preference_loss
from fastpref.benchmarks._inputs import relative_error
from fastpref.benchmarks._losses import BETA, dpo_of_sums
from fastpref.benchmarks._measure import MIB, Table, resident, seconds
from fastpref.benchmarks._peers import naive_logps
from fastpref.trainer.collate import collate
from fastpref.trainer.data import sequences_of, tokenize_pairs
from fastpref.trainer.demo import demo_model, demo_pairs

COLUMNS = (
    ("dtype", "dtype", "s"),
    ("tokens", "tokens", "d"),
    ("head loss", "head_loss_error", ".1e"),
    ("head grad.", "head_gradient_error", ".1e"),
    ("all grad.", "gradient_error", ".1e"),
    ("extra MiB", "extra_MiB", "d"),
    ("median s", "median_s", ".3f"),
)


def eager_loss(hidden: Tensor, weight: Tensor, *, targets: Tensor, ref_logps: Tensor) -> Tensor:
    return dpo_of_sums(naive_logps(hidden, weight, targets).sum(-1), ref_logps)


def fused_loss(hidden: Tensor, weight: Tensor, *, targets: Tensor, ref_logps: Tensor) -> Tensor:
    return linear_preference_loss(hidden, weight, targets, beta=BETA, ref_logps=ref_logps).loss


def head_gradients(
    hidden: Tensor, weight: Tensor, head: Callable[..., Tensor], bound: dict[str, Tensor]
) -> tuple[float, list[Tensor]]:
    x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = head(x, w, **bound)
    return loss.item(), list(torch.autograd.grad(loss, (x, w)))


def parameter_gradients(model: Any, inputs: dict[str, Tensor], head: Callable[..., Tensor]) -> list[Tensor]:
    loss = model(**inputs, head=head)
    return list(torch.autograd.grad(loss, list(model.parameters())))


def prepare(
    hidden: Tensor, weight: Tensor, head: Callable[..., Tensor], bound: dict[str, Tensor]
) -> tuple[Callable[[], object], Callable[[], object]]:
    """(a tiny call, the call) of which the second is measured."""
    hidden, weight = hidden.clone(), weight.clone()  # they come in shared memory, resident only once it is read
    few = {"targets": torch.zeros(2, 2, dtype=torch.long), "ref_logps": torch.zeros(2)}
    tiny = partial(head_gradients, hidden[:2, :2], weight[:64], head, few)
    return tiny, partial(head_gradients, hidden, weight, head, bound)


def measure(dtype: torch.dtype, n_pairs: int, rounds: int = 5) -> list[dict[str, Any]]:
    """A row for each contender. Errors are against float64 on the same rounded weights, relative for gradients:
    `head_...` of the head alone on the model's hidden states, `gradient_error` over all parameters of the model."""
    folder = demo_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs, _ = tokenize_pairs(demo_pairs()[0][:n_pairs], tokenizer)
    batch = collate(sequences_of(pairs), tokenizer.pad_token_id)
    targets = batch.pop("targets")
    model = fused_lm_head(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        hidden = model(**batch, head=lambda hidden, weight: hidden)
        # a reference that is not the policy: at equal log-probs the loss is log 2 whatever the head does
        shift = torch.randn(2 * n_pairs, generator=torch.Generator().manual_seed(0))
        ref_logps = (
            5 * shift + exact(**batch, head=lambda x, w: linear_logps(x, w, targets, backend="torch").sum(-1)).float()
        )
    bound = {"targets": targets, "ref_logps": ref_logps}
    weight = model.get_output_embeddings().weight.detach()
    true_loss, true_head = head_gradients(hidden.double(), weight.double(), eager_loss, bound)
    truth = parameter_gradients(exact, batch, partial(eager_loss, **bound))

    rows: list[dict[str, Any]] = []
    steps: dict[str, Callable[[], object]] = {}
    for name, head in {"eager": eager_loss, "fastpref": fused_loss}.items():
        loss, gradients = head_gradients(hidden, weight, head, bound)
        steps[name] = partial(head_gradients, hidden, weight, head, bound)
        rows.append(
            {
                "contender": name,
                "dtype": str(dtype).removeprefix("torch."),
                "tokens": int((targets != -100).sum()),
                "positions": targets.numel(),
                "head_loss_error": abs(loss - true_loss),
                "head_gradient_error": relative_error(gradients, true_head),
                "gradient_error": relative_error(parameter_gradients(model, batch, partial(head, **bound)), truth),
                "extra_MiB": round(resident(prepare, hidden, weight, head, bound) / MIB),
            }
        )
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step))
    for row in rows:
        spent = times[row["contender"]]
        row |= {
            "median_s": round(statistics.median(spent), 4),
            "min_s": round(min(spent), 4),
            "max_s": round(max(spent), 4),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    table = Table("smollm2_head", COLUMNS, ("torch", "transformers"), arguments.json)
    table.heading("SmolLM2-135M")
    for dtype in arguments.dtype:
        for row in measure(getattr(torch, dtype), arguments.pairs):
            table.add(row)


if __name__ == "__main__":
    main()
