"""The command line: options from YAML and words, commands, plan and doctor."""

import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest
import torch

from fastpref import plan
from fastpref.trainer import cli, plan_table
from fastpref.trainer.config import as_command, convert, given_options, option, read_yaml


@dataclass(kw_only=True)
class Options:
    learning_rate: float = option(1e-6, "how far 100 % of a step goes")
    name: str | None = option(None, "a name", alias="n")
    steps: int = option(10, "how many")
    bf16: bool = option(False, "whether")
    loss: str | list[str] = option("sigmoid", "one or more")
    strategy: Literal["no", "steps"] = option("no", "when")
    resume: bool | str = option(False, "from where")


def given(*words, **file):
    return given_options(Options, words, prog="fastpref it", description="does it")


def refusal(capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        given(*words)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_texts_keep_their_ends():
    shown = as_command("fastpref it", Options(name="runs/v1.0", learning_rate=2.0))
    assert shown == "fastpref it --learning_rate 2 --name runs/v1.0"


def test_only_what_was_given_is_returned():
    assert given() == {}
    assert given("--steps", "3", "--bf16", "--n", "x") == {"steps": 3, "bf16": True, "name": "x"}


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--learning-rate", "5e-6"], {"learning_rate": 5e-6}),
        (["--learning_rate=5e-6"], {"learning_rate": 5e-6}),
        (["--bf16", "false"], {"bf16": False}),
        (["--bf16", "True"], {"bf16": True}),
        (["--bf16", "N"], {"bf16": False}),
        (["--name", "none"], {"name": None}),
        (["--name", "None"], {"name": None}),
        (["--loss", "sigmoid"], {"loss": "sigmoid"}),
        (["--loss", "sigmoid", "sft"], {"loss": ["sigmoid", "sft"]}),
        (["--resume"], {"resume": True}),
        (["--resume", "False"], {"resume": False}),
        (["--resume", "runs/checkpoint-5"], {"resume": "runs/checkpoint-5"}),
        (["--strategy", "steps"], {"strategy": "steps"}),
    ],
)
def test_words_become_values(words, value):
    found = given(*words)
    assert found == value
    assert [type(x) for x in found.values()] == [type(x) for x in value.values()]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lerning_rate", "1"], "unknown option '--lerning_rate'; did you mean 'learning_rate'?"),
        (["--learn", "1"], "unknown option '--learn'"),  # an abbreviation changes its meaning when options are added
        (["--stepz", "1", "--warm", "2"], "unknown options '--stepz' (did you mean 'steps'?), '--warm': --help lists"),
        (["--learning_rate", "fast"], "learning_rate: wanted a number; got 'fast'"),
        (["--steps", "1.5"], "steps: wanted a whole number; got '1.5'"),
        (["--bf16", "maybe"], "bf16: wanted true or false; got 'maybe'"),
        (["--strategy", "always"], "strategy: wanted one of no, steps; got 'always'"),
    ],
)
def test_wrong_words_are_refused(capsys, words, message):
    assert message in refusal(capsys, *words)


def test_yaml_is_read_and_the_line_overrides_it(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("learning_rate: 5e-6\nsteps: 7\nloss: [sigmoid, sft]\nname: null\nbf16: true\n")
    found = given("--config", str(file), "--steps", "8")
    # YAML 1.1 reads 5e-6 as text
    assert found == {"learning_rate": 5e-6, "steps": 8, "loss": ["sigmoid", "sft"], "name": None, "bf16": True}


def test_yaml_takes_aliases_and_a_bare_no(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("n: x\nstrategy: no\n")
    assert read_yaml(Options, file) == {"name": "x", "strategy": "no"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "unknown option 'stepz'; did you mean 'steps'?"),
        ("q: x", "unknown option 'q'; one of learning_rate, name"),
        ("stepz: 3\nq: x\nsteps: a\nn: x", "unknown options 'stepz' (did you mean 'steps'?), 'q': --help lists"),
        ("stepz: 3\nsteps: a\nbf16: 2", "steps: wanted a whole number; got 'a'; bf16: wanted true or false; got 2"),
        ("n: x\nname: y", "name is given by both its names"),
        ("strategy: true", "strategy: wanted one of no, steps; got True"),
        ("steps: [3]", "steps: wanted a whole number; got [3]"),
        ("steps: true", "steps: wanted a whole number; got True"),
        ("- steps", "wanted one `option: value` a line; got list"),
        ("steps: {", "not YAML"),
    ],
)
def test_wrong_yaml_is_refused_with_its_file(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as refused:
        read_yaml(Options, file)
    assert message in str(refused.value)


def test_a_config_that_is_not_there(capsys, tmp_path):
    assert "No such file" in refusal(capsys, "--config", str(tmp_path / "none.yaml"))


def test_the_equivalent_command_reads_back():
    options = Options(learning_rate=5e-6, bf16=True, loss=["a", "b"], name="two words")
    command = as_command("fastpref it", options)
    assert command.endswith("--learning_rate 5e-06 --name 'two words' --bf16 true --loss a b")
    import shlex

    assert Options(**given(*shlex.split(command)[2:])) == options


def test_convert_keeps_the_order_of_a_union():
    assert convert("x", "true", bool | str) is True
    assert convert("x", "path", bool | str) == "path"


def test_help_shows_meaning_and_default(capsys):
    with pytest.raises(SystemExit):
        given("--help")
    out = " ".join(capsys.readouterr().out.split())
    assert "--learning_rate RATE how far 100 % of a step goes (1e-06)" in out
    assert "--name NAME, --n NAME a name (none)" in out


def test_commands_are_listed(capsys):
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    assert cli.main(["dop"]) == 2
    shown = capsys.readouterr()
    assert "fastpref: unknown command 'dop'; did you mean 'dpo'?" in shown.err
    assert all(f"  fastpref {name} " in text for text in shown for name in ("dpo", "plan", "doctor"))


def test_a_missing_extra_is_named_with_its_line(capsys, monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "peft" else object())
    assert cli.main(["dpo"]) == 1
    assert capsys.readouterr().err == "fastpref dpo: peft missing; run: pip install 'fastpref[train]'\n"


def test_our_refusals_are_one_line_and_other_errors_keep_their_traceback(capsys, monkeypatch):
    assert cli.main(["plan"]) == 1
    assert capsys.readouterr().err == "fastpref plan: give model_name_or_path, or hidden_size and vocab_size\n"
    monkeypatch.setattr(plan_table, "table", lambda options: int("not ours"))
    with pytest.raises(ValueError, match="not ours"):
        cli.main(["plan", "--hidden_size", "8", "--vocab_size", "100"])


def test_the_command_line_is_light():
    """Neither help nor the list of commands waits for transformers."""
    code = "import sys; from fastpref.trainer import cli; cli.main(['--help']); print('transformers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.endswith("False\n")


def test_module_is_the_command():
    found = subprocess.run([sys.executable, "-m", "fastpref", "plam"], capture_output=True, text=True)
    assert found.returncode == 2
    assert "did you mean 'plan'?" in found.stderr


def test_plan_shows_our_plan_and_the_formulas(capsys):
    sizes = ["--hidden_size", "64", "--vocab_size", "1000", "--max_length", "128", "--prompt_length", "28"]
    assert (
        cli.main(["plan", *sizes, "--per_device_train_batch_size", "2", "--dtype", "float32", "--device", "cpu"]) == 0
    )
    out = capsys.readouterr().out
    ours = plan(400, 64, 1000, dtype=torch.float32, trainable_head=True, couples="pair")
    assert "400 of 512 scored" in out
    assert f"why {ours.passes} passes: {ours.why}" in out
    rows = {line.split("  ")[0]: line for line in out.splitlines() if line}
    assert f"{ours.peak_bytes / 2**20:.3g} MiB" in rows["fastpref"]
    assert f"{12 * 512 * 1000 / 2**20:.3g} MiB" in rows["eager"]  # 12 bytes a logit, prompt included
    assert f"{4 * 2 * 400 * 64 * 1000 / 1e6:.3g} MFLOP" in rows["TRL"]  # four passes over what is scored
    assert "formula, not measured" in " ".join(out.split())


def test_plan_of_a_frozen_head_is_cheaper():
    of = {"hidden_size": 64, "vocab_size": 1000, "device": "cpu"}
    shown = [plan_table.table(plan_table.PlanOptions(**of, use_peft=frozen)) for frozen in (False, True)]
    assert "trained, bfloat16 on cpu" in shown[0]
    assert "frozen, bfloat16 on cpu" in shown[1]
    assert "why 2 passes: frozen head" in shown[1]


def test_plan_names_the_folder_that_is_not_there():
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"^plan: no configuration to be had from '/nowhere' \(no such folder\)"):
        plan_table.head_sizes(plan_table.PlanOptions(model_name_or_path="/nowhere"))


def test_plan_reads_a_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.LlamaConfig(hidden_size=64, vocab_size=777).save_pretrained(tmp_path)
    options = plan_table.PlanOptions(model_name_or_path=str(tmp_path))
    assert plan_table.head_sizes(options) == (64, 777)
    assert "head 777 x 64" in plan_table.table(options)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "give model_name_or_path, or hidden_size and vocab_size"),
        (
            {"hidden_size": 1, "vocab_size": 1, "prompt_length": 1024},
            r"prompt_length must be in \[0, max_length=1024\)",
        ),
        ({"hidden_size": 1, "vocab_size": 1, "per_device_train_batch_size": 0}, "must be at least 1; got 0"),
        ({"hidden_size": "wide", "vocab_size": 1}, "^plan: hidden_size: wanted a whole number or none; got 'wide'"),
    ],
)
def test_plan_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        plan_table.PlanOptions(**wrong)


def test_doctor_reports_versions_and_every_backend(capsys):
    from fastpref import kernels

    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert f"{torch.get_num_threads()} torch threads" in out
    for backend, state in kernels.status().items():
        assert f"  {backend:<12}{state}\n" in out
