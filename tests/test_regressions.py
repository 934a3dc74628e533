"""Bugs that were, each a test named after what went wrong."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastpref import couples, linear_logps, linear_preference_loss, selective_logps

MIB = 2**20
BACKENDS = ["cpu", "torch"]


def batch(n_pairs, tokens=9, hidden_size=8, vocab_size=4099, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2 * n_pairs, tokens, hidden_size, generator=generator).requires_grad_()
    weight = torch.randn(vocab_size, hidden_size, generator=generator).requires_grad_()
    targets = torch.randint(0, vocab_size, (2 * n_pairs, tokens), generator=generator)
    ref_logps = torch.randn(2 * n_pairs, generator=generator) - 9.0 * tokens
    return hidden, weight, targets, ref_logps


def centred(pairs, *, beta):
    """Couples the batch."""
    return beta * (pairs.chosen_logps - pairs.chosen_logps.mean()).square()


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", centred])
@pytest.mark.parametrize("dead", [[1], [0, 1, 2, 3]])
def test_a_pair_without_live_tokens_was_left_out_of_the_fused_loss(loss_type, dead):
    hidden, weight, targets, ref_logps = batch(4)
    for pair in dead:
        targets[[pair, pair + 4]] = -100
    options = {"loss_type": loss_type, "ref_logps": ref_logps}
    want = linear_preference_loss(hidden, weight, targets, backend="reference", **options).loss
    for head in (weight, weight.detach()):
        for workspace in (MIB, 64 * MIB):
            got = linear_preference_loss(hidden, head, targets, workspace=workspace, **options).loss
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_around_the_fused_loss_rescored_every_chunk_for_each(use_reentrant):
    hidden, weight, targets, ref_logps = batch(16)
    calls = 0

    @couples("pair")
    def counted(pairs, *, beta):
        nonlocal calls
        calls += 1
        return beta * (pairs.chosen_logratios - pairs.rejected_logratios)

    def loss(hidden, weight):
        options = {"loss_type": counted, "ref_logps": ref_logps, "workspace": MIB}
        return linear_preference_loss(hidden, weight, targets, **options).loss

    want = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    once, calls = calls, 0
    assert once > 3  # chunks
    checkpoint(loss, hidden, weight, use_reentrant=use_reentrant).backward()
    assert calls <= 2 * once
    torch.testing.assert_close((hidden.grad, weight.grad), want)


def test_a_learnable_tensor_in_a_loss_silently_got_no_gradient():
    hidden, weight, targets, ref_logps = batch(16)
    scale = torch.nn.Parameter(torch.tensor(2.0))

    @couples("pair")
    def scaled(pairs, *, beta):
        return scale * beta * pairs.chosen_logratios

    options = {"loss_type": scaled, "ref_logps": ref_logps}
    for head, workspace in ((weight, MIB), (weight, 64 * MIB), (weight.detach(), MIB)):  # several chunks, and one
        with pytest.raises(ValueError, match="must depend on nothing learnable but the log-probs"):
            linear_preference_loss(hidden, head, targets, workspace=workspace, **options)
    linear_preference_loss(hidden, weight, targets, reduction="none", **options).loss.mean().backward()
    assert scale.grad.abs() > 0
    with pytest.raises(TypeError, match="beta must be a number; got Parameter"):
        linear_preference_loss(hidden, weight, targets, ref_logps=ref_logps, beta=scale)


def test_the_row_of_target_156_in_uint8_was_read_as_that_of_an_ignored_one():
    """-100 in eight bits."""
    hidden, weight, _, _ = batch(1)
    targets, rows = torch.tensor([156, 3, 156]), torch.tensor([4, 5, 17])
    hidden = hidden.flatten(0, 1)
    assert torch.equal(
        linear_logps(hidden, weight, targets.to(torch.uint8), rows=rows),
        linear_logps(hidden, weight, targets, rows=rows),
    )


def test_one_loss_of_a_list_was_broadcast_over_the_pairs():
    hidden, weight, targets, ref_logps = batch(2)
    losses = ["sigmoid", lambda pairs, *, beta: pairs.chosen_logps.sum()]
    with pytest.raises(ValueError, match=r"must return a tensor of shape \(2,\); got \(\)"):
        linear_preference_loss(hidden, weight, targets, ref_logps=ref_logps, loss_type=losses)


@pytest.mark.parametrize("workspace", [MIB, 64 * MIB])
def test_a_loss_of_nothing_trained_raised_in_forward(workspace):
    hidden, weight, targets, _ = batch(16)
    constant = couples("pair")(lambda pairs, *, beta: torch.ones(pairs.chosen_logps.shape))
    assert linear_preference_loss(hidden, weight, targets, loss_type=constant, workspace=workspace).loss == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_confident_row_lost_its_precision_to_the_rounding_of_its_anchor(backend):
    hidden, weight = torch.tensor([[1.1, 1.3]]), torch.tensor([[30.1, 29.9], [0.0, 0.0], [1.0, 0.0]])
    logits = hidden.double() @ weight.double().T
    want = -torch.log1p((logits[0, 1:] - logits[0, 0]).exp().sum())
    got = linear_logps(hidden, weight, torch.tensor([0]), backend=backend)
    assert want < 0
    torch.testing.assert_close(got.double(), want[None], rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_label_masked_by_the_bias_was_nan_not_minus_infinity(backend):
    hidden, weight = torch.full((2, 4), 3.0, requires_grad=True), torch.full((6, 4), -20.0, requires_grad=True)
    bias = torch.tensor([-math.inf, 0, 1, 2, 3, 4])
    got = linear_logps(hidden, weight, torch.tensor([0, 1]), bias=bias, outputs=["entropy"], backend=backend)
    assert got.logps[0] == -math.inf and got.logps[1].isfinite() and got.entropy.isfinite().all()
    for gradient in torch.autograd.grad(got.logps.sum(), (hidden, weight)):
        assert gradient.isfinite().all()


def test_masked_logits_gave_nan_not_minus_infinity():
    logits = torch.tensor([[-math.inf, 1.0, 2.0], [0.0, -math.inf, -math.inf]], requires_grad=True)
    got = selective_logps(logits, torch.tensor([0, 0]))
    assert got.tolist() == [-math.inf, 0.0]
    (gradient,) = torch.autograd.grad(got[1] + 0 * got[0].detach().clamp(min=-1), logits)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_nan_that_sends_no_gradient_spoilt_the_others(backend, trained):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 8, generator=generator), torch.randn(50, 8, generator=generator)
    hidden[1] = math.nan
    inputs = [hidden.requires_grad_(), weight.requires_grad_()][: 1 + trained]
    got = linear_logps(hidden, weight, torch.tensor([1, 2, 3, -100]), backend=backend)
    upstream = torch.tensor([1.0, 0.0, 2.0, math.nan])
    for gradient in torch.autograd.grad(got, inputs, upstream):
        assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_an_unknown_instruction_set_named_neither_the_variable_nor_the_choices(monkeypatch):
    monkeypatch.setenv("FASTPREF_CPU_ISA", "avx9000")
    with pytest.raises(ValueError, match=r"FASTPREF_CPU_ISA must be one of .*portable on this processor; got avx9000"):
        linear_logps(torch.ones(2, 3), torch.ones(5, 3), torch.tensor([0, 1]))
