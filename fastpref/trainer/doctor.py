"""`fastpref doctor`: what this machine has, which backends run on it, and why not."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

import fastpref
from fastpref import kernels
from fastpref.trainer.config import given_options

PACKAGES = ("torch", "numpy", "triton", "transformers", "accelerate", "datasets", "peft")
ISAS = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "neon", "sve")  # as torch.cpu.get_capabilities names them


@dataclass
class DoctorOptions:
    """None: it only looks."""


def main(argv: Sequence[str]) -> int:
    """`fastpref doctor`; 0, since a missing backend is a finding and not a failure."""
    given_options(DoctorOptions, argv, prog="fastpref doctor", description=(__doc__ or ""))
    print(findings())
    return 0


def findings() -> str:
    """One line a finding, in three groups."""
    lines = [
        f"fastpref      {fastpref.__version__}",
        f"python        {platform.python_version()}, {platform.platform()}",
    ]
    lines += [f"{name:<14}{_version(name)}" for name in PACKAGES]
    # torch 2.13 has it; before it, only what torch itself chose is known
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    found_isas = " ".join(name for name in ISAS if capabilities.get(name)) or "unknown"
    lines += [
        "",
        f"CPU           {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
    ]
    lines += [f"  vectors     {found_isas}; torch uses {torch.backends.cpu.get_cpu_capability()}"]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        capability = f"compute capability {found.major}.{found.minor}"
        lines.append(f"GPU {index}         {found.name}, {found.total_memory / 2**30:.0f} GiB, {capability}")
    if not torch.cuda.device_count():
        lines.append("GPU           none that torch sees")
    lines += ["", "backends"]
    lines += [f"  {name:<12}{state}" for name, state in kernels.status().items()]
    if kernels.why_not("cuda") is not None and torch.cuda.is_available():
        lines.append(f"  {'':<12}in its place torch runs GAE and the rows of DPO and PPO, in more launches")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
