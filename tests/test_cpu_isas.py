"""The C++ head on every instruction set of this processor, and on AMX emulated by tests/amx_emu, against float64."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastpref import linear_logps
from tests._oracle import (
    BACKENDS,
    assert_entropy,
    assert_gradient,
    assert_logps,
    assert_same_bits,
    head,
    option_case,
    three_ways,
    upstream,
)

if "cpu" not in BACKENDS:
    pytest.skip("the extension is not built", allow_module_level=True)

from fastpref import _cpu
from fastpref.kernels.cpu import head as cpu_head
from fastpref.kernels.head import Head

ROOT = Path(__file__).parents[1]
ISAS = _cpu.isas()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# one; odd; whole AMX tiles and pairs; one past a tile in each; past a block of K, of MC rows and of the vocabulary
SHAPES = [(1, 1, 2), (7, 13, 11), (32, 64, 96), (33, 65, 97), (49, 259, 483)]


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The binding of csrc/head_isa.cpp with AMX's intrinsics replaced by plain C++."""
    cxx = shutil.which("g++")
    if cxx is None or "avx512bf16" not in ISAS:
        pytest.skip("needs g++ and a processor with AVX512-BF16")
    import pybind11

    folder = tmp_path_factory.mktemp("amx")
    includes = [f"-isystem{path}" for path in (sysconfig.get_paths()["include"], pybind11.get_include())]
    common = [cxx, "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", *includes]
    tiles = (
        "-O1 -march=x86-64-v4 -mavx512bf16 -ffp-contract=fast -fno-math-errno -fno-trapping-math -DFP_ISA=amx".split()
    )
    sources = {
        ROOT / "csrc" / "head_isa.cpp": [*tiles, "-DFP_ISA=amx", '-DFP_AMX_INTRINSICS="../tests/amx_emu/amx_emu.h"'],
        ROOT / "csrc" / "threads.cpp": [],
        ROOT / "tests" / "amx_emu" / "module.cpp": [],
    }

    def compile_one(source):
        subprocess.run(
            [*common, *sources[source], "-c", str(source), "-o", str(folder / f"{source.stem}.o")], check=True
        )

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources))
    library = folder / "_amx.so"
    objects = [str(folder / f"{source.stem}.o") for source in sources]
    subprocess.run([*common, "-shared", *objects, "-o", str(library)], check=True)
    spec = importlib.util.spec_from_file_location("_amx", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=[*ISAS, "amx emulated"])
def isa(request, monkeypatch):
    """Each instruction set in turn, forced."""
    if request.param != "amx emulated":
        monkeypatch.setenv("FASTPREF_CPU_ISA", request.param)
        return request.param
    module = request.getfixturevalue("emulated")
    monkeypatch.setenv("FASTPREF_CPU_ISA", "amx")
    names = ("isas", "head_score", "head_d_hidden", "head_d_weight")
    kernels = SimpleNamespace(
        token_pad=_cpu.token_pad, label_dots=_cpu.label_dots, **{name: getattr(module, name) for name in names}
    )
    monkeypatch.setattr(cpu_head, "_cpu", kernels)
    return request.param


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def check(args, grads, **options):
    (ours, d_ours), _, (want, d_want) = three_ways(args, grads, backend="cpu", **options)
    assert_logps(ours["logps"], want["logps"])
    if "entropy" in grads:
        assert_entropy(ours["entropy"], want["entropy"])
    assert d_ours.keys() == d_want.keys()
    for name, gradient in d_ours.items():
        assert_gradient(gradient, d_want[name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_both_products(isa, dtype, threads):
    for shape in SHAPES:
        check(head(*shape, dtype), {"logps": upstream(shape[0])})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["none", "bias", "softcap", "all"])
def test_options_and_entropy(isa, dtype, name):
    args, options = option_case(name, 35, 67, 131, dtype)
    check(args, {"logps": upstream(35), "entropy": upstream(35, seed=2)}, **options)


def problem(n, h, v, dtype, weight):
    """Arguments of the kernels' own score, d_hidden and label_dots."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, h, generator=generator).to(dtype)
    targets = torch.randint(v, (n,), generator=generator)
    return x, Head(weight, None, None, 1.0, 2**28), targets, torch.full((n,), 2.0), torch.ones(n)


def everything(n, h, v, dtype, weight):
    """Sums, stored chunk, F W, F^T X and the label's products; the weight is read in `dtype`."""
    x, parameters, targets, anchor, inv_temperature = problem(n, h, v, dtype, weight)
    chunk = cpu_head.new_chunk(n, weight, dtype).fill_(float("nan"))
    sums = cpu_head.score(x, parameters, targets, anchor, inv_temperature, chunk, None)
    d_weight = torch.zeros(v, h)
    cpu_head.d_weight(chunk, x.float(), torch.ones(n), d_weight, True)
    dots = cpu_head.label_dots(x, weight, targets)
    return [*sums, chunk, cpu_head.d_hidden(chunk, n, weight, dtype, torch.ones(n)), d_weight, dots]


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_whatever_the_weights_strides(isa, dtype):
    n, h, v = 37, 66, 131
    weight = torch.randn(v, h, generator=torch.Generator().manual_seed(4)).div(4).to(dtype)
    want = everything(n, h, v, dtype, weight)
    wide = torch.full((v, h + 5), float("nan"), dtype=dtype)
    wide[:, 3 : h + 3] = weight
    spaced = torch.full((v, 2 * h), float("nan"), dtype=dtype)
    spaced[:, ::2] = weight
    for strided in (wide[:, 3 : h + 3], weight.t().contiguous().t(), spaced[:, ::2]):
        assert torch.equal(strided, weight) and strided.stride() != weight.stride()
        for got, wanted in zip(everything(n, h, v, dtype, strided), want, strict=True):
            assert_same_bits(got, wanted)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_fp32_weight_is_read_as_if_it_had_been_cast(isa, dtype, transposed):
    for n, h, v in SHAPES:
        weight = torch.randn(v, h, generator=torch.Generator().manual_seed(5)) / 4
        edges = torch.tensor(
            [0.0, -0.0, 2.0**-14, 2.0**-25, 3e-8, -6.1e-5, 1e-41, 1 + 2.0**-9, 1 + 3 * 2.0**-9, 1 + 2.0**-11]
        )
        weight.view(-1)[: min(10, weight.numel())] = edges[: weight.numel()]
        cast = weight.to(dtype)
        if transposed:
            weight = weight.t().contiguous().t()
        for got, wanted in zip(everything(n, h, v, dtype, weight), everything(n, h, v, dtype, cast), strict=True):
            assert_same_bits(got, wanted)


def test_every_fp16_is_what_its_neighbourhood_rounds_to():
    """Halfway cases, subnormals and overflow of the rounding to fp16, one product of 1 and a weight a row."""
    bits = torch.arange(0, 0x7C00, 7, dtype=torch.int16).view(torch.float16).float()
    half_ulp = torch.nextafter(bits.half(), torch.tensor(torch.inf).half()).float() - bits
    finite = half_ulp.isfinite()
    values = torch.cat([bits[finite] + part * half_ulp[finite] for part in (0.0, 0.25, 0.5, 0.5001, 0.75)])
    values = torch.cat([values, -values, torch.tensor([65519.0, 65520.0, 1e30, -1e30, torch.inf])])[:, None]
    ones, targets = torch.ones(len(values), 1).half(), torch.arange(len(values))
    assert_same_bits(cpu_head.label_dots(ones, values, targets), values.half().double()[:, 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_label_dots_against_float64(dtype):
    for n, h, v in SHAPES:
        args = head(n, h, v, dtype, ignored=0.0)
        want = (args["hidden"].double() * args["weight"].double()[args["targets"]]).sum(1)
        got = cpu_head.label_dots(args["hidden"], args["weight"], args["targets"])
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_label_of_minus_one_is_in_no_row(isa, dtype):
    """Sums over a slab of the vocabulary that the label is not in."""
    weight = torch.randn(97, 33, generator=torch.Generator().manual_seed(6)).div(4).to(dtype)
    x, parameters, targets, anchor, inv_temperature = problem(17, 33, 97, dtype, weight)
    sums = cpu_head.score(x, parameters, torch.full_like(targets, -1), anchor, inv_temperature, None, None)
    want = (x.double() @ weight.double().T - 2).exp().sum(1)
    torch.testing.assert_close(sums.exp, want, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_of_a_chunk_is_zero_whatever_the_weight_holds(isa, dtype):
    weight = torch.randn(50, 33, generator=torch.Generator().manual_seed(7)).to(dtype)
    weight[3], weight[5, 2], weight[7, 1] = torch.nan, torch.inf, -torch.inf
    x, parameters, targets, anchor, inv_temperature = problem(17, 33, 50, dtype, weight)
    chunk = cpu_head.new_chunk(17, weight, dtype).fill_(1.0)
    cpu_head.score(x, parameters, targets, anchor, inv_temperature, chunk, None)
    assert chunk.shape[1] > 17 and bool((chunk[:, 17:] == 0).all())


def test_amx_is_not_listed_where_the_processor_has_none():
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    if "amx_bf16" not in flags:
        assert "amx" not in ISAS


FORK = """
import os, signal, torch
from fastpref import gae, linear_logps
from fastpref.kernels.cpu import head as cpu_head
from tests.test_cpu_isas import everything
torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)
hidden, weight = torch.randn(40, 24, generator=generator), torch.randn(501, 24, generator=generator) / 4
targets = torch.randint(501, (40,), generator=generator)

def kernels():
    return [*everything(40, 24, 501, torch.float32, weight), gae(hidden, hidden)[0]]

def backward():
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    return torch.autograd.grad(linear_logps(x, w, targets, backend="cpu").sum(), (x, w))

def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

want, want_backward = kernels(), backward()
child = os.fork()
if child == 0:
    signal.alarm(20)
    good = same(kernels(), want)
    torch.set_num_threads(1)  # as in a DataLoader's worker: torch's own index_add_ waits for the team that is gone
    os._exit(0 if good and same(backward(), want_backward) else 3)
print(os.waitpid(child, 0)[1])
"""


def test_a_forked_child_neither_hangs_nor_differs():
    """libgomp's team does not survive a fork; SIGALRM ends a child that waits for it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    result = subprocess.run(
        [sys.executable, "-c", FORK], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.stdout.strip() == "0", result.stdout + result.stderr


def test_forward_bits_do_not_depend_on_the_chunk(isa):
    args = head(49, 65, 483, torch.bfloat16)
    want = linear_logps(**args, backend="cpu")
    leaf = args["hidden"].clone().requires_grad_()
    assert_same_bits(linear_logps(**{**args, "hidden": leaf}, backend="cpu").detach(), want)
