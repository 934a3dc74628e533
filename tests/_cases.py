"""Calls of linear_logps as hypothesis draws them, shapes, strides, dtypes, options, and the contract on any of them."""

import math
from typing import NamedTuple

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from fastpref import linear_logps
from tests._oracle import BACKENDS, IGNORE, as_dict, assert_logps, eager, head, run, truth, upstream

MIB = 1 << 20
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
LAYOUTS = ("plain", "offset", "transposed", "steps", "columns")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKS = [15, 16, 17, 47, 48, 49, 95, 96, 97]  # tiles of tokens and of vocabulary rows, and one beside
VOCABULARY = st.sampled_from([1, 2, 3, *BLOCKS, 479, 480, 481]) | st.integers(1, 60)
HIDDEN = st.sampled_from([1, 2, 3, 31, 32, 33, 63, 65, 257]) | st.integers(1, 70)
TOKENS = st.sampled_from([0, 1, 2, *BLOCKS]) | st.integers(0, 40)


def examples(count):
    return settings(deadline=None, derandomize=True, database=None, max_examples=count)


def laid(x: Tensor, layout: str) -> Tensor:
    """The same numbers with other strides; NaN, or a target out of range, lies between them."""
    between = math.nan if x.is_floating_point() else -7
    if layout == "plain":
        return x.clone()
    if layout == "offset":  # three elements in: aligned to an element and no more
        return x.new_full((x.numel() + 3,), between)[3:].view(x.shape).copy_(x)
    if layout == "transposed":
        return x.new_full(x.shape[::-1], between).permute(*reversed(range(x.dim()))).copy_(x)
    steps = [3] * x.dim() if layout == "steps" else [1] * (x.dim() - 1) + [2]
    wide = x.new_full([step * size + 1 for step, size in zip(steps, x.shape, strict=True)], between)
    return wide[tuple(slice(1, None, step) for step in steps)].copy_(x)


class Case(NamedTuple):
    tensors: dict[str, Tensor]  # arguments, as laid out in memory
    options: dict  # of the logits, as truth takes them
    call: dict  # what changes no number: backend, workspace, ...
    order: Tensor | None = None  # of packed

    def __repr__(self) -> str:  # what a failure shows; the numbers follow from the seed that is drawn
        tensors = {k: f"{tuple(x.shape)} strides {x.stride()} {x.dtype}" for k, x in self.tensors.items()}
        return f"Case({tensors}, {self.options}, {self.call}, {int(self.live.sum())} live)"

    @property
    def live(self) -> Tensor:
        return self.tensors["targets"] != IGNORE

    def leaves(self):
        return {k: self.tensors[k].detach().requires_grad_() for k in ("hidden", "weight", "bias") if k in self.tensors}


@st.composite
def cases(
    draw,
    *,
    tokens=TOKENS,
    vocabulary=VOCABULARY,
    dtypes=DTYPES,
    softcaps=(None, 5.0, 30.0),
    bias=None,
    batched=None,
    rows=None,
):
    """None: drawn."""
    n, h, v, dtype = draw(tokens), draw(HIDDEN), draw(vocabulary), draw(st.sampled_from(dtypes))
    bias = draw(st.booleans()) if bias is None else bias
    spread, ignored = draw(st.sampled_from([3.0, 1.0, 8.0, 0.0])), draw(st.sampled_from([0.3, 0.0, 0.9, 1.0]))
    seed = draw(st.integers(0, 10**6))
    tensors = head(n, h, v, dtype, seed=seed, spread=spread, ignored=ignored, bias=bias)
    generator = torch.Generator().manual_seed(seed)
    options = {
        "softcap": draw(st.sampled_from(softcaps)),
        "logit_scale": draw(st.sampled_from([1.0, 0.4, -1.3])),
        "temperature": draw(st.sampled_from([1.0, 0.7, 3.0])),
    }
    if draw(st.booleans()):
        options["temperature"] = 0.5 + torch.rand(n, generator=generator)
    call = {
        "backend": draw(st.sampled_from(BACKENDS)),
        "workspace": draw(st.sampled_from([None, MIB, 32 * MIB])),
        "max_extra_bytes": draw(st.sampled_from([None, 0])),
        "deterministic": draw(st.booleans()),
    }

    expanded = draw(st.sampled_from(["", "", "", "hidden", "weight", "columns"]))
    needed = torch.zeros(n, dtype=torch.bool)  # hidden states that a target wants
    batched = draw(st.booleans()) if batched is None else batched
    if not batched and n and (draw(st.booleans()) if rows is None else rows):
        tensors["rows"] = torch.randint(max(1, n // 2), (n,), generator=generator)
        needed[tensors["rows"][tensors["targets"] != IGNORE]] = True
    else:
        needed = tensors["targets"] != IGNORE
    if expanded == "weight":
        tensors["weight"] = tensors["weight"][:1].expand(v, h)
    elif expanded == "columns":
        tensors["hidden"] = tensors["hidden"][:, :1].expand(n, h)
    elif expanded == "hidden" and n:
        tensors["hidden"] = tensors["hidden"][:1].expand(n, h)
    else:  # nobody reads what no target wants
        tensors["hidden"][~needed] = math.nan
    if isinstance(options["temperature"], Tensor):
        options["temperature"][tensors["targets"] == IGNORE] = math.nan
    if not batched and draw(st.booleans()):
        inner = torch.randint(n + 1, (3,), generator=generator).sort().values
        call["cu_seqlens"] = torch.tensor([0, *inner, n], dtype=torch.int32)

    sides = [d for d in (1, 2, 3) if n % d == 0]
    shape = (b := draw(st.sampled_from(sides)), n // b) if batched else (n,)
    for place in (tensors, options):
        for name, x in place.items():
            if isinstance(x, Tensor):
                x = x if name in ("weight", "bias") else x.unflatten(0, shape)
                place[name] = x if expanded and 0 in x.stride() else laid(x, draw(st.sampled_from(LAYOUTS)))
    return Case(tensors, options, call)


def logits(case: Case) -> tuple[Tensor, Tensor]:
    """(x . w + bias, z) of the live tokens in float64."""
    live, a = case.live.flatten(), {k: x.double() for k, x in case.leaves().items()}
    hidden = a["hidden"].flatten(0, -2)
    hidden = (hidden[case.tensors["rows"]] if "rows" in case.tensors else hidden)[live]
    raw = (hidden @ a["weight"].T + a.get("bias", 0.0)).detach().requires_grad_()
    z, softcap, temperature = case.options["logit_scale"] * raw, case.options["softcap"], case.options["temperature"]
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return raw, z / (temperature.flatten()[live].double()[:, None] if isinstance(temperature, Tensor) else temperature)


def largest_logit(case: Case) -> float:
    z = logits(case)[1].detach()
    return float(z.abs().max()) if z.numel() else 0.0


def uncancelled(case: Case, grads: dict[str, Tensor], sides: Tensor | None = None) -> dict[str, float]:
    """The norm of each gradient if its parts did not cancel: label and others, outputs, the sides of pairs."""
    raw, z = logits(case)
    live = case.live.flatten()
    every = z.log_softmax(1).detach()
    p, label = every.exp(), case.tensors["targets"].flatten()[live].long()[:, None]
    is_label = torch.zeros_like(p).scatter(1, label, 1.0)
    parts = {
        "logps": (is_label * -torch.expm1(every), (1 - is_label) * p),
        "entropy": (p * every, p * (p * every).sum(1, keepdim=True)),
    }
    (slope,) = torch.autograd.grad(z.sum(), raw)
    hidden = case.tensors["hidden"].flatten(0, -2)
    hidden = (hidden[case.tensors["rows"]] if "rows" in case.tensors else hidden)[live].detach().double()
    weight = case.tensors["weight"].detach().double()
    masks = [torch.ones_like(live[live])] if sides is None else [sides.flatten()[live], ~sides.flatten()[live]]
    norms = dict.fromkeys(("hidden", "weight", "bias"), 0.0)
    for name, upstream_ in grads.items():
        for part in parts[name]:
            part = part * slope * upstream_.flatten()[live].double()[:, None]
            for some in masks:
                d, x = part[some], hidden[some]
                for name_, total, squares in (
                    ("hidden", d @ weight, d.square() @ weight.square()),
                    ("weight", d.T @ x, d.T.square() @ x.square()),
                    ("bias", d.sum(0), d.square()),
                ):  # terms of random signs come to the root of the sum of their squares
                    norms[name_] += max(float(total.norm()), float(squares.sum()) ** 0.5)
    return norms


def assert_gradients(
    case: Case,
    gradients: dict[str, Tensor],
    grads: dict[str, Tensor],
    *,
    sides: Tensor | None = None,
    off: dict[str, Tensor] | None = None,
):
    """3e-3 of the norm for 16 bits, 3e-6 for fp32; where no arithmetic in fp32 gets there, twice eager PyTorch's error.

    sides: of a pair, which may cancel. off: what the upstream gradient of a loss may itself be off by.
    """
    truths, logit = differentiate_truth(case, grads, gradients), largest_logit(case)
    norms = uncancelled(case, grads, sides)
    spread = uncancelled(case, off) if off else dict.fromkeys(norms, 0.0)
    for name, x in gradients.items():
        want = truths[name]
        assert x.shape == want.shape and bool(torch.isfinite(x).all()), name
        # a norm over few tokens or entries averages no roundings: three of them may add up
        few = 2.5 if int(case.live.sum()) < 64 or want.numel() < 512 else 1.0
        allowed = few * (3e-6 * max(1.0, logit / 16) if x.dtype == torch.float32 else 3e-3) * norms[name] + spread[name]
        if x.dtype == torch.float16:  # subnormal below 6e-5
            allowed += 2.0**-25 * want.numel() ** 0.5
        error = float((x.double() - want).norm())
        if error > allowed:
            fp32 = differentiate_truth(case, grads, gradients, eager, torch.float32)[name]
            allowed = max(allowed, 2 * float((fp32.double() - want).norm()))
        assert error <= allowed, f"d {name}: {error:.2e} > {allowed:.2e}, of norm {float(want.norm()):.2e}"


def assert_outputs(case: Case, ours: dict[str, Tensor]):
    values = run(truth, case.tensors, dtype=torch.float64, trained=(), **case.options)[0]
    live, logit = case.live, largest_logit(case)
    scale = max(1.0, logit / 64)
    for name, x in ours.items():
        want, x = values[name], x.detach()
        assert x.dtype == (torch.bool if name == "is_top1" else torch.float32) and x.shape == live.shape
        assert bool((x[~live] == 0).all()), f"{name} of an ignored token is not 0"
        if name == "is_top1":
            top = logits(case)[1].detach().topk(min(2, case.tensors["weight"].shape[0]), dim=1).values
            clear = (top[:, 0] - top[:, -1] > 1e-4) | torch.tensor(top.shape[1] == 1)
            assert bool((x[live] == want[live].bool())[clear].all())
            continue
        # the contract is of an rms; one of a few tokens may be four times off
        allowed = 4 * (2e-6 + 1e-6 * (want.abs() + (logit if name == "mean_logits" else 0))) * scale
        error = (x.double() - want).abs()
        assert bool((error <= allowed).all()), (
            f"{name} is off by {float((error / allowed).max()):.1f} x what is allowed"
        )
    assert bool((ours["logps"] <= 0).all()) and bool((ours.get("entropy", torch.zeros(1)) >= 0).all())
    if int(live.sum()) > 64:
        assert_logps(ours["logps"].detach()[live], values["logps"][live], logit)


def score(case: Case, **changes) -> dict[str, Tensor]:
    return as_dict(linear_logps(**{**case.tensors, **case.options, **case.call, **changes}))


def packed(case: Case, order: Tensor) -> Case:
    """The tokens of a case in this order, contiguous, as packed input."""
    keep = case.call.get("backend") == "torch"  # the bits of a library's product depend on the strides of the weight

    def some(x: Tensor) -> Tensor:
        return x.reshape(case.live.numel(), *x.shape[case.live.dim() :])[order]

    per_token = ("targets", "rows") if "rows" in case.tensors else ("targets", "hidden")
    tensors = {k: some(x) if k in per_token else x if keep else x.contiguous() for k, x in case.tensors.items()}
    options = {k: some(x) if isinstance(x, Tensor) else x for k, x in case.options.items()}
    return Case(tensors, options, {k: x for k, x in case.call.items() if k != "cu_seqlens"}, order)


def given_gradients(case: Case, names=("logps", "entropy"), seed=1) -> dict[str, Tensor]:
    """Random, and NaN where no token is."""
    shape = case.live.shape
    return {k: upstream(*shape, seed=seed + i).masked_fill(~case.live, math.nan) for i, k in enumerate(names)}


def differentiate(case: Case, grads: dict[str, Tensor], trained=("hidden", "weight", "bias"), **changes):
    leaves = {k: x for k, x in case.leaves().items() if k in trained}
    values = score(case, outputs=OUTPUTS, **leaves, **changes)
    given_ = [grads[k] for k in grads]
    return values, dict(
        zip(leaves, torch.autograd.grad([values[k] for k in grads], list(leaves.values()), given_), strict=True)
    )


def differentiate_truth(case: Case, grads: dict[str, Tensor], trained, function=truth, dtype=torch.float64):
    clean = {k: x.masked_fill(~case.live, 0.0).to(dtype) for k, x in grads.items()}
    return run(function, case.tensors, grads=clean, trained=list(trained), dtype=dtype, **case.options)[1]
