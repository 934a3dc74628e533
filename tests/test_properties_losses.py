"""linear_preference_loss, dpo_loss and gae over drawn calls: float64 formulas, and the symmetries of pairs and rows."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastpref import dpo_loss, gae, linear_preference_loss
from tests._cases import DTYPES, HIDDEN, LAYOUTS, MIB, Case, assert_gradients, examples, laid
from tests._oracle import BACKENDS, IGNORE, LOSSES, assert_same_bits, formula, head, truth, upstream

VOCABULARY = st.sampled_from([2, 3, 16, 17, 97, 480, 481]) | st.integers(2, 60)
REFERENCES = ["sums", "tokens", "hidden", "free"]
EPS = torch.finfo(torch.float32).eps


class Batch(NamedTuple):
    """Pairs, to the oracle as (2B, T), and the call: packed, by rows, strided, or as they are."""

    case: Case
    call: dict
    name: str  # of a formula
    ref: Tensor  # (2B,) what the reference comes to
    keep: Tensor  # (2B, T) the tokens of the call

    def __repr__(self) -> str:
        call = {k: f"{tuple(x.shape)} strides {x.stride()}" if torch.is_tensor(x) else x for k, x in self.call.items()}
        return f"Batch({self.name}, {self.case.tensors['hidden'].dtype}, {call})"

    def as_drawn(self, d_hidden: Tensor) -> Tensor:
        d_hidden = d_hidden[self.call["rows"]] if "rows" in self.call else d_hidden
        where = self.keep[..., None].expand_as(self.case.tensors["hidden"])
        return torch.zeros(where.shape, dtype=d_hidden.dtype).masked_scatter(where, d_hidden)


@st.composite
def batches(draw, names=tuple(LOSSES), hows=("batched", "packed", "live only", "rows"), large=False):
    b, t, h, v = draw(st.integers(1, 3)), draw(st.integers(1, 17)), draw(HIDDEN), draw(VOCABULARY)
    if large:  # several chunks of 1 MiB
        b, t, v = 4, draw(st.integers(80, 120)), draw(st.integers(900, 1100))
    dtype, seed, name = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 10**6)), draw(st.sampled_from(names))
    ignored, bias = draw(st.sampled_from([0.0, 0.3])), draw(st.booleans())
    generator = torch.Generator().manual_seed(seed)
    tensors = head(2 * b * t, h, v, dtype, seed=seed, ignored=ignored, bias=bias)
    tensors |= {k: tensors[k].unflatten(0, (2 * b, t)) for k in ("hidden", "targets")}
    if name == "ipo":  # it divides by the lengths
        tensors["targets"][:, 0] = 0
    elif draw(st.booleans()):
        tensors["targets"][draw(st.integers(0, 2 * b - 1))] = IGNORE
    live = tensors["targets"] != IGNORE
    tensors["hidden"][~live] = math.nan
    options = {k: draw(st.sampled_from(x)) for k, x in {"softcap": [None, 5.0], "logit_scale": [1.0, -1.3]}.items()}
    options["temperature"] = draw(st.sampled_from([1.0, 0.7]))
    if draw(st.booleans()):
        options["temperature"] = (0.5 + torch.rand(2 * b, t, generator=generator)).masked_fill(~live, math.nan)
    case = Case(tensors, options, {})

    call = {**tensors, **options}
    for name_, values in {
        "backend": BACKENDS,
        "workspace": [None, MIB],
        "max_extra_bytes": [None, 0],
        "deterministic": [False, True],
        "beta": [0.1, 0.5],
        "reduction": ["mean", "sum", "none"],
    }.items():
        call[name_] = draw(st.sampled_from(values))
    reference, ref = draw(st.sampled_from(REFERENCES)), torch.zeros(2 * b)
    own = options | {k: x.double() if x.is_floating_point() else x for k, x in tensors.items()}
    if reference == "sums":
        ref = call["ref_logps"] = (truth(**own)["logps"].sum(1) + upstream(2 * b, seed=seed)).float()
    elif reference == "tokens":
        ref = (truth(**own)["logps"] + upstream(2 * b, t, seed=seed)).float()
        call["ref_token_logps"], ref = ref.masked_fill(~live, math.nan), ref.masked_fill(~live, 0.0).double().sum(1)
    elif reference == "hidden":
        call["ref_hidden"], call["ref_weight"] = tensors["hidden"].flip(-1), tensors["weight"].flip(0)
        ref = truth(**{**own, "hidden": own["hidden"].flip(-1), "weight": own["weight"].flip(0)})["logps"].sum(1)
    else:
        call["reference_free"] = True

    how = draw(st.sampled_from(hows))
    keep = live if how == "live only" else torch.ones_like(live)
    if how != "batched":
        for k in ("hidden", "targets", "temperature", "ref_token_logps", "ref_hidden"):
            call |= {k: call[k][keep]} if torch.is_tensor(call.get(k)) else {}
        call["cu_seqlens"] = torch.cat([torch.zeros(1), keep.sum(1).cumsum(0)]).int()
    if how == "rows" and reference != "hidden":
        place = torch.randperm(len(call["hidden"]), generator=generator)
        call["hidden"], call["rows"] = call["hidden"][place], place.argsort()
    call = {k: laid(x, draw(st.sampled_from(LAYOUTS))) if torch.is_tensor(x) else x for k, x in call.items()}
    return Batch(case, call, name, ref.double(), keep)


def losses_and_slopes(batch: Batch, sums: Tensor, given_: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) losses of (2B,) sums, and d (given . losses) / d sums (2B,)."""
    sums = sums.detach().requires_grad_()
    lengths = batch.case.live.sum(1).chunk(2)
    losses = formula(batch.name, *sums.chunk(2), *batch.ref.chunk(2), lengths, batch.call["beta"])
    return losses.detach(), torch.autograd.grad(losses, sums, given_)[0]


@given(batches(), st.booleans())
@examples(400)
def test_preference_loss(batch, with_bias_frozen):
    check_loss(batch, with_bias_frozen)


@given(batches(large=True), st.booleans())
@examples(20)
def test_preference_loss_of_many_chunks(batch, with_bias_frozen):
    batch.call["workspace"] = MIB
    check_loss(batch, with_bias_frozen)


def check_loss(batch: Batch, with_bias_frozen: bool) -> None:
    case, call, b = batch.case, batch.call, len(batch.ref) // 2
    leaves = {k: call[k].detach().requires_grad_() for k in ("hidden", "weight", "bias") if k in call}
    if with_bias_frozen or "ref_hidden" in call:
        leaves.pop("bias", None)
    loss_type, own = LOSSES[batch.name]
    result = linear_preference_loss(**{**call, **leaves}, loss_type=loss_type, **own)
    given_ = upstream(b) if call["reduction"] == "none" else upstream(1)[0]
    gradients = dict(zip(leaves, torch.autograd.grad(result.loss, list(leaves.values()), given_), strict=True))
    gradients["hidden"] = batch.as_drawn(gradients["hidden"])

    tensors = {k: x.double() if x.is_floating_point() else x for k, x in case.tensors.items()}
    logps = truth(**tensors, **case.options)["logps"]
    sums = logps.sum(1)
    off = 4 * (2e-6 + 1e-6 * logps.abs()).square().sum(1).sqrt() + 2 * EPS * (sums.abs() + batch.ref.abs())
    each = given_.double().expand(b) / (b if call["reduction"] == "mean" else 1)
    losses, slopes = losses_and_slopes(batch, sums, each)
    apart = torch.cat([off[:b], -off[b:]])  # the two sides of a pair at their worst
    nearby = [losses_and_slopes(batch, sums + sign * apart, each) for sign in (1, -1)]
    losses_off = sum((x - losses).abs() for x, _ in nearby) + 8 * EPS * (1 + losses.abs())
    slopes_off = sum((x - slopes).abs() for _, x in nearby) + 8 * EPS * slopes.abs()

    want = {"none": losses, "sum": losses.sum(), "mean": losses.mean()}[call["reduction"]]
    assert result.loss.shape == want.shape and bool(((result.loss.double() - want).abs() <= losses_off.sum()).all())
    ours = torch.cat([result.chosen_logps, result.rejected_logps]).detach()
    assert bool(((ours.double() - sums).abs() <= off).all()) and bool((ours <= 0).all())
    rewards = torch.cat([result.chosen_rewards, result.rejected_rewards])
    assert bool(((rewards.double() - call["beta"] * (sums - batch.ref)).abs() <= off).all())
    per_token = {k: {"logps": x[:, None].expand_as(logps)} for k, x in {"grads": slopes, "off": slopes_off}.items()}
    chosen = (torch.arange(2 * b) < b)[:, None].expand_as(logps)
    assert_gradients(case, gradients, **per_token, sides=chosen)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_pairs_without_tokens(deterministic, backend):
    """Shrunk from test_preference_loss."""
    weight, nothing = torch.ones(3, 2, requires_grad=True), torch.full((2, 5), IGNORE)
    call = {"ref_logps": torch.zeros(2), "backend": backend, "deterministic": deterministic}
    loss = linear_preference_loss(torch.full((2, 5, 2), math.nan), weight, nothing, **call).loss
    torch.testing.assert_close(loss.detach(), torch.tensor(math.log(2)))
    assert bool((torch.autograd.grad(loss, weight)[0] == 0).all())


@given(batches(names=["sigmoid"], hows=["batched"]))
@examples(150)
def test_swapping_the_sides_flips_the_margin(batch):
    b = len(batch.ref) // 2
    call = {**batch.call, "reduction": "none", "deterministic": True}
    sided = ("hidden", "targets", "ref_hidden", "ref_logps", "ref_token_logps", "temperature")
    swapped = {k: x.roll(b, 0) if k in sided and torch.is_tensor(x) else x for k, x in call.items()}
    one, other = linear_preference_loss(**call), linear_preference_loss(**swapped)
    for chosen, rejected in (("chosen_logps", "rejected_logps"), ("chosen_rewards", "rejected_rewards")):
        assert_same_bits(getattr(one, chosen), getattr(other, rejected))
        assert_same_bits(getattr(one, rejected), getattr(other, chosen))
    margin = one.chosen_rewards - one.rejected_rewards
    torch.testing.assert_close(other.loss - one.loss, margin, rtol=1e-5, atol=1e-5)


@given(st.data(), st.sampled_from([*LOSSES]), st.sampled_from([0.1, 0.5]), st.sampled_from([*DTYPES, torch.float64]))
@examples(300)
def test_dpo_loss(data, name, beta, dtype):
    b, size = data.draw(st.sampled_from([0, 1, 2, 15, 16, 17, 33])), data.draw(st.sampled_from([1, 20, 300]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    plain = [(-size * torch.rand(b, generator=generator)).to(dtype) for _ in range(4)]
    logps = [laid(x, data.draw(st.sampled_from(LAYOUTS))) for x in plain]
    sums, exact = [x.requires_grad_() for x in logps[:2]], [x.double().requires_grad_() for x in plain[:2]]
    refs, lengths = [x.double() for x in plain[2:]], torch.randint(1, 30, (2, b), generator=generator)
    call = {"loss_type": LOSSES[name][0], "beta": beta, **LOSSES[name][1]}
    losses, *rewards = dpo_loss(*logps, chosen_lengths=lengths[0], rejected_lengths=lengths[1], **call)
    want = formula(name, *exact, *refs, lengths, beta)
    width = torch.float64 if dtype == torch.float64 else torch.float32
    eps = torch.finfo(width).eps
    slack = 8 * eps * (1 + size) ** (2 if name == "ipo" else 1)  # ipo squares what the others are linear in
    wanted = [want, *(beta * (x - y) for x, y in zip(exact, refs, strict=True))]
    for x, y in zip((losses, *rewards), wanted, strict=True):
        assert x.dtype == width and x.shape == (b,)
        torch.testing.assert_close(x.double(), y, rtol=8 * eps, atol=slack)
    given_ = upstream(b)
    if name == "hinge":  # either slope is right at the kink, where coarse 16-bit sums do land
        given_[(1 - wanted[1] + wanted[2]).abs() < slack] = 0
    got = torch.autograd.grad(losses, sums, given_.to(width), retain_graph=True)
    for x, y in zip(got, torch.autograd.grad(want, exact, given_.double()), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=torch.finfo(dtype).eps, atol=16 * eps * (1 + size) + 2.0**-24)

    order = torch.randperm(b, generator=generator)
    lengths = lengths[:, order]
    moved = dpo_loss(*(x[order] for x in logps), chosen_lengths=lengths[0], rejected_lengths=lengths[1], **call)
    for x, y in zip(moved, (losses, *rewards), strict=True):
        assert_same_bits(x, y[order])
    swapped = dpo_loss(*(logps[i] for i in (1, 0, 3, 2)), beta=beta)
    assert_same_bits(swapped[1], rewards[1])
    assert_same_bits(swapped[2], rewards[0])


def advantages_of(row: dict[str, list], gamma: float, lam: float) -> tuple[list[float], list[float]]:
    """The recursion on Python's floats; a masked step is passed over."""
    next_value, next_advantage = row["bootstrap"], 0.0
    results = [(0.0, 0.0)] * len(row["mask"])
    for t in reversed(range(len(row["mask"]))):
        if row["mask"][t]:
            going = 0.0 if row["dones"][t] else 1.0
            delta = row["rewards"][t] + gamma * going * next_value - row["values"][t]
            next_advantage = delta + gamma * lam * going * next_advantage
            next_value = row["values"][t]
            results[t] = (next_advantage, next_advantage + next_value)
    return [x for x, _ in results], [x for _, x in results]


@given(st.data())
@examples(300)
def test_gae(data):
    b, t = data.draw(st.integers(0, 4)), data.draw(st.sampled_from([15, 16, 17, 63, 64, 65]) | st.integers(0, 40))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    dtype, probability = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    one = data.draw(st.sampled_from([torch.bool, torch.uint8, torch.int64, torch.float32]))
    discounts = {k: data.draw(st.sampled_from([0.0, 0.9, 1.0])) for k in ("gamma", "lam")}
    rewards, values = torch.randn(2, b, t, generator=generator).to(dtype)
    if data.draw(st.booleans()):
        values = values[:, :1].expand(b, t)
    mask = torch.rand(b, t, generator=generator) < probability
    dones = torch.rand(b, t, generator=generator) < 0.2
    args = {"rewards": rewards, "values": values, "bootstrap": torch.randn(b, generator=generator).to(dtype)}
    given_ = {k: laid(x, data.draw(st.sampled_from(LAYOUTS))) for k, x in args.items()}
    given_["rewards"][~mask] = math.nan  # never read
    given_["values"][~mask] = math.nan
    given_ |= {"mask": laid(3 * mask.to(one), "transposed"), "dones": laid(dones.to(one), "steps")}
    args |= {"mask": mask, "dones": dones}
    for name, neutral in {"mask": True, "dones": False, "bootstrap": 0.0}.items():
        if data.draw(st.booleans()) and (name != "mask" or probability == 1.0):
            del given_[name]
            args[name] = torch.full_like(args[name], neutral)
    got = gae(**given_, **discounts)
    rows = [{k: x[i].tolist() for k, x in args.items()} for i in range(b)]
    for ours, which in zip(got, (0, 1), strict=True):
        want = torch.tensor([advantages_of(row, **discounts)[which] for row in rows], dtype=torch.float64).view(b, t)
        allowed = 8 * EPS * (1 + want.abs().sum(1, keepdim=True))
        assert ours.dtype == torch.float32 and bool(((ours.double() - want).abs() <= allowed).all())
        assert bool((ours[~args["mask"]] == 0).all())

    twice = {k: 2 * x if k in ("rewards", "values", "bootstrap") else x for k, x in given_.items()}
    for x, y in zip(gae(**twice, **discounts), got, strict=True):
        assert_same_bits(x, 2 * y)
    for i in range(b):  # alone, and without a batch
        for x, y in zip(gae(**{k: x[i] for k, x in given_.items()}, **discounts), got, strict=True):
            assert_same_bits(x, y[i])
