import shutil

import numpy as np
import pytest

from ptxsim import Device, Module


@pytest.fixture
def device():
    return Device()


@pytest.fixture
def cuda():
    """Compile CUDA C++ text."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")

    def build(source, arch="sm_80", **options):
        return Module.from_cuda(source + "\n", arch=arch, **options)

    return build


def run_ptx(body, inputs, outputs, threads=None, target="sm_90", **options):
    """Run a PTX body once per thread. inputs: arrays; outputs: dtypes.

    The body sees inputs in %a0, %a1.. and writes %o0, %o1..; every value has a 32-bit (%a) or 64-bit (%A, %O) name
    by its width; 16-bit ones are %h and %oh.
    """
    inputs = [np.ascontiguousarray(x) for x in inputs]
    n = threads or len(inputs[0])
    names = {2: ("h", "oh", "b16"), 4: ("a", "o", "b32"), 8: ("A", "O", "b64"), 1: ("h", "oh", "b8")}
    lines = []
    for j, x in enumerate(inputs):
        name, _, kind = names[x.dtype.itemsize]
        lines += [f"ld.param.u64 %p, [P{j}]; mad.wide.u32 %p, %i, {x.dtype.itemsize}, %p; ld.global.{kind} %{name}{j}, [%p];"]
    lines.append(body)
    for j, t in enumerate(outputs):
        _, name, kind = names[np.dtype(t).itemsize]
        lines += [
            f"ld.param.u64 %p, [P{len(inputs) + j}]; mad.wide.u32 %p, %i, {np.dtype(t).itemsize}, %p; st.global.{kind} [%p], %{name}{j};"
        ]
    params = ", ".join(f".param .u64 P{j}" for j in range(len(inputs) + len(outputs)))
    text = f""".version 8.0
.target {target}
.address_size 64
.visible .entry k({params}) {{
 .reg .b64 %p, %A<8>, %O<8>, %t<8>; .reg .b32 %i, %n, %c, %a<8>, %o<8>, %r<32>; .reg .b16 %h<8>, %oh<8>; .reg .pred %q<8>;
 mov.u32 %c, %ctaid.x; mov.u32 %n, %ntid.x; mov.u32 %i, %tid.x; mad.lo.u32 %i, %c, %n, %i;
 {" ".join(lines)}
 ret;
}}"""
    device = Device()
    block = min(n, 256)
    assert n % block == 0
    out = [device.empty(n, t) for t in outputs]
    Module.from_ptx(text).launch("k", n // block, block, [*map(device.array, inputs), *out], device=device, **options)
    return [x.numpy() for x in out]


@pytest.fixture
def ptx():
    return run_ptx


@pytest.fixture
def rng():
    return np.random.default_rng(7)
