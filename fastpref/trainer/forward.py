"""From token ids through a causal LM to a loss: the fused head runs inside the model's own forward."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpref.integrations.transformers import HeadOutput
from fastpref.trainer.collate import IGNORE_INDEX, PromptAndCompletion, collate
from fastpref.trainer.metrics import Tally
from fastpref.trainer.packing import pack, packs, through_rows
from fastpref.trainer.run import Run
from fastpref.trainer.start import padding_id


def through_head(
    run: Run, model: Any, sequences: Sequence[PromptAndCompletion], head: Callable[..., Any]
) -> tuple[Any, Tensor | None]:
    """(what `head` returned, the router loss of a mixture of experts whose config asks for it, else None).

    head: called as head(hidden, weight, targets, **options): what the `linear_*` functions take. The targets that are
        not -100 are those of the sequences in their order; a model that packs has no others.
    """
    if packs(run.bare_model):
        batch = pack(sequences).to(run.accelerator.device)
        return _with_aux_loss(through_rows(model, batch, head, **run.options.head_options))
    padded = collate(sequences, padding_id(run.tokenizer))
    inputs = {name: tensor.to(run.accelerator.device) for name, tensor in padded.items()}
    given = {"targets": inputs.pop("targets"), **run.options.head_options}
    return _with_aux_loss(
        model(**inputs, head=lambda hidden, weight, **options: head(hidden, weight, **given, **options))
    )


def _with_aux_loss(found: Any) -> tuple[Any, Tensor | None]:
    return (found.result, found.aux_loss) if isinstance(found, HeadOutput) else (found, None)


def tallied(
    run: Run,
    tally: Tally,
    loss: Tensor,
    metrics: dict[str, Tensor],
    aux_loss: Tensor | None,
    *,
    share: float,
    weight: float,
    items: float | None = None,
    **weights: float,
) -> Tensor:
    """The loss with the router's, if there is one; it and the metrics of its batch go to the tally.

    share: what `loss` is of the batch's mean: 1, or its items over those of the whole step; 0 where it has none.
    weight: what the metrics are means over; weights: those of the metrics that are means over something else.
    items: what the loss is a mean over; None: weight.
    """
    if aux_loss is not None:
        loss = loss + share * run.bare_model.config.get_text_config().router_aux_loss_coef * aux_loss
        metrics = {**metrics, "aux_loss": aux_loss}
    weights["loss"] = weight if items is None else items
    tally.add({"loss": loss / share if share else loss, **metrics}, weight, **weights)
    return loss


def rows_of(values: Tensor, counts: Sequence[int], width: int) -> Tensor:
    """(S, width) from values (M,) of S sequences end to end, counts[i] of each; 0 past a sequence's end."""
    rows = values.new_zeros(len(counts), width)
    rows[_inside(counts, width, values.device)] = values
    return rows


def placed(rows: Tensor, counts: Sequence[int], targets: Tensor) -> Tensor:
    """Shaped like targets: the values of `rows_of` where something is predicted, 0 elsewhere."""
    out = torch.zeros(targets.shape, dtype=rows.dtype, device=rows.device)
    out[targets != IGNORE_INDEX] = rows[_inside(counts, rows.shape[1], rows.device)]
    return out


def _inside(counts: Sequence[int], width: int, device: torch.device) -> Tensor:
    return torch.arange(width, device=device) < torch.tensor(counts, device=device)[:, None]
