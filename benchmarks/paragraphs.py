"""README's tables and sentences of single runs: the trainer, TRL's trainers with our head, one real batch, GAE.

Each takes the committed rows of one benchmark and gives Markdown, "" without rows; `readme` puts them in their place.
"""

from collections.abc import Callable, Sequence

from fastpref.benchmarks._measure import Row

TRAINERS = {  # contender of trainer_trl.py: its name in README
    "trl": "TRL's DPOTrainer",
    "fastpref": "**fastpref**, its defaults",
    "selective": "`--gradient_checkpointing selective`",
    "known-reference": "the reference known from an earlier run",
    "no-checkpoints": "`--gradient_checkpointing false`",
    "adafactor": "`--optim adafactor`",
    "prompts-twice": "a prompt read for each answer",
    "padded": "rows padded, too",
    "prompts-in-head": "prompt tokens scored, too",
    "logits": "logits, by eager PyTorch",
}
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


def all_of(rows: Sequence[Row]) -> list[str]:
    made: dict[str, Callable[[Sequence[Row]], str]] = {
        "trainer_trl": trainer,
        "integration_trl": integration,
        "smollm2_head": one_batch,
        "gae": gae,
    }
    found = {name: [row for row in rows if row["benchmark"] == name] for name in made}
    return [make(found[name]) for name, make in made.items() if found[name]]


def grid(cells: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its heading."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (cells[0], ["---"] * len(cells[0]), *cells[1:]))


def made_at(rows: Sequence[Row]) -> str:
    return ", ".join(dict.fromkeys(row["commit"] for row in rows))


def trainer(rows: Sequence[Row]) -> str:
    found = {(row["contender"], row["dtype"]): row for row in rows}
    dtypes = [dtype for dtype in DTYPES if any(key[1] == dtype for key in found)]
    headings = [f"{DTYPES[dtype]}: {what}" for dtype in dtypes for what in ("s a step", "peak, GB")]
    lines = [["DPO, SmolLM2-135M", *headings]]
    for contender, name in TRAINERS.items():
        cells = [name]
        for dtype in dtypes:
            row = found.get((contender, dtype))
            cells += [f"{row['whole_step_s']:.1f}", f"{row['peak_GB']:.2f}"] if row else ["", ""]
        if any(cells[1:]):
            lines.append(cells)
    steps = len(rows[0]["losses"])
    about = (
        f"Steps of `fastpref dpo` beside TRL {rows[0]['trl']}'s: real chat pairs, 2 a step, at most 1,024 tokens, "
        "AdamW, the same order; below our defaults what one choice changes. Seconds hold the reference, which a later "
        f"run finds on disk. {steps} steps each; `python benchmarks/trainer_trl.py --steps {steps}`, {made_at(rows)}."
    )
    if len(dtypes) == 2:
        ours, theirs = (
            abs(found[name, "bfloat16"]["last_loss"] - found[name, "float32"]["last_loss"])
            for name in ("fastpref", "trl")
        )
        about += (
            f" In fp32 the losses differ by at most {found['fastpref', 'float32']['loss_difference']:.1e}; in bf16 our "
            f"last one is {ours:.1e} from fp32's, TRL's {theirs:.1e}."
        )
    return f"{grid(lines)}\n\n{about}"


def integration(rows: Sequence[Row]) -> str:
    found = {(row["trainer"], "fastpref" in row["contender"]): row for row in rows}
    parts = []
    for name in dict.fromkeys(row["trainer"] for row in rows):
        without, within = found[name, False], found[name, True]
        parts.append(
            f"{name} {without['seconds']:.2f} s a step and {within['seconds']:.2f}, "
            f"{without['added_MiB']:,.0f} MiB added and {within['added_MiB']:,.0f}"
        )
    apart = max(row["curve_error"] for row in rows)
    return (
        f"TRL {rows[0]['trl']}'s own trainers on SmolLM2-135M in fp32, without our head and with it: "
        f"{'; '.join(parts)}. Every number that both log agrees to {apart:.1e}; `python benchmarks/integration_trl.py "
        f"--steps {rows[0]['steps']}`, {made_at(rows)}."
    )


def one_batch(rows: Sequence[Row]) -> str:
    lines = [["8 real pairs", "dtype", "loss error", "gradient error", "memory, MiB", "time, s"]]
    for row in rows:
        errors = [f"{row[key]:.1e}" for key in ("head_loss_error", "head_gradient_error")]
        lines.append(
            [row["contender"], DTYPES[row["dtype"]], *errors, f"{row['extra_MiB']:,.0f}", f"{row['median_s']:.2f}"]
        )
    about = (
        f"A DPO step of SmolLM2-135M's head on {rows[0]['tokens']} completion tokens among {rows[0]['positions']} "
        "positions. Errors are relative to fp64, memory is what the resident set grew by, with the gradients returned; "
        f"`python benchmarks/smollm2_head.py`, {made_at(rows)}."
    )
    return f"{grid(lines)}\n\n{about}"


def gae(rows: Sequence[Row]) -> str:
    shapes = dict.fromkeys(row["shape"] for row in rows if "ratio" in row)
    shape = next(iter(shapes))
    here = {(row["mask"], row["contender"]): row for row in rows if row["shape"] == shape and "ratio" in row}
    whole = here["none", "fastpref"]
    peers = [
        f"{name} {row['us'] / whole['us']:,.0f}"
        for (mask, name), row in here.items()
        if mask == "none" and "fastpref" not in name
    ]
    ours = [(mask, row) for (mask, name), row in here.items() if name == "fastpref"]
    masks = [f"{mask} {row['us']:.0f} us, {row['ratio']:.1f}" for mask, row in ours]
    return (
        f"`gae`, {shape.replace('x', ' rows of ')} steps, by mask: {'; '.join(masks)} times what torch.add takes to "
        f"stream as many bytes ({whole['ratio_min']:.1f} to {whole['ratio_max']:.1f} over rounds without a mask). "
        f"Times as long without a mask: {', '.join(peers)}. `fastpref bench gae`, {made_at(rows)}."
    )
