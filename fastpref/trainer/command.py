"""What `fastpref RECIPE ARGV...` does: options from YAML and words, then the recipe."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import transformers
from accelerate import PartialState

from fastpref.trainer.config import as_command, given_options

# what a recipe does with neither a model nor a dataset: minutes on two cores, and the held-out loss falls
DEMO: dict[str, Any] = {
    "max_steps": 60,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-5,
    "max_length": 128,
    "gradient_checkpointing": False,
    "test_split_size": 96,
    "logging_steps": 5,
    "save_steps": 20,
    "save_total_limit": 1,
}


def run_command(
    options: Any,
    train: Callable[[Any], Any],
    argv: Sequence[str],
    *,
    description: str,
    demo: Mapping[str, Any] | None = None,
) -> int:
    """Trains with the options that the command line gives; returns 0.

    Args:
        options: the recipe's dataclass.
        description: its first line is shown by `--help`.
        demo: what differs from DEMO, whose options hold where neither a model nor a dataset is given and the line does
            not say otherwise; None: there is no demo.
    """
    name = f"fastpref {options.recipe}"
    given = given_options(options, argv, prog=name, description=description.partition("\n")[0])
    if demo is None or given.keys() & {"model_name_or_path", "dataset_name"}:
        chosen = options(**given)
    else:
        chosen = options(**{**DEMO, **demo, **given})
        PartialState().print(f"demo      {as_command(name, chosen)}")
    transformers.utils.logging.disable_progress_bar()  # ours is the one to watch
    train(chosen)
    return 0
