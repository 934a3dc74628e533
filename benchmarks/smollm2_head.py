"""One DPO step of SmolLM2-135M on real pairs, fused head against eager PyTorch: gradients, then memory and time.

    python benchmarks/smollm2_head.py [--pairs 8] [--dtype float32 bfloat16] [--json benchmarks/results/FILE.jsonl]

The bound: 3 passes over the head, 2 N H V FLOPs each, N completion tokens, H 576, V 49,152, which is what the bare
GEMMs cost. Eager holds (2B, T, V) logits, a log-softmax of them in fp32, and the gradients of both. Memory is what a
fresh process adds to its resident set during the head's forward and backward alone, on the model's own hidden states;
the two gradients it returns are part of it.
"""

import argparse
import copy
import json
import multiprocessing
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpref import fused_lm_head, linear_logps, linear_preference_loss
from fastpref.trainer.data import PairCollator, tokenize_pairs
from fastpref.trainer.demo import demo_model, demo_pairs

BETA = 0.1
MIB = 2**20


def eager_loss(hidden: Tensor, weight: Tensor, *, targets: Tensor, ref_logps: Tensor) -> Tensor:
    """DPO as it is written by hand: all logits, log-softmax in fp32."""
    logits = hidden @ weight.T
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    picked = logps.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    sums = torch.where(targets != -100, picked, 0.0).sum(-1)
    chosen, rejected = (sums - ref_logps).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


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


def relative_error(got: list[Tensor], truth: list[Tensor]) -> float:
    """Frobenius, over all tensors at once."""
    difference = sum(float((a.double() - b).square().sum()) for a, b in zip(got, truth, strict=True))
    return (difference / sum(float(b.square().sum()) for b in truth)) ** 0.5


def extra_memory(arguments: tuple[Any, ...]) -> int:
    """Bytes that head_gradients(*arguments) adds to the resident set at its highest, result included; Linux."""
    # a process of its own: what an earlier step freed may stay resident, and the next one would look cheap
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_extra_memory, arguments).result()


def _extra_memory(arguments: tuple[Any, ...]) -> int:

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

    hidden, weight, *rest = arguments
    hidden, weight = hidden.clone(), weight.clone()  # they come in shared memory, resident only once it is read
    few = {"targets": torch.zeros(2, 2, dtype=torch.long), "ref_logps": torch.zeros(2)}
    head_gradients(hidden[:2, :2], weight[:64], rest[0], few)  # what the first call of all loads is not the head's
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to now
    before = status("VmRSS")
    head_gradients(hidden, weight, *rest)
    return status("VmHWM") - before


def measure(dtype: torch.dtype, n_pairs: int, rounds: int = 5) -> list[dict[str, Any]]:
    """A row for each contender. Errors are against float64 on the same rounded weights, relative for gradients:
    `head_...` of the head alone on the model's hidden states, `gradient_error` over all parameters of the model."""
    folder = demo_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs, _ = tokenize_pairs(demo_pairs()[0][:n_pairs], tokenizer)
    batch = PairCollator(tokenizer.pad_token_id)(pairs)
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

    rows, steps = [], {}
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
                "extra_MiB": round(extra_memory((hidden, weight, head, bound)) / MIB),
            }
        )
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    for row in rows:
        spent = times[row["contender"]]
        row |= {
            "median_s": round(statistics.median(spent), 4),
            "min_s": round(min(spent), 4),
            "max_s": round(max(spent), 4),
        }
    return rows


def provenance() -> dict[str, Any]:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    cpu = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    from fastpref.kernels.cpu.head import isa

    return {
        "device": f"{cpu[0]}, {isa()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    about = provenance()
    print(about)
    names = ("dtype", "tokens", "head loss", "head grad.", "all grad.", "extra MiB", "median s")
    print(" " * 10 + "".join(f"{name:>11}" for name in names))
    for dtype in arguments.dtype:
        for row in measure(getattr(torch, dtype), arguments.pairs):
            errors = (row["head_loss_error"], row["head_gradient_error"], row["gradient_error"])
            print(f"{row['contender']:10}{row['dtype']:>11}{row['tokens']:>11}", end="")
            print("".join(f"{error:>11.1e}" for error in errors), f"{row['extra_MiB']:>10}{row['median_s']:>11.3f}")
            if arguments.json:
                with arguments.json.open("a") as file:
                    file.write(json.dumps({"benchmark": "smollm2_head", **row, **about}) + "\n")


if __name__ == "__main__":
    main()
