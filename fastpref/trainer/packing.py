"""Batches without padding, in which the completions of a prompt share one copy of it.

    row        prompt  chosen  rejected  prompt  chosen ...
    position   0 1 2   3 4 5   3 4       0 1     2 ...

Every completion reads its prompt and itself, never its neighbours, so each token's state is what it is in a run of that
sequence alone: a prompt is passed through once instead of twice, and nothing is spent on padding. The attention is
SDPA, branch by branch, registered with transformers under the name "fastpref"; there is no mask over the row. Where
dropout is on, completions share what it drops of their prompt.

    reason = enable_packing(model)           # None, or why this model cannot; it is then as it was
    batch = pack(sequences).to(device)       # [(prompt_ids, completion_ids), ...]
    head = partial(linear_preference_loss, ref_logps=ref_logps)
    through_rows(model, batch, head).loss.backward()
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fastpref.integrations.transformers import decoder_of

NAME = "fastpref"


class Branches(NamedTuple):
    """The next tokens of a row: a prompt's, then those of its completions, one after the other."""

    prompt: int
    completions: tuple[int, ...]


class Packed(NamedTuple):
    """What the model reads, and what its head is to predict: sequence s has targets cu_seqlens[s] to [s + 1] - 1."""

    inputs: dict[str, Tensor]  # (1, N) int64: input_ids, attention_mask, position_ids
    targets: Tensor  # (M,) int64, the tokens of the completions
    rows: Tensor  # (M,) int64, which of the N hidden states predicts each
    cu_seqlens: Tensor  # (S + 1,) int32
    branches: tuple[Branches, ...]

    def to(self, device: torch.device) -> "Packed":
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        targets, rows, cu_seqlens = (x.to(device) for x in (self.targets, self.rows, self.cu_seqlens))
        return Packed(inputs, targets, rows, cu_seqlens, self.branches)


def pack(sequences: Sequence[tuple[list[int], list[int]]], *, share: bool = True) -> Packed:
    """S sequences, (ids of a prompt, which may be empty, ids of its completion), in one row without padding.

    Targets are in the order of the sequences. A prompt's last state predicts the first token of its completion; without
    a prompt, nothing does.

    share: one copy of a prompt for all its completions.
    """
    if not sequences:
        raise ValueError("pack: sequences must hold at least one; got none")
    if not all(completion for _, completion in sequences):
        raise ValueError("pack: sequences must have completions of at least one token; got an empty one")
    of_prompt: dict[object, list[int]] = {}
    for s, (prompt, _) in enumerate(sequences):
        of_prompt.setdefault(tuple(prompt) if share and prompt else s, []).append(s)

    ids: list[int] = []
    positions: list[int] = []
    branches = []
    targets: list[list[int]] = [[] for _ in sequences]
    rows: list[list[int]] = [[] for _ in sequences]
    for members in of_prompt.values():
        start, prompt = len(ids), sequences[members[0]][0]
        n = len(prompt)
        branches.append(Branches(n, tuple(len(sequences[s][1]) for s in members)))
        ids += prompt
        positions += range(n)
        for s in members:
            completion = sequences[s][1]
            own = range(len(ids), len(ids) + len(completion) - 1)  # the row of each of its tokens predicts the next
            targets[s] = completion if n else completion[1:]
            rows[s] = [start + n - 1, *own] if n else [*own]
            ids += completion
            positions += range(n, n + len(completion))
    inputs = {
        "input_ids": torch.tensor([ids]),
        # all ones and not None: transformers would look for sequences in the positions, and build a mask of them
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "position_ids": torch.tensor([positions]),
    }
    bounds = torch.tensor([*accumulate(map(len, targets), initial=0)], dtype=torch.int32)
    flat_targets, flat_rows = (torch.tensor([*chain.from_iterable(x)], dtype=torch.long) for x in (targets, rows))
    return Packed(inputs, flat_targets, flat_rows, bounds, tuple(branches))


def through_rows(model: Any, batch: Packed, head: Callable[..., Any], **options: Any) -> Any:
    """What a model under `fused_lm_head` returns for head(hidden (N, H), weight, targets, rows=, cu_seqlens=, ...)."""

    def on_rows(hidden: Tensor, weight: Tensor, **found: Any) -> Any:
        places = {"rows": batch.rows, "cu_seqlens": batch.cu_seqlens}
        return head(hidden.flatten(0, 1), weight, batch.targets, **places, **options, **found)

    with _packed_as(batch.branches):
        return model(**batch.inputs, head=on_rows)


# Read where a forward makes its attention mask, once: the mask itself then goes from layer to layer, into the
# recomputations of a checkpoint too
_branches: ContextVar[tuple[Branches, ...]] = ContextVar("fastpref_branches", default=())


@contextlib.contextmanager
def _packed_as(branches: tuple[Branches, ...]) -> Iterator[None]:
    token = _branches.set(branches)
    try:
        yield
    finally:
        _branches.reset(token)


@dataclass(frozen=True)
class BranchMask:
    """What attends to what in a packed row: stands where transformers has a (B, 1, T, T) tensor."""

    branches: tuple[Branches, ...]
    window: int | None  # a token attends to itself and to the window - 1 tokens before it
    _masks: dict[tuple[int, int, torch.device], Tensor] = field(default_factory=dict, repr=False)

    def causal(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """(rows, columns) bool: the last `rows` queries of a sequence of `columns` keys."""
        key = rows, columns, device
        if key not in self._masks:
            ones = torch.ones(rows, columns, dtype=torch.bool, device=device)
            mask = ones.tril(columns - rows)
            self._masks[key] = mask if self.window is None else mask.triu(columns - rows - self.window + 1)
        return self._masks[key]


def _mask(**arguments: Any) -> BranchMask | Tensor | None:
    """transformers asks for an attention mask."""
    if not (branches := _branches.get()):
        return sdpa_mask(**arguments)
    return BranchMask(branches, _window(arguments["mask_function"], arguments.get("local_size")))


def _window(allows: Callable[..., Tensor], local_size: int | None) -> int | None:
    """The sliding window, None without one; a ValueError if what a token attends to is anything else."""
    length = 2 * (local_size or 8)
    q, kv = torch.tensor([[length // 2], [length - length // 4], [length - 1]]), torch.arange(length)[None]
    zero = torch.zeros((), dtype=torch.long)
    causal = (kv <= q) if local_size is None else (kv <= q) & (kv > q - local_size)
    if not torch.equal(allows(zero, zero, q, kv).broadcast_to(causal.shape), causal):
        raise ValueError("packing: a token must attend to all tokens before it or to a sliding window of them")
    return local_size


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BranchMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """(B, T, heads, head size) of query (B, heads, T, head size); key and value may have fewer heads."""
    if isinstance(attention_mask, BranchMask):
        attend = partial(_attend, dropout=dropout, scaling=scaling, softcap=softcap)
        return _by_branch(attend, query, key, value, attention_mask).transpose(1, 2).contiguous(), None
    if softcap is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)
    found = _attend(query, key, value, attention_mask, dropout=dropout, scaling=scaling, softcap=softcap)
    return found.transpose(1, 2).contiguous(), None


def _by_branch(attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, mask: BranchMask) -> Tensor:
    # split and not sliced: the gradient of a slice is as long as the row
    sizes = [n for prompt, (first, *others) in mask.branches for n in (prompt + first, *others)]
    parts = zip(*(x.split(sizes, dim=2) for x in (query, key, value)), strict=True)
    found = []
    for prompt, (first, *others) in mask.branches:
        whole = next(parts)
        wide = mask.window is not None and prompt + first > mask.window
        found.append(attend(*whole, mask.causal(prompt + first, prompt + first, query.device) if wide else None))
        q_prompt, k_prompt, v_prompt = (x[:, :, :prompt] for x in whole)
        for n in others:
            q, k, v = next(parts)
            keys, values = torch.cat((k_prompt, k), dim=2), torch.cat((v_prompt, v), dim=2)
            wide = mask.window is not None and prompt + n > mask.window
            if not wide and (query.is_cuda or prompt < n // 2):
                # SDPA's causal kernels are square: the prompt's queries once more, which they are fast enough for
                found.append(attend(torch.cat((q_prompt, q), dim=2), keys, values, None)[:, :, prompt:])
            else:
                found.append(attend(q, keys, values, mask.causal(n, prompt + n, query.device)))
    return torch.cat(found, dim=2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """(B, heads, Q, head size); mask (Q, K) or (B, 1, Q, K) bool, None: causal, K = Q (or Q = 1, which sees all K)."""
    groups = query.shape[1] // key.shape[1]
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=groups > 1
        )
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scale / softcap))
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # a padded row may see nothing at all
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return F.dropout(weights, dropout) @ value


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


def packs(model: Any) -> bool:
    """Whether `enable_packing` was told None."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None) == NAME


def enable_packing(model: Any) -> str | None:
    """None: the model now reads what `pack` makes. Else the reason why it cannot, and it is as it was.

    Found out by running both ways on a few tokens: a state-space model carries one answer into the next, others ignore
    the attention interface or the position ids.

    model: a transformers causal LM, or a PeftModel around one, not yet wrapped by DDP or FSDP2, its parameters whole.
    """
    if packs(model):
        return None
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = causal_lm.config._attn_implementation
    if before not in ("sdpa", "eager"):
        return f"its attention is {before}, and packing is by SDPA"
    if any(p.is_meta or type(p).__name__ == "DTensor" for p in causal_lm.parameters()):
        return "its parameters are not here to try it"
    training = [module for module in causal_lm.modules() if module.training]
    causal_lm.eval()
    try:
        why = _differs(causal_lm, before)
    # whatever the code of a model raises at a mask that is no tensor, it means the same
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    finally:
        for module in training:
            module.training = True
    if why is not None:
        causal_lm.set_attn_implementation(before)
    return why


@torch.no_grad()
def _differs(causal_lm: Any, before: str) -> str | None:
    """None, or what differs between the two ways to run a few tokens."""
    embedding = causal_lm.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)

    def tokens(n: int) -> list[int]:
        return torch.randint(embedding.shape[0], (n,), generator=generator).tolist()

    prompts: list[list[int]] = [tokens(5), tokens(3), []]
    sequences = [(prompt, tokens(n)) for n in (3, 1, 6) for prompt in prompts if prompt or n > 1]
    packed = pack(sequences).to(embedding.device)

    def states() -> Tensor:
        """Of each sequence alone, those that predict something."""
        found = []
        for prompt, completion in sequences:
            ids = torch.tensor([prompt + completion], device=embedding.device)
            found.append(decoder_of(causal_lm)(input_ids=ids, use_cache=False)[0][0, max(len(prompt), 1) - 1 : -1])
        return torch.cat(found).float()

    expected = states()
    causal_lm.set_attn_implementation(NAME)
    if causal_lm.config._attn_implementation != NAME:
        return "it does not take its attention from transformers' attention interface"
    eps = max(torch.finfo(x.dtype).eps for x in (embedding, next(causal_lm.parameters())))
    allowed = max(1e-4, 8 * eps) * expected.norm()
    if not (states() - expected).norm() <= allowed:
        return f"its {before} attention is not SDPA's"
    with _packed_as(packed.branches):
        found = decoder_of(causal_lm)(**packed.inputs, use_cache=False)[0].flatten(0, 1)
    if not (found[packed.rows].float() - expected).norm() <= allowed:
        return "its states of a packed row are not those of its sequences"
    return None
