"""A checkpoint is whole or absent: through kills, a full disk, damage, and a removal cut short."""

import os
import random
import resource
import signal

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")

from accelerate import Accelerator

from fastpref.trainer.checkpoint import (
    checkpoints,
    last_whole,
    load_state,
    remove,
    save_state,
    why_broken,
    write_whole,
)


def fill(path):
    (path / "model").mkdir()
    (path / "model" / "weights.bin").write_bytes(bytes(range(256)) * 100)
    (path / "state.pt").write_bytes(b"state")


@pytest.fixture
def two(tmp_path):
    """A run with checkpoints 5 and 10, both whole."""
    write_whole(tmp_path / "checkpoint-5", fill)
    write_whole(tmp_path / "checkpoint-10", fill)
    return tmp_path


def test_the_last_by_step_and_not_by_name(two):
    assert [path.name for path in checkpoints(two)] == ["checkpoint-5", "checkpoint-10"]
    assert last_whole(two, pytest.fail) == two / "checkpoint-10"
    assert last_whole(two / "elsewhere", pytest.fail) is None


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: (path / "state.pt").write_bytes(b"stat"), "state.pt is not as it was written"),
        (lambda path: (path / "state.pt").write_bytes(b"stale"), "state.pt is not as it was written"),
        (lambda path: (path / "model/weights.bin").unlink(), "No such file"),
        (lambda path: (path / "manifest.json").unlink(), "No such file"),
        (lambda path: (path / "manifest.json").write_text("{"), "Expecting"),
    ],
    ids=["cut short", "a byte changed", "a file lost", "no manifest", "manifest cut short"],
)
def test_damage_is_recognised_and_passed_over_aloud(two, damage, reason):
    damage(two / "checkpoint-10")
    assert reason in why_broken(two / "checkpoint-10")
    said = []
    assert last_whole(two, said.append) == two / "checkpoint-5"
    assert len(said) == 1
    assert said[0].startswith(f"passing over {two}/checkpoint-10: ")
    assert reason in said[0]


def in_a_process_that_is_killed(work):
    """Runs work(kill) in a fork; kill() ends it as a power cut would."""
    child = os.fork()
    if child == 0:
        work(lambda: os.kill(os.getpid(), signal.SIGKILL))
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def test_killed_while_writing_leaves_the_one_before(two):
    def work(kill):
        write_whole(two / "checkpoint-15", lambda path: (fill(path), kill()))

    in_a_process_that_is_killed(work)
    assert last_whole(two, pytest.fail) == two / "checkpoint-10"
    write_whole(two / "checkpoint-15", fill)  # what the killed one left is no obstacle
    assert sorted(path.name for path in two.iterdir()) == ["checkpoint-10", "checkpoint-15", "checkpoint-5"]


def test_killed_while_removing_leaves_no_half(two, monkeypatch):
    def work(kill):
        monkeypatch.setattr("shutil.rmtree", lambda path: ((path / "state.pt").unlink(), kill()))
        remove(two / "checkpoint-10")

    in_a_process_that_is_killed(work)
    assert last_whole(two, pytest.fail) == two / "checkpoint-5"
    write_whole(two / "checkpoint-10", fill)
    remove(two / "checkpoint-10")
    assert [path.name for path in two.iterdir()] == ["checkpoint-5"]


@pytest.mark.parametrize(
    "writer", [lambda x, path: torch.save(x, path), lambda x, path: path.write_bytes(bytes(x.nbytes))]
)
def test_a_full_disk_leaves_nothing_half_written(two, writer):
    """A limit on the size of a file stands for the disk: the write fails in its middle all the same."""

    def fill_too_much(path):
        fill(path)
        writer(torch.zeros(1_000_000), path / "state.pt")

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not write .*checkpoint-15: .*Nothing of it was left behind"):
            write_whole(two / "checkpoint-15", fill_too_much)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in two.iterdir()) == ["checkpoint-10", "checkpoint-5"]


def test_state_parts_and_random_generators_come_back(tmp_path):
    accelerator = Accelerator(cpu=True)
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.tensor([1.0, 2.0, 3.0])
    optimizer.step()
    state = {"step": 4, "window": {"loss": [1.5, 2.0]}, "reference": torch.arange(4.0).view(2, 2), "before": None}
    save_state(accelerator, tmp_path, state, {"optimizer": optimizer}, fill_model, limit=1)

    drawn = [random.random(), np.random.rand(), torch.rand(1)]
    fresh = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    found = load_state(accelerator, tmp_path / "checkpoint-4", {"optimizer": fresh}, lambda state: [])
    assert [random.random(), np.random.rand(), torch.rand(1)] == drawn
    torch.testing.assert_close(found, state)
    torch.testing.assert_close(fresh.state_dict(), optimizer.state_dict())
    with pytest.raises(ValueError, match=r"cannot go on from .*checkpoint-4, which was written with beta 1, seed 2"):
        load_state(accelerator, tmp_path / "checkpoint-4", {"optimizer": fresh}, lambda state: ["beta 1", "seed 2"])


def fill_model(path):
    (path / "model.safetensors").write_bytes(b"weights")


def test_limit_removes_the_oldest(tmp_path):
    accelerator = Accelerator(cpu=True)
    for step in (8, 9, 10, 11):
        save_state(accelerator, tmp_path, {"step": step}, {}, fill_model, limit=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-11"]
    save_state(accelerator, tmp_path, {"step": 12}, {}, fill_model, limit=None)
    assert len(checkpoints(tmp_path)) == 3


def test_an_error_that_is_not_of_the_disk_comes_through(tmp_path):
    def fill(path):
        raise RuntimeError("some tensors share memory")

    with pytest.raises(RuntimeError, match=r"^some tensors share memory$"):
        write_whole(tmp_path / "model", fill)
    assert not any(tmp_path.iterdir())
