"""What csrc/*.cu must pass without a GPU: sanitizers over the emulator, and each of them seen to catch a fault."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastpref import kernels
from fastpref.trainer import doctor
from tests._cuda_emu import CSRC, KERNELS, ROOT, Programs, run, run_cases

OPS = [name.removesuffix(".cu") for name in KERNELS]


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Programs:
    return Programs(tmp_path_factory.mktemp("cuda_emu"))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("reverse", [False, True])
def test_no_bad_access_and_no_undefined_behaviour(programs, op, reverse):
    result = run_cases(programs.program("address"), op, reverse=reverse)
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.parametrize("op", OPS)
def test_no_race(programs, op):
    result = run_cases(programs.program("threads"), op)
    assert result.returncode == 0 and "WARNING" not in result.stdout, result.stdout[-3000:]


BARRIER = ("gae.cu", "      __syncthreads();\n", "")
FAULTS = {
    "a dropped barrier: wrong values in one of the orders": (*BARRIER, "plain", " is .*, not "),
    "a dropped barrier: a race": (*BARRIER, "threads", "data race"),
    "one buffer for two stretches: a race": ("gae.cu", "buffer ^= 1", "buffer ^= 0", "threads", "data race"),
    "a mask off by one: a write before the row": (
        *("gae.cu", "if (first + i >= 0) row[first + i]", "if (first + i >= -1) row[first + i]"),
        *("address", "heap-buffer-overflow"),
    ),
    "shared memory that nobody wrote: NaN": (
        *("gae.cu", "if (lane == WARP - 1) totals[buffer][warp] = map;", "", "plain", " is -?nan, not "),
    ),
    "a sum of a block too far: a write past it": (
        *(
            "ppo_row.cu",
            "for (int k = 0; k < kTokenMetrics; ++k) args",
            "for (int k = 0; k <= kTokenMetrics; ++k) args",
        ),
        *("address", "index 8 out of bounds|buffer-overflow"),
    ),
    "a token of the next sequence: a write past the last": (
        *("ppo_row.cu", "i < last;", "i <= last;", "address", "heap-buffer-overflow"),
    ),
    "the wrong side of a pair": (
        "dpo_row.cu",
        "return {loss, beta * slope,",
        "return {loss, -beta * slope,",
        "plain",
        "slopes",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(programs, fault):
    name, text, planted, flavour, pattern = FAULTS[fault]
    program, op = programs.program(flavour, (name, text, planted)), name.removesuffix(".cu")
    results = [run_cases(program, op, reverse=reverse) for reverse in (False, True)]
    caught = [result for result in results if result.returncode]
    assert caught, "it went unnoticed"
    assert any(re.search(pattern, result.stdout) for result in caught), caught[0].stdout[-3000:]


SETUP = {
    node.targets[0].id: node.value
    for node in ast.parse((ROOT / "setup.py").read_text()).body
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_a_register_spill_fails_the_build(tmp_path):
    flags = [
        *shlex.split(ast.literal_eval(SETUP["NVCC_FLAGS"].args[0])),
        "-gencode=arch=compute_90,code=sm_90",
        f"-I{CSRC}",
    ]
    source, bound = (CSRC / "gae.cu").read_text(), "__launch_bounds__(THREADS, 1024 / THREADS)"
    assert bound in source
    (tmp_path / "gae.cu").write_text(
        source.replace(bound, "__launch_bounds__(THREADS, THREADS > 32 ? 2048 / THREADS : 32)")
    )
    spilled = run("nvcc", *flags, "-c", tmp_path / "gae.cu", "-o", tmp_path / "gae.o")
    assert spilled.returncode and "spill" in spilled.stdout.lower(), spilled.stdout


def built_extension() -> Path:
    if not (kernels.why_not("cuda") or "built").startswith("built"):
        pytest.skip("fastpref._cuda is not built")
    from fastpref import _cuda

    return Path(_cuda.__file__)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_the_extension_needs_neither_a_cuda_runtime_nor_torch():
    needed = subprocess.check_output(["readelf", "-d", built_extension()], text=True)
    assert "NEEDED" in needed and not [name for name in ("cudart", "libcuda", "torch", "c10") if name in needed]


@pytest.mark.skipif(kernels.why_not("cuda") is None, reason="there is a device")
@pytest.mark.parametrize("op", OPS)
def test_a_launch_without_a_device_says_so(op):
    built_extension()
    from fastpref import _cuda

    sizes = {
        "gae": (*[0] * 8, 1, 1, 1.0, 1.0),
        "dpo_row": (*[0] * 12, 1, 0, 0.1, 0.0, 1.0),
        "ppo_row": (*[0] * 14, 1, 1, 0.8, 1.2, 2.0, 1.0, 0.0, 0, 0.0),
    }
    with pytest.raises(RuntimeError, match=rf"^{op}: CUDA says: .*(driver|device)"):
        getattr(_cuda, op)(*sizes[op], 0, 0)


def test_doctor_says_what_stands_in_on_a_gpu_without_the_extension(monkeypatch):
    monkeypatch.setattr(kernels, "why_not", lambda backend: "not built: no nvcc" if backend == "cuda" else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    lines = doctor.findings().splitlines()
    at = next(i for i, line in enumerate(lines) if line.split()[:1] == ["cuda"])
    assert "not built" in lines[at] and "torch runs GAE and the rows of DPO and PPO" in lines[at + 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_run_gpu_says_that_there_is_no_device():
    script = ROOT / "benchmarks" / "run_gpu.sh"
    environment = {**os.environ, "PYTHON": sys.executable}
    result = run("bash", script, "all", env=environment)
    assert result.returncode == 2 and "no device here" in result.stdout
    result = run("bash", script, "measure", env=environment)
    assert result.returncode == 2 and "stages are build test tune bench and all; got measure" in result.stdout
