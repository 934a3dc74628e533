"""A vocabulary held in parts by two and by three gloo processes: values and gradients are those of one process.

The processes of each number are started once; every `check_` runs in all of them, and every test reads what one check
said. The parts are of unequal size, and each has labels.
"""

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
    linear_cross_entropy,
    linear_divergence,
    linear_logps,
    linear_policy_loss,
    linear_preference_loss,
    linear_unpaired_loss,
)
from tests._oracle import BACKENDS, as_dict, head, run, upstream

SPLITS = {2: [67, 40], 3: [19, 51, 37]}  # rows of the vocabulary on each process
H, V = 8, 107
OPTIONS = {"softcap": 5.0, "logit_scale": 1.3, "temperature": 0.7}
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
MANY = 1000  # rows: several chunks of the smallest workspace, 1 MiB
TIMES = 2.0**-20  # of float32


def part_of(rank):
    rows = SPLITS[dist.get_world_size()]
    first = sum(rows[:rank])
    return slice(first, first + rows[rank])


def both(function, args, grads, rank, *, trained=("hidden", "weight", "bias"), twins=(), **options):
    """(values, gradients) of one process with the whole head, and of this one with its part."""
    trained = [name for name in trained if args.get(name) is not None]
    whole = run(function, args, grads=grads, trained=trained, **options)
    mine = {
        name: x[part_of(rank)] if name in ("weight", "bias", *twins) and x is not None else x
        for name, x in args.items()
    }
    parts = run(function, mine, grads=grads, trained=trained, process_group=dist.group.WORLD, **options)
    return whole, parts


def assert_same(whole, parts, rank, *, tolerance=2e-6, twins=()):
    (want, d_want), (got, d_got) = whole, parts
    tensors = [name for name, x in want.items() if isinstance(x, torch.Tensor)]
    assert tensors and d_want and want.keys() == got.keys() and d_want.keys() == d_got.keys()
    for name in tensors:
        torch.testing.assert_close(
            got[name], want[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name, g in d_want.items():
        g = g[part_of(rank)] if name in ("weight", "bias", *twins) else g
        error = (d_got[name].float() - g.float()).norm() / g.float().norm()
        assert error <= tolerance, f"gradient of {name}: relative error {error:.1e}"


def grads_of(n, *names):
    return {name: upstream(n, seed=i) for i, name in enumerate(names)}


def check_logps_and_every_output(rank):
    for backend in BACKENDS:
        args = head(40, H, V, bias=True, ignored=0.2)
        given = {"outputs": OUTPUTS, "backend": backend, **OPTIONS}
        for trained in (("hidden", "weight", "bias"), ("hidden",), ("weight",)):
            assert_same(
                *both(linear_logps, args, grads_of(40, "logps", "entropy"), rank, trained=trained, **given), rank
            )
            assert_same(*both(linear_logps, args, grads_of(40, "logps"), rank, trained=trained, backend=backend), rank)


def check_several_chunks(rank):
    """Of a size that all processes must choose alike, though their parts differ."""
    args = head(MANY, H, V)
    for trained in (("hidden", "weight"), ("hidden",)):
        assert_same(*both(linear_logps, args, grads_of(MANY, "logps"), rank, trained=trained, workspace=2**20), rank)


def check_bfloat16(rank):
    args = head(40, H, V, torch.bfloat16)
    whole, parts = both(linear_logps, args, grads_of(40, "logps"), rank)
    assert_same(whole, ({"logps": whole[0]["logps"]}, parts[1]), rank, tolerance=2**-7)
    # the products are of the same numbers, so the values are as exact as in fp32
    torch.testing.assert_close(parts[0]["logps"], whole[0]["logps"], rtol=2e-6, atol=2e-6)


def check_rows_and_temperatures(rank):
    args = {**head(7, H, V), "rows": torch.tensor([0, 0, 1, 2, 3, 6, 6]), "temperature": torch.linspace(0.5, 2, 7)}
    assert_same(*both(linear_logps, args, grads_of(7, "logps"), rank), rank)


def check_label_far_below_the_maximum(rank):
    """Such a row is scored again, anchored at a maximum that one process alone knows."""
    args = head(12, H, V)
    args["hidden"][:6] = 60 * args["weight"][torch.tensor([0, 30, 66, 67, 90, 106])]
    args["targets"][:6] = torch.tensor([106, 90, 1, 5, 67, 0])
    for outputs in ((), OUTPUTS):
        whole, parts = both(linear_logps, args, grads_of(12, "logps"), rank, outputs=outputs)
        assert whole[0]["logps"].min() < -50
        assert_same(whole, parts, rank)


def check_nothing_to_score(rank):
    args = head(5, H, V)
    args["targets"].fill_(-100)
    mine = {**args, "weight": args["weight"][part_of(rank)]}
    values, gradients = run(linear_logps, mine, grads=grads_of(5, "logps"), process_group=dist.group.WORLD)
    assert not values["logps"].any() and not any(g.any() for g in gradients.values())


def check_cross_entropy(rank):
    loss = {"logps": torch.tensor(1.7)}
    for n, workspace in ((40, None), (MANY, 2**20)):
        args = head(n, H, V, bias=True, ignored=0.2)
        for options in ({}, {"label_smoothing": 0.1}, {"label_smoothing": 0.1, **OPTIONS}):
            assert_same(
                *both(linear_cross_entropy, args, loss, rank, workspace=workspace, **options), rank, tolerance=5e-6
            )


def in_sequences(n, t, **options):
    args = head(n * t, H, V, ignored=0.2, **options)
    return {name: x if name in ("weight", "bias") else x.unflatten(0, (n, t)) for name, x in args.items()}


def check_preference_loss(rank):
    args = {**in_sequences(4, 250), "ref_logps": -9 * upstream(4).abs()}
    for workspace in (None, 2**20):
        for options in ({"loss_type": ["sigmoid", "ipo"]}, {"use_weighting": True}, {"loss_type": "aot"}):
            options |= {"beta": 0.01, "workspace": workspace}
            assert_same(
                *both(linear_preference_loss, args, {"loss": torch.tensor(1.7)}, rank, **options), rank, tolerance=2e-5
            )


def check_reference_from_its_own_part_of_a_head(rank):
    args = in_sequences(4, 6)
    args |= {"ref_hidden": args["hidden"] + 0.1 * upstream(4, 6, H), "ref_weight": args["weight"] + 0.1}
    loss = {"loss": torch.tensor(1.7), "chosen_logps": upstream(2)}
    whole, parts = both(linear_preference_loss, args, loss, rank, twins=("ref_weight",))
    assert_same(whole, parts, rank, tolerance=1e-5)


def check_divergence(rank):
    names = "weight_p", "weight_q", "bias_p", "bias_q"
    sides = {side: head(40, H, V, bias=True, seed=seed) for seed, side in enumerate("pq")}
    args = {f"{name}_{side}": of[name] for side, of in sides.items() for name in ("hidden", "weight", "bias")}
    args["mask"] = sides["p"]["targets"] >= 0
    for kind in ("reverse_kl", "forward_kl", "jsd"):
        for trained in ((*names[:2], "hidden_p", "bias_p"), ("hidden_p", "hidden_q")):
            given = {"trained": trained, "twins": names, "kind": kind, **OPTIONS}
            whole, parts = both(linear_divergence, args, grads_of(40, "logps"), rank, **given)
            assert_same(whole, parts, rank, twins=names, tolerance=5e-6)


def check_unpaired_loss(rank):
    args = {**in_sequences(4, 6), "desirable": torch.tensor([True, False, False, True])}
    given = {"ref_logps": -9 * upstream(4).abs(), "kl": 0.3}
    assert_same(*both(linear_unpaired_loss, args, {"loss": torch.tensor(1.7)}, rank, **given), rank, tolerance=1e-5)


def check_policy_loss(rank):
    args = {**in_sequences(4, 250), "advantages": upstream(4)}
    for trained in (("hidden", "weight"), ("hidden",)):
        given = {"trained": trained, "entropy_coef": 0.1, "workspace": 2**20}
        assert_same(*both(linear_policy_loss, args, {"loss": torch.tensor(1.7)}, rank, **given), rank, tolerance=1e-5)


def check_the_least_of_what_a_copy_may_take(rank):
    """The processes take the same passes, though one of them alone has no room for the copy of the gradient."""
    args = {**in_sequences(4, 700), "advantages": upstream(4)}  # several chunks
    given = {"entropy_coef": 0.1, "workspace": 2**20, "max_extra_bytes": None if rank else 0}
    assert_same(*both(linear_policy_loss, args, {"loss": torch.tensor(1.7)}, rank, **given), rank, tolerance=1e-5)


class Told:
    """What this process tells the others within the block: (collective, numbers)."""

    def __enter__(self):
        self.seen, self.before = [], (dist.all_gather_into_tensor, dist.all_reduce)
        gather, reduce = self.before
        dist.all_gather_into_tensor = lambda out, x, **k: self.seen.append(("gather", x.numel())) or gather(out, x, **k)
        dist.all_reduce = lambda x, **k: self.seen.append(("reduce", x.numel())) or reduce(x, **k)
        return self

    def __exit__(self, *_):
        dist.all_gather_into_tensor, dist.all_reduce = self.before


def check_two_vectors_a_sweep(rank):
    n, sizes = 40, ("gather", 6)  # the last: what the processes agree on, once a call
    args = head(n, H, V, ignored=0.0)
    mine = {**args, "weight": args["weight"][part_of(rank)]}
    for trained, outputs, told in (
        ((), (), [("gather", n), ("gather", n)]),
        ((), OUTPUTS, [("gather", n), ("gather", 5 * n)]),
        (("hidden", "weight"), (), [("gather", n), ("gather", n), ("reduce", n * H)]),
        (("hidden",), (), [("gather", n), ("gather", n), ("reduce", n * H)]),
    ):
        leaves = {
            name: x.clone().requires_grad_(name in trained) if x.is_floating_point() else x for name, x in mine.items()
        }
        with Told() as this:
            found = as_dict(linear_logps(**leaves, process_group=dist.group.WORLD, outputs=outputs))["logps"]
            if trained:
                found.backward(upstream(n))
        assert this.seen == [sizes, *told], this.seen


def check_same_bits_on_all_processes_and_runs(rank):
    args = {**in_sequences(4, 250), "ref_logps": -9 * upstream(4).abs()}
    mine = {**args, "weight": args["weight"][part_of(rank)]}
    given = {"grads": {"loss": torch.tensor(1.7)}, "process_group": dist.group.WORLD, "workspace": 2**20}
    found = [run(linear_preference_loss, mine, **given) for _ in range(2)]
    for name, x in found[0][1].items():
        assert torch.equal(x, found[1][1][name]), name
    for x in (found[0][0]["loss"], found[0][0]["chosen_logps"], found[0][1]["hidden"]):
        everywhere = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(everywhere, x.contiguous())
        assert all(torch.equal(x, other) for other in everywhere)


def check_a_group_of_one(rank):
    alone = [dist.new_group([one]) for one in range(dist.get_world_size())][rank]
    args = head(12, H, V)
    want, d_want = run(linear_logps, args, grads=grads_of(12, "logps"))
    got, d_got = run(linear_logps, args, grads=grads_of(12, "logps"), process_group=alone)
    assert torch.equal(got["logps"], want["logps"])
    assert all(torch.equal(d_got[name], d_want[name]) for name in d_want)


class ForGpus(dist.ProcessGroup):
    """As one of NCCL."""

    _device_types = (torch.device("cuda"),)


def check_refusals(rank):
    args, group = head(12, H, V), dist.group.WORLD
    mine = {**args, "weight": args["weight"][part_of(rank)]}
    with pytest.raises(ValueError, match=r"linear_logps: targets must be in \[0, 107\) .* got 107"):
        linear_logps(**{**mine, "targets": args["targets"].clone().fill_(V)}, process_group=group)
    with pytest.raises(TypeError, match="process_group must be a ProcessGroup; got str"):
        linear_logps(**mine, process_group="world")
    with pytest.raises(ValueError, match="process_group must serve the device of hidden, cpu; got one for cuda"):
        linear_logps(**mine, process_group=ForGpus(0, 1))
    with pytest.raises(ValueError, match="must be another than 'reference'"):
        linear_logps(**mine, process_group=group, backend="reference")
    n = 12 - rank
    with pytest.raises(ValueError, match="rows of hidden must be as many on every process of process_group; got"):
        linear_logps(mine["hidden"][:n], mine["weight"], mine["targets"][:n], process_group=group)
    rows = 0 if rank == 1 else 5
    with pytest.raises(ValueError, match="weight must have a row or more on every process"):
        linear_logps(mine["hidden"], mine["weight"][:rows], mine["targets"], process_group=group)


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


def worker(rank, world, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    # a check that fails in one process leaves the others waiting: not for long
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=20))
    said = {}
    for name, check in CHECKS.items():
        try:
            check(rank)
            said[name] = ""
        except BaseException:
            said[name] = traceback.format_exc()
    (folder / f"{world}-{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=SPLITS)
def said(request, tmp_path_factory):
    """What went wrong in each check, by process."""
    folder, world = tmp_path_factory.mktemp("ranks"), request.param
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(worker, args=(world, port, folder), nprocs=world)
    return [json.loads((folder / f"{world}-{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize("name", CHECKS)
def test_processes(said, name):
    wrong = [f"process {rank}: {one[name]}" for rank, one in enumerate(said) if one[name]]
    assert not wrong, "\n".join(wrong)
