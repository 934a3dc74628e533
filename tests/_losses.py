"""Every loss of pairs as its paper prints it, in float64, written apart from fastpref.losses.

A `Case` holds what the formulas are in: of each pair's chosen (w) and rejected (l) completion the log-prob, the
log-ratio to the reference, the length and the tokens. `ROWS` names each loss with options and says what it needs and
couples.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastpref import Tokens


@dataclass
class Case:
    """B pairs of token log-probs; 0 in `logps` and `ref`, and anything in the rest, where mask is False."""

    logps: Tensor  # (2B, T) under the policy
    ref: Tensor  # (2B, T) under the reference
    mask: Tensor  # (2B, T) bool
    log_sum_sq: Tensor  # (2B, T) log sum_v p_v^2
    beta: float

    def __post_init__(self):
        self.n = self.mask.sum(1).chunk(2)
        self.lw, self.ll = self.logps.sum(1).chunk(2)
        ref_w, ref_l = self.ref.sum(1).chunk(2)
        self.rw, self.rl = self.lw - ref_w, self.ll - ref_l
        self.mean_w, self.mean_l = self.lw / self.n[0].clamp(min=1), self.ll / self.n[1].clamp(min=1)

    @property
    def z(self):
        return self.beta * (self.rw - self.rl)

    def changed(self, f) -> "Case":
        """The same with log-ratios f(r)."""
        other = Case(self.logps, self.ref, self.mask, self.log_sum_sq, self.beta)
        other.rw, other.rl = f(self.rw), f(self.rl)
        return other

    def shortened(self, alpha) -> "Case":
        """The same with tokens beyond the shorter answer's length counted by alpha; lengths as they were."""
        factor = torch.ones_like(self.logps)
        for i in range(len(self.lw)):
            j = i + len(self.lw)
            shared = int(min(self.n[0][i], self.n[1][i]))
            for row in (i, j):
                factor[row, self.mask[row].nonzero()[shared:, 0]] = alpha
        other = Case(self.logps * factor, self.ref * factor, self.mask, self.log_sum_sq, self.beta)
        other.mean_w = self.mean_w
        return other

    def wpo(self):
        each = torch.where(self.mask, self.logps - self.log_sum_sq, 0.0).sum(1) / self.mask.sum(1).clamp(min=1)
        return each.exp().detach().chunk(2)[0] * each.exp().detach().chunk(2)[1]


# log-ratios of chosen and rejected, nats: margins of 50, 200 and 400 of either sign. No two alike, nor both far below 0
# without some nats between: sorting and the forward KL would show the rounding of the sums, times exp(30)
EXTREME = torch.tensor([[200.0, -200.0, 190.0, -190.0, 0.0, 3.0], [150.0, 200.0, -210.0, -140.0, 203.0, -200.0]])


def case(margins="ordinary", b=4, t=7, beta=0.3):
    """A Case of random log-probs; the lengths of a pair differ."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, t + 1, (2 * b, 1), generator=generator)
    mask = torch.arange(t) < lengths
    logps, log_sum_sq = -3 * rand(2 * b, t) - 0.01, -2 * rand(2 * b, t)
    ref = logps + 2 * rand(2 * b, t) - 1
    if margins == "extreme":
        ref = logps - EXTREME[:, :b].reshape(-1, 1) / lengths
    return Case(logps * mask, ref * mask, mask, log_sum_sq, beta)


def tokens_of(c, outputs=None, **changes):
    """The Tokens of a Case; without `outputs` none are known."""
    sequence = torch.arange(len(c.logps))[:, None].expand(c.logps.shape).reshape(-1)
    given = {"logps": c.logps, "ref_logps": c.ref, "mask": c.mask, "sequence": sequence}
    given = {k: None if x is None else x.reshape(-1) for k, x in {**given, **changes}.items()}
    return Tokens(**given, outputs=outputs or {})


def log_sigmoid(x):
    return -torch.logaddexp(torch.zeros_like(x), -x)


def sigma(x):
    return torch.exp(log_sigmoid(x))


def smoothed(z, e):
    return -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z)


def exo(c, e=1e-3):
    model, labels = torch.stack([sigma(c.z), sigma(-c.z)]), torch.tensor([[1 - e], [e]], dtype=torch.float64)
    return (torch.special.xlogy(model, model) - model * labels.log()).sum(0)


def aot(c, e=0.0):
    ref_margin = (c.lw - c.rw) - (c.ll - c.rl)
    return smoothed(c.beta * ((c.lw - c.ll).sort().values - ref_margin.sort().values), e)


def discopop(c, tau=0.05):
    share = sigma(c.z / tau)
    growing = torch.exp(-torch.logaddexp(c.z, c.z - c.z / tau))  # share * exp(-z), which overflow
    return (1 - share) * -log_sigmoid(c.z) + growing


def log_odds(mean_logp):
    p = mean_logp.exp()
    return (p / (1 - p)).log()


def unlikelihood(c, alpha=1.0):
    b = len(c.lw)
    p = torch.where(c.mask[b:], c.logps[b:], -torch.inf).exp()
    return -c.mean_w - alpha * (1 - p).log().sum(1) / c.n[1].clamp(min=1)


def tangent_exp(x):
    """exp up to 30 nats, its tangent beyond, as losses/_f_divergence.py promises."""
    return torch.where(x < 30, x.clamp(max=30).exp(), math.exp(30) * (x - 29))


def alpha_score(r, a):
    """(u^(a - 1) - 1) / (a - 1)"""
    return (tangent_exp((a - 1) * r) - 1) / (a - 1)


def js_score(r):
    u = r.exp()
    return (2 * u / (1 + u)).log()


@dataclass
class Row:
    formula: Callable[[Case], Tensor]  # (B,)
    loss_type: str | list[str]
    options: dict = field(default_factory=dict)
    couples: str = "pair"
    needs: frozenset[str] = frozenset({"reference"})  # and "lengths", "tokens"
    slack: float = 1.0  # how much more than a log-prob's own error an error of the loss may be


def row(formula, loss_type, options=None, couples="pair", needs="reference", slack=1.0):
    return Row(formula, loss_type, options or {}, couples, frozenset(needs.split()), slack)


def changed(f):
    return lambda c: smoothed(c.changed(f).z, 0.0)


def forward_kl(r):
    return 1 - tangent_exp(-r)


ROWS = {
    "sigmoid": row(lambda c: -log_sigmoid(c.z), "sigmoid"),
    "cdpo": row(lambda c: smoothed(c.z, 0.2), "sigmoid", {"label_smoothing": 0.2}),
    "robust": row(
        lambda c: (-0.9 * log_sigmoid(c.z) + 0.1 * log_sigmoid(-c.z)) / 0.8, "robust", {"label_smoothing": 0.1}
    ),
    "hinge": row(lambda c: (1 - c.z).clamp(min=0), "hinge"),
    "ipo": row(
        lambda c: (c.rw / c.n[0].clamp(min=1) - c.rl / c.n[1].clamp(min=1) - 1 / (2 * c.beta)) ** 2,
        "ipo",
        needs="reference lengths",
    ),
    "exo_pair": row(exo, "exo_pair"),
    "exo_pair 0.2": row(lambda c: exo(c, 0.2), "exo_pair", {"label_smoothing": 0.2}),
    "nca_pair": row(
        lambda c: -log_sigmoid(c.beta * c.rw) - 0.5 * (log_sigmoid(-c.beta * c.rw) + log_sigmoid(-c.beta * c.rl)),
        "nca_pair",
    ),
    "bco_pair": row(lambda c: -log_sigmoid(c.beta * c.rw) - log_sigmoid(-c.beta * c.rl), "bco_pair"),
    "bco_pair delta": row(
        lambda c: -log_sigmoid(c.beta * c.rw - 0.5) - log_sigmoid(-(c.beta * c.rl - 0.5)),
        "bco_pair",
        {"delta": torch.tensor(0.5)},
    ),
    "sppo_hard": row(lambda c: (c.rw - 0.5 / c.beta) ** 2 + (c.rl + 0.5 / c.beta) ** 2, "sppo_hard", slack=3.0),
    "aot": row(aot, "aot", couples="batch"),
    "aot smoothed": row(lambda c: aot(c, 0.2), "aot", {"label_smoothing": 0.2}, couples="batch"),
    "aot_unpaired": row(
        lambda c: smoothed(c.beta * (c.rw.sort().values - c.rl.sort().values), 0.1),
        "aot_unpaired",
        {"label_smoothing": 0.1},
        couples="batch",
    ),
    "apo_zero": row(lambda c: 1 - sigma(c.beta * c.rw) + sigma(c.beta * c.rl), "apo_zero"),
    "apo_down": row(lambda c: sigma(c.beta * c.rw) + 1 - sigma(c.z), "apo_down"),
    "discopop": row(discopop, "discopop", slack=20.0),
    "discopop 0.5": row(lambda c: discopop(c, 0.5), "discopop", {"discopop_tau": 0.5}),
    "sigmoid_norm": row(
        lambda c: -log_sigmoid(c.beta * (c.rw / c.n[0].clamp(min=1) - c.rl / c.n[1].clamp(min=1))),
        "sigmoid_norm",
        needs="reference lengths",
    ),
    "sft": row(lambda c: -c.mean_w, "sft", needs="lengths"),
    "cpo": row(lambda c: -log_sigmoid(c.beta * (c.lw - c.ll)) - c.mean_w, "cpo", needs="lengths"),
    "cpo alone": row(
        lambda c: smoothed(c.beta * (c.lw - c.ll), 0.1), "cpo", {"cpo_alpha": 0.0, "label_smoothing": 0.1}, needs=""
    ),
    "simpo": row(lambda c: -log_sigmoid(c.beta * (c.mean_w - c.mean_l) - 0.5), "simpo", needs="lengths"),
    "simpo 1.4": row(
        lambda c: smoothed(c.beta * (c.mean_w - c.mean_l) - 1.4, 0.1),
        "simpo",
        {"simpo_gamma": 1.4, "label_smoothing": 0.1},
        needs="lengths",
    ),
    "orpo": row(
        lambda c: -c.mean_w - c.beta * log_sigmoid(log_odds(c.mean_w) - log_odds(c.mean_l)), "orpo", needs="lengths"
    ),
    "dpop": row(lambda c: -log_sigmoid(c.beta * (c.rw - c.rl - 50 * (-c.rw).clamp(min=0))), "dpop", slack=5.0),
    "dpop 5": row(
        lambda c: -log_sigmoid(c.beta * (c.rw - c.rl - 5 * (-c.rw).clamp(min=0))), "dpop", {"dpop_lambda": 5.0}
    ),
    "unlikelihood": row(unlikelihood, "unlikelihood", needs="lengths tokens"),
    "unlikelihood 0.3": row(
        lambda c: unlikelihood(c, 0.3), "unlikelihood", {"unlikelihood_alpha": 0.3}, needs="lengths tokens"
    ),
    # what acts on every loss alike
    "rpo": row(
        lambda c: 0.7 * smoothed(c.z, 0.0) - 0.3 * c.mean_w,
        ["sigmoid", "sft"],
        {"loss_weights": [0.7, 0.3]},
        needs="reference lengths",
    ),
    "mpo": row(
        lambda c: 0.8 * smoothed(c.z, 0.0) + 0.2 * ROWS["bco_pair"].formula(c) - c.mean_w,
        ["sigmoid", "bco_pair", "sft"],
        {"loss_weights": [0.8, 0.2, 1.0]},
        needs="reference lengths",
    ),
    "of pairs and of the batch": row(
        lambda c: smoothed(c.z, 0.0) + 0.5 * aot(c), ["sigmoid", "aot"], {"loss_weights": [1.0, 0.5]}, couples="batch"
    ),
    "forward_kl": row(changed(forward_kl), "sigmoid", {"f_divergence_type": "forward_kl"}, slack=30.0),
    "js": row(changed(js_score), "sigmoid", {"f_divergence_type": "js_divergence"}),
    "alpha": row(
        changed(lambda r: alpha_score(r, 0.5)), "sigmoid", {"f_divergence_type": "alpha_divergence"}, slack=30.0
    ),
    "alpha 0.9": row(
        changed(lambda r: alpha_score(r, 0.9)),
        "sigmoid",
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.9},
        slack=5.0,
    ),
    "alpha 1": row(
        lambda c: smoothed(c.z, 0.0),
        "sigmoid",
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
    ),
    "alpha 0": row(
        changed(forward_kl),
        "sigmoid",
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.0},
        slack=30.0,
    ),
    "ipo js": row(
        lambda c: ROWS["ipo"].formula(c.changed(js_score)),
        "ipo",
        {"f_divergence_type": "js_divergence"},
        needs="reference lengths",
    ),
    "ld": row(lambda c: smoothed(c.shortened(0.3).z, 0.0), "sigmoid", {"ld_alpha": 0.3}, needs="reference tokens"),
    "ld ipo, sft": row(
        lambda c: ROWS["ipo"].formula(c.shortened(0.0)) - c.mean_w,
        ["ipo", "sft"],
        {"ld_alpha": 0.0},
        needs="reference lengths tokens",
    ),
    "ld aot": row(lambda c: aot(c.shortened(0.5)), "aot", {"ld_alpha": 0.5}, "batch", "reference tokens"),
    "wpo": row(lambda c: smoothed(c.z, 0.0) * c.wpo(), "sigmoid", {"use_weighting": True}, needs="reference tokens"),
    "wpo ld js": row(
        lambda c: (0.5 * smoothed(c.shortened(0.6).changed(js_score).z, 0.0) + 2 * (-c.mean_w)) * c.wpo(),
        ["sigmoid", "sft"],
        {
            "loss_weights": [0.5, 2.0],
            "use_weighting": True,
            "ld_alpha": 0.6,
            "f_divergence_type": "js_divergence",
        },
        needs="reference lengths tokens",
    ),
}


def value_and_slope(formula, case, upstream):
    """(losses, the gradient of their sum weighted by upstream to the token log-probs), float64."""
    logps = case.logps.detach().requires_grad_()
    losses = formula(Case(logps, case.ref, case.mask, case.log_sum_sq, case.beta))
    return losses.detach(), torch.autograd.grad(losses, logps, upstream)[0]
