"""The op tests on kernels that GCC's sanitizers watch: ``python tests/sanitize.py address`` or ``thread``, then any pytest arguments.

``address`` is AddressSanitizer with UBSan, ``thread`` is ThreadSanitizer. ddpm_fast._C is built with CMake in build/sanitize-*,
beside a copy of the Python package; the installed one is left alone. Before the tests, calls that are wrong on purpose must be
reported: a sanitizer that sees nothing would pass every test. Needs GCC with its sanitizer runtimes, cmake, ninja and pybind11.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Allocations of CPython and PyTorch that live as long as the process are not leaks. libgomp, PyTorch and CPython are not
# instrumented, so what they synchronise with is unknown and only accesses from the kernels count.
OPTIONS = {
    "address": {"ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1"},
    "thread": {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1"},
}
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}

# Tests that are left out, and why. Files of *_cuda.py are left out too: this build has no CUDA part, and the simulator of its
# PTX has checks of its own.
COMPILER = "PyTorch's tracers and compiler call the same kernels as eager code does, and what they generate is not instrumented"
MEMORY = "a sanitizer's shadow memory is not the op's"
FORK = "ThreadSanitizer does not support a child forked from a process with threads"
ALWAYS = {
    "tests/ops/test_randn.py::test_compiles_whole_and_does_not_recompile_for_each_stream[inductor]": COMPILER,
    "tests/ops/test_ops_compile.py": COMPILER,
    "tests/ops/test_ops_memory.py": MEMORY,
}
DESELECTED = {
    "address": ALWAYS,
    "thread": ALWAYS
    | {
        "tests/ops/test_randn.py::test_dataloader_workers_draw_the_same": FORK,
        "tests/ops/test_ops_system.py::test_safe_in_a_forked_child": FORK,
    },
}

# Wrong calls of the kernels, and what the report must say. None is reported by luck: each kernel touches what it must not.
FAULTS = {
    "address": {
        "heap-buffer-overflow": "_C.cpu_randn(sizes=torch.empty(1, 1025), out=torch.empty(1024), key=(0, 0, 0))",
        "misaligned address": "_C.first_out_of_range(torch.frombuffer(bytearray(24), dtype=torch.int64, count=2, offset=4), 1)",
    },
    "thread": {
        # The output of the team's first thread is the input of its second.
        "data race": "x = torch.zeros(3, 16384); one = torch.ones(1); t = torch.zeros(2, dtype=torch.int64); torch.set_num_threads(2)\n"
        "for _ in range(20): _C.cpu_q_sample(sizes=x[:2], x_start=x[:2], t=t, signal=one, sigma=one, noise=(0, 0, 0), out=x[1:])",
    },
}

# Starts what runs under the sanitizer. The working folder, which holds the package without its _C, must not be on the path.
LOAD = """
import sys
sys.path = [path for path in sys.path if path]
import torch
from ddpm_fast import _C
folder, sanitizer = sys.argv[1:3]
if not _C.__file__.startswith(folder) or _C.build_info()["sanitizer"] != sanitizer:
    sys.exit(f"loaded {_C.__file__} with sanitizer {_C.build_info().get('sanitizer')}, not the one in {folder}")
"""
RUN_TESTS = (
    LOAD
    + """
import pytest
sys.exit(pytest.main(sys.argv[3:]))
"""
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("sanitizer", choices=list(OPTIONS))
    arguments, pytest_arguments = parser.parse_known_args()
    sanitizer = arguments.sanitizer
    os.environ.setdefault("CXX", "g++")
    package = build(sanitizer)
    environment = {
        **os.environ,
        **OPTIONS[sanitizer],
        "PYTHONPATH": str(package),
        # libstdc++ before PyTorch loads it: the runtime looks for its functions when it starts.
        "LD_PRELOAD": f"{compiler_file(RUNTIMES[sanitizer])} {compiler_file('libstdc++.so')}",
        "OMP_NUM_THREADS": "2",
    }
    run = [sys.executable, "-c"]
    for report, fault in FAULTS[sanitizer].items():
        done = subprocess.run([*run, LOAD + fault, str(package), sanitizer], cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode == 0 or report not in done.stderr:
            sys.exit(f"{sanitizer}: no report of a {report} where there is one (exit status {done.returncode})\n{done.stderr}")
        print(f"{sanitizer}: reports a {report}", flush=True)
    for test, reason in DESELECTED[sanitizer].items():
        print(f"{sanitizer}: without {test}: {reason}", flush=True)
    deselect = [f"--deselect={test}" for test in DESELECTED[sanitizer]]
    # Reports go to the process's stderr, which pytest would keep to itself when the sanitizer ends the process.
    options = ["--capture=sys", "-p", "no:cacheprovider", *deselect, *pytest_arguments]
    return subprocess.run([*run, RUN_TESTS, str(package), sanitizer, *options, *op_tests()], cwd=ROOT, env=environment).returncode


def build(sanitizer: str) -> Path:
    """Builds _C; returns the folder that has the package with it."""
    if missing := [tool for tool in ("cmake", "ninja") if not shutil.which(tool)]:
        sys.exit(f"{' and '.join(missing)} not found; pip install '.[dev]'")
    import pybind11

    folder = ROOT / "build" / f"sanitize-{sanitizer}"
    package = folder / "package"
    configure = [
        "cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder),
        f"-DDDPM_FAST_SANITIZE={sanitizer}", "-DDDPM_FAST_CUDA=0",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    for command in (configure, ["cmake", "--build", str(folder)]):
        if subprocess.run(command).returncode:
            sys.exit(f"{' '.join(command[:2])} failed; its message stands above")
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "ddpm_fast", package / "ddpm_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for module in folder.glob("_C.*"):
        shutil.copy(module, package / "ddpm_fast")
    return package


def compiler_file(name: str) -> str:
    """Path of one of the compiler's libraries."""
    command = [*shlex.split(os.environ["CXX"]), f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        sys.exit(f"{os.environ['CXX']} has no {name}; install GCC's sanitizer runtimes")
    return path


def op_tests() -> list[str]:
    """Test files of the ops, and of the noise that they share."""
    ops = [path.stem.strip("_") for path in (ROOT / "ddpm_fast" / "ops").glob("*.py")]
    files = {path for op in [*ops, "ops", "noise", "words"] for path in (ROOT / "tests").glob(f"*/test_{op}*.py")}
    return sorted(str(path.relative_to(ROOT)) for path in files if not path.stem.endswith("_cuda"))


if __name__ == "__main__":
    sys.exit(main())
