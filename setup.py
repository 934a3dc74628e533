"""Builds the extension modules: writes a build.ninja and runs ninja on it.

    fastpref._cpu    csrc/*.cpp, by g++ (or $CXX); csrc/*_isa.cpp once for each row of ISAS
    fastpref._cuda   csrc/*.cu, by nvcc, and csrc/bind_cuda.cpp; FASTPREF_CUDA=AUTO (the default), ON or OFF

No torch header is read: pointers cross the boundary as integers, so one build serves every torch version.
Without a compiler the package installs without the modules, and says so here and in `fastpref doctor`.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
BUILD = Path("build") / f"ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"

# -ffast-math would let the compiler drop the NaN and infinity handling that the numerics contract asks for
CXX_FLAGS = shlex.split(
    "-O3 -std=c++17 -fPIC -ffp-contract=fast -fno-math-errno -fno-trapping-math -fvisibility=hidden -Wall -Wextra"
)

# one object file a row; a row whose flags the compiler refuses is left out, and FP_HAVE_<NAME> is then not defined
ISAS = {
    "portable": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4"],
    "avx512bf16": ["-march=x86-64-v4", "-mavx512bf16"],
    "amx": ["-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}

CUDA_ARCHS = [80, 90, 100]
# a register spill is an error: it would cost more than the kernel saves
NVCC_FLAGS = shlex.split("-O3 -std=c++17 -lineinfo -Xptxas=-warn-spills,-Werror -Xcompiler=-fPIC,-fvisibility=hidden")


def find_cxx() -> str | None:
    return next(
        (path for name in (os.environ.get("CXX", ""), "g++", "c++", "clang++") if (path := shutil.which(name))), None
    )


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    names = [os.environ.get("CUDACXX", ""), "nvcc", *(str(Path(home, "bin", "nvcc")) for home in homes if home)]
    return next((path for name in names if (path := shutil.which(name))), None)


def accepts(cxx: str, flags: list[str]) -> bool:
    """Whether the compiler and its linker take these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("int main() { return 0; }\n")
        command = [cxx, *flags, str(source), "-o", str(Path(folder, "probe"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def cuda_targets(nvcc: str) -> list[str]:
    """Machine code for each architecture this nvcc knows, and PTX of the newest one for the chips after it."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    archs = [arch for arch in CUDA_ARCHS if f"compute_{arch}" in known]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def cpu_sources() -> list[Path]:
    return sorted(path for path in CSRC.glob("*.cpp") if path.name != "bind_cuda.cpp")


def cuda_sources() -> list[Path]:
    return [*sorted(CSRC.glob("*.cu")), CSRC / "bind_cuda.cpp"]


def write_ninja(cxx: str, nvcc: str | None) -> Path:
    """The path of build.ninja. Paths in it are relative to the repository root, where ninja runs."""
    import pybind11

    includes = [f"-isystem{path}" for path in (sysconfig.get_paths()["include"], pybind11.get_include())]
    openmp = ["-fopenmp"] if accepts(cxx, ["-fopenmp"]) else []
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    isas = {name: flags for name, flags in ISAS.items() if name == "portable" or (x86 and accepts(cxx, flags))}
    have = [f"-DFP_HAVE_{name.upper()}" for name in isas]
    print(f"fastpref: {cxx}, OpenMP {'on' if openmp else 'off'}, {', '.join(isas)}", file=sys.stderr)

    lines = [
        f"builddir = {BUILD}",
        "rule cxx",
        f"  command = {shlex.join([cxx, *CXX_FLAGS, *openmp, *includes])} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {shlex.join([cxx, '-shared', *undefined, *openmp])} $in -o $out",
    ]

    def compile_one(rule: str, source: Path, name: str, flags: list[str]) -> str:
        output = str(BUILD / f"{name}.o")
        lines.extend([f"build {output}: {rule} {source}", f"  flags = {shlex.join(flags)}"])
        return output

    isa_sources = [source for source in cpu_sources() if source.stem.endswith("_isa")]
    objects = [compile_one("cxx", s, s.stem, have) for s in cpu_sources() if s not in isa_sources]
    # the linker keeps the first copy of an inline function: baseline objects come first, AVX-512 ones last,
    # so that no code an old processor runs is taken from an object made for a new one
    for name, flags in isas.items():
        objects += [compile_one("cxx", s, f"{s.stem}_{name}", [*flags, f"-DFP_ISA={name}"]) for s in isa_sources]
    lines.append(f"build {BUILD / '_cpu.so'}: link {' '.join(objects)}")

    if nvcc:
        command = [nvcc, "-ccbin", cxx, *NVCC_FLAGS, *cuda_targets(nvcc)]
        lines += [
            "rule nvcc",
            f"  command = {shlex.join(command)} $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule nvlink",
            f"  command = {shlex.join([nvcc, '-ccbin', cxx, '-shared', '-cudart=static'])} $in -o $out",
        ]
        objects = [compile_one("nvcc" if s.suffix == ".cu" else "cxx", s, s.name, []) for s in cuda_sources()]
        lines.append(f"build {BUILD / '_cuda.so'}: nvlink {' '.join(objects)}")

    BUILD.mkdir(parents=True, exist_ok=True)
    path = BUILD / "build.ninja"
    path.write_text("\n".join(lines) + "\n")
    return path


class NinjaBuild(build_ext):
    """Every extension is one shared object that ninja makes; setuptools only says where it goes."""

    def build_extensions(self) -> None:
        script = write_ninja(CXX, NVCC)
        subprocess.run([sys.executable, "-m", "ninja", "-f", str(script)], check=True)
        for extension in self.extensions:
            self.mkpath(os.path.dirname(self.get_ext_fullpath(extension.name)))
            self.copy_file(str(BUILD / f"{extension.name.split('.')[-1]}.so"), self.get_ext_fullpath(extension.name))


def extensions() -> list[Extension]:
    headers = [str(path) for pattern in ("*.h", "*.cuh") for path in CSRC.glob(pattern)]
    modules = []
    if CXX:
        modules.append(Extension("fastpref._cpu", [str(path) for path in cpu_sources()], depends=headers))
    if CXX and NVCC:
        modules.append(Extension("fastpref._cuda", [str(path) for path in cuda_sources()], depends=headers))
    return modules


def choose_compilers() -> tuple[str | None, str | None]:
    """(C++ compiler or None, nvcc or None); says aloud what will be missing, and why."""
    wanted = os.environ.get("FASTPREF_CUDA", "AUTO").upper()
    if wanted not in ("AUTO", "ON", "OFF"):
        sys.exit(f"fastpref: FASTPREF_CUDA must be AUTO, ON or OFF; got {wanted}")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    cxx, nvcc = find_cxx() if header.exists() else None, None if wanted == "OFF" else find_nvcc()
    if cxx is None:
        missing = "no C++ compiler was found (set CXX)" if header.exists() else f"{header} does not exist"
        print(f"fastpref: {missing}; installing WITHOUT the compiled CPU kernels", file=sys.stderr)
    if wanted == "ON" and not (cxx and nvcc):
        sys.exit(
            "fastpref: FASTPREF_CUDA=ON needs nvcc and a C++ compiler; not found (set CUDACXX or CUDA_HOME, and CXX)"
        )
    return cxx, nvcc


CXX, NVCC = choose_compilers()
setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild})
