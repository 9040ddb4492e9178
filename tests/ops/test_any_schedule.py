"""The real kernels give the same bits in whatever order their warps run, and stay within their limits when what hardware leaves open is
chosen against them: garbage in registers and shared memory, late copies, approximate instructions an ulp off (ptxsim/schedule.py).

By default one seed and small calls. PTXSIM_SEEDS=20 pytest tests/ops/test_any_schedule.py takes more seeds, and further calls with them.
"""

import os

import pytest
import torch
from attention_checks import check, inputs
from attention_simulator import Sources, simulate
from group_norm_simulated import Case, backward, forward
from interpreter import INTERPRETED
from machine import nvcc_missing
from numerics import assert_as_accurate, assert_bits_equal
from op_cases import NAMES, everything, make, upstreams
from ptxsim import Module
from ptxsim.nvcc import compile_ptx

from ddpm_fast.backends import native, native_missing

SEEDS = int(os.environ.get("PTXSIM_SEEDS", "1"))
MORE = SEEDS > 1
ORDERS = ("reversed", "random")


@pytest.fixture(params=range(SEEDS), ids="seed {}".format)
def seed(request):
    return request.param


def module(source):
    return Module.from_ptx(compile_ptx(source, "sm_80", [], ["-std=c++17"]))


@pytest.fixture(scope="module")
def planned():
    if nvcc_missing():
        pytest.skip(nvcc_missing())
    if native is None or not hasattr(native, "cuda_group_norm_plan"):
        pytest.skip(f"the launch plans are not there: {native_missing or 'ddpm_fast._C was built without CUDA'}")


def in_every_order(call, seed, monkeypatch):
    """The results of call(), {name: tensor}, in order with this seed; the other orders must give their bits."""
    monkeypatch.setenv("PTXSIM_SCHEDULE", f"in order:{seed}")
    results = call()
    for order in ORDERS:
        monkeypatch.setenv("PTXSIM_SCHEDULE", f"{order}:{seed}")
        for name, x in call().items():
            assert_bits_equal(x, results[name], f"{name}, {order}:{seed}")
    return results


GROUP_NORM = [
    Case(2, 12, 20, 4, dropout=0.3),
    Case(2, 40, 16, 4, True, torch.bfloat16, dropout=0.3),
    Case(1, 4, 4096, 1, True),
]  # the last in two launches
if MORE:
    GROUP_NORM += [
        Case(2, 6, 1, 2),
        Case(1, 2056, 2, 8, True),
        Case(3, 32, 64, 8, True),
        Case(2, 1040, 3, 2),
        Case(1, 16, 9000, 4, True),
        Case(2, 12, 49, 4, True, torch.float16),
    ]


@pytest.mark.parametrize("case", GROUP_NORM, ids=str)
def test_group_norm(case, seed, csrc, planned, monkeypatch):
    tensors = case.make()
    plan, source = case.plan(native), module(csrc / "cuda" / "group_norm.cu")
    results = in_every_order(lambda: forward(source, plan, case, tensors)[0], seed, monkeypatch)
    assert_as_accurate(results["y"], case.expected(tensors, torch.float32)["y"], case.expected(tensors, torch.float64)["y"])


@pytest.mark.parametrize("case", GROUP_NORM, ids=str)
def test_group_norm_backward(case, seed, csrc, planned, monkeypatch):
    tensors = case.make()
    plan, source = case.plan(native, backward=True), module(csrc / "cuda" / "group_norm_backward.cu")
    results = in_every_order(lambda: backward(source, plan, case, tensors)[0], seed, monkeypatch)
    baseline, exact = (case.expected(tensors, arithmetic, gradients=True) for arithmetic in (torch.float32, torch.float64))
    for name, x in results.items():
        assert_as_accurate(x, baseline[name], exact[name], floor=1 if name == "grad_x" else 4, what=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 17, 1, 32), *([(1, 130, 1, 32), (1, 65, 1, 128), (1, 33, 1, 256)] if MORE else [])], ids=str)
def test_attention(shape, dtype, seed, planned, monkeypatch):
    qkv, grad_out, scale = inputs(shape, dtype)
    found = []

    def call():
        found.append(simulate(Sources("sm_80"), qkv, scale, grad_out))
        return {"out": found[-1].out, "logsumexp": found[-1].logsumexp, "grad_qkv": found[-1].grad_qkv}

    in_every_order(call, seed, monkeypatch)
    check(found[0], qkv, scale, grad_out)


@pytest.mark.parametrize(
    "name, given", NAMES if MORE else [(name, "Noise") for name in ("q_sample", "simple_loss", "p_step", "gaussian_kl mean", "vlb_terms")]
)
def test_triton(name, given, seed, monkeypatch):
    """Nothing in them is approximate: with any seed their bits are those without one."""
    pytest.importorskip("triton", reason="Triton is not installed, so its kernels cannot be compiled")
    if INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1: nothing is compiled in this process")
    from simulator import simulated

    case = make(name, given, (2, 1, 1, 1500))  # two tiles with a tail
    grads = upstreams(case())
    with simulated(80):
        plain = everything(case, grads, backend="triton")
        results = in_every_order(lambda: everything(case, grads, backend="triton"), seed, monkeypatch)
    for what, x in results.items():
        assert_bits_equal(x, plain[what], what)
