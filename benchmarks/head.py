"""One step of the head for each loss, as a multiple of the matrix products it cannot avoid; errors and memory.

The bound, by hand: 2 n H V FLOPs a product, n completion tokens (prompt tokens need none), for logits, d_hidden,
d_weight unless the head is frozen, and the logits of the reference where the loss has one; and each product reads the
head or writes its gradient once, s V H bytes. The products are timed as torch.mm into outputs that exist, in the faster
of the inputs' dtype and fp32, right before every timed step: `ratio` is the median of step over products, with the
lowest and highest of the rounds beside it.

Every contender's answer is compared with float64 on the same rounded inputs first, Frobenius and relative for
gradients; one that is off by more than WRONG is not timed. `extra MiB`: torch's allocations alive at once beyond the
inputs, the returned gradients among them. `tokens/s` counts completion tokens. Whose step takes over SLOWEST seconds is
named, and not called again in later tables. With --quick a peer is called in one way, and after the first table who is
compiled before a first call, or slow, is left out.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastpref import plan
from fastpref.benchmarks._inputs import Batch, Exact, Shape, batch, exact, exact_logps, relative_error
from fastpref.benchmarks._losses import LOSSES
from fastpref.benchmarks._measure import (
    MIB,
    Row,
    Table,
    WrongAnswer,
    against,
    allocated,
    bare_products,
    fastest_products,
    or_reason,
)
from fastpref.benchmarks._peers import COMPILED, CONTENDERS, LOSSES_ONLY, PACKAGES, SECOND, gradients, load, value
from fastpref.benchmarks._real import pairs_of_quotes
from fastpref.benchmarks._settings import Settings, sizes

COLUMNS = (
    ("step s", "seconds", ".4f"),
    ("ratio", "ratio", ".2f"),
    ("lowest", "ratio_min", ".2f"),
    ("highest", "ratio_max", ".2f"),
    ("tokens/s", "tokens_per_s", ".0f"),
    ("extra MiB", "extra_MiB", ".0f"),
    ("loss error", "loss_error", ".1e"),
    ("d_hidden", "d_hidden_error", ".1e"),
    ("d_weight", "d_weight_error", ".1e"),
    ("positions", "positions", "d"),
)
# relative error from which it is another loss's, and not rounding: with bf16 logits of 30, off by 0.06, tokens of PPO
# move across the edge of the clip, and gradients by a tenth
WRONG = {torch.float32: 1e-3, torch.float16: 0.3, torch.bfloat16: 0.3}
SLOW = 3  # times its bound: what --quick does not wait for twice, unless it is eager PyTorch
SLOWEST = 20.0  # seconds of one step


@dataclass(frozen=True)
class Case:
    """What all rows of one table share."""

    loss: str
    trained: bool
    inputs: Batch
    true: Exact | None
    bare: Callable[[], None]
    rounds: int
    longest: float  # seconds


def run(settings: Settings) -> list[Row]:
    """A table for each shape, dtype, loss and head; see the module."""
    table = Table("head", COLUMNS, PACKAGES, settings.json)
    left_out = SECOND if settings.quick else ()
    contenders = list(settings.contenders or [name for name in CONTENDERS if name not in left_out])
    for shape in settings.shapes:
        for dtype in settings.dtypes:
            inputs = inputs_of(shape, dtype, settings).to(settings.device)
            for loss in settings.losses:
                true = truth(loss, inputs)
                for head in settings.heads if LOSSES[loss].couples else ("unused",):
                    fill(table, case_of(loss, head == "trained", inputs, true, settings), settings, contenders)
                    if settings.quick:  # one table has them all
                        slow = {row["contender"] for row in table.rows if row.get("ratio", 0) > SLOW} | set(COMPILED)
                        contenders = [name for name in contenders if name in ("fastpref", "naive") or name not in slow]
    return table.rows


def inputs_of(shape: Shape, dtype: torch.dtype, settings: Settings) -> Batch:
    pairs, length = sizes(shape, settings)
    if settings.real:
        return pairs_of_quotes(4 * pairs, dtype)  # they are short
    return batch(shape, pairs, length, dtype, sampled=True)


def truth(loss: str, inputs: Batch) -> Exact:
    """Of the loss and its gradients, in float64."""
    ref = torch.empty(0)
    if LOSSES[loss].reference:
        ref = exact_logps(inputs.ref_hidden, inputs.ref_weight, inputs.targets).sum(-1)
    of = LOSSES[loss].of
    return exact(inputs.hidden, inputs.weight, inputs.targets, lambda logps: of(logps, inputs, ref))


def case_of(loss: str, trained: bool, inputs: Batch, true: Exact | None, settings: Settings) -> Case:
    about = LOSSES[loss]
    (vocab, hidden), n = inputs.weight.shape, len(inputs.live)
    products = partial(
        bare_products,
        n,
        hidden,
        vocab,
        trained,
        about.reference,
        gradients=about.couples is not None,
        device=settings.device,
    )
    bare, _ = fastest_products(inputs.weight.dtype, products)
    return Case(loss, trained, inputs, true, bare, settings.rounds, settings.longest)


def errors(got: tuple[float, list[Tensor]], true: Exact | None, live: Tensor) -> Row:
    """Of the loss, relative where it is above 1, and of the gradients."""
    if true is None:
        return {}
    loss, grads = got
    row = {"loss_error": abs(loss - true.loss) / max(1.0, abs(true.loss))}
    if grads:
        row["d_hidden_error"] = relative_error([grads[0].flatten(0, -2)[live]], [true.d_hidden])
    return row | ({"d_weight_error": relative_error(grads[1:], [true.d_weight])} if len(grads) > 1 else {})


def refuse_wrong(row: Row, dtype: torch.dtype) -> None:
    """Raises WrongAnswer where an error is no rounding error."""
    for key, error in row.items():
        if not error <= WRONG[dtype]:  # NaN too
            raise WrongAnswer(f"{key} {error:.1e}")


def measure(name: str, case: Case) -> Row:
    """The row of one contender: first its answer and memory, then its time."""
    contender = load(name)
    step = contender.step(case.loss)
    call = partial(value, step, case.inputs)
    if LOSSES[case.loss].couples is not None:
        call = partial(gradients, step, case.inputs, case.trained)
    if name in COMPILED:
        call()
    answers: list[tuple[float, list[Tensor]]] = []
    start = time.perf_counter()
    extra = allocated(lambda: answers.append(call()))
    spent = time.perf_counter() - start
    row = errors(answers.pop(), case.true, case.inputs.live)
    refuse_wrong(row, case.inputs.weight.dtype)
    row["extra_MiB"] = extra / MIB
    if spent > SLOWEST:
        return row | {"reason": f"not timed: a step took {spent:.0f} s", "too_slow": True}
    row |= against(case.bare, call, case.rounds, case.longest, warm=True)
    row["positions"] = case.inputs.targets.numel() if contender.all_positions else len(case.inputs.live)
    return row | {"tokens_per_s": len(case.inputs.live) / row["seconds"]}


def describe(case: Case, real: bool) -> Row:
    """What is known of a table before the clock starts."""
    weight, n, loss = case.inputs.weight, len(case.inputs.live), LOSSES[case.loss]
    (vocab, hidden), dtype = weight.shape, weight.dtype
    products = loss.products(case.trained)
    planned = plan(
        n, hidden, vocab, dtype=dtype, trainable_head=case.trained, couples=loss.couples, device=weight.device
    )
    row: Row = {
        "loss": case.loss,
        "head": "unused" if loss.couples is None else "trained" if case.trained else "frozen",
        "model": Shape(hidden, vocab).model,
        "inputs": "real" if real else "peaked",
        "H": hidden,
        "V": vocab,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": n,
        "bare_products": products,
        "bare_flops": products * 2 * n * hidden * vocab,
        "bare_bytes": products * weight.nbytes,
        "passes_planned": planned.passes,
    }
    return row | ({} if case.true is None else {"entropy": case.true.entropy, "gap": case.true.gap})


def fill(table: Table, case: Case, settings: Settings, contenders: Sequence[str] | None = None) -> None:
    """One table: a row for each contender that has this loss."""
    about = describe(case, settings.real)
    title = (
        "{loss}, {head} head, {model}: H {H}, V {V:,}, {dtype}, {tokens:,} completion tokens, {inputs} inputs\n"
        "bound: {bare_products} products, {bare_flops:.2e} FLOP, {bare_bytes:.1e} B of head; "
        "fastpref plans {passes_planned} passes"
    )
    if case.true is not None:
        title += "\nentropy {entropy:.1f} nats, targets up to {gap:.0f} below the maximum"
    table.heading(title.format(**about))
    too_slow = {row["contender"]: row["reason"] for row in table.rows if "too_slow" in row}
    for name in contenders or settings.contenders or CONTENDERS:
        if case.loss not in LOSSES_ONLY.get(name, LOSSES):
            continue
        if name in too_slow:
            table.add({"contender": name, **about, "reason": f"{too_slow[name]} in an earlier table"})
        else:
            table.add({"contender": name, **about, **or_reason(name, partial(measure, name, case))})
