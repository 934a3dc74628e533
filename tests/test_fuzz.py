"""Random calls of every C++ entry point under the address and undefined-behaviour sanitizers: tests/fuzz.

A failure names its seed; with the program built as here, `fuzz_cpu SEED 1` is that case alone.
"""

import ast
import os
import platform
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastpref import kernels

ROOT = Path(__file__).parents[1]
CASES = 400
SANITIZE = shlex.split("-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined,float-cast-overflow")
# setup.py cannot be imported without a build; an instruction set added to it is fuzzed without a change here
SETUP = {
    node.targets[0].id: node.value
    for node in ast.parse((ROOT / "setup.py").read_text()).body
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
}
ISAS = ast.literal_eval(SETUP["ISAS"])
CXX_FLAGS = [flag for flag in shlex.split(ast.literal_eval(SETUP["CXX_FLAGS"].args[0])) if flag != "-O3"]


def run(*command, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


@pytest.fixture(scope="module")
def fuzz_cpu(tmp_path_factory) -> Path:
    cxx = next((path for name in (os.environ.get("CXX", ""), "g++", "clang++") if (path := shutil.which(name))), None)
    if cxx is None:
        pytest.skip("needs g++ or clang++")
    folder = tmp_path_factory.mktemp("fuzz")
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    built = run(cxx, *SANITIZE, probe, "-o", folder / "probe")
    if built.returncode or (built := run(folder / "probe")).returncode:
        pytest.skip(f"{cxx} has no sanitizers here: {built.stdout.strip()[-200:]}")

    x86 = platform.machine().lower() in ("x86_64", "amd64")
    accepted = [name for name, flags in ISAS.items() if x86 and not run(cxx, *flags, "-E", probe).returncode]
    isas = {name: ISAS[name] for name in accepted or ["portable"]}
    openmp = ["-fopenmp"] if not run(cxx, "-fopenmp", probe, "-o", folder / "probe").returncode else []
    compile_ = [cxx, *CXX_FLAGS, *SANITIZE, "-fno-sanitize-recover=all", *openmp, "-c"]
    jobs = {f"{source.stem}.o": [source] for source in (ROOT / "tests" / "fuzz").glob("*.cpp")}
    for source in sorted((ROOT / "csrc").glob("*.cpp")):
        if source.stem.endswith("_isa"):
            for name, flags in isas.items():
                jobs[f"{source.stem}_{name}.o"] = [*flags, f"-DFP_ISA={name}", source]
        elif not source.stem.startswith("bind_"):
            jobs[f"{source.stem}.o"] = [*(f"-DFP_HAVE_{name.upper()}" for name in isas), source]
    if "avx512bf16" in isas:  # what AMX needs beside its tiles, which tests/amx_emu emulates
        tiles = ["-DFP_ISA=amx_emulated", '-DFP_AMX_INTRINSICS="../tests/amx_emu/amx_emu.h"']
        jobs["amx_emulated.o"] = [*ISAS["avx512bf16"], *tiles, ROOT / "csrc" / "head_isa.cpp"]
        jobs["fuzz_head.o"].append("-DFUZZ_AMX_EMULATED")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda job: run(*compile_, *job[1], "-o", folder / job[0]), jobs.items()))
    for result in results:
        assert result.returncode == 0, result.stdout
    program = folder / "fuzz_cpu"
    linked = run(cxx, *SANITIZE, *openmp, *(folder / name for name in jobs), "-o", program)
    assert linked.returncode == 0, linked.stdout
    return program


def test_random_calls_of_the_cpu_kernels(fuzz_cpu):
    # waiting threads that spin make three threads on two cores ten times slower
    options = {"OMP_WAIT_POLICY": "passive", "UBSAN_OPTIONS": "print_stacktrace=1", "ASAN_OPTIONS": "detect_leaks=1"}
    result = run(fuzz_cpu, 0, CASES, env={**os.environ, **options}, timeout=300)
    assert result.returncode == 0, result.stdout[-6000:]
    assert result.stdout.endswith(f"{CASES} cases, none failed\n")
    if kernels.why_not("cpu") is None:
        from fastpref import _cpu

        assert result.stdout.startswith(f"instruction sets: {' '.join(_cpu.isas())}\n")
