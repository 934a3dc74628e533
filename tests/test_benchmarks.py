"""The benchmarks at tiny shapes: every row asked for is there, fastpref's are right, nobody's is made up."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastpref.benchmarks import (
    _losses,
    _measure,
    _peers,
    ablation,
    accuracy,
    check,
    gae,
    gae_gpu,
    head,
    memory,
    memory_cpu,
    readme,
    scaling,
    selective,
    tables,
)
from fastpref.benchmarks._inputs import MODELS, Shape, batch
from fastpref.benchmarks._peers import CONTENDERS, Contender, load, naive_logps
from fastpref.benchmarks._settings import Settings, sizes
from fastpref.benchmarks.cli import MODULES, SUITES, parser, settings_of
from fastpref.trainer import cli

ROOT = Path(__file__).parents[1]
CONTRACT, EAGER = {"bfloat16": 3e-3, "float32": 3e-6}, {"bfloat16": 0.05, "float32": 1e-5}
TINY = Settings(shapes=(Shape(32, 1003),), pairs=2, length=12, rounds=2, contenders=("fastpref", "naive", "cce"))


def test_head_has_a_row_for_each_loss_head_dtype_and_contender(monkeypatch):
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", None)  # as if it were not installed
    found = head.run(TINY.but(losses=("score", "dpo", "ppo")))
    assert len(found) == (1 + 2 * 2) * 2 * 3  # a score has no head to train
    for row in found:
        if row["contender"] == "cce":
            assert "cut_cross_entropy" in row["reason"]
            continue
        reference, trained = row["loss"] in ("dpo", "kto"), row["head"] == "trained"
        assert row["bare_products"] == (1 if row["loss"] == "score" else 2 + trained) + reference
        assert row["bare_flops"] == row["bare_products"] * 2 * 24 * 32 * 1003
        assert row["tokens"] == 24 and row["tokens_per_s"] == pytest.approx(24 / row["seconds"])
        assert row["seconds"] > 0 and row["bare_s"] > 0 and row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        assert ("d_weight_error" in row) == trained and ("d_hidden_error" in row) == (row["loss"] != "score")
        # the eager step is another computation of the same number
        allowed = (CONTRACT if row["contender"] == "fastpref" else EAGER)[row["dtype"]]
        assert row.get("d_hidden_error", 0.0) <= allowed and row.get("d_weight_error", 0.0) <= allowed
        assert row["positions"] == (24 if row["contender"] == "fastpref" else 48)
        assert row["torch"] and row["device"] and row["threads"] >= 1 and row["commit"]


def test_a_wrong_answer_is_not_timed(monkeypatch):
    def halved(hidden, weight, targets):
        return naive_logps(hidden, weight, targets) * 0.5

    monkeypatch.setitem(CONTENDERS, "naive", lambda: Contender(halved))
    (row,) = head.run(TINY.but(losses=("sft",), heads=("frozen",), dtypes=(torch.float32,), contenders=("naive",)))
    assert row["reason"].startswith("wrong: loss_error") and "seconds" not in row
    monkeypatch.setitem(CONTENDERS, "fastpref", lambda: Contender(halved))
    with pytest.raises(_measure.WrongAnswer):
        head.run(TINY.but(losses=("sft",), heads=("frozen",), dtypes=(torch.float32,), contenders=("fastpref",)))


@pytest.mark.parametrize("loss", _losses.LOSSES)
def test_truth_is_autograd_in_float64(loss):
    inputs = batch(Shape(8, 50), 2, 6, torch.float64, sampled=True)
    hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    ref = naive_logps(inputs.ref_hidden, inputs.ref_weight, inputs.targets).sum(-1)
    value = _losses.LOSSES[loss].of(naive_logps(hidden, weight, inputs.targets), inputs, ref)
    value.backward()
    true = head.truth(loss, inputs)
    assert true.loss == pytest.approx(float(value.detach()), rel=1e-12)
    torch.testing.assert_close(true.d_hidden, hidden.grad.flatten(0, 1)[inputs.live], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(true.d_weight, weight.grad.float(), rtol=1e-5, atol=1e-8)


def test_peers_that_need_a_gpu_say_so():
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    for name in ("liger-ce", "cce-exact", "quack", "verl-triton"):
        if name == "cce-exact":
            pytest.importorskip("cut_cross_entropy")
        with pytest.raises(_measure.Absent, match="for GPUs"):
            load(name)


def test_a_batch_fits_the_machine_and_keeps_the_models_head():
    for name in MODELS:
        shape = Shape.parse(name)
        pairs, length = sizes(shape, Settings())
        assert shape.model == name and pairs >= 1 and length >= 32
    assert sizes(Shape.parse("SmolLM2-135M"), Settings()) == (4, 256)
    assert sizes(Shape.parse("Gemma-3-12B"), Settings())[1] < 256
    with pytest.raises(ValueError, match="SmolLM2-135M"):
        Shape.parse("SmolLM2")


def test_the_longest_sequence_is_found_to_an_eighth():
    asked = []

    def fits(n):
        asked.append(n)
        return n <= 1000

    found, bounded = memory.longest(fits, lambda n: False)
    assert not bounded and 875 <= found <= 1000 and len(asked) <= 10
    assert memory.longest(lambda n: True, lambda n: n >= 128) == (128, True)
    assert memory.longest(lambda n: False, lambda n: False) == (0, False)


def test_memory_of_the_fused_head_lets_a_longer_sequence_in():
    settings = TINY.but(shapes=(Shape(16, 20011),), dtypes=(torch.float32,), contenders=("fastpref", "naive"))
    ours, naive = memory.run(settings.but(memory_gib=0.04))
    longest = ours.get("length", ours.get("at_least", 0))
    assert ours["extra_MiB"] <= 41 and (longest > naive.get("length", 0) or "reason" in naive)


def test_ablation_predicts_before_it_measures(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setitem(ablation.BACKBONES, True, (8, 72))
    found = {
        row["contender"]: row
        for row in ablation.run(TINY.but(quick=True, pairs=4, length=96, shapes=(Shape(8, 2003),)))
    }
    assert {name: round(row["predicted"], 2) for name, row in found.items() if name != "exponentials"} == {
        "stored": 1.33,
        "declared": 1.33,
        "rows": 1.5,
        "rows, all": 2.0,
        "padding": 1.38,
        "shared prompt": 1.3,
    }
    assert found["exponentials"]["predicted"] > 1
    assert all(row["seconds"] > 0 and row["ratio_min"] <= row["ratio"] for row in found.values())
    verdicts = [ablation.judged(2.0, {"ratio": ratio})["verdict"] for ratio in (1.5, 1.7, 2.3, 2.5)]
    assert verdicts == ["missed", "met", "met", "missed"]


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder in place of the committed results, with the rows of one run."""
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    monkeypatch.setattr(readme, "MODEL", "32x1003")
    table = _measure.Table("memory", (), _peers.PACKAGES, tmp_path / "bench_cpu.jsonl")
    head.run(TINY.but(losses=("dpo", "ppo"), json=tmp_path / "bench_cpu.jsonl"))
    table.add({"contender": "naive", "model": "32x1003", "dtype": "bfloat16", "at_least": 512})
    return tmp_path


def test_readmes_table_is_made_of_the_rows(results, monkeypatch):
    rows = [json.loads(line) for line in (results / "bench_cpu.jsonl").read_text().splitlines()]
    bf16, fp32 = [r for r in rows if (r["contender"], r.get("loss"), r.get("head")) == ("fastpref", "dpo", "trained")]
    text = readme.replaced(f"# x\n{readme.BEGIN}\nold\n{readme.END}\nrest\n")
    (line,) = [line for line in text.splitlines() if line.startswith("| **fastpref**")]
    assert f"| {bf16['seconds']:.3f} | {bf16['ratio']:.2f} |" in line
    (other,) = [line for line in text.splitlines() if line.startswith("| 32x1003, float32 |")]
    assert f"| **{fp32['ratio']:.2f}**, eager " in other
    assert "| eager PyTorch |" in text and "over 512" in text and "On a GPU: not measured." in text
    assert text.startswith("# x\n") and text.endswith("\nrest\n") and "old" not in text
    assert readme.replaced(text) == text


def test_readme_says_what_the_results_say():
    text = (ROOT / "README.md").read_text()
    assert readme.replaced(text) == text, "run: python -m fastpref.benchmarks.readme"
    assert tables.page(readme.committed()) == (readme.RESULTS / "README.md").read_text()


def test_selective_has_the_gradient_that_is_written_over_the_logits(monkeypatch):
    monkeypatch.delitem(selective.CONTENDERS, "naive-compiled")
    monkeypatch.setitem(selective.LOGITS, "cpu", 2**17)
    found = selective.run(TINY.but(quick=True, dtypes=(torch.float32,)))
    ours = [row for row in found if row["contender"].startswith("fastpref")]
    assert [row["pass"] for row in ours] == ["forward"] * 2 + ["forward and backward"] * 2
    assert all(row["logps_error"] <= 2e-6 and row.get("d_logits_error", 0) <= 3e-6 and row["ratio"] > 0 for row in ours)
    assert ours[3]["extra_MiB"] < ours[2]["extra_MiB"]  # in place


def test_tables_show_the_latest_row_and_who_is_absent(results):
    text = tables.page([{**row, "commit": "abc"} for row in readme.committed()] + readme.committed())
    assert "**loss dpo, head trained, model 32x1003, dtype float32, inputs peaked**; " in text and "abc" not in text
    assert text.count("\n| fastpref |") == 8 and text.count("| cce | not measured: No module") in (0, 8)
    assert "| naive | 512 |" in text  # of the memory suite: at least


def test_slope():
    assert scaling.slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


def test_check_names_what_became_worse():
    row = {"kernel": "amx", "threads": 2, "loss": "dpo", "head": "trained", "model": "M", "dtype": "bfloat16"}
    key = check.key({**row, "ratio": 1.0})
    assert check.worse([{**row, "ratio": 1.2}], {key: 1.0}) == []
    assert check.worse([{**row, "ratio": 1.3}], {key: 1.0}) == [f"{key}: 1.30, was 1.00, more than 25% worse"]


def test_check_passes_nothing_for_being_unknown(monkeypatch, tmp_path, capsys):
    row = {"kernel": "amx", "threads": 2, "loss": "dpo", "head": "trained", "model": "M", "dtype": "bfloat16"}
    monkeypatch.setattr(check.head, "run", lambda settings: [{**row, "ratio": 1.2}])
    monkeypatch.setattr(check, "BASELINE", tmp_path / "baseline.json")
    (tmp_path / "baseline.json").write_text("{}")
    assert check.main() == 1 and "has no baseline" in capsys.readouterr().out
    monkeypatch.setattr(check, "measured", lambda: {check.key(row): 1.2})
    assert check.main(["--update"]) == 0 and check.main() == 0
    (tmp_path / "baseline.json").write_text(json.dumps({check.key(row): 0.9}))
    assert check.main() == 1 and "was 0.90, more than 25% worse" in capsys.readouterr().out


def test_baseline_is_of_ratios_that_were_measured():
    baseline = json.loads(check.BASELINE.read_text())
    assert baseline and baseline == check.measured(), "run: python -m fastpref.benchmarks.check --update"


def test_a_planted_regression_makes_the_check_red(monkeypatch, tmp_path, capsys):
    calls = []

    def clock(bare, call, rounds, longest, warm):  # counts the work in place of timing it
        calls.clear()
        call()
        return {"seconds": 1.0, "ratio": float(len(calls))}

    step, times = CONTENDERS["fastpref"]().step("ppo"), 4

    def steps(inputs):
        return torch.stack([(calls.append(1), step(inputs))[1] for _ in range(times)]).mean()

    monkeypatch.setitem(CONTENDERS, "fastpref", lambda: Contender(None, {"ppo": steps}))
    monkeypatch.setattr(head, "against", clock)
    monkeypatch.setattr(check, "WHAT", TINY.but(losses=("ppo",), contenders=("fastpref",), dtypes=(torch.float32,)))
    monkeypatch.setattr(check, "BASELINE", tmp_path / "baseline.json")
    check.BASELINE.write_text(json.dumps({check.key(row): row["ratio"] for row in head.run(check.WHAT)}))
    times = 5
    assert check.main() == 0
    times = 6
    assert check.main() == 1 and "6.00, was 4.00, more than 25% worse" in capsys.readouterr().out


def test_who_takes_too_long_is_named_and_not_called_again(monkeypatch):
    calls = []

    def slow(*given):
        calls.append(1)
        return naive_logps(*given)

    monkeypatch.setattr(head, "SLOWEST", 0.0)
    monkeypatch.setitem(CONTENDERS, "naive", lambda: Contender(slow))
    found = head.run(TINY.but(losses=("sft",), dtypes=(torch.float32,), contenders=("naive",)))
    assert len(calls) == 1 and [row["reason"][:24] for row in found] == ["not timed: a step took 0"] * 2
    assert found[1]["reason"].endswith("in an earlier table") and "seconds" not in found[0]


def test_quick_asks_each_peer_once_and_waits_for_nobody_slow_twice(monkeypatch):
    def ratio(bare, call, *_, **__):
        return {"seconds": 1.0, "ratio": 4.0}

    monkeypatch.setattr(head, "against", ratio)
    for name in CONTENDERS:
        monkeypatch.setitem(CONTENDERS, name, lambda: Contender(naive_logps))
    found = head.run(TINY.but(quick=True, losses=("dpo",), dtypes=(torch.float32,), contenders=None))
    first, later = ([row["contender"] for row in found if row["head"] == kind] for kind in ("trained", "frozen"))
    assert set(first) == {*CONTENDERS} - {*_peers.SECOND, "liger-ce", "quack"} and later == ["fastpref", "naive"]


def test_run_cpu_refuses_a_part_that_it_has_not():
    script = ROOT / "benchmarks" / "run_cpu.sh"
    found = subprocess.run(["bash", str(script), "heads"], capture_output=True, text=True)
    assert found.returncode == 2 and "parts are head fp32 wide" in found.stderr


def test_command_writes_rows_and_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    options = "--shape 32x1003 --pairs 1 --length 8 --rounds 2 --dtype float32 --contenders fastpref naive"
    options += " --loss dpo --head trained"
    files = ["--json", str(tmp_path / "rows.jsonl"), "--plot", str(tmp_path / "plot.png")]
    assert cli.main(["bench", "head", *options.split(), *files]) == 0
    found = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["contender"] for row in found] == ["fastpref", "naive"] and found[0]["benchmark"] == "head"
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert "bound: 4 products" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["heads"], "suites must be of head"),
        (["--shape", "12"], "shape must be HxV"),
        (["--device", "cuda"], "no CUDA"),
    ],
)
def test_command_refuses(arguments, words, capsys):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has one")
    assert cli.main(["bench", *arguments]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_can_be_run(name):
    assert callable(importlib.import_module(f"fastpref.benchmarks.{MODULES.get(name, name)}").run)


def test_quick_asks_for_less():
    quick, whole = (settings_of(parser().parse_args(words)) for words in (["--quick"], []))
    assert quick.quick and quick.rounds < whole.rounds and len(quick.losses) < len(whole.losses)


def test_importing_fastpref_leaves_the_benchmarks_alone():
    code = "import sys, fastpref; print([name for name in sys.modules if name.startswith('fastpref.benchmarks')])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("contender", ["actor", "roles"])
def test_memory_ppo_compares_steps_on_as_many_tokens(tmp_path, contender):
    for name in ("transformers", "accelerate", "peft"):
        pytest.importorskip(name)
    from fastpref.benchmarks import memory_ppo
    from tests._online import make_tiny

    model = str(make_tiny(tmp_path) / "model")
    memory_ppo.save_reward(model, tmp_path / "reward")
    row = memory_ppo.step(contender, model, "adamw_torch", tmp_path)
    assert row["tokens"] == 8 * (5 + 32)
    assert 100 < row["peak_MiB"] < 10_000


def test_memory_cpu(tmp_path):
    # 1,024 completion tokens of 16,003 logits: a chunk of 31 MiB in bf16
    options = "--shape 32x16003 --pairs 4 --length 256 --rounds 1 --head trained --workspace 64 --json"
    memory_cpu.main([*options.split(), str(tmp_path / "rows")])
    found = {row["contender"]: row for row in map(json.loads, (tmp_path / "rows").read_text().splitlines())}
    ours, naive = found["fastpref 64"], found["naive"]
    assert 0.8 * ours["chunk_MiB"] <= ours["resident_MiB"] <= ours["planned_MiB"] + 16
    assert ours["resident_MiB"] < naive["resident_MiB"] / 4
    assert set(found) == {"fastpref 64", "fastpref 64 max", "naive"}
    assert naive["ratio"] > 0 and "planned_MiB" not in naive


def test_accuracy():
    for row in accuracy.run(TINY.but(quick=True, contenders=("fastpref", "naive"))):
        if row["contender"] == "fastpref":
            assert row["rms"] <= 1e-5 and row["sum"] <= 1e-3
            assert max(row["d_hidden_error"], row["d_weight_error"]) <= CONTRACT[row["dtype"]]
        elif row["dtype"] == "bfloat16":
            assert row["rms"] > 1e-3  # logits rounded to bf16: the measure sees it


def test_gae_against_the_loops_of_others(tmp_path, monkeypatch):
    for name in gae.UNMASKED:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    gae.main(["--shapes", "8x40", "--rounds", "2", "--json", str(tmp_path / "rows.jsonl")])
    found = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(found) == len(gae.MASKS) * len(gae.CONTENDERS)
    reasons = {(row["contender"], row["mask"]): row["reason"] for row in found if "reason" in row}
    absent = {(name, masks) for name in gae.UNMASKED for masks in gae.MASKS}
    assert set(reasons) == {("OpenRLHF", "random"), *absent}
    for row in found:
        if "reason" not in row:
            assert row["error"] <= 1e-6 and row["us"] > 0 and row["ratio_min"] <= row["ratio"] <= row["ratio_max"]


def test_a_wrong_gae_is_not_timed(monkeypatch):
    monkeypatch.setitem(gae.CONTENDERS, "verl", lambda *given: lambda: [1.001 * x for x in gae._verl(*given)])
    (row,) = (r for r in gae.tabulate([(4, 20)], ["none"], "cpu", 1, None) if r["contender"] == "verl")
    assert row["reason"].startswith("wrong: error") and "us" not in row


@pytest.mark.parametrize("masks", ["none", "completions"])
@pytest.mark.parametrize("name", gae.UNMASKED)
def test_gae_of_who_knows_no_mask(name, masks):
    pytest.importorskip("pufferlib._C" if name == "pufferlib" else name)
    assert gae.measure(name, gae.case(8, 40, masks, "cpu"), masks, 1)["error"] <= gae.ALLOWED


def test_an_episode_ends_with_its_last_live_step():
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]]).bool()
    assert gae.ends(torch.zeros(2, 4), mask).tolist() == [[False, False, True, False], [False, False, False, True]]
    assert gae.ends(torch.zeros(2, 4), None)[:, -1].all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_gae_gpu_says_that_there_is_no_device(capsys):
    assert gae_gpu.main([]) == 1
    assert "gae_gpu: fastpref._cuda is not usable here" in capsys.readouterr().err
