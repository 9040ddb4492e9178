"""The machine code of the CUDA kernels, as it lies in the installed module: PTX is what the simulator runs, SASS is what a GPU runs.

Nothing that must be rounded by itself is contracted, no array or spilled register lies in local memory but where docs/kernels.md
says so, and tensors are read and written 16 bytes at a time.
"""

import functools
import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from machine import SIMULATED_ARCHS, nvcc_missing, triton_missing
from op_cases import everything, make
from ptxsim.nvcc import assemble, compile_ptx
from simulator import simulated

from ddpm_fast.backends import native, native_missing

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
KERNELS = {"group_norm": 18, "group_norm_backward": 20, "attention": 12, "attention_backward": 30}
TRITON = [
    ("q_sample", "Noise"),
    ("simple_loss", "Noise"),
    ("p_step learned, multistep and guided", "Noise"),
    ("vlb_terms", None),
]  # one of a kind
SPILLS = {("sm_90", "16attention_kernelIfLi256E"), ("sm_90", "30attention_backward_keys_kernelIfLi256ELi2E")}


@functools.cache
def cuobjdump():
    """The tool of the CUDA toolkit, or the one that comes with Triton; empty where there is none."""
    package = importlib.util.find_spec("triton")
    ours = Path(package.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if package else Path()
    return shutil.which("cuobjdump") or (str(ours) if ours.is_file() else "")


def instructions(cubin):
    """How often each instruction stands in each function of a cubin."""
    if not cuobjdump():
        pytest.skip("cuobjdump is neither on PATH nor in Triton")
    text = subprocess.run([cuobjdump(), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    functions = (part.split("\n", 1) for part in text.split("Function : ")[1:])
    return {name.strip(): Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", body)) for name, body in functions}


@functools.cache
def ptx_of(name, arch):
    if nvcc_missing():
        pytest.skip(nvcc_missing())
    include = [str(CUDA)] if name.startswith("attention") else []  # as the other tests have it, so that each is compiled once
    return compile_ptx(str(CUDA / f"{name}.cu"), arch, include, ["-std=c++17"])


@pytest.fixture(scope="module")
def sass_of(tmp_path_factory):
    """sass_of(name, arch): how often each instruction stands in each function that csrc/cuda/<name>.cu was built to."""
    if native is None or native.build_info()["cuda"] is None:
        pytest.skip(native_missing or "ddpm_fast._C was built without CUDA")
    if not cuobjdump():
        pytest.skip("cuobjdump is neither on PATH nor in Triton")
    folder = tmp_path_factory.mktemp("cubins")
    subprocess.run([cuobjdump(), "-xelf", "all", native.__file__], cwd=folder, capture_output=True, check=True)

    @functools.cache
    def sass(name, arch):
        kernel = re.compile(rf"\d{name}_(?:keys_)?kernelI".encode())
        cubins = list(folder.glob(f"*.{arch}.cubin"))
        if not cubins:
            pytest.skip(f"ddpm_fast._C was not built for {arch}, but for {native.build_info()['cuda_architectures']}")
        (cubin,) = (path for path in cubins if kernel.search(path.read_bytes()))
        found = {plain(function): counts for function, counts in instructions(cubin).items()}
        assert len(found) == KERNELS[name]
        return found

    return sass


def plain(function):
    """A mangled name without that of the file's unnamed namespace, which has a hash of where it was compiled."""
    return re.sub(r"\d+_GLOBAL__N__[0-9a-f]{8}_\d+_\w+?_cu_[0-9a-f]{8}", "", function)


def count(found, start):
    return sum(n for op, n in found.items() if op == start or op.startswith(f"{start}."))


def in_ptx(ptx):
    """How often each instruction stands in each kernel of a PTX text."""
    bodies = re.findall(r"\.entry (\w+)\((.*?)^}", ptx, re.M | re.S)
    return {plain(name): Counter(re.findall(r"^\s*(?:@\S+ )?((?:mul|add|sub)\.rn\.f32)\b", body, re.M)) for name, body in bodies}


@pytest.mark.parametrize("arch", SIMULATED_ARCHS)
@pytest.mark.parametrize("name", KERNELS)
def test_no_local_memory(name, arch, sass_of):
    for kernel, found in sass_of(name, arch).items():
        if not any(arch == a and part in kernel for a, part in SPILLS):
            assert count(found, "LDL") == count(found, "STL") == 0, kernel


@pytest.mark.parametrize("arch", SIMULATED_ARCHS)
@pytest.mark.parametrize("name", ["attention", "attention_backward"])
def test_attention_rounds_its_logits_and_sums(name, arch, sass_of):
    """A logit is rounded before anything is subtracted, and fp32's parts are added to their sums in registers: an FADD each."""
    wanted = in_ptx(ptx_of(name, arch))
    for kernel, found in sass_of(name, arch).items():
        assert found["FMUL"] >= wanted[kernel]["mul.rn.f32"], kernel
        products = found["HMMA.1688.F32.TF32"]
        if products:  # of six of a part, into four sums
            assert found["FADD"] >= products // 6 * 4, kernel
        assert bool(products) == ("kernelIf" in kernel and "delta" not in kernel), kernel


@pytest.mark.parametrize("arch", SIMULATED_ARCHS)
def test_accesses_are_16_bytes_wide(arch, sass_of):
    """All of attention's tiles and rows; group_norm's data in every kernel for vectors."""
    for name in ("attention", "attention_backward"):
        for kernel, found in sass_of(name, arch).items():
            copies = {op for op in found if op.startswith("LDGSTS")}
            loads = {op for op in found if re.match(r"LDG\.", op)}
            if "delta" in kernel:
                assert not copies and loads == {"LDG.E.128.CONSTANT"}, kernel
                continue
            assert copies == {"LDGSTS.E.BYPASS.128"} | ({"LDGSTS.E"} if "keys" in kernel else set()), kernel  # logsumexp and delta
            assert loads == ({"LDG.E.CONSTANT"} if "queries" in kernel else set()), kernel
            assert found["STG.E.128"] and found["STG.E"] <= 2, kernel
            assert not any(re.match(r"STG\.E\.(U8|U16|64)", op) for op in found), kernel
    for name, tensors in (("group_norm", 1), ("group_norm_backward", 2)):
        for kernel, found in sass_of(name, arch).items():
            shape = re.search(r"Lb[01]ELi(\d+)ELi(\d+)E", kernel)
            if shape and shape[1] != "1":
                assert found["LDG.E.128.CONSTANT"] == tensors * int(shape[2]), kernel
                assert count(found, "STG.E.128") >= int(shape[2]), kernel


@pytest.mark.skipif(bool(triton_missing()), reason=triton_missing() or "-")
def test_contraction_would_be_noticed(tmp_path):
    """Without .rn ptxas may contract, and does: in the noise, whose bits it would change."""
    if shutil.which("ptxas") is None:
        pytest.skip("ptxas is not on PATH")
    with simulated(80, run=False) as launches:
        everything(make("q_sample", "Noise", (2, 1, 1, 1504), torch.float32), backend="triton")
    ptx = launches[0].compiled.asm["ptx"]  # of forward, which draws
    cubin, _ = assemble(re.sub(r"\b(mul|add|sub)\.rn\.f32", r"\1.f32", ptx), "sm_80")
    (found,) = instructions(cubin).values()
    assert found["FMUL"] < len(re.findall(r"\bmul\.(?:rn\.)?f32\b", ptx))


@pytest.mark.skipif(bool(triton_missing()), reason=triton_missing() or "-")
@pytest.mark.parametrize("call", TRITON, ids=str)
@pytest.mark.parametrize("arch", SIMULATED_ARCHS)
def test_triton_kernels(arch, call, tmp_path):
    """No local memory; as many multiplications and additions as the PTX has. (Roots, divisions, exponentials have FFMAs of their own.)"""
    with simulated(int(arch[3:]), run=False) as launches:
        everything(make(*call, (2, 1, 1, 1504), torch.float32), backend="triton")
    assert launches
    for launch in launches:
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(launch.compiled.asm["cubin"])
        (found,) = instructions(cubin).values()
        written = Counter(re.findall(r"\b(mul|add|sub|fma)\.(?:rn\.)?f32\b", launch.compiled.asm["ptx"]))
        assert count(found, "LDL") == count(found, "STL") == written["fma"] == 0, launch.name
        assert found["FMUL"] >= written["mul"] and found["FADD"] >= written["add"] + written["sub"], launch.name
