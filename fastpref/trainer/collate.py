"""Token ids to tensors: what a causal LM reads of a batch, and what its head is to predict."""

from collections.abc import Sequence

import torch
from torch import Tensor

IGNORE_INDEX = -100
PromptAndCompletion = tuple[list[int], list[int]]  # ids of a prompt and of its completion


def collate(sequences: Sequence[PromptAndCompletion], pad_token_id: int) -> dict[str, Tensor]:
    """int64 tensors (S, T) of S sequences prompt + completion, padded on the right to the longest.

        input_ids: prompt + completion, then pad_token_id.
        attention_mask: 1 on the sequence, 0 on the padding.
        targets: targets[i, t] = input_ids[i, t + 1] where position t + 1 is completion, else -100.

    Raises:
        ValueError: no sequences. TypeError: pad_token_id is not an int.
    """
    if not isinstance(pad_token_id, int):
        raise TypeError(
            f"collate: pad_token_id must be an int; got {pad_token_id!r} "
            "(a tokenizer without a pad token can pad with its EOS)"
        )
    if not sequences:
        raise ValueError("collate: sequences must hold at least one; got none")
    longest = max(len(prompt) + len(completion) for prompt, completion in sequences)
    input_ids = torch.full((len(sequences), longest), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    targets = torch.full_like(input_ids, IGNORE_INDEX)
    for i, (prompt, completion) in enumerate(sequences):
        ids = torch.tensor(prompt + completion)
        start = max(len(prompt), 1)  # nothing predicts the first token of all
        input_ids[i, : len(ids)] = ids
        attention_mask[i, : len(ids)] = 1
        targets[i, start - 1 : len(ids) - 1] = ids[start:]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "targets": targets}
