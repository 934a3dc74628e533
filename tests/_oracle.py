"""Truth for the tests of the head: the formulas in float64, eager PyTorch's own error, and the numerics contract.

Written apart from fastpref.kernels.reference, which is itself under test: the log-prob here is
-log(1 + sum of the others' exp(z_v - z_y)), the eager one what people write, log_softmax and gather.
"""

import math

import torch
from torch import Tensor

from fastpref import kernels, linear_logps, linear_preference_loss

IGNORE = -100
BACKENDS = [name for name in ("torch", "cpu") if kernels.why_not(name) is None]
TRAINED = ("hidden", "weight", "bias")
OPTIONS = {  # of the logits; "bias" and "per_token" are made by the test
    "none": {},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.7},
    "temperature per token": {"per_token": True},
    "softcap": {"softcap": 5.0},
    "logit_scale": {"logit_scale": 0.4},
    "all": {"bias": True, "per_token": True, "softcap": 5.0, "logit_scale": 1.3},
}


def scores(hidden: Tensor, weight: Tensor, bias=None, *, temperature=1.0, softcap=None, logit_scale=1.0) -> Tensor:
    """(N, V) logits of (N, H), in the dtype of the inputs."""
    z = hidden @ weight.T
    z = logit_scale * (z if bias is None else z + bias)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return z / (temperature.to(z.dtype)[:, None] if isinstance(temperature, Tensor) else temperature)


def truth(hidden, weight, targets, bias=None, *, rows=None, temperature=1.0, **options) -> dict[str, Tensor]:
    """Every output of linear_logps, shaped like targets, from tensors of any dtype; ignored rows are cut out first."""
    live = targets.flatten() != IGNORE
    hidden = hidden.flatten(0, -2)
    hidden = (hidden if rows is None else hidden[rows])[live]
    if isinstance(temperature, Tensor):
        temperature = temperature.flatten()[live]
    z = scores(hidden, weight, bias, temperature=temperature, **options)
    label = targets.flatten()[live].long()[:, None]
    z_y = z.gather(1, label)
    if weight.shape[0] == 1:
        logps = (0 * z).sum(1)
    else:
        others = (z - z_y).scatter(1, label, float("-inf"))
        logps = -torch.logaddexp(torch.zeros_like(z_y[:, 0]), others.logsumexp(1))
    every = z.log_softmax(1)
    return {
        name: torch.zeros(targets.shape, dtype=x.dtype).masked_scatter(live.view(targets.shape), x)
        for name, x in {
            "logps": logps,
            "entropy": -(every.exp() * every).sum(1),
            "log_sum_sq_probs": (2 * every).logsumexp(1),
            "mean_logits": z.mean(1),
            "is_top1": z_y[:, 0] >= z.max(1).values if z.numel() else z_y[:, 0] > 0,
        }.items()
    }


def eager(hidden, weight, targets, bias=None, **options) -> dict[str, Tensor]:
    """What people write, at its most careful: log_softmax of fp32 logits, and gather."""
    hidden, weight, bias = (x if x is None else x.float() for x in (hidden, weight, bias))
    live, rows = targets.flatten() != IGNORE, options.pop("rows", None)
    hidden = (hidden.flatten(0, -2) if rows is None else hidden[rows])[live]
    temperature = options.pop("temperature", 1.0)
    if isinstance(temperature, Tensor):
        temperature = temperature.flatten()[live]
    every = scores(hidden, weight, bias, temperature=temperature, **options).log_softmax(1)
    logps = every.gather(1, targets.flatten()[live].long()[:, None])[:, 0]
    entropy = -(every.exp() * every).sum(1)
    return {
        name: torch.zeros(targets.shape).masked_scatter(live.view(targets.shape), x)
        for name, x in {"logps": logps, "entropy": entropy}.items()
    }


def option_case(name, n, h, v, dtype, **given):
    """(arguments, options) of linear_logps for a name in OPTIONS."""
    options = dict(OPTIONS[name])
    args = head(n, h, v, dtype, bias=options.pop("bias", False), **given)
    if options.pop("per_token", False):
        args["temperature"] = 0.5 + torch.rand(n, generator=torch.Generator().manual_seed(5))
    return args, options


def head(n, h, v, dtype=torch.float32, *, seed=0, spread=3.0, ignored=0.25, bias=False) -> dict[str, Tensor]:
    """Arguments of linear_logps: logits of standard deviation `spread`, a third of the labels at the maximum."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=generator)
    weight = torch.randn(v, h, generator=generator) * spread / h**0.5
    targets = torch.randint(v, (n,), generator=generator)
    targets = torch.where(torch.rand(n, generator=generator) < 1 / 3, (hidden @ weight.T).argmax(1), targets)
    targets[torch.rand(n, generator=generator) < ignored] = IGNORE
    args = {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "targets": targets}
    if bias:
        args["bias"] = torch.randn(v, generator=generator).to(dtype)
    return args


def pairs(b=3, t=9, h=21, v=67, dtype=torch.float32, *, seed=0, bias=False):
    """2B sequences after a prompt of 3 tokens, of all lengths up to t; hidden is NaN where no target is."""
    args = head(2 * b * t, h, v, dtype, seed=seed, ignored=0.0, bias=bias)
    args["hidden"], args["targets"] = args["hidden"].view(2 * b, t, h), args["targets"].view(2 * b, t)
    ends = torch.randint(5, t + 1, (2 * b, 1), generator=torch.Generator().manual_seed(seed + 1))
    where = torch.arange(t)
    args["targets"][(where < 3) | (where >= ends)] = IGNORE
    args["hidden"][args["targets"] == IGNORE] = math.nan
    return args


def upstream(*shape, seed=1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(function, args, *, grads=None, trained=TRAINED, dtype=None, **options):
    """(values, gradients by name) of function(**args): `grads` holds the upstream gradient of each output used."""
    args = {k: x.to(dtype) if dtype and x is not None and x.is_floating_point() else x for k, x in args.items()}
    leaves = {k: args[k].detach().clone().requires_grad_() for k in trained if args.get(k) is not None}
    values = as_dict(function(**{**args, **leaves}, **options))
    if not grads or not leaves:
        return values, {}
    outputs = [values[k] for k in grads]
    given = [g.to(x.dtype) for g, x in zip(grads.values(), outputs, strict=True)]
    return values, dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), given), strict=True))


def as_dict(result) -> dict[str, Tensor]:
    if isinstance(result, Tensor):
        return {"logps": result}
    result = result._asdict() if hasattr(result, "_asdict") else result
    return {k: x for k, x in result.items() if x is not None}


def three_ways(args, grads, *, backend, trained=TRAINED, **options):
    """(ours, eager's, truth), each as (values, gradients)."""
    outputs = {"outputs": ("entropy",)} if "entropy" in grads else {}
    ours = run(linear_logps, args, grads=grads, trained=trained, backend=backend, **outputs, **options)
    fp32 = run(eager, args, grads=grads, trained=trained, **options)
    return ours, fp32, run(truth, args, grads=grads, trained=trained, dtype=torch.float64, **options)


def assert_no_worse(actual, eager, truth, factor=2.0):
    assert actual.shape == truth.shape
    if not truth.numel():
        return
    error, allowed = (actual.double() - truth).abs().max(), factor * (eager.double() - truth).abs().max()
    ulp = torch.finfo(actual.dtype).eps * truth.abs().max()
    assert error <= allowed + ulp, f"error {error:.1e} > {factor} x eager's + 1 ulp = {allowed + ulp:.1e}"


def assert_logps(actual, truth, largest_logit=64.0):
    """The contract: an error of 2e-6 + 1e-6 |logp|, rms, in proportion to the largest |logit| above 64."""
    assert actual.shape == truth.shape and bool(torch.isfinite(actual).all())
    assert bool((actual <= 0).all()), f"log-probs above 0: up to {actual.max():.1e}"
    allowed = (2e-6 + 1e-6 * truth.abs()) * max(1.0, float(largest_logit) / 64)
    rms = ((actual.double() - truth) / allowed).square().mean().sqrt() if truth.numel() else 0.0
    assert rms <= 1, f"error is {rms:.2f} of what the contract allows"


def assert_entropy(actual, truth):
    """As exact as a log-prob of its size: 2 standard deviations of what the contract allows one, for every token."""
    assert actual.shape == truth.shape and bool((actual >= 0).all())
    error = (actual.double() - truth).abs()
    assert bool((error <= 2 * (2e-6 + 1e-6 * truth)).all()), f"off by {error.max():.1e}"


def assert_gradient(actual, truth, scale=None):
    """The contract: relative Frobenius error, 3e-3 for 16 bits and 3e-6 for fp32. scale: the un-cancelled norm."""
    assert actual.shape == truth.shape and bool(torch.isfinite(actual).all())
    error, norm = (actual.double() - truth).norm(), truth.norm() if scale is None else scale
    allowed = {torch.float32: 3e-6, torch.float64: 1e-12}.get(actual.dtype, 3e-3) * norm
    assert error <= allowed, f"gradient error {error:.2e} > {allowed:.2e}, of norm {norm:.2e}"


def assert_same_bits(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(a, b), f"{int((a != b).sum())} of {a.numel()} entries differ, by up to {(a - b).abs().max():.1e}"


LOSSES = {  # name: (type, options), and below the formula of what stands there
    "sigmoid": ("sigmoid", {}),
    "cdpo": ("sigmoid", {"label_smoothing": 0.2}),
    "hinge": ("hinge", {}),
    "ipo": ("ipo", {}),
}


def formula(name, chosen, rejected, ref_chosen, ref_rejected, lengths, beta):
    """(B,) losses of sums of log-probs, as the papers print them."""
    chosen, rejected = chosen - ref_chosen, rejected - ref_rejected
    z = beta * (chosen - rejected)
    if name == "hinge":
        return torch.clamp(1 - z, min=0)
    if name == "ipo":
        return (chosen / lengths[0] - rejected / lengths[1] - 1 / (2 * beta)) ** 2
    flipped = {"sigmoid": 0.0, "cdpo": 0.2}[name]
    return (1 - flipped) * torch.log1p(torch.exp(-z)) + flipped * torch.log1p(torch.exp(z))


def reference_of(args, seed=7):
    """(2B,) reference sums close to the policy's own."""
    with torch.no_grad():
        clean = {k: x.double() if x.is_floating_point() else x for k, x in args.items()}
        sums = truth(**clean)["logps"].sum(1)
    return (sums + 3 * upstream(len(sums), seed=seed)).float()


def true_loss(args, name="sigmoid", *, ref_logps, beta=0.1, reduction="mean", grads=None, trained=TRAINED, **options):
    """(values, gradients) of the loss in float64: `name` is that of a formula."""

    def whole(hidden, weight, targets, bias=None):
        logps = truth(hidden, weight, targets, bias, **options)["logps"].sum(1)
        chosen, rejected = logps.chunk(2)
        lengths = (targets != IGNORE).sum(1).chunk(2)
        losses = formula(name, chosen, rejected, *ref_logps.double().chunk(2), lengths, beta)
        loss = {"mean": losses.mean, "sum": losses.sum, "none": losses.clone}[reduction]()
        return {"loss": loss, "chosen_logps": chosen, "rejected_logps": rejected, "losses": losses}

    return run(whole, args, grads=grads or {"loss": torch.tensor(1.0)}, trained=trained, dtype=torch.float64)


def our_loss(args, name="sigmoid", *, grads=None, trained=TRAINED, **options):
    loss_type, own = LOSSES[name] if isinstance(name, str) else (name, {})
    grads = grads or {"loss": torch.tensor(1.0)}
    return run(linear_preference_loss, args, grads=grads, trained=trained, loss_type=loss_type, **own, **options)


def assert_close(values, truth, names=("loss", "chosen_logps", "rejected_logps")):
    for name in names:  # sums of under 10 log-probs, each within a few 1e-6
        torch.testing.assert_close(values[name].double(), truth[name], rtol=2e-6, atol=2e-5)


def assert_gradients(gradients, truths, **options):
    assert gradients.keys() == truths.keys()
    for name in gradients:
        assert_gradient(gradients[name], truths[name], **options)
