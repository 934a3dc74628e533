"""Hidden states of SmolLM2-135M-Instruct over film critics' quotes, both fetched on first use: see trainer/demo.py."""

from typing import Any

import torch
from torch import Tensor

from fastpref.benchmarks._inputs import Batch, Shape, exact_logps, head_weight

SHAPE = Shape.parse("SmolLM2-135M")


def _model() -> tuple[Any, Any]:
    """(model in fp32, its tokenizer)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastpref.trainer.demo import demo_model

    folder = demo_model()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def running_text(n: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden (S, length, H), weight, targets (S, length)) in fp32: n tokens of quotes, one after the other."""
    from fastpref.trainer.demo import demo_pairs

    model, tokenizer = _model()
    ids: list[int] = []
    for row in demo_pairs()[0]:
        if len(ids) > n:
            break
        ids += tokenizer(row["prompt"] + row["chosen"] + row["rejected"] + "\n")["input_ids"]
    tokens = torch.tensor(ids[: n + 1])
    inputs, targets = tokens[:-1].view(-1, length), tokens[1:].view(-1, length)
    with torch.no_grad():
        hidden = model.base_model(inputs).last_hidden_state
    return hidden, model.get_output_embeddings().weight.detach(), targets


def pairs_of_quotes(pairs: int, dtype: torch.dtype, seed: int = 0) -> Batch:
    """Chosen and rejected quotes behind their prompts, padded; the reference is the policy moved by 5 %, as in batch().

    Old log-probs are the policy's own, moved by 0.1.
    """
    from fastpref.trainer.collate import collate
    from fastpref.trainer.data import sequences_of, tokenize_pairs
    from fastpref.trainer.demo import demo_pairs

    model, tokenizer = _model()
    rows, _ = tokenize_pairs(demo_pairs()[0][:pairs], tokenizer)
    inputs = collate(sequences_of(rows), tokenizer.pad_token_id)
    targets = inputs.pop("targets")
    with torch.no_grad():
        hidden = model.base_model(**inputs).last_hidden_state
    generator = torch.Generator().manual_seed(seed)
    weight = model.get_output_embeddings().weight.detach()
    noise = torch.randn(hidden.shape, generator=generator) * hidden.norm(dim=-1, keepdim=True) / SHAPE.hidden**0.5
    ref_weight = weight + 0.05 * weight.norm(dim=1).mean() * head_weight(SHAPE, generator)
    hidden_states, head = hidden.to(dtype), weight.to(dtype)
    old = exact_logps(hidden_states, head, targets) + 0.1 * torch.randn(targets.shape, generator=generator)
    return Batch(
        hidden_states,
        head,
        targets,
        (hidden + 0.05 * noise).to(dtype),
        ref_weight.to(dtype),
        old.float(),
        torch.randn(len(targets), generator=generator),
        torch.randn(targets.shape, generator=generator),
    )
