"""Builds csrc/*.cu for the CPU, by g++ over tests/cuda_emu: a module for Python, and programs under a sanitizer."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC, EMULATOR = ROOT / "csrc", ROOT / "tests" / "cuda_emu"
KERNELS = sorted(path.name for path in CSRC.glob("*.cu"))
FLAVOURS = {
    "plain": "-std=c++17 -O1",
    "address": "-std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all",
    "threads": "-std=c++20 -O1 -g -fsanitize=thread -DCUDA_EMU_THREADS",
}
CXX = next((path for name in (os.environ.get("CXX", ""), "g++") if (path := shutil.which(name))), None)


def run(*command, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def compile_(folder: Path, source: Path, flags: list[str]) -> Path:
    output = folder / f"{source.name}.o"
    # -Wno-unknown-pragmas: of #pragma unroll
    command = [CXX, *flags, f"-I{EMULATOR}", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fPIC", "-fvisibility=hidden"]
    result = run(*command, "-x", "c++", "-c", source, "-o", output)
    assert result.returncode == 0, result.stdout
    return output


def build_module(folder: Path):
    """fastpref._cuda, its kernels emulated."""
    if CXX is None:
        pytest.skip("needs g++")
    import pybind11

    flags = shlex.split(FLAVOURS["plain"])
    flags += [f"-isystem{path}" for path in (sysconfig.get_paths()["include"], pybind11.get_include())]
    sources = [CSRC / "bind_cuda.cpp", *(CSRC / name for name in KERNELS)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: compile_(folder, source, flags), sources))
    linked = run(CXX, "-shared", *objects, "-o", folder / "_cuda.so")
    assert linked.returncode == 0, linked.stdout
    spec = importlib.util.spec_from_file_location("_cuda", folder / "_cuda.so")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Programs:
    """tests/cuda_emu/cases.cpp with csrc/*.cu, in each flavour, as it is or with a fault planted."""

    def __init__(self, folder: Path):
        self.folder, self.compiled, self.linked = folder, {}, {}

    def objects(self, flavour: str) -> dict[str, Path]:
        """Of the sources as they are; skips where the compiler, or this system, has no such sanitizer."""
        if flavour not in self.compiled:
            if CXX is None:
                pytest.skip("needs g++")
            folder, flags = self.folder / flavour, shlex.split(FLAVOURS[flavour])
            folder.mkdir()
            probe = folder / "probe.cpp"
            probe.write_text("int main() { return 0; }\n")
            built = run(CXX, *flags, probe, "-o", folder / "probe")
            if built.returncode or (built := run(folder / "probe")).returncode:
                pytest.skip(f"{CXX} has no {flavour} sanitizer here: {built.stdout.strip()[-200:]}")
            sources = [EMULATOR / "cases.cpp", *(CSRC / name for name in KERNELS)]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(lambda source: compile_(folder, source, flags), sources))
            self.compiled[flavour] = {path.name: made for path, made in zip(sources, objects, strict=True)}
        return self.compiled[flavour]

    def program(self, flavour: str, fault: tuple[str, str, str] | None = None) -> Path:
        """fault: (a .cu file, text that stands in it once, what stands there instead)."""
        if (flavour, fault) in self.linked:
            return self.linked[flavour, fault]
        objects = dict(self.objects(flavour))
        folder = self.folder / str(len(self.linked))
        folder.mkdir()
        if fault is not None:
            name, text, planted = fault
            source = (CSRC / name).read_text()
            assert source.count(text) == 1, f"{name} has changed: {text!r} stands in it {source.count(text)} times"
            for header in [*CSRC.glob("*.h"), *CSRC.glob("*.cuh")]:
                shutil.copy(header, folder)
            (folder / name).write_text(source.replace(text, planted))
            objects[name] = compile_(folder, folder / name, shlex.split(FLAVOURS[flavour]))
        linked = run(CXX, *shlex.split(FLAVOURS[flavour]), *objects.values(), "-o", folder / "cases")
        assert linked.returncode == 0, linked.stdout
        return self.linked.setdefault((flavour, fault), folder / "cases")


def run_cases(program: Path, op: str, *, reverse: bool = False) -> subprocess.CompletedProcess:
    options = {"CUDA_EMU_REVERSE": str(int(reverse)), "UBSAN_OPTIONS": "print_stacktrace=1"}
    # a fiber's stack is none that the address sanitizer knows
    options["ASAN_OPTIONS"] = "detect_stack_use_after_return=0"
    result = run(program, op, env={**os.environ, **options}, timeout=120)
    if "unexpected memory mapping" in result.stdout:
        pytest.skip("the thread sanitizer does not know where this kernel puts memory")
    return result
