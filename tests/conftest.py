"""What this machine can test, said at the start of every run, and the fixtures that choose among it."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import op_cases
import pytest
import torch
from interpreter import INTERPRETED, round_to_bfloat16
from machine import ISAS, SIMULATED_ARCHS, isa_missing, nvcc_missing, nvcc_version, triton_missing, triton_version

from ddpm_fast.backends import DEFAULTS, TAKES, missing, native, native_missing, tables

TESTS = Path(__file__).resolve().parent
# What each mark of pyproject.toml is given to, by path in tests/. A test of another file carries its own.
MARKED = {
    "simulator": (
        "ptxsim/*",
        "ops/test_*_cuda.py",
        "ops/test_triton_checks.py",
        "ops/test_triton_reduce.py",
        "ops/test_triton_simulated.py",
        "ops/test_triton_traffic.py",
        "ops/test_any_schedule.py",
        "ops/test_sass.py",
    ),
    "interpreter": ("ops/test_triton_interpreted.py",),
    "slow": ("ops/test_ops_memory.py",),
    "statistics": ("noise/test_noise_statistics.py", "diffusion/test_theory.py", "training/test_timestep_samplers.py"),
}
MOST_WORKERS = 8  # each takes a gigabyte with PyTorch, and where there is a GPU, memory of that


class Backend(NamedTuple):
    """One way to run an op here: force ``name``, with tensors on ``device``."""

    name: str
    isa: str | None
    device: torch.device


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="of the tensors of op_cases.py: what test_ops_*.py ask of every op; the GPU where there is one",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite runs in worker processes, one a core, where pytest-xdist is there and nothing else is asked for (``-n 0``)."""
    if hasattr(config, "workerinput") or INTERPRETED or config.option.usepdb:
        return
    if getattr(config.option, "numprocesses", 0) is None and all(Path(argument).is_dir() for argument in config.args):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        config.option.numprocesses = min(cores, MOST_WORKERS) if cores > 1 else 0
        config.option.dist = "worksteal" if cores > 1 else "no"


def pytest_configure(config):
    if hasattr(config, "workerinput"):  # cores are shared out: teams that wait for each other would spend them waiting
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    if stale := [pattern for patterns in MARKED.values() for pattern in patterns if not any(TESTS.glob(pattern))]:
        raise pytest.UsageError(f"tests/conftest.py marks files that are not there: {', '.join(stale)}")
    op_cases.DEVICE = torch.device(config.getoption("--device"))
    if INTERPRETED:
        round_to_bfloat16()
        DEFAULTS["cpu"] = ("triton",)
    config.addinivalue_line(
        "markers", "backends(op, without=()): run with each backend of the op, and the CPU one with each instruction set"
    )


@functools.cache
def marks(path: Path) -> list[str]:
    """Of MARKED, for a test file."""
    if not path.is_relative_to(TESTS):
        return []
    place = path.relative_to(TESTS).as_posix()
    return [mark for mark, patterns in MARKED.items() if any(fnmatch(place, pattern) for pattern in patterns)]


def pytest_itemcollected(item):
    for mark in marks(item.path):
        item.add_marker(mark)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # the longest first, so that workers end together


def pytest_report_header(config):
    isas = [isa if not isa_missing(isa) else f"no {isa} ({isa_missing(isa)})" for isa in ISAS]
    simulator = f"yes, {nvcc_version()} for {' '.join(SIMULATED_ARCHS)}" if not nvcc_missing() else f"no: {nvcc_missing()}"
    device = f"no: {missing('cuda')}" if missing("cuda") else f"yes, {torch.cuda.get_device_name()}"
    triton = f"{triton_version()} {'interpreted in this process' if INTERPRETED else 'interpreted, and compiled for the simulator'}"
    return [
        "ddpm_fast layers that run here:",
        f"  reference: yes, PyTorch {torch.__version__}, {torch.get_num_threads()} threads",
        f"  cpu: {native_missing or ', '.join(isas)}",
        f"  Triton: {triton_missing() or triton}",
        f"  CUDA C++ in the simulator: {simulator}",
        f"  CUDA device: {device}",
    ]


def pytest_generate_tests(metafunc):
    marker = metafunc.definition.get_closest_marker("backends")
    if marker is None or "backend" not in metafunc.fixturenames:
        return
    names = []
    for name in tables[marker.args[0]].implementations:
        if name not in marker.kwargs.get("without", ()):
            names += [f"cpu-{isa}" for isa in ISAS] if name == "cpu" else [name]
    metafunc.parametrize("backend", names, indirect=True)


@contextlib.contextmanager
def _selected(isa: str):
    if isa_missing(isa):
        pytest.skip(f"cpu kernels for {isa}: {isa_missing(isa)}")
    native.select_isa(isa)
    try:
        assert native.isa() == isa
        yield isa
    finally:
        native.select_isa(None)


@pytest.fixture(params=list(ISAS))
def isa(request):
    """Each build of the CPU kernels in turn."""
    with _selected(request.param) as name:
        yield name


@pytest.fixture
def backend(request):
    """A :class:`Backend`. With ``@pytest.mark.backends(op)``, each one that the op has; what is missing is skipped by name."""
    name, _, isa = request.param.partition("-")
    if name == "cpu":
        with _selected(isa):
            yield Backend("cpu", isa, torch.device("cpu"))
        return
    if missing(name):
        pytest.skip(f"backend {name}: {missing(name)}")
    yield Backend(name, None, torch.device("cpu" if name == "reference" or "cpu" in TAKES[name] else "cuda"))


@pytest.fixture(autouse=True)
def seed():
    """torch's global generator starts every test in the same state."""
    torch.manual_seed(0)


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    """Number of threads of PyTorch, and so of the CPU kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def csrc():
    """Folder of the native sources."""
    return TESTS.parent / "csrc"


@pytest.fixture
def command(monkeypatch, capfd):
    """Runs ``ddpm-fast`` with arguments: (exit code, stdout, stderr)."""

    def call(*arguments):
        from ddpm_fast.cli import main

        monkeypatch.setattr(sys, "argv", ["ddpm-fast", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as leave:
            code = leave.code
        return (code, *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Folder of a short training run of a short chain on the digits, by the command; not to be changed."""
    from typer.testing import CliRunner

    from ddpm_fast.cli import app

    out = tmp_path_factory.mktemp("run") / "digits"
    arguments = ["train", "--steps", "3", "--batch", "8", "--log-every", "1", "-T", "30", "--out", str(out)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return out
