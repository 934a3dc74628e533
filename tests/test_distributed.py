"""Losses inside the forward of a model on two gloo processes: one process on the whole batch gives the same gradients.

The two processes are started once; every `check_` runs in both of them, and every test reads what one check said.
"""

import copy
import json
import os
import socket
import traceback
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from fastpref import kto_kl, linear_logps, linear_preference_loss

transformers = pytest.importorskip("transformers")

from fastpref.integrations.transformers import fused_lm_head  # noqa: E402

WORLD, PAIRS, T, V = 2, 6, 9, 67
# the pairs of each process: not equally many, so that a mean of means would show
SHARES = [[0, 1, 2, 3], [4, 5]]


def tiny(**options):
    """A fused float32 Llama, the same in every process."""
    sizes = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, **options)
    torch.manual_seed(0)
    return fused_lm_head(transformers.LlamaForCausalLM(config))


def batch(pairs):
    """(input_ids, targets, ref_logps) of these pairs: B chosen, then B rejected; prompts and lengths of all sizes."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, V, (2 * PAIRS, T), generator=generator)
    start = torch.randint(1, 4, (2 * PAIRS, 1), generator=generator)
    length = torch.randint(1, 6, (2 * PAIRS, 1), generator=generator)
    ref_logps = -4.2 * length[:, 0] + torch.randn(2 * PAIRS, generator=generator)
    position = torch.arange(T)
    targets = torch.where((position >= start) & (position < start + length), input_ids, -100).roll(-1, dims=1)
    chosen = torch.tensor(pairs)
    rows = torch.cat([chosen, chosen + PAIRS])
    return input_ids[rows], targets[rows], ref_logps[rows]


def loss_of(model, pairs):
    """The share of these pairs in the mean over all pairs."""
    input_ids, targets, ref_logps = batch(pairs)
    head = partial(linear_preference_loss, targets=targets, ref_logps=ref_logps, beta=0.5, num_items=PAIRS)
    return model(input_ids, head=head).loss


def whole_batch_gradients(model):
    """What one process gets from the whole batch at once, by a copy of the model."""
    model = copy.deepcopy(model)
    loss_of(model, list(range(PAIRS))).backward()
    return gradients(model)


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    found = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}
    assert all(g is not None and g.norm() > 0 for g in found.values()), found
    return found


def assert_equal_gradients(actual, expected, tolerance=1e-6):
    assert actual.keys() == expected.keys()
    for name, g in expected.items():
        error = ((actual[name] - g).norm() / g.norm()).item()
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def shard(model, *, own_head=False, **options):
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    if own_head:
        fully_shard(model.lm_head, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def check_ddp(rank):
    model = tiny()
    expected = whole_batch_gradients(model)
    wrapped = DistributedDataParallel(model)
    # averaged over processes by DDP, so multiplied by their number
    (loss_of(wrapped, SHARES[rank]) * WORLD).backward()
    assert_equal_gradients(gradients(model), expected)


def check_ddp_unused_parameters(rank):
    """DDP then searches the output for the tensors to start from."""
    model = tiny()
    model.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
    twin = tiny()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    for _ in range(2):  # a parameter that DDP believes unused, or still waits for, shows in the second step
        model.zero_grad()
        (loss_of(wrapped, SHARES[rank]) * WORLD).backward()
    model.unused.requires_grad_(False)
    assert_equal_gradients(gradients(model), whole_batch_gradients(twin))


def check_ddp_static_graph(rank):
    """DDP then finds the tensors of the output by pytree: any other container, and nothing is averaged, silently."""
    model = tiny()
    expected = whole_batch_gradients(model)
    wrapped = DistributedDataParallel(model, static_graph=True)
    (loss_of(wrapped, SHARES[rank]) * WORLD).backward()
    assert_equal_gradients(gradients(model), expected)


def check_ddp_gradient_accumulation(rank):
    model = tiny(tie_word_embeddings=True)
    expected = whole_batch_gradients(model)
    wrapped = DistributedDataParallel(model)
    with wrapped.no_sync():
        (loss_of(wrapped, SHARES[rank][:1]) * WORLD).backward()
    (loss_of(wrapped, SHARES[rank][1:]) * WORLD).backward()
    assert_equal_gradients(gradients(model), expected)


def check_ddp_lora(rank):
    import peft

    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny(), config)  # random from the seed that tiny() has set
    expected = whole_batch_gradients(model)
    wrapped = DistributedDataParallel(model)
    (loss_of(wrapped, SHARES[rank]) * WORLD).backward()
    assert_equal_gradients(gradients(model), expected)


def check_fsdp(rank, tied=False, **options):
    model = tiny(tie_word_embeddings=tied)
    expected = whole_batch_gradients(model)
    shard(model, **options)
    for micro_batch in (SHARES[rank][:1], SHARES[rank][1:]):
        (loss_of(model, micro_batch) * WORLD).backward()
    assert_equal_gradients(gradients(model), expected)


def check_fsdp_tied(rank):
    check_fsdp(rank, tied=True)


def check_fsdp_resharded_after_forward(rank):
    """The head is freed between forward and backward, and must be gathered again for the latter."""
    check_fsdp(rank, reshard_after_forward=True)


def check_fsdp_head_sharded_by_itself(rank):
    check_fsdp(rank, own_head=True, reshard_after_forward=True)


def check_fsdp_weight_read_again_in_backward(rank):
    """linear_logps recomputes in backward, where the head of a root that reshards must be whole once more."""
    model = tiny()

    def backward(pairs, factor):
        input_ids, targets, _ = batch(pairs)
        logps = model(input_ids, head=partial(linear_logps, targets=targets)).sum(-1).view(2, -1)
        (torch.nn.functional.softplus(logps[1] - logps[0]).sum() * factor).backward()

    backward(list(range(PAIRS)), 1)
    expected = gradients(model)
    model.zero_grad()
    shard(model, own_head=True, reshard_after_forward=True)
    backward(SHARES[rank], WORLD)
    assert_equal_gradients(gradients(model), expected)


def check_fsdp_mixed_precision(rank):
    model = tiny()
    expected = whole_batch_gradients(model)
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    seen = []
    input_ids, targets, ref_logps = batch(SHARES[rank])

    def head(hidden, weight):
        seen.append((hidden.dtype, weight.dtype, tuple(weight.shape)))
        return linear_preference_loss(hidden, weight, targets, ref_logps=ref_logps, beta=0.5, num_items=PAIRS)

    (model(input_ids, head=head).loss * WORLD).backward()
    assert seen == [(torch.bfloat16, torch.bfloat16, (V, 32))]
    # a few bfloat16 roundings of 2^-9 along two layers and back
    assert_equal_gradients(gradients(model), expected, tolerance=5e-2)


def check_fused_after_sharding(rank):
    model = tiny()
    expected = whole_batch_gradients(model)
    plain = transformers.LlamaForCausalLM(model.config)
    plain.load_state_dict(model.state_dict())
    model = fused_lm_head(shard(plain))
    (loss_of(model, SHARES[rank]) * WORLD).backward()
    assert_equal_gradients(gradients(model), expected)


def check_sharded_head_is_refused_outside_forward(rank):
    model = shard(tiny())
    input_ids, targets, ref_logps = batch([0])
    hidden = torch.randn(*input_ids.shape, 32)
    with pytest.raises(ValueError, match=r"linear_logps: weight must be whole; got a DTensor.*fused_lm_head"):
        linear_logps(hidden, model.lm_head.weight, targets)
    with pytest.raises(ValueError, match=r"linear_preference_loss: weight must be whole.*fused_lm_head"):
        linear_preference_loss(hidden, model.lm_head.weight, targets, ref_logps=ref_logps)


def check_tensor_parallel_head(rank):
    """Each process has the whole batch and some rows of the head, which nobody gathers."""
    model = tiny()
    expected = whole_batch_gradients(model)
    with torch.no_grad():
        logits = model(batch([0])[0]).logits
    mesh = init_device_mesh("cpu", (WORLD,))
    parallelize_module(model.lm_head, mesh, ColwiseParallel(output_layouts=Replicate()))
    seen = []

    def head(hidden, weight, process_group, **options):
        seen.append((tuple(hidden.shape), weight.shape[0], process_group.size()))
        return linear_preference_loss(hidden, weight, process_group=process_group, **options)

    input_ids, targets, ref_logps = batch(list(range(PAIRS)))
    fused_lm_head(model)
    loss = model(input_ids, head=partial(head, targets=targets, ref_logps=ref_logps, beta=0.5, num_items=PAIRS)).loss
    loss.backward()
    assert seen == [((2 * PAIRS, T, 32), [34, 33][rank], WORLD)]
    assert isinstance(model.lm_head.weight.grad, DTensor)
    assert_equal_gradients(gradients(model), expected, tolerance=3e-6)
    with torch.no_grad():  # without head its plan still acts
        torch.testing.assert_close(model(batch([0])[0]).logits, logits)


def check_tensor_parallel_plan_of_transformers(rank):
    """`tp_plan` splits the layers too, and replaces the forward of each."""
    from transformers.distributed import DistributedConfig

    model = tiny()
    expected = whole_batch_gradients(model)
    folder = os.environ["FOLDER"]
    if rank == 0:
        model.save_pretrained(folder)
    dist.barrier()
    config = DistributedConfig(tp_size=WORLD, tp_plan="auto")
    model = fused_lm_head(transformers.LlamaForCausalLM.from_pretrained(folder, distributed_config=config))
    assert isinstance(model.lm_head.weight, DTensor)
    loss_of(model, list(range(PAIRS))).backward()
    assert_equal_gradients(gradients(model), expected, tolerance=1e-5)


def check_head_split_over_its_hidden_size_is_gathered(rank):
    model = tiny()
    expected = whole_batch_gradients(model)
    mesh = init_device_mesh("cpu", (WORLD,))
    weight = distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(1)])
    model.lm_head.weight = torch.nn.Parameter(weight)
    loss_of(fused_lm_head(model), list(range(PAIRS))).backward()
    assert_equal_gradients(gradients(model), expected)


def check_kto_kl_of_shares_of_unequal_size(rank):
    """The mean over all sequences, clamped once: neither a mean of means, nor of clamped ones."""
    apart = torch.tensor([[2.0, 1.0, 4.0], [-5.5]][rank])
    assert kto_kl(apart, torch.zeros_like(apart)).item() == 0.375
    assert kto_kl(-apart, torch.zeros_like(apart)).item() == 0
    alone = [dist.new_group([one]) for one in range(WORLD)][rank]
    assert kto_kl(apart, torch.zeros_like(apart), process_group=alone).item() == pytest.approx([7 / 3, 0][rank])


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


def worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), FOLDER=str(folder / "model"))
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
