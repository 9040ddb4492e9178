"""The Triton kernels on a GPU, where there is one: CPU's bits, CUDA graphs, and what autograd and torch.compile ask of ops.

Each op's own tests run there too, with backend="triton" (conftest.py's `backends`).
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from numerics import assert_as_accurate, assert_bits_equal
from op_cases import every_case, everything, make, upstreams

from ddpm_fast.backends import missing

pytestmark = pytest.mark.skipif(
    bool(missing("triton")) or not torch.cuda.is_available(), reason=f"backend triton on a device: {missing('triton') or 'interpreted'}"
)
SHAPES = [(6, 2, 7, 13), (131, 1, 1, 3), (2, 1, 1, 1504), (16, 3, 64, 64)]


def on_device(case):
    return case.map(lambda _, x: x.cuda())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_case
def test_results_and_gradients(name, given, shape, dtype):
    case = make(name, given, shape, dtype)
    grads = upstreams(case())
    got = {what: x.cpu() for what, x in everything(on_device(case), [g.cuda() for g in grads]).items()}
    exact = everything(case.in_float64(), [g.double() for g in grads])
    baseline = everything(case, grads, backend="reference")
    native = everything(case, grads, backend="cpu")
    for what, x in got.items():
        assert_as_accurate(x, baseline[what], exact[what], floor=4.0, what=what)
        if case.op in ("q_sample", "p_step") or name == "gaussian_kl":
            assert_bits_equal(x, native[what], f"{what}, against the CPU kernel")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_case
def test_captured_in_a_graph(name, given, dtype):
    """Forward and backward."""
    case = on_device(make(name, given, (3, 2, 33, 31), dtype)).watched()
    grads = [torch.ones_like(x) for x in case()]

    def step():
        results = case()
        return [x.detach() for x in results] + list(torch.autograd.grad(results, case.inputs(), grads))

    expected = step()  # compiles, which a capture could not
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # as PyTorch asks of what is captured with its backward
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    graph.replay()
    torch.cuda.synchronize()
    for x, y in zip(results, expected, strict=True):
        assert_bits_equal(x.cpu(), y.cpu())


@every_case
def test_waits_for_nothing(name, given):
    case = on_device(make(name, given, (3, 2, 33, 31))).watched()
    results = case()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(case(), case.inputs(), [torch.ones_like(x) for x in results])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("file", ["test_ops_gradients.py", "test_ops_compile.py"])
def test_what_is_asked_of_every_op(file):
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--device", "cuda", str(here / file)]
    done = subprocess.run(command, cwd=here.parents[1], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:]
