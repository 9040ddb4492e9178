"""csrc/cuda/randn.cu, proved without a GPU: its compiled PTX runs in the simulator, under the plan that the launcher uses.

The simulator stops at accesses out of bounds or misaligned; reading its output stops at a byte that was never written.
"""
import re
import shutil

import pytest
import torch
from machine import SIMULATED_ARCHS, nvcc_missing
from numerics import assert_bits_equal
from ptxsim import MemoryFault, Module
from ptxsim.nvcc import assemble, compile_ptx
from randn_simulated import DTYPES, KEY, expected, plan, simulate

from ddpm_fast import Noise
from ddpm_fast.backends import missing
from ddpm_fast.ops import randn

FLAGS = ["-std=c++17"]
SIZES = [
    (1, 1),  # the smallest
    (2, 3),  # less than a counter block
    (3, 4),  # just one, stored as a vector
    (3, 6),  # rows that a vector of two would fit, but not one of four
    (2, 1023),  # a tail of three, and rows that end in the middle of a vector
    (5, 1024),  # every thread of one block
    (2, 1028),  # one thread in the second block
    (4, 4099),  # a prime of several blocks
]


@pytest.fixture(scope="module")
def source(csrc):
    if nvcc_missing():
        pytest.skip(nvcc_missing())
    return csrc / "cuda" / "randn.cu"


@pytest.fixture(scope="module", params=SIMULATED_ARCHS)
def ptx(request, source):
    return compile_ptx(source, request.param, [], FLAGS)


@pytest.fixture(scope="module")
def module(ptx):
    return Module.from_ptx(ptx)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_simulated_bits_are_the_references(shape, dtype, module):
    out, report = simulate(module, shape, KEY, dtype)
    assert_bits_equal(out, expected(shape, KEY, dtype))
    # Every byte was written, so as many bytes as there are means that none was written twice.
    assert report.global_store.bytes_requested == out.numel() * out.element_size()
    assert report.global_load.requests == 0
    assert report.local_requests == 0


@pytest.mark.parametrize("key", [Noise(0), Noise(2**32, 1, 2**32), Noise(2**64 - 1, 2**32 - 1, 2**64 - 1), Noise(1, 0, 2**63 - 1)], ids=str)
def test_simulated_keys(key, module):
    out, _ = simulate(module, (2, 9), key)
    assert_bits_equal(out, expected((2, 9), key))


def test_samples_beyond_the_grid_are_looped_over(module):
    out, _ = simulate(module, (7, 37), KEY, grid=(1, 3, 1))
    assert_bits_equal(out, expected((7, 37), KEY))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stores_are_vectors_and_fill_their_sectors(dtype, module):
    """A warp's 32 threads store 4 values each with one instruction: 512 bytes in fp32, no sector touched twice."""
    out, report = simulate(module, (4, 4096), KEY, dtype)
    stores = report.global_store
    assert stores.bytes_requested == stores.bytes_moved == stores.unique_bytes == out.numel() * out.element_size()
    assert stores.requests == out.numel() // (32 * 4)
    assert {name for name in report.opcodes if name.startswith("st.global")} == {f"st.global.wb.v{2 if out.element_size() == 2 else 4}.u32"}


def test_nothing_is_contracted_or_approximated(ptx):
    """mul.rn and add.rn may not be fused by ptxas, as mul and add may; the root is the rounded one."""
    floating = set(re.findall(r"^\s*((?:fma|mad|mul|add|sub|sqrt|div|rcp|rsqrt|sin|cos|lg2|ex2)\.[\w.]*f32)\b", ptx, re.M))
    assert floating == {"mul.rn.f32", "add.rn.f32", "sqrt.rn.f32"}


@pytest.mark.parametrize("arch", SIMULATED_ARCHS)
def test_no_spills_and_registers_for_eight_blocks(arch, source):
    if shutil.which("ptxas") is None:
        pytest.skip("ptxas is not on PATH")
    _, said = assemble(compile_ptx(source, arch, [], FLAGS), arch)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(registers) == len(spills) == len(DTYPES), said
    assert set(spills) == {("0", "0", "0")}
    assert max(registers) <= 65536 // (256 * 8)  # what randn.cu says beside its block size


@pytest.mark.parametrize(
    "good, bad, shape, fault",
    [
        ("if (i + k < elements) target[k]", "target[k]", (2, 1023), MemoryFault),  # no tail guard: past the end
        ("if (i >= elements) return;", "", (1, 4), MemoryFault),  # no guard at all: threads past the sample's end
        ("const bool whole = elements % 4 == 0;", "const bool whole = true;", (2, 1023), MemoryFault),  # vectors on odd rows
        ("first_sample + uint64_t(sample)", "uint32_t(first_sample + uint64_t(sample))", (4, 8), AssertionError),  # 32-bit index
    ],
    ids=["no tail guard", "no guard", "misaligned", "32-bit sample index"],
)
def test_wrong_kernels_are_caught(good, bad, shape, fault, source, csrc):
    text = source.read_text()
    assert text.count(good) == 1
    wrong = Module.from_cuda(text.replace(good, bad), "sm_80", [str(csrc / "cuda")], FLAGS)
    with pytest.raises(fault):
        out, _ = simulate(wrong, shape, KEY)
        assert_bits_equal(out, expected(shape, KEY))


@pytest.mark.parametrize(
    "samples, elements, grid",
    [
        (1, 1, (1, 1, 1)),
        (3, 1024, (1, 3, 1)),
        (3, 1025, (2, 3, 1)),
        (65535, 4, (1, 65535, 1)),
        (2**40, 4, (1, 65535, 1)),  # the hardware's limit in y
        (1, 2**34, (2**24, 1, 1)),  # the largest sample there can be
    ],
)
def test_launch_plan(samples, elements, grid):
    assert plan(samples, elements) == {"grid": grid, "block": 256}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SIZES, (70_000, 5)], ids=str)
def test_bits_on_the_device(shape, dtype):
    if missing("cuda"):
        pytest.skip(f"backend cuda: {missing('cuda')}")
    out = randn(shape, KEY, device="cuda", dtype=dtype, backend="cuda")
    assert_bits_equal(out.cpu(), expected(shape, KEY, dtype))


def test_device_launch_follows_the_current_stream():
    if missing("cuda"):
        pytest.skip(f"backend cuda: {missing('cuda')}")
    graph, static = torch.cuda.CUDAGraph(), torch.zeros(3, 1025, device="cuda")
    with torch.cuda.graph(graph):
        static.copy_(randn((3, 1025), KEY, device="cuda", backend="cuda"))
    graph.replay()
    torch.cuda.synchronize()
    assert_bits_equal(static.cpu(), expected((3, 1025), KEY))
