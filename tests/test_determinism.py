"""The same bits on every call: rerun, threads, company, other calls at the same time, a forked child, every processor.

tests/test_linear_logps_edges.py and tests/test_preference_autograd.py have the same for chunks, and for single rows.
"""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastpref import gae, kernels, linear_cross_entropy, linear_logps, linear_preference_loss
from tests._oracle import (
    BACKENDS,
    IGNORE,
    assert_gradient,
    assert_logps,
    assert_same_bits,
    head,
    pairs,
    reference_of,
    run,
    truth,
    upstream,
)

pytestmark = pytest.mark.usefixtures("any_algorithms")
ROOT = Path(__file__).parents[1]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MIB = 1 << 20
N = 150


@pytest.fixture
def threads_are_put_back() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def isas() -> list[str]:
    if kernels.why_not("cpu"):
        return []
    from fastpref import _cpu

    return _cpu.isas()


def everything(dtype: torch.dtype, backend: str, rows: slice = slice(None), workspace=None) -> dict[str, torch.Tensor]:
    """Outputs and gradients of the head and of a loss; with `rows` the outputs of these tokens and pairs only."""
    call = {"backend": backend, "deterministic": True, "workspace": workspace}
    args = head(N, 67, 1031, dtype, ignored=0.1, bias=True)
    args = {k: x[rows] if k in ("hidden", "targets") else x for k, x in args.items()}
    n = len(args["targets"])
    grads = {"logps": upstream(n), "entropy": upstream(n, seed=2)}
    outputs = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    values, gradients = run(linear_logps, args, grads=grads, outputs=outputs, **call)
    found = {f"head {k}": x.detach() for k, x in values.items()}
    found |= {f"head d {k}": x for k, x in gradients.items()}

    args = pairs(4, 12, 24, 1031, dtype)
    ref = reference_of(args)
    values, gradients = run(
        linear_preference_loss, args, grads={"loss": upstream(4)}, ref_logps=ref, reduction="none", **call
    )
    for name in ("loss", "chosen_logps", "rejected_logps", "chosen_rewards", "rejected_rewards"):
        found[f"loss {name}"] = values[name].detach()
    found |= {f"loss metric {k}": x for k, x in values["metrics"].items()}
    found |= {f"loss d {k}": x for k, x in gradients.items()}
    return found


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert bool((torch.isfinite(got[name]) == torch.isfinite(want[name])).all()), name
        assert_same_bits(got[name].nan_to_num(), want[name].nan_to_num())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_threads_and_reruns(dtype, backend, threads_are_put_back):
    """Gradients of the C++ kernels too: their sums are cut by the shape, not by the threads."""
    want = everything(dtype, backend)
    for count in (1, 2, 3, 2):
        torch.set_num_threads(count)
        got = everything(dtype, backend)
        assert_same(everything(dtype, backend), got)
        if backend == "torch":  # its gradients are a library's products, whose bits depend on the threads
            got = {k: x if " d " not in k else want[k] for k, x in got.items()}
        assert_same(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab_size", [1, 2, 8, 17, 1031])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_order_of_rows(dtype, vocab_size, backend):
    """Found by test_properties at V = 2: a row's place in a block of a library's product decided its bits."""
    args = head(60, 33, vocab_size, dtype, ignored=0.0)
    want = linear_logps(**args, backend=backend, deterministic=True)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    moved = {k: x if k == "weight" else x[order] for k, x in args.items()}
    assert_same_bits(linear_logps(**moved, backend=backend, deterministic=True), want[order])


@pytest.mark.parametrize("backend", BACKENDS)
def test_calls_at_the_same_time(backend):
    dtypes = [*DTYPES.values()] * 4
    want = {dtype: everything(dtype, backend) for dtype in DTYPES.values()}
    with ThreadPoolExecutor(4) as pool:
        for dtype, got in zip(dtypes, pool.map(lambda dtype: everything(dtype, backend), dtypes), strict=True):
            assert_same(got, want[dtype])


def small(args, paired) -> dict[str, torch.Tensor]:
    """Outputs and gradients of tensors so small that PyTorch itself would use one thread."""
    grads, found = {"logps": upstream(16), "entropy": upstream(16, seed=2)}, {}
    for function, given, call in (
        (linear_logps, args, {"grads": grads, "outputs": ("entropy",)}),
        (linear_preference_loss, paired, {"grads": {"loss": torch.tensor(1.7)}, "reference_free": True}),
    ):
        for results in run(function, given, **call):
            found |= {f"{function.__name__} {k}": x.detach().float() for k, x in results.items() if k != "metrics"}
    return found | dict(zip(("advantages", "returns"), gae(*upstream(2, 9, 30), mask=upstream(9, 30) > 0), strict=True))


def child(pipe, threads: int, inputs) -> None:
    torch.set_num_threads(threads)
    pipe.send({name: x.numpy() for name, x in small(*inputs).items()})
    pipe.close()


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Tensors say that they are on CUDA, where index_add adds by atomics: refused if an index repeats."""

    def in_order(add):
        def run(out, dim, index, rows):
            assert index.unique().numel() == index.numel(), "floats added in any order"
            return add(out, dim, index, rows)

        return run

    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in ("index_add", "index_add_"):
        monkeypatch.setattr(torch.Tensor, name, in_order(getattr(torch.Tensor, name)))


@pytest.mark.parametrize("trained", [("hidden", "weight", "bias"), ("hidden",)])
@pytest.mark.parametrize("function", [linear_logps, linear_cross_entropy])
def test_sums_on_cuda_have_an_order(function, trained, as_on_cuda, monkeypatch):
    """Rows of hidden that serve several targets, labels that several rows have."""
    args = head(40, 24, 19, torch.float32, ignored=0.2, bias=True)
    args["rows"] = torch.randint(40, (90,), generator=torch.Generator().manual_seed(1))
    args["targets"] = args["targets"][args["rows"]]
    call = {"trained": trained, "backend": "torch", "grads": {"logps": upstream(90)}}
    if function is linear_cross_entropy:
        call |= {"grads": {"logps": torch.tensor(1.7)}, "label_smoothing": 0.3}
    _, found = run(function, args, **call)
    monkeypatch.undo()
    _, want = run(function, args, **call)
    for name in trained:
        torch.testing.assert_close(found[name], want[name], rtol=1e-5, atol=1e-6)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="PyTorch's own threads do not survive a fork")
@pytest.mark.parametrize("threads", [1])  # with more, PyTorch's own operators hang, index_add_ among them
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child(threads, threads_are_put_back):
    """As a worker of a data loader: the parent has used its threads, the child has none of them."""
    torch.set_num_threads(2)
    inputs = head(16, 24, 961, torch.bfloat16), pairs(2, 6, 24, 961)
    want = small(*inputs)
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    process = fork.Process(target=child, args=(there, threads, inputs))
    process.start()
    there.close()
    try:
        assert here.poll(30), "the child hangs"
        got = here.recv()
    finally:
        process.kill()
        process.join()
    assert_same({name: torch.from_numpy(x) for name, x in got.items()}, want)


SCRIPT = """
import sys
import torch
from tests.test_determinism import DTYPES, everything
torch.set_num_threads(1)
runs = []
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    runs.append({name: everything(dtype, "cpu") for name, dtype in DTYPES.items()})
few = {name: everything(dtype, "cpu", slice(40, 101, 3), 1 << 20) for name, dtype in DTYPES.items()}
torch.save((runs, few), sys.argv[1])
"""


@pytest.mark.parametrize("isa", isas())
def test_every_instruction_set(isa, tmp_path):
    """In a process of its own: the variable is what a user sets."""
    saved = tmp_path / "bits.pt"
    env = {**os.environ, "FASTPREF_CPU_ISA": isa, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", SCRIPT, str(saved)], env=env, cwd=ROOT, check=True, timeout=120)
    (first, *others), few = torch.load(saved)
    for name, dtype in DTYPES.items():
        for other in others:
            assert_same(other[name], first[name])
        for k, x in few[name].items():
            if k.startswith("head ") and not k.startswith("head d "):
                assert_same_bits(x, first[name][k][40:101:3])
        args = head(N, 67, 1031, dtype, ignored=0.1, bias=True)
        live = args["targets"] != IGNORE
        grads = {"logps": upstream(N), "entropy": upstream(N, seed=2)}
        values, gradients = run(truth, args, grads=grads, dtype=torch.float64)
        assert_logps(first[name]["head logps"][live], values["logps"].detach()[live])
        for k, x in gradients.items():
            assert_gradient(first[name][f"head d {k}"], x)
