"""Which implementation is chosen, what a missing one says, and how ops are listed."""

import pytest
import torch
from machine import ISAS

from ddpm_fast import backends, ops
from ddpm_fast.backends import BACKENDS, BackendTable, missing, native

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def table():
    """A table of names, so that a choice can be told, which is not left among the ops."""
    made = BackendTable("an_op", **{name: name for name in BACKENDS})
    yield made
    del backends.tables["an_op"]


@pytest.fixture
def nothing_is_missing(monkeypatch):
    monkeypatch.setattr(backends, "missing", lambda backend: "")


@pytest.fixture
def all_is_missing(monkeypatch):
    monkeypatch.setattr(backends, "missing", lambda backend: "" if backend == "reference" else f"no {backend} today")


@pytest.mark.parametrize(
    "device, dtype, expected",
    [
        (CPU, torch.float32, "cpu"),
        (CPU, torch.bfloat16, "cpu"),
        (CPU, torch.float16, "cpu"),
        (CPU, torch.float64, "reference"),
        (CUDA, torch.float32, "triton"),
        (CUDA, torch.bfloat16, "triton"),
        (CUDA, torch.float64, "reference"),
        (torch.device("meta"), torch.float32, "reference"),
    ],
)
def test_default(table, nothing_is_missing, device, dtype, expected):
    assert table.default(device.type, dtype) == expected
    assert table.choose(device, dtype) == expected
    assert table.choose(device, dtype) == expected  # from what it remembers


def test_default_without_triton_is_cuda_and_without_either_the_reference(nothing_is_missing):
    try:
        assert BackendTable("an_op", reference="r", cpu="c", cuda="d").choose(CUDA, torch.float32) == "d"
        assert BackendTable("an_op", reference="r", cpu="c").choose(CUDA, torch.float32) == "r"
        assert BackendTable("an_op", reference="r").choose(CPU, torch.float32) == "r"
    finally:
        del backends.tables["an_op"]


def test_what_is_missing_is_never_the_default(table, all_is_missing):
    for device in (CPU, CUDA):
        assert table.choose(device, torch.float32) == "reference"


@pytest.mark.parametrize("name, device", [("cpu", CPU), ("triton", CUDA), ("cuda", CUDA)])
def test_a_forced_missing_backend_says_why(table, all_is_missing, name, device):
    with pytest.raises(RuntimeError, match=f"backend '{name}' is not available: no {name} today"):
        table.choose(device, torch.float32, name)


@pytest.mark.parametrize("name, device", [("reference", CPU), ("reference", CUDA), ("cpu", CPU), ("triton", CUDA), ("cuda", CUDA)])
def test_a_forced_backend_is_taken(table, nothing_is_missing, name, device):
    assert table.choose(device, torch.float32, name) == name


@pytest.mark.parametrize(
    "name, device, dtype, message",
    [
        ("tpu", CPU, torch.float32, "backend must be one of reference, cpu, triton, cuda, got 'tpu'"),
        ("cpu", CUDA, torch.float32, "backend 'cpu' of an_op takes CPU tensors, got cuda"),
        ("triton", CPU, torch.float32, "backend 'triton' of an_op takes CUDA tensors, got cpu"),
        ("cuda", CPU, torch.float32, "backend 'cuda' of an_op takes CUDA tensors, got cpu"),
        ("cpu", CPU, torch.float64, r"backend 'cpu' of an_op takes float32, bfloat16 or float16, got torch\.float64"),
        ("triton", CUDA, torch.int32, r"backend 'triton' of an_op takes float32, bfloat16 or float16, got torch\.int32"),
    ],
)
def test_what_a_forced_backend_cannot_do(table, nothing_is_missing, name, device, dtype, message):
    with pytest.raises(ValueError, match=message):
        table.choose(device, dtype, name)


def test_a_backend_that_the_op_does_not_have(nothing_is_missing):
    try:
        with pytest.raises(ValueError, match="an_op has no triton backend; it has reference, cpu"):
            BackendTable("an_op", reference="r", cpu="c").choose(CUDA, torch.float32, "triton")
    finally:
        del backends.tables["an_op"]


@pytest.fixture
def forgetful():
    """`missing` asks again, before and after."""
    missing.cache_clear()
    yield
    missing.cache_clear()


def test_missing_without_the_native_module(monkeypatch, forgetful):
    monkeypatch.setattr(backends, "native", None)
    monkeypatch.setattr(backends, "native_missing", "it was not built")
    assert missing("cpu") == missing("cuda") == "it was not built"
    assert missing("reference") == ""


def test_missing_without_cuda_in_the_build(monkeypatch, forgetful):
    class WithoutCuda:
        def build_info():
            return {"cuda": None, "cuda_missing": "switched off"}

    monkeypatch.setattr(backends, "native", WithoutCuda)
    monkeypatch.setattr(backends, "native_missing", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert missing("cuda") == "ddpm_fast._C was built without CUDA: switched off"
    assert missing("cpu") == missing("triton") == ""


@pytest.mark.parametrize(
    "capabilities, on_path, cc, message",
    [
        ([(9, 0)], ["gcc"], "", ""),
        ([(9, 0)], ["clang"], "", ""),
        ([(9, 0)], [], "/opt/cc", ""),
        ([(9, 0)], [], "", "Triton builds its launcher with a C compiler, and there is no gcc or clang on PATH and no CC"),
        ([(9, 0), (7, 0)], ["gcc"], "", "Triton needs a compute capability of 7.5 or more, the oldest GPU here has 7.0"),
    ],
)
def test_missing_where_triton_could_not_launch(monkeypatch, forgetful, capabilities, on_path, cc, message):
    """The first op must not stop there: the reference runs, and `info` says why."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
    monkeypatch.setattr("shutil.which", lambda name: name if name in on_path else None)
    monkeypatch.setenv("CC", cc)
    assert missing("triton") == message


@pytest.mark.parametrize(
    "built, capability, message",
    [
        ("80-real 90", (8, 0), ""),
        ("80-real 90", (12, 0), ""),  # by the PTX of the newest
        ("native", (7, 0), ""),  # of the GPU that it was built beside
        ("90 86-real", (8, 0), "ddpm_fast._C was built for a compute capability of 8.6 or more, the oldest GPU here has 8.0"),
        ("100", (9, 0), "ddpm_fast._C was built for a compute capability of 10.0 or more, the oldest GPU here has 9.0"),
    ],
)
def test_missing_where_no_kernel_of_the_build_could_start(monkeypatch, forgetful, built, capability, message):
    class WithCuda:
        def build_info():
            return {"cuda": 13000, "cuda_architectures": built}

    monkeypatch.setattr(backends, "native", WithCuda)
    monkeypatch.setattr(backends, "native_missing", "")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert missing("cuda") == message


@pytest.mark.parametrize("version, message", [("13.0", "PyTorch sees no CUDA device"), (None, "this PyTorch was built without CUDA")])
def test_missing_without_a_device(monkeypatch, forgetful, version, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", version)
    assert missing("triton") == message


def test_every_op_is_listed_with_a_reference():
    assert {"q_sample", "randn"} <= set(backends.tables)
    for op, table in backends.tables.items():
        assert table.op == op
        assert "reference" in table.implementations
        assert set(table.implementations) <= set(BACKENDS)
        assert all(callable(implementation) for implementation in table.implementations.values())
    assert callable(ops.q_sample)


def test_select_isa():
    if native is None:
        pytest.skip(backends.native_missing)
    offered = native.build_info()["isas"]
    assert offered[-1] == "portable" and set(offered) <= set(ISAS)
    try:
        for isa in offered:
            native.select_isa(isa)
            assert native.isa() == isa
        for isa in ("sse9", "", *(set(ISAS) - set(offered))):
            with pytest.raises(ValueError, match=f"this processor does not run the {isa} build"):
                native.select_isa(isa)
            assert native.isa() == offered[-1]  # a refused one changes nothing
    finally:
        native.select_isa(None)
    assert native.isa() == offered[0]
