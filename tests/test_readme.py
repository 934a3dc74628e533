"""README's Python runs as it stands, one block after the other, on a model of a few thousand parameters."""

import re
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_blocks_run() -> None:
    blocks = BLOCK.findall(README.read_text(encoding="utf-8"))
    assert len(blocks) >= 2
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(61, (4, 7), generator=generator)
    names = {
        "model": LlamaForCausalLM(config),
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "completion_mask": (torch.arange(7) >= 3).expand(4, 7),
        "hidden": torch.randn(4, 7, 16, generator=generator, requires_grad=True),
        "weight": torch.randn(61, 16, generator=generator, requires_grad=True),
    }
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md, block {number + 1}", "exec"), names)
    for trained in (*names["model"].parameters(), names["hidden"], names["weight"]):
        assert trained.grad is not None and bool(trained.grad.isfinite().all()) and bool((trained.grad != 0).any())
