"""The policy losses in float64, sequence by sequence, as their papers print them; and batches to try them on."""

import math

import torch

from tests._oracle import IGNORE, head, upstream

OPTIONS = {  # a row of the table: name of the test -> (loss_type, its options, reduction of the paper)
    "ppo": ("ppo", {}, "mean"),
    "ppo, clip higher": ("ppo", {"epsilon": 0.1, "epsilon_high": 0.28}, "mean"),
    "ppo, dual clip": ("ppo", {"delta": 1.5}, "mean"),
    "grpo": ("grpo", {}, "sequence_mean"),
    "dr_grpo": ("dr_grpo", {}, "constant"),
    "bnpo": ("bnpo", {}, "mean"),
    "dapo": ("dapo", {"epsilon_high": 0.28}, "mean"),
    "gspo": ("gspo", {"epsilon": 0.03, "epsilon_high": 0.04}, "sequence_mean"),
    "cispo": ("cispo", {"epsilon_high": 0.4}, "mean"),
    "cispo, both bounds": ("cispo", {"epsilon_high": 0.4, "epsilon": 0.1}, "mean"),
    "sapo": ("sapo", {}, "sequence_mean"),
    "vespo": ("vespo", {}, "mean"),
    "luspo": ("luspo", {"epsilon": 0.03}, "sequence_sum"),
    "rloo": ("rloo", {}, "sequence_mean"),
    "reinforce": ("reinforce", {}, "sequence_sum"),
}
MAX_LENGTH = 32
LIMIT = 20.0


def exp(x):
    """exp, and its tangent from 20 on: the one departure from the papers."""
    return torch.where(x <= LIMIT, torch.exp(torch.clamp(x, max=LIMIT)), math.exp(LIMIT) * (1 + x - LIMIT))


def surrogate(loss_type, logp, old, advantage, *, epsilon=0.2, epsilon_high=None, delta=None):
    """Terms of one sequence's tokens; `advantage` of each token."""
    log_ratio = logp - old
    if loss_type == "reinforce":
        return -advantage * logp
    if loss_type == "sapo":
        tau = torch.where(advantage > 0, torch.tensor(1.0).double(), torch.tensor(1.05).double())
        return -4 / tau / (1 + torch.exp(-tau * (exp(log_ratio) - 1))) * advantage
    if loss_type == "vespo":
        k, rate = (torch.where(advantage > 0, a, b).double() for a, b in ((2.0, 3.0), (3.0, 2.0)))
        log_w = log_ratio.detach().sum()
        return -torch.exp(k * log_w + rate * (1 - log_w.exp())) * advantage * logp
    if loss_type == "cispo":
        weight = exp(log_ratio.detach()).clamp(0.0 if epsilon is None else 1 - epsilon, 1 + epsilon_high)
        return -weight * advantage * logp
    if loss_type in ("gspo", "luspo"):
        ratio = exp(log_ratio.mean()).expand(logp.shape)
    elif loss_type == "rloo":
        ratio = exp(log_ratio.sum()).expand(logp.shape)
    else:
        ratio = exp(log_ratio)
    high = epsilon if epsilon_high is None else epsilon_high
    gain = torch.stack((ratio * advantage, torch.clamp(ratio, 1 - epsilon, 1 + high) * advantage)).amin(0)
    inside = (ratio >= 1 - epsilon) & (ratio <= 1 + high)  # where the two are one number
    gain = torch.where(inside, ratio * advantage, gain)
    if delta is not None:
        gain = torch.where(advantage < 0, torch.maximum(gain, delta * advantage), gain)
    return -gain


def kl(estimator, logp, ref):
    log_ratio = ref - logp
    return {"k1": -log_ratio, "k2": log_ratio**2 / 2, "k3": exp(log_ratio) - 1 - log_ratio}[estimator]


def total(terms, reduction):
    """`terms`: a tensor for each sequence."""
    tokens = sum(len(t) for t in terms)
    every = torch.cat(terms)
    if reduction in ("mean", "sum"):
        return every.sum() / (max(tokens, 1) if reduction == "mean" else 1)
    each = [t.sum() / (max(len(t), 1) if reduction == "sequence_mean" else 1) for t in terms]
    return torch.stack(each).mean() / (MAX_LENGTH if reduction == "constant" else 1)


def true_loss(
    name, logps, batch, *, reduction=None, kl_coef=0.0, kl_estimator="k3", entropy=None, entropy_coef=0.0, weights=None
):
    """() float64, of logps (B, T) float64; `batch` holds old_logps, advantages (B, T) and ref_logps."""
    loss_type, options, of_paper = OPTIONS[name]
    if loss_type == "cispo":
        options = {"epsilon": None, **options}
    terms = []
    for i, live in enumerate(batch["mask"]):
        logp = logps[i][live]
        old, advantage = (batch[key][i][live].double() for key in ("old_logps", "advantages"))
        term = surrogate(loss_type, logp, old, advantage, **options) if len(logp) else logp
        if weights is not None:
            term = term * weights[i][live].double()
        if kl_coef:
            term = term + kl_coef * kl(kl_estimator, logp, batch["ref_logps"][i][live].double())
        if entropy_coef:
            term = term - entropy_coef * entropy[i][live]
        terms.append(term)
    return total(terms, reduction or of_paper)


def rollout(b=5, t=9, *, spread=0.3, seed=0, poisoned=True):
    """logps and what belongs to them, (B, T) float32; rows of all lengths, one empty, one with a hole; NaN if dead."""
    generator = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(b, t, generator=generator)

    logps = -normal().abs() - 0.1
    mask = torch.arange(t) < torch.randint(2, t + 1, (b, 1), generator=generator)
    mask[0, :2], mask[-1] = False, False
    mask[1], mask[1, 3] = True, False
    batch = {
        "logps": logps,
        "old_logps": logps - spread * normal(),
        "ref_logps": logps - spread * normal(),
        "advantages": torch.randn(b, 1, generator=generator).expand(b, t).clone(),
        "mask": mask,
    }
    if poisoned:
        for key in ("logps", "old_logps", "ref_logps", "advantages"):
            batch[key] = torch.where(mask, batch[key], math.nan)
    return batch


def arguments(batch, *, by_sequence=True):
    """The keyword arguments of policy_loss; advantages (B,), or (B, T)."""
    given = {key: batch[key] for key in ("logps", "old_logps", "advantages", "mask")}
    if by_sequence:
        # one number a row, at its live tokens
        live = torch.where(batch["mask"], batch["advantages"], 0.0)
        given["advantages"] = live.sum(1) / batch["mask"].sum(1).clamp(min=1)
    return given


def packed(batch):
    """The same sequences end to end, and cu_seqlens; masked tokens in front of each stay."""
    flat = {key: x.reshape(-1) for key, x in batch.items()}
    b, t = batch["mask"].shape
    return flat, torch.arange(b + 1, dtype=torch.int32) * t


def with_head(batch, h=13, v=61, dtype=torch.float32, seed=3):
    """hidden (B, T, H), weight, targets of these tokens, old and reference log-probs close to the head's own."""
    b, t = batch["mask"].shape
    args = head(b * t, h, v, dtype, seed=seed, ignored=0.0)
    hidden, targets = args["hidden"].view(b, t, h), args["targets"].view(b, t)
    with torch.no_grad():
        z = args["hidden"].double() @ args["weight"].double().T
        logps = z.log_softmax(1).gather(1, args["targets"][:, None]).view(b, t).float()
    targets[~batch["mask"]] = IGNORE
    hidden[~batch["mask"]] = math.nan
    near = {key: logps + 0.25 * upstream(b, t, seed=seed + i) for i, key in enumerate(("old_logps", "ref_logps"))}
    near = {key: torch.where(batch["mask"], x, math.nan) for key, x in near.items()}
    return {"hidden": hidden, "weight": args["weight"], "targets": targets}, {**batch, **near}
