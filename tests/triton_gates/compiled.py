"""Every shipped tile compiles for its architecture, fits it, spills nothing and runs on tensor cores; and the gate sees
where one does not. FASTPREF_AOT=all compiles all of the table and odd shapes; else a sample of it.
"""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import tune_triton
from fastpref.kernels.triton import configs, table
from tests.triton_gates.aot import SHARED, Problem, compiled, gate

ALL = os.environ.get("FASTPREF_AOT") == "all"
# rows of any number; GPT-2's V. An H that is no multiple of 16 no model has: it is read in small pieces, and spills
LLAMA, ODD, GPT2 = (8192, 4096, 151936), (1003, 896, 50256), (1003, 768, 50257)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942", *(["sm_86"] if ALL else [])])
def test_forward_sweep(monkeypatch, arch):
    for code in compiled(monkeypatch, arch, Problem(*LLAMA, BF16).score):
        gate(code, tensor_cores=code.kernel == "score_kernel")


@pytest.mark.parametrize("arch", SHARED if ALL else ["sm_90"])
def test_vocabulary_that_is_no_multiple_of_16(monkeypatch, arch):
    code = compiled(monkeypatch, arch, Problem(*GPT2, BF16).score)[0]
    gate(code, tensor_cores=True)


@pytest.mark.parametrize("arch", SHARED if ALL else ["sm_90"])
def test_fp16(monkeypatch, arch):
    problem = Problem(*LLAMA, FP16)
    for code in compiled(monkeypatch, arch, lambda: (problem.score(), problem.gradients())):
        gate(code, tensor_cores=code.kernel != "sums_kernel")


@pytest.mark.parametrize("arch", ["sm_90", *(["sm_100"] if ALL else [])])
def test_descriptors(monkeypatch, arch):
    shipped = configs.lookup(arch, BF16, *LLAMA[1:])
    described = shipped._replace(score=shipped.score._replace(descriptors=True))
    monkeypatch.setattr(configs, "lookup", lambda *_: described)
    code = compiled(monkeypatch, arch, Problem(*LLAMA, BF16).score)[0]
    gate(code, tensor_cores=True)
    assert code.count("UTMALDG") and not code.count("LDGSTS"), "operands do not come through the accelerator"


@pytest.mark.parametrize("arch", SHARED if ALL else ["sm_80", "sm_90"])
def test_products(monkeypatch, arch):
    found = compiled(monkeypatch, arch, Problem(*LLAMA, BF16).gradients)
    assert [code.kernel for code in found] == ["d_hidden_kernel", "d_weight_kernel"]
    for code in found:
        gate(code, tensor_cores=True)


@pytest.mark.parametrize("arch", SHARED if ALL else ["sm_90"])
def test_rest(monkeypatch, arch):
    found = compiled(monkeypatch, arch, Problem(*LLAMA, BF16).rest)
    names = "label_dots add_rows d_bias selective_sums selective_gradient"
    assert [code.kernel for code in found] == [f"{name}_kernel" for name in names.split()]
    for code in found:
        gate(code, tensor_cores=False)


@pytest.mark.parametrize("arch", SHARED if ALL else ["sm_90"])
def test_true_fp32(monkeypatch, arch):
    problem = Problem(*LLAMA, FP32)
    for code in compiled(monkeypatch, arch, lambda: (problem.score(), problem.gradients())):
        gate(code, tensor_cores=False)
        assert not any(code.count(name) for name in ("HMMA", "HGMMA", "UTCHMMA")), "tf32 without being asked for"


@pytest.mark.skipif(not ALL, reason="FASTPREF_AOT=all compiles the whole table")
@pytest.mark.parametrize("options", [{}, {"bias": True, "softcap": 30.0}])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("shape", [LLAMA, ODD])
@pytest.mark.parametrize("arch", SHARED)
def test_everything(monkeypatch, arch, shape, dtype, options):
    problem = Problem(*shape, dtype, **options)
    calls = (problem.score, lambda: problem.score(store=False), lambda: problem.score(again=True), problem.gradients)
    # a capped logit holds its tanh beside itself: some registers too many on sm_90, of what a tile needs once
    spill = 32 if options else 0
    for code in [code for call in calls for code in compiled(monkeypatch, arch, call)]:
        gate(code, dtype != FP32 and code.kernel != "sums_kernel", spill)


def test_table_has_a_row_for_everything():
    for arch in SHARED:
        for dtype in (BF16, FP16, FP32):
            for hidden_size, vocab_size in ((64, 100), (4096, 151936), (16384, 1_000_000)):
                config = configs.lookup(arch, dtype, hidden_size, vocab_size)
                assert config.score.fresh * config.score.depth <= 256
                # bytes of partial sums that a row takes: what the planner counts on
                assert config.score.columns * config.score.tiles >= 20 * 12
    assert all(row.arch in SHARED for row in table.ROWS)


def test_table_is_as_the_tuner_writes_it():
    assert tune_triton.source(table.ROWS) == Path(table.__file__).read_text()


def test_tuned_row_comes_before_the_general_one():
    old = configs.lookup("sm_90", BF16, 4096, 151936)
    row = configs.Row("sm_90", 16, 4096, 151936, old._replace(library=not old.library), "a device")
    rows = tune_triton.merged(tune_triton.merged(table.ROWS, [row]), [row])
    assert len(rows) == len(table.ROWS) + 1
    assert next(found for found in rows if found[:2] == row[:2]) == row


def test_tuner_keeps_what_it_found_before_it_failed(monkeypatch, tmp_path):
    copy = tmp_path / "table.py"
    copy.write_text(Path(table.__file__).read_text())
    better = configs.lookup("sm_90", BF16, *LLAMA[1:]).score._replace(descriptors=True)

    def search(tuned, field, *_):
        if field == "d_weight":
            raise RuntimeError("an illegal memory access")
        if field == "score":
            assert next(tune_triton.neighbours(tuned.config.score)) == better  # what is tried first
            tuned.config = tuned.config._replace(score=better)

    problem = SimpleNamespace(score=None, d_hidden=None, d_weight=None)
    monkeypatch.setattr(table, "__file__", str(copy))
    monkeypatch.setattr(configs, "arch_of", lambda device: "sm_90")
    monkeypatch.setattr(configs, "lookup", configs.lookup)  # put back: the tuner replaces it
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    monkeypatch.setattr(tune_triton, "Problem", lambda *_: problem)
    monkeypatch.setattr(tune_triton, "search", search)
    monkeypatch.setattr(tune_triton.kernels, "why_not", lambda backend: None)
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        tune_triton.main([])
    assert copy.read_text().count("a device") == 1 and "4, True)" in copy.read_text()


def test_gate_sees_a_spill(monkeypatch):
    codes = compiled(monkeypatch, "sm_90", Problem(*LLAMA, BF16).score, maxnreg=128)
    with pytest.raises(AssertionError, match="score_kernel on sm_90 spills"):
        gate(codes[0], tensor_cores=True)


def test_gate_sees_a_spill_inside_of_the_loop(monkeypatch):
    codes = compiled(monkeypatch, "sm_90", Problem(*LLAMA, BF16).score, maxnreg=128)
    with pytest.raises(AssertionError, match="score_kernel on sm_90 spills inside of its loop"):
        gate(codes[0], tensor_cores=True, may_spill=2**20)


def test_gate_sees_operands_that_come_in_small_pieces(monkeypatch):
    for call, reason in (
        ("score", "score_kernel on sm_80 loads synchronously"),
        ("gradients", "loads 16 bits at a time"),
    ):
        codes = compiled(monkeypatch, "sm_80", getattr(Problem(1003, 900, 50256, BF16), call))
        with pytest.raises(AssertionError, match=reason):
            gate(codes[0], tensor_cores=True)


def test_gate_sees_too_much_shared_memory(monkeypatch):
    codes = compiled(monkeypatch, "sm_90", Problem(*LLAMA, BF16).gradients, num_stages=6)
    with pytest.raises(AssertionError, match="bytes of shared memory"):
        gate(codes[0], tensor_cores=True)


def test_gate_sees_products_beside_the_tensor_cores(monkeypatch):
    codes = compiled(monkeypatch, "sm_80", Problem(*LLAMA, FP32).score)
    with pytest.raises(AssertionError, match="score_kernel on sm_80 has no HMMA"):
        gate(codes[0], tensor_cores=True)
