"""Log-probabilities of a reference kept on disk: which model and tokens they are of, and that they are used."""

import copy
import resource

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft

from fastpref import __version__
from fastpref.trainer import dpo
from fastpref.trainer.metrics import read_metrics
from fastpref.trainer.reference import LogpsCache, fingerprint
from tests._trainer import TWO_PROCESSES, make_tiny, run_command
from tests.test_fused_lm_head import tiny

SEQUENCES = [([1, 2], [3]), ([1], [2, 3]), ([], [1, 2, 3]), ([1, 2], [3, 4])]
LOGPS = torch.tensor([-1.5, -2.25, -3.125, -0.1], dtype=torch.float64)


def test_fingerprint_is_of_weights_and_configuration():
    model = tiny("llama")
    found = fingerprint(model)
    assert fingerprint(copy.deepcopy(model)) == found
    for name, parameter in model.named_parameters():
        other = copy.deepcopy(model)
        with torch.no_grad():
            changed = other.get_parameter(name).view(-1)
            changed[-1] = torch.nextafter(changed[-1], torch.tensor(torch.inf))
        assert fingerprint(other) != found, name
        assert parameter.dtype == torch.float32
    assert fingerprint(copy.deepcopy(model).bfloat16()) != found
    other = copy.deepcopy(model)
    other.config.rms_norm_eps *= 2
    assert fingerprint(other) != found


def test_fingerprint_leaves_adapters_out():
    model = tiny("llama")
    found = fingerprint(model)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert fingerprint(peft.get_peft_model(model, config)) == found


def test_cache_gives_back_what_it_was_given(tmp_path):
    cache = LogpsCache(tmp_path / "new", "model", "no")
    assert cache.get(SEQUENCES).isnan().all()
    cache.put(SEQUENCES[:3], LOGPS[:3])
    for one in (cache, LogpsCache(tmp_path / "new", "model", "no")):
        assert one.get(SEQUENCES[:3]).equal(LOGPS[:3])
        assert one.get(SEQUENCES[3:]).isnan().all()
    for other in (LogpsCache(tmp_path / "new", "another", "no"), LogpsCache(tmp_path / "new", "model", "bf16")):
        assert other.get(SEQUENCES).isnan().all()


def test_two_runs_at_once_keep_both(tmp_path):
    one, two = (LogpsCache(tmp_path, "model", "no") for _ in range(2))
    one.put(SEQUENCES[:2], LOGPS[:2])
    two.put(SEQUENCES[2:], LOGPS[2:])
    assert LogpsCache(tmp_path, "model", "no").get(SEQUENCES).equal(LOGPS)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"no zip" * 99])
def test_damaged_file_is_said_and_written_anew(tmp_path, capsys, damage):
    LogpsCache(tmp_path, "model", "no").put(SEQUENCES, LOGPS)
    path = tmp_path / f"model-no-{__version__}.npz"
    path.write_bytes(damage(path.read_bytes()))
    cache = LogpsCache(tmp_path, "model", "no")
    assert "cannot be read" in capsys.readouterr().err
    assert cache.get(SEQUENCES).isnan().all()
    cache.put(SEQUENCES, LOGPS)
    assert LogpsCache(tmp_path, "model", "no").get(SEQUENCES).equal(LOGPS)


def test_a_full_disk_is_said_and_what_was_kept_stays(tmp_path, capsys):
    """A limit on the size of a file stands for the disk."""
    LogpsCache(tmp_path, "model", "no").put(SEQUENCES[:1], LOGPS[:1])
    cache = LogpsCache(tmp_path, "model", "no")
    more = [([i], [i]) for i in range(2000)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        cache.put(more, torch.arange(2000.0, dtype=torch.float64))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "fastpref: reference log-probabilities cannot be kept in " in capsys.readouterr().err
    assert cache.get(more[-1:]).tolist() == [1999.0]
    assert LogpsCache(tmp_path, "model", "no").get(SEQUENCES[:2])[0] == LOGPS[0]
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_whose_cache_cannot_be_written_goes_on_in_every_process(tmp_path):
    make_tiny(tmp_path)
    (tmp_path / "kept").write_text("a file where a folder is wanted")  # permissions would not stop root
    sources = {"model_name_or_path": str(tmp_path / "model"), "dataset_name": str(tmp_path / "pairs.jsonl")}
    small = {"max_steps": 1, "per_device_train_batch_size": 4, "test_split_size": 8, "logging_steps": 1}
    kept = {"cache_ref_log_probs": str(tmp_path / "kept"), "output_dir": str(tmp_path / "run")}
    shown = run_command(dpo.DPOOptions(**small, **sources, **kept), launcher=TWO_PROCESSES)
    assert "cannot be kept in " in shown
    assert read_metrics(tmp_path / "run/metrics.jsonl")[-1]["step"] == 1


def test_second_run_scores_no_reference(tmp_path, monkeypatch, capsys):
    make_tiny(tmp_path)
    scored = []
    logps_of = dpo.linear_logps
    monkeypatch.setattr(dpo, "linear_logps", lambda *a, **o: scored.append(1) or logps_of(*a, **o))

    def run(name, **given):
        scored.clear()
        small = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "test_split_size": 16}
        sources = {"model_name_or_path": str(tmp_path / "model"), "dataset_name": str(tmp_path / "pairs.jsonl")}
        kept = {"cache_ref_log_probs": str(tmp_path / "kept"), "output_dir": str(tmp_path / name)}
        dpo.train(dpo.DPOOptions(**{**small, **sources, **kept, **given}))
        return read_metrics(tmp_path / name / "metrics.jsonl"), len(scored)

    first, passes = run("first")
    assert passes > 0
    assert "known from an earlier run" not in capsys.readouterr().out
    second, passes = run("second")
    assert passes == 0
    assert second == first
    shown = capsys.readouterr().out
    assert "reference 16 of 16 are known from an earlier run" in shown
    assert "reference 12 of 12 are known from an earlier run" in shown
    # some more pairs, the first of which are known
    assert run("longer", max_steps=5)[1] > 0
    assert "reference 12 of 20 are known from an earlier run" in capsys.readouterr().out
    # a model that has been trained is another one
    assert run("tuned", model_name_or_path=str(tmp_path / "first" / "model"))[1] > 0
    assert run("without", cache_ref_log_probs=False)[1] > 0
