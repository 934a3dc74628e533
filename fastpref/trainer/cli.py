"""The `fastpref` command: `fastpref dpo|plan|bench|doctor ...`, also as `python -m fastpref`.

Each command is a module with `main(argv) -> exit code`, imported only when it is called.
"""

import difflib
import dis
import importlib
import sys
from collections.abc import Sequence
from importlib.util import find_spec

TRAIN = ("transformers", "accelerate", "datasets", "peft", "matplotlib", "tqdm", "yaml")
COMMANDS = {  # name: module, what it needs beyond fastpref's own requirements, one line
    "sft": ("fastpref.trainer.sft", TRAIN, "teach a model to answer as examples do; without options, a demo"),
    "reward": ("fastpref.trainer.reward", TRAIN, "train a reward model on preference pairs; without options, a demo"),
    "dpo": (
        "fastpref.trainer.dpo",
        TRAIN,
        "tune a model on preference pairs (DPO and its relatives); without options, a demo",
    ),
    "kto": ("fastpref.trainer.kto", TRAIN, "tune a model on answers labelled good or bad; without options, a demo"),
    "ppo": ("fastpref.trainer.ppo", TRAIN, "tune a model on a reward (PPO): four roles on one set of base weights"),
    "grpo": ("fastpref.trainer.grpo", TRAIN, "the same without a critic: GRPO, RLOO and their relatives"),
    "pairs": ("fastpref.trainer.pairs", TRAIN, "make preferences: sample, score, keep the best and the worst"),
    "eval": ("fastpref.trainer.eval", TRAIN, "a model beside its reference: loss, accuracy, win rate, KL, best of n"),
    "plan": ("fastpref.trainer.plan_table", (), "what the head of a model costs: passes, FLOPs, memory, beside peers"),
    "bench": (
        "fastpref.benchmarks.cli",
        (),
        "time, memory and accuracy of the head and GAE beside others",
    ),
    "doctor": ("fastpref.trainer.doctor", (), "versions, devices and backends of this machine, and why not"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of `fastpref ARGV...`: 0, or 1 for a refusal at run time, 2 for a wrong command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        print(f"fastpref: unknown command {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""), file=sys.stderr)
        print(usage(), file=sys.stderr)
        return 2
    module, needs, _ = COMMANDS[name]
    missing = [package for package in needs if find_spec(package) is None]
    if missing:
        print(f"fastpref {name}: {', '.join(missing)} missing; run: pip install 'fastpref[train]'", file=sys.stderr)
        return 1
    try:
        return importlib.import_module(module).main(rest)
    except (ArithmeticError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        # our own refusals are whole sentences; an error from anywhere else needs its traceback
        if not _raised_by_us(error):
            raise
        print(f"fastpref {name}: {str(error).removeprefix(f'{name}: ')}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fastpref: interrupted", file=sys.stderr)
        return 130


def usage() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  fastpref {name:{width}}  {meaning}" for name, (_, _, meaning) in COMMANDS.items()]
    return "\n".join(["usage:", *lines, f"  fastpref {'COMMAND --help':{width}}  its options"])


def _raised_by_us(error: BaseException) -> bool:
    """By a `raise` of ours, that is, and not by a line that went wrong."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or not last.tb_frame.f_globals.get("__name__", "").startswith("fastpref."):
        return False
    return last.tb_frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
