"""Two gloo processes with unequal shares of a batch: policy losses, whitening and moments are those of the whole."""

import json
import os
import socket
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastpref import (
    RunningMoments,
    linear_policy_loss,
    masked_whiten,
    policy_loss,
    update_moments,
    value_loss,
)
from tests._oracle import upstream
from tests._policy import MAX_LENGTH, OPTIONS, arguments, rollout, with_head

WORLD, SHARES = 2, [[0, 1, 2], [3, 4]]  # not equally many, so that a mean of means would show


def items(name, mask):
    return int(mask.sum()) if OPTIONS[name][2] == "mean" else len(mask)


def own(name):
    loss_type, options, reduction = OPTIONS[name]
    return {"loss_type": loss_type, **options, **({"max_length": MAX_LENGTH} if reduction == "constant" else {})}


def summed(x):
    dist.all_reduce(x)
    return x


def check_every_policy_loss(rank):
    batch = rollout()
    for name in OPTIONS:
        whole = arguments(batch)
        whole["logps"] = whole["logps"].clone().requires_grad_()
        expected = policy_loss(**whole, **own(name))
        expected.loss.backward()
        mine = arguments({key: x[SHARES[rank]] for key, x in batch.items()})
        mine["logps"] = mine["logps"].clone().requires_grad_()
        out = policy_loss(**mine, **own(name), num_items=items(name, batch["mask"]))
        out.loss.backward()
        torch.testing.assert_close(summed(out.loss.detach()), expected.loss.detach(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(mine["logps"].grad, whole["logps"].grad[SHARES[rank]], rtol=1e-6, atol=1e-8)


def check_the_fused_head(rank):
    args, batch = with_head(rollout())
    for name in ("ppo", "gspo", "dr_grpo"):
        gradients = []
        for rows, num_items in ((range(5), None), (SHARES[rank], items(name, batch["mask"]))):
            rows = list(rows)
            weight = args["weight"].clone().requires_grad_()
            given = {"advantages": arguments(batch)["advantages"][rows], "old_logps": batch["old_logps"][rows]}
            hidden, targets = args["hidden"][rows], args["targets"][rows]
            linear_policy_loss(hidden, weight, targets, **given, **own(name), num_items=num_items).loss.backward()
            gradients.append(weight.grad)
        torch.testing.assert_close(summed(gradients[1]), gradients[0], rtol=1e-5, atol=1e-7)


def check_value_loss(rank):
    batch = rollout()
    given = [batch[key] for key in ("logps", "old_logps", "ref_logps", "mask")]
    whole = value_loss(*given)[0]
    mine = value_loss(*(x[SHARES[rank]] for x in given), num_items=int(batch["mask"].sum()))[0]
    torch.testing.assert_close(summed(mine), whole)


def check_whitening_and_moments(rank):
    batch = rollout()
    x, mask, group = 3 + 2 * batch["logps"], batch["mask"], dist.group.WORLD
    mine = masked_whiten(x[SHARES[rank]], mask[SHARES[rank]], process_group=group)
    torch.testing.assert_close(mine, masked_whiten(x, mask)[SHARES[rank]], rtol=1e-6, atol=1e-6)
    alone = masked_whiten(x[SHARES[rank]], mask[SHARES[rank]])
    assert not torch.allclose(mine, alone)
    scores = upstream(5)
    moments = update_moments(RunningMoments(), scores[SHARES[rank]], process_group=group)
    assert moments.n == 5
    torch.testing.assert_close(moments.mean, scores.double().mean())
    torch.testing.assert_close(moments.sum_sq / 4, scores.double().var())


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


def worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    # a check that fails in one process leaves the other waiting: not for long
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=timedelta(seconds=30))
    said = {}
    for name, check in CHECKS.items():
        try:
            check(rank)
            said[name] = ""
        except BaseException:
            said[name] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What went wrong in each check, by process."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(worker, args=(port, folder), nprocs=WORLD)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(said, name):
    wrong = [f"process {rank}: {said[rank][name]}" for rank in range(WORLD) if said[rank][name]]
    assert not wrong, "\n".join(wrong)
