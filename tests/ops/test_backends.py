"""Which implementation is chosen, what a missing one says, and how ops are listed."""

import re

import pytest
import torch
from machine import ISAS

from ddpm_fast import backends, ops
from ddpm_fast.backends import BACKENDS, BackendTable, missing, native
from ddpm_fast.models import UNet
from ddpm_fast.models.cpu_plan import plan_obstacle

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def table():
    """A table of names, so that a choice can be told, which is not left among the ops."""
    made = BackendTable("an_op", **{name: name for name in BACKENDS})
    yield made
    del backends.tables["an_op"]


@pytest.fixture
def nothing_is_missing(monkeypatch):
    monkeypatch.setattr(backends, "missing", lambda backend, device=None: "")


@pytest.fixture
def all_is_missing(monkeypatch):
    monkeypatch.setattr(backends, "missing", lambda backend, device=None: "" if backend == "reference" else f"no {backend} today")


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
    assert table.default(device, dtype) == expected
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
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "_start_triton", lambda: None)
    assert missing("cuda") == "ddpm_fast._C was built without CUDA: switched off"
    assert missing("cpu") == missing("triton") == ""


@pytest.fixture
def gpus(monkeypatch, forgetful):
    """gpus(capability, ...): a machine with such GPUs, as far as PyTorch says, and a build of ours for some architectures."""

    class WithCuda:
        built, problems = "80-real 90", {}

        def build_info():
            return {"cuda": 13000, "cuda_architectures": WithCuda.built}

        def cuda_problem(index):
            return WithCuda.problems.get(index, "")

    def there_are(*capabilities, built="80-real 90", problems=()):
        WithCuda.built, WithCuda.problems = built, dict(problems)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "native", WithCuda)
    monkeypatch.setattr(backends, "native_missing", "")
    monkeypatch.setattr(backends, "_start_triton", lambda: None)
    monkeypatch.setattr("shutil.which", lambda name: name)
    return there_are


@pytest.mark.parametrize(
    "on_path, cc, message",
    [
        (["gcc"], "", ""),
        (["clang"], "", ""),
        ([], "/opt/cc", ""),
        ([], "", "Triton builds its launcher with a C compiler, and there is no gcc or clang on PATH and no CC"),
    ],
)
def test_missing_where_triton_could_not_launch(monkeypatch, gpus, on_path, cc, message):
    """The first op must not stop there: the reference runs, and `info` says why."""
    gpus((9, 0))
    monkeypatch.setattr("shutil.which", lambda name: name if name in on_path else None)
    monkeypatch.setenv("CC", cc)
    assert missing("triton") == message


def test_missing_where_tritons_driver_does_not_start(monkeypatch, gpus):
    """As without Python.h, or libcuda: it is tried before an op needs it."""
    gpus((9, 0))

    def start():
        raise ImportError("libcuda.so cannot be found!\nPossible files are located at []")

    monkeypatch.setattr(backends, "_start_triton", start)
    reason = "Triton's driver does not start: ImportError: libcuda.so cannot be found! Possible files are located at []"
    assert missing("triton") == missing("triton", torch.device("cuda", 0)) == reason


@pytest.mark.parametrize(
    "built, capability, message",
    [
        ("80-real 90", (8, 0), ""),
        ("80-real 90", (12, 0), ""),  # by the PTX of the newest
        ("native", (7, 0), ""),  # of the GPU that it was built beside
        ("90 86-real", (8, 0), "ddpm_fast._C was built for a compute capability of 8.6 or more, cuda:0 has 8.0"),
        ("100", (9, 0), "ddpm_fast._C was built for a compute capability of 10.0 or more, cuda:0 has 9.0"),
    ],
)
def test_missing_where_no_kernel_of_the_build_could_start(gpus, built, capability, message):
    gpus(capability, built=built)
    assert missing("cuda") == message


def test_each_gpu_is_asked_for_itself(table, gpus):
    """One old card beside a new one switches nothing off on the new one."""
    gpus((8, 9), (6, 1), (8, 6), problems={2: "CUDA driver version is insufficient"})
    first, second, third = (torch.device("cuda", index) for index in range(3))
    assert missing("triton") == missing("cuda") == missing("triton", first) == missing("cuda", first) == ""
    assert missing("triton", second) == "Triton needs a compute capability of 7.5 or more, cuda:1 has 6.1"
    assert missing("cuda", second) == "ddpm_fast._C was built for a compute capability of 8.0 or more, cuda:1 has 6.1"
    assert missing("cuda", third) == "CUDA driver version is insufficient"
    assert [table.default(device, torch.float32) for device in (first, second, third)] == ["triton", "reference", "triton"]
    with pytest.raises(RuntimeError, match="backend 'triton' is not available: Triton needs .* cuda:1 has 6.1"):
        table.choose(second, torch.float32, "triton")


def test_missing_where_no_gpu_will_do(gpus):
    gpus((6, 1), (7, 0))
    assert missing("triton") == "Triton needs a compute capability of 7.5 or more, cuda:0 has 6.1"


def test_a_gpu_that_runs_the_reference_says_why_once(gpus, monkeypatch):
    gpus((6, 1))
    monkeypatch.setattr(backends, "_warned_of", set())
    tables = [BackendTable(f"op {i}", reference="r", cuda="d") for i in range(2)]
    try:
        device = torch.device("cuda", 0)
        message = (
            "op 0 runs in plain PyTorch on cuda:0, in many small operations, since its kernels are missing: ddpm_fast._C was built for"
        )
        with pytest.warns(RuntimeWarning, match=message) as warned:
            assert [table.choose(device, torch.float32) for table in tables] == ["r", "r"]
            assert tables[0].choose(device, torch.float64) == "r"  # which has no kernels anywhere
        assert len(warned) == 1
    finally:
        for table in tables:
            del backends.tables[table.op]


def test_a_backend_is_switched_off_and_on(table, gpus):
    gpus((9, 0))
    device = torch.device("cuda", 0)
    assert table.choose(device, torch.float32) == "triton"
    try:
        backends.disable("triton")
        assert table.choose(device, torch.float32) == "cuda"
        assert missing("triton") == missing("triton", device) == "switched off by backends.disable('triton')"
        with pytest.raises(RuntimeError, match=r"backend 'triton' is not available: switched off by backends\.disable"):
            table.choose(device, torch.float32, "triton")
        backends.disable("cuda")
        assert table.choose(device, torch.float32) == "reference"
        backends.disable("cpu")
        assert table.choose(CPU, torch.float32) == "reference"
    finally:
        for backend in ("cpu", "triton", "cuda"):
            backends.enable(backend)
    assert table.choose(device, torch.float32) == "triton" and table.choose(CPU, torch.float32) == "cpu"


def test_every_op_takes_the_reference_where_the_cpu_kernels_are_off():
    if native is None:
        pytest.skip(backends.native_missing)
    try:
        backends.disable("cpu")
        for op, table in backends.tables.items():
            if "cpu" in table.implementations:
                assert table.choose(CPU, torch.float32) is table.implementations["reference"], op
        net = UNet.from_preset("digits").eval()
        assert "kernels" in plan_obstacle(net, torch.zeros(1, 1, 8, 8))
    finally:
        backends.enable("cpu")
    assert table.choose(CPU, torch.float32) is table.implementations["cpu"]


@pytest.mark.parametrize("name", ["reference", "gpu", None])
@pytest.mark.parametrize("switch", [backends.disable, backends.enable])
def test_what_cannot_be_switched_off(switch, name):
    with pytest.raises(ValueError, match=f"backend must be one of cpu, triton, cuda, got {name!r}"):
        switch(name)


def test_the_kernels_say_why_they_cannot_start():
    if native is None or not hasattr(native, "cuda_problem"):
        pytest.skip(backends.native_missing or "ddpm_fast._C was built without CUDA")
    if torch.cuda.is_available():
        assert all(native.cuda_problem(index) == "" for index in range(torch.cuda.device_count()) if not missing("cuda"))
        assert "invalid device ordinal" in native.cuda_problem(torch.cuda.device_count())
    else:
        assert re.fullmatch(r".+ \(kernels built with CUDA \d+\.\d, driver (not found|for CUDA \d+\.\d)\)", native.cuda_problem(0))


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
