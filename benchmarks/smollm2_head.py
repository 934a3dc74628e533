"""One DPO step of SmolLM2-135M on real pairs: the fused head against eager PyTorch, gradients first, then memory and time.

    python benchmarks/smollm2_head.py [--pairs 16] [--dtype float32 bfloat16] [--json benchmarks/results/FILE.jsonl]

The bound: 3 passes over the head, 2 N H V FLOPs each, N completion tokens, H 576, V 49,152, which is what the bare
GEMMs cost. Eager holds (2B, T, V) logits, a log-softmax of them in fp32, and the gradients of both. Memory is what the
process adds to its resident set during the head's forward and backward alone, on the model's own hidden states, less
the two gradients that both return.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpref import fused_lm_head, linear_preference_loss
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


def parameter_gradients(model: Any, inputs: dict[str, Tensor], head: Callable[..., Tensor]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs, head=head)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def relative_error(got: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Frobenius, over all parameters at once."""
    difference = sum((got[name].double() - truth[name].double()).square().sum() for name in truth)
    return float((difference / sum(t.double().square().sum() for t in truth.values())).sqrt())


def resident_peak(run: Callable[[], Any]) -> int:
    """Bytes that `run` adds to the resident set at its highest; Linux."""

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to now
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def measure(dtype: torch.dtype, n_pairs: int) -> list[dict[str, Any]]:
    folder = demo_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs, _ = tokenize_pairs(demo_pairs()[0][:n_pairs], tokenizer)
    batch = PairCollator(tokenizer.pad_token_id)(pairs)
    targets = batch.pop("targets")
    n_tokens = int((targets != -100).sum())
    truth_model = fused_lm_head(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64))
    truth_model.load_state_dict({k: v.to(dtype).double() for k, v in truth_model.state_dict().items()})
    # a reference that is not the policy: at equal log-probs the loss is log 2 whatever the head does
    shift = torch.randn(2 * n_pairs, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        ref_logps = truth_model(**batch, head=partial(_sums, targets=targets)) + 5 * shift
    loss, truth = parameter_gradients(truth_model, batch, partial(eager_loss, targets=targets, ref_logps=ref_logps))
    model = fused_lm_head(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))
    heads = {"eager": eager_loss, "fastpref": fused_loss}
    bound = {"targets": targets, "ref_logps": ref_logps.float()}

    with torch.no_grad():
        hidden = model(**batch, head=lambda hidden, weight: hidden)
    weight = model.get_output_embeddings().weight.detach()
    rows = []
    for name, head in heads.items():
        got, gradients = parameter_gradients(model, batch, partial(head, **bound))
        x, w = hidden.detach().requires_grad_(), weight.requires_grad_()

        def step(head: Callable[..., Tensor] = head, x: Tensor = x, w: Tensor = w) -> None:
            torch.autograd.grad(head(x, w, **bound), (x, w))

        step()
        rows.append(
            {
                "contender": name,
                "dtype": str(dtype).removeprefix("torch."),
                "tokens": n_tokens,
                "positions": targets.numel(),
                "loss_error": abs(got - loss),
                "gradient_error": relative_error(gradients, truth),
                "extra_MiB": round((resident_peak(step) - x.nbytes - w.nbytes) / MIB),
                "step": step,
            }
        )
    times: dict[str, list[float]] = {name: [] for name in heads}
    for _ in range(5):
        for row in rows:
            start = time.perf_counter()
            row["step"]()
            times[row["contender"]].append(time.perf_counter() - start)
    for row in rows:
        del row["step"]
        spent = times[row["contender"]]
        row |= {"median_s": round(statistics.median(spent), 4), "min_s": round(min(spent), 4), "max_s": round(max(spent), 4)}
    return rows


def _sums(hidden: Tensor, weight: Tensor, *, targets: Tensor) -> Tensor:
    picked = (hidden @ weight.T).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return torch.where(targets != -100, picked, 0.0).sum(-1)


def provenance() -> dict[str, Any]:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    cpu = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    from fastpref.kernels.cpu.head import isa

    return {
        "device": f"{cpu[0]}, {isa()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    about = provenance()
    print(about)
    print(f"{'':10}{'dtype':>10}{'tokens':>8}{'loss error':>12}{'grad. error':>13}{'extra MiB':>11}{'median s':>10}")
    for dtype in arguments.dtype:
        for row in measure(getattr(torch, dtype), arguments.pairs):
            print(
                f"{row['contender']:10}{row['dtype']:>10}{row['tokens']:>8}{row['loss_error']:>12.1e}"
                f"{row['gradient_error']:>13.1e}{row['extra_MiB']:>11}{row['median_s']:>10.3f}"
            )
            if arguments.json:
                with arguments.json.open("a") as file:
                    file.write(json.dumps({"benchmark": "smollm2_head", **row, **about}) + "\n")


if __name__ == "__main__":
    main()
