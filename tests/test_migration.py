"""The migration page, fastpref/integrations/README.md: each "after" gives the loss and gradients of its "before".

The peers are not imported: what their calls compute is written out here, in fp32 on whole logits.
"""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

PAGE = (Path(__file__).parents[1] / "fastpref/integrations/README.md").read_text()
SECTIONS = {
    part.splitlines()[0]: re.findall(r"```python\n(.*?)```", part, flags=re.DOTALL) for part in PAGE.split("\n## ")[1:]
}


def tensors():
    """(what the snippets read, the leaves)."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 7, 12, generator=generator), torch.randn(31, 12, generator=generator)
    targets = torch.randint(31, (4, 7), generator=generator)
    targets[:, :2] = -100
    targets[3] = -100  # no token of this one counts
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    given = {"hidden": hidden, "weight": weight, "targets": targets, "F": F, "torch": torch}
    given |= {"ref_hidden": hidden.detach() + 0.3, "ref_weight": weight.detach() * 1.1}
    given["ref_logps"] = sums(given["ref_hidden"], given["ref_weight"], targets)
    given["old_logps"] = token_logps(hidden, weight, targets, 0.9)[0].detach() + torch.randn(4, 7, generator=generator)
    given["advantages"] = torch.randn(4, 7, generator=generator)
    given["class_weights"] = torch.rand(31, generator=generator)
    return given, leaves


def token_logps(hidden, weight, targets, temperature=1.0):
    every = (hidden @ weight.T / temperature).log_softmax(-1)
    live = targets != -100
    logps = torch.where(live, every.gather(-1, targets.clamp(min=0)[..., None])[..., 0], 0.0)
    return logps, -(every.exp() * every).sum(-1)


def sums(hidden, weight, targets):
    return token_logps(hidden, weight, targets)[0].sum(-1).detach()


class LigerFusedLinearDPOLoss:
    def __init__(self, beta):
        self.beta = beta

    def __call__(self, weight, hidden, targets, *, ref_input, ref_weight):
        chosen, rejected = (
            token_logps(hidden, weight, targets)[0].sum(-1) - sums(ref_input, ref_weight, targets)
        ).chunk(2)
        return -F.logsigmoid(self.beta * (chosen - rejected)).mean(), None


class FusedLinearForPPO:
    def __call__(self, hidden, weight, input_ids, temperature):
        return token_logps(hidden, weight, input_ids, temperature)


class cut_cross_entropy:  # stands for the module
    @staticmethod
    def linear_cross_entropy(hidden, weight, targets, softcap):
        return F.cross_entropy((softcap * torch.tanh(hidden @ weight.T / softcap)).flatten(0, 1), targets.flatten())


def compute_policy_loss(old_logps, logps, advantages, mask, cliprange, loss_agg_mode, clip_ratio_c=3.0):
    assert loss_agg_mode == "seq-mean-token-mean"
    ratio = (logps - old_logps).exp()
    clipped = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange))
    losses = torch.where(advantages < 0, torch.minimum(clipped, -advantages * clip_ratio_c), clipped)
    lengths = mask.sum(-1)
    return ((losses * mask).sum(-1) / lengths.clamp(min=1)).sum() / (lengths > 0).sum(), None


PEERS = {x.__name__: x for x in (LigerFusedLinearDPOLoss, FusedLinearForPPO, cut_cross_entropy, compute_policy_loss)}


def result(code):
    given, leaves = tensors()
    names = {**given, **PEERS}
    exec(code, names)
    return names["loss"], torch.autograd.grad(names["loss"], leaves)


@pytest.mark.parametrize(
    "section, number", [(name, n) for name in SECTIONS if name != "TRL 1.16" for n in range(1, len(SECTIONS[name]))]
)
def test_after_is_before(section, number):
    before, after = SECTIONS[section][0], SECTIONS[section][number]
    (want, d_want), (got, d_got) = result(before), result(after)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for x, y in zip(d_got, d_want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    assert all(code.count("\n") <= 6 for code in (before, after))


def test_trl(tmp_path):
    if not pytest.importorskip("trl").__version__.startswith("1.16."):
        pytest.skip("the trainers are called as TRL 1.16 has them")
    import datasets
    import transformers
    import trl

    from tests.test_trl_integration import PAIRS, V, tokenizer

    sizes = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, **special)
    ).save_pretrained(tmp_path)
    options = {
        "max_steps": 2,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
    }
    losses = []
    for code in SECTIONS["TRL 1.16"]:
        names = {
            "DPOTrainer": trl.DPOTrainer,
            "model": transformers.AutoModelForCausalLM.from_pretrained(tmp_path),
            "args": trl.DPOConfig(output_dir=str(tmp_path), **options),
            "dataset": datasets.Dataset.from_list(PAIRS),
            "tokenizer": tokenizer(),
        }
        exec(code, names)
        losses.append([row["loss"] for row in names["trainer"].state.log_history if "loss" in row])
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], abs=1e-5)
