"""`fastpref dpo` beside TRL's DPOTrainer: the same pairs in the same order give the same losses, step by step."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("trl")

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from fastpref.trainer.batches import items_of_step
from fastpref.trainer.dpo import DPOOptions, train
from fastpref.trainer.metrics import read_metrics
from tests._trainer import make_tiny

STEPS, PAIRS, SEED = 6, 4, 42


def test_losses_and_margins_of_every_step(tmp_path):
    make_tiny(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()][: STEPS * PAIRS]
    shared = {
        "per_device_train_batch_size": PAIRS,
        "max_steps": STEPS,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "linear",
        "max_length": 12,  # cuts some
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "beta": 0.2,
        "report_to": "none",
    }
    config = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        **shared,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        train_sampling_strategy="sequential",
    )
    theirs = DPOTrainer(model=str(tmp_path / "model"), args=config, train_dataset=Dataset.from_list(rows))
    theirs.train()
    expected = [line for line in theirs.state.log_history if "loss" in line]

    # the recipe draws its order: put the rows where it will look for them
    order = [i for step in range(1, STEPS + 1) for i in items_of_step(step, len(rows), PAIRS, SEED)]
    placed = [row for _, row in sorted(zip(order, rows, strict=True), key=lambda pair: pair[0])]
    (tmp_path / "placed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in placed))
    sources = {"model_name_or_path": str(tmp_path / "model"), "dataset_name": str(tmp_path / "placed.jsonl")}
    ours = {"test_split_size": 0, "seed": SEED, "cache_ref_log_probs": False, "output_dir": str(tmp_path / "ours")}
    train(DPOOptions(**sources, **shared, **ours))
    found = read_metrics(tmp_path / "ours" / "metrics.jsonl")

    assert len(found) == len(expected) == STEPS
    assert found[-1]["loss"] < 0.9 * found[0]["loss"]  # a curve that moves
    for own, line in zip(found, expected, strict=True):
        for key in ("loss", "rewards/margins", "rewards/chosen", "grad_norm", "learning_rate"):
            assert own[key] == pytest.approx(line[key], abs=2e-4, rel=1e-3), (own["step"], key)
