"""Inputs that look like a language model's, and the answer in float64.

Random hidden states make every softmax flat, which hides errors and flatters whoever skips small probabilities: at
V = 131,072 each is 8e-6, below the 2.4e-4 that Cut Cross-Entropy's filter leaves out for bf16, so nearly all of its
backward would be skipped; and a kernel that is right in the middle of the range of logits only would look right. Here
a row is `spread * noise + boost * w_k / |w_k|`: spread is chosen so that the noise alone has 5 nats of entropy, and
boost raises the logit of one token k by as much: uniform from 0 to twice what gives k half of the mass, so that rows
run from flat to certain, 2 to 4 nats on the mean. Two targets in three are that k; the third is any token, often 30
nats below the maximum.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE = -100
AT_ONCE = 2**24  # logits in float64

MODELS = {  # H and V of their heads
    "SmolLM2-135M": (576, 49_152),
    "Gemma-3-270M": (640, 262_144),
    "Qwen2.5-0.5B": (896, 151_936),
    "Llama-3-8B": (4096, 128_256),
    "Qwen3-8B": (4096, 151_936),
    "Gemma-3-12B": (3840, 262_208),
}


class Shape(NamedTuple):
    hidden: int
    vocab: int

    def __str__(self) -> str:
        return f"{self.hidden}x{self.vocab}"

    @property
    def model(self) -> str:
        """Whose head this is, or H x V."""
        return next((name for name, sizes in MODELS.items() if sizes == self), str(self))

    @staticmethod
    def parse(text: str) -> "Shape":
        """Of a name in MODELS, or of HxV."""
        if text in MODELS:
            return Shape(*MODELS[text])
        hidden, _, vocab = text.partition("x")
        if not (hidden.isdecimal() and vocab.isdecimal()):
            raise ValueError(f"bench: shape must be HxV or one of {', '.join(MODELS)}; got {text!r}")
        return Shape(int(hidden), int(vocab))


@dataclass(frozen=True)
class Batch:
    """B chosen sequences, then their B rejected ones; the first half of each is prompt, its targets ignored."""

    hidden: Tensor  # (2B, T, H)
    weight: Tensor  # (V, H)
    targets: Tensor  # (2B, T)
    ref_hidden: Tensor  # as hidden and weight, of the reference
    ref_weight: Tensor
    old_logps: Tensor | None  # (2B, T) fp32, of the policy that sampled; only the clipped loss needs them
    advantages: Tensor  # (2B,)
    upstream: Tensor  # (2B, T) fp32, the gradient that reaches log-probs

    def to(self, device: str) -> "Batch":
        moved: dict[str, Any] = {name: None if x is None else x.to(device) for name, x in vars(self).items()}
        return Batch(**moved)

    @property
    def live(self) -> Tensor:
        """(n,) positions of the targets that count, in the flattened batch."""
        return (self.targets.flatten() != IGNORE).nonzero()[:, 0]


def head_weight(shape: Shape, generator: torch.Generator) -> Tensor:
    """(V, H) rows of length about 1."""
    return torch.randn(shape.vocab, shape.hidden, generator=generator) / shape.hidden**0.5


def peaked_rows(weight: Tensor, n: int, generator: torch.Generator, top: float | None = None) -> tuple[Tensor, Tensor]:
    """(hidden (n, H), targets (n,)): boosts uniform in [0, top]; see the module for its default."""
    vocab_size, hidden_size = weight.shape
    # Gaussian logits: a softmax of log V - spread^2 / 2 nats, and exponentials that sum to V e^(spread^2 / 2)
    spread = (2 * max(math.log(vocab_size) - 5, 0.5)) ** 0.5
    top = 2 * (math.log(vocab_size) + spread**2 / 2) if top is None else top
    likely = torch.randint(vocab_size, (n,), generator=generator)
    boost = top * torch.rand(n, 1, generator=generator)
    hidden = spread * torch.randn(n, hidden_size, generator=generator)
    hidden += boost * torch.nn.functional.normalize(weight[likely], dim=1)
    other = torch.randint(vocab_size, (n,), generator=generator)
    return hidden, torch.where(torch.rand(n, generator=generator) < 2 / 3, likely, other)


def batch(shape: Shape, pairs: int, length: int, dtype: torch.dtype, sampled: bool = False, seed: int = 0) -> Batch:
    """The reference is the policy moved by 5 %, so that the log-ratio of a sequence is some nats.

    sampled: with old_logps, at the cost of a float64 pass.
    """
    generator = torch.Generator().manual_seed(seed)
    n = 2 * pairs
    weight = head_weight(shape, generator)
    hidden, targets = peaked_rows(weight, n * length, generator)
    moved = hidden.norm(dim=1, keepdim=True) / shape.hidden**0.5 * torch.randn(hidden.shape, generator=generator)
    ref_hidden = (hidden + 0.05 * moved).to(dtype)
    ref_weight = (weight + 0.05 * head_weight(shape, generator)).to(dtype)
    weight, hidden = weight.to(dtype), hidden.to(dtype).view(n, length, -1)
    targets = targets.view(n, length)
    targets[:, : length // 2] = IGNORE
    old = None
    if sampled:  # a policy some updates ago: ratios of some percent, one token in twenty outside the clip range of 0.2
        old = exact_logps(hidden, weight, targets) + 0.1 * torch.randn(n, length, generator=generator)
    return Batch(
        hidden,
        weight,
        targets,
        ref_hidden.view(n, length, -1),
        ref_weight,
        None if old is None else old.float(),
        torch.randn(n, generator=generator),
        torch.randn(n, length, generator=generator),
    )


@torch.no_grad()
def exact_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log softmax(x W^T)[target] in float64, shaped like targets; 0 where ignored."""
    live = (targets.flatten() != IGNORE).nonzero()[:, 0]
    x, y = hidden.flatten(0, -2)[live].double(), targets.flatten()[live]
    log_sum = x.new_full((len(live),), -torch.inf)
    for slab in weight.split(AT_ONCE // max(len(live), 1)):
        log_sum = torch.logaddexp(log_sum, (x @ slab.double().T).logsumexp(1))
    out = torch.zeros(targets.numel(), dtype=torch.float64, device=x.device)
    out[live] = (x * weight[y].double()).sum(1) - log_sum
    return out.view(targets.shape)


class Exact(NamedTuple):
    """float64, but d_weight."""

    loss: float
    logps: Tensor  # shaped like targets
    d_hidden: Tensor  # (n, H): the rows whose targets count
    d_weight: Tensor  # formed in float64, kept in float32
    entropy: float  # mean over those rows, nats
    gap: float  # the most that a target lies below its row's maximum, nats


@torch.no_grad()
def exact(hidden: Tensor, weight: Tensor, targets: Tensor, loss_of: Callable[[Tensor], Tensor]) -> Exact:
    """The loss of the log-probs and its gradients, AT_ONCE logits at a time."""
    logps = exact_logps(hidden, weight, targets)
    with torch.enable_grad():
        leaf = logps.clone().requires_grad_()
        loss = loss_of(leaf)
    live = (targets.flatten() != IGNORE).nonzero()[:, 0]
    slope = torch.autograd.grad(loss, leaf)[0].flatten()[live, None]
    x, y, at = hidden.flatten(0, -2)[live].double(), targets.flatten()[live], logps.flatten()[live, None]
    log_sum = (x * weight[y].double()).sum(1, keepdim=True) - at
    d_hidden = slope * weight[y].double()
    d_weight = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    entropy, highest = 0.0, torch.full_like(at, -torch.inf)
    step = AT_ONCE // max(len(live), 1)
    for first in range(0, len(weight), step):
        w = weight[first : first + step].double()
        log_p = x @ w.T - log_sum
        highest = torch.maximum(highest, log_p.amax(1, keepdim=True))
        p = log_p.exp()
        entropy -= float((p * log_p).sum())
        d_z = p.mul_(-slope)
        d_hidden += d_z @ w
        inside = ((y >= first) & (y < first + step)).nonzero()[:, 0]
        d_z[inside, y[inside] - first] += slope[inside, 0]
        d_weight[first : first + step] = d_z.T @ x
    n = max(len(live), 1)
    return Exact(float(loss), logps, d_hidden, d_weight, entropy / n, float((highest - at).max()) if len(live) else 0.0)


def relative_error(got: list[Tensor], truth: list[Tensor]) -> float:
    """Frobenius, over all tensors at once."""
    difference = sum(float((a.double() - b).square().sum()) for a, b in zip(got, truth, strict=True))
    return (difference / sum(float(b.double().square().sum()) for b in truth)) ** 0.5
