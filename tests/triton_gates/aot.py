"""Machine code of the Triton kernels without a GPU: what a launch would compile, and what to read off it.

The launchers run on meta tensors, and each kernel they launch is handed to `warmup` under a stand-in driver, with the
arguments specialised as for the real ones. Never in a process with TRITON_INTERPRET, and not in one that uses a GPU.
"""

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.driver import driver
from triton.runtime.jit import MockTensor

from fastpref.kernels.head import Head
from fastpref.kernels.triton import configs, head, selective_logps

KIB = 1024
# bytes of shared memory a block may have: CUDA C++ Programming Guide, compute capabilities; CDNA 3 ISA, LDS
SHARED = {"sm_80": 163 * KIB, "sm_86": 99 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB}
TENSOR_CORES = {"sm_80": "HMMA", "sm_86": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}


class Code(NamedTuple):
    arch: str
    kernel: str
    registers: int
    spilled: int  # bytes, or registers on gfx942
    shared: int  # bytes
    warps: int  # with those that warp specialisation adds
    text: str  # the disassembly

    def count(self, mnemonic):
        return len(re.findall(rf"\b{mnemonic}", self.text))

    def product_loop(self):
        """The instructions of the innermost loop that has the tensor cores' own; of NVIDIA's disassembly."""
        lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;/]+);", self.text)]
        jumps = [
            (at, int(to[1], 16)) for at, text in lines if (to := re.search(r"BRA (?:`\(\S+\) )?0x([0-9a-f]+)", text))
        ]
        loops = [[text for at, text in lines if first <= at <= last] for last, first in jumps if first < last]
        return min((loop for loop in loops if any(TENSOR_CORES[self.arch] in text for text in loop)), key=len)


class _Driver:
    launcher_cls = None

    def __init__(self, arch):
        self.target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.backend, self.target.arch  # one cache of compiled kernels for each target

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


class _Warmup:
    """Stands for a kernel in the launchers, and compiles."""

    def __init__(self, name, kernel, found, options):
        self.name, self.kernel, self.found, self.options = name, kernel, found, options

    def __getitem__(self, grid):
        def compile_it(*arguments, **options):
            mocks = [MockTensor(x.dtype) if isinstance(x, torch.Tensor) else x for x in arguments]
            self.found.append((self.name, self.kernel.warmup(*mocks, grid=grid, **{**options, **self.options})))

        return compile_it


def compiled(monkeypatch, arch, call, **options):
    """[Code] of the kernels that `call` launches, on `arch`; `options` replace those of the launchers."""
    found = []
    driver.set_active(_Driver(arch))
    monkeypatch.setattr(configs, "arch_of", lambda device: arch)
    for module in (head, selective_logps):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            kernel = getattr(module, name)
            warmup = _Warmup(name, kernel.kernel if isinstance(kernel, _Warmup) else kernel, found, options)
            monkeypatch.setattr(module, name, warmup)
    call()
    return [_read(arch, name, kernel) for name, kernel in found]


def _read(arch, name, kernel):
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    if arch.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        registers, spilled = (
            int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")
        )
        return Code(arch, name, registers, spilled, shared, warps, text)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(kernel.asm["ptx"])
        number = int(arch[3:])
        target = f"{arch}a" if number >= 90 else arch
        assembler = [get_ptxas(number).path, "-v", "--gpu-name", target, str(ptx), "-o", os.devnull]
        said = subprocess.run(assembler, capture_output=True, text=True, check=True).stderr
        cubin.write_bytes(kernel.asm["cubin"])
        disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run([disassembler, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    registers = int(re.search(r"Used (\d+) registers", said)[1])
    spilled = sum(int(re.search(rf"(\d+) bytes spill {way}", said)[1]) for way in ("stores", "loads"))
    return Code(arch, name, registers, spilled, shared, warps, text)


def gate(code, tensor_cores, may_spill=0):
    """Raises where a kernel spills, does not fit, or computes its products elsewhere than on tensor cores.

    may_spill: bytes, outside of the loop over depth.
    """
    what = f"{code.kernel} on {code.arch}"
    assert code.spilled <= may_spill, f"{what} spills {code.spilled}"
    if code.spilled:
        inside = [text for text in code.product_loop() if re.search(r"\b(LDL|STL)\b", text)]
        assert not inside, f"{what} spills inside of its loop: {inside}"
    assert code.shared <= SHARED[code.arch], f"{what} wants {code.shared} bytes of shared memory"
    if tensor_cores:
        mnemonic = TENSOR_CORES[code.arch]
        assert code.count(mnemonic), f"{what} has no {mnemonic}"
        # operands in flight while others are multiplied; gfx942 goes through registers
        if code.arch != "gfx942":
            assert code.count("LDGSTS") or code.count("UTMALDG"), f"{what} loads synchronously"
            # a bias is read so, and costs nothing; operands of products must not be
            assert code.kernel == "score_kernel" or not code.count("LDG.E.U16"), f"{what} loads 16 bits at a time"


class Problem(NamedTuple):
    n: int
    hidden_size: int
    vocab_size: int
    dtype: torch.dtype
    bias: bool = False
    softcap: float | None = None

    def _empty(self, *shape, dtype=None):
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def _head(self):
        bias = self._empty(self.vocab_size) if self.bias else None
        return Head(self._empty(self.vocab_size, self.hidden_size), bias, self.softcap, 1.0, 2**32)

    def score(self, store=True, again=False):
        row = self._empty(self.n, dtype=torch.float32)
        parameters, targets = self._head(), self._empty(self.n, dtype=torch.int64)
        chunk = head.new_chunk(self.n, parameters.weight, self.dtype) if store else None
        only = self._empty(self.n, dtype=torch.bool) if again else None
        head.score(self._empty(self.n, self.hidden_size), parameters, targets, row, row, chunk, None, only)

    def rest(self):
        """The kernels around the products."""
        parameters, row = self._head(), self._empty(self.n, dtype=torch.float32)
        targets, x = self._empty(self.n, dtype=torch.int64), self._empty(self.n, self.hidden_size)
        head.label_dots(x, parameters.weight, targets)
        out = self._empty(self.vocab_size, self.hidden_size, dtype=torch.float32)
        head.add_rows(out, targets, x, row, head.order_of(targets))
        head.add_d_bias(head.new_chunk(self.n, parameters.weight, self.dtype), row, out[:, 0].contiguous())
        logits = self._empty(self.n, self.vocab_size)
        found = selective_logps.selective_logps(logits, targets, None, row, self.softcap, 1.0)
        given = row, row, logits, targets, None, row, self.softcap, 1.0, found[0], found[1], found[-1]
        selective_logps.d_logits(*given, torch.empty_like(logits))

    def gradients(self):
        weight, row = self._head().weight, self._empty(self.n, dtype=torch.float32)
        chunk = head.new_chunk(self.n, weight, self.dtype)
        head.d_hidden(chunk, self.n, weight, self.dtype, row)
        scaled = self._empty(self.n, self.hidden_size, dtype=chunk.dtype)
        out = self._empty(self.vocab_size, self.hidden_size, dtype=torch.float32)
        head.d_weight(chunk, scaled, row, out, True)
