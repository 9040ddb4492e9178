"""Drives CMake for `pip install`. Everything declarative is in pyproject.toml.

Environment, read at build time only:
    DDPM_FAST_CUDA        auto (default: where nvcc works), 0 or 1
    DDPM_FAST_CUDA_ARCHS  for instance "80;90" (default: the GPUs present, else 80 and 90 with PTX)
    CXX, CUDACXX          compilers, as CMake understands them
    CUDA_HOME, CUDA_PATH  toolkits to look for nvcc in, where it is not on PATH
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
USUAL_TOOLKIT = "/usr/local/cuda"
NO_COMPILER = """
ddpm_fast builds its kernels and found no C++ compiler (looked for {looked_for}). Install one:
    Debian, Ubuntu    apt-get install g++
    Fedora, RHEL      dnf install gcc-c++
    macOS             xcode-select --install
    conda             conda install -c conda-forge cxx-compiler
or set CXX to the compiler's path.
"""


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        check_compiler()
        import pybind11  # build requirements; not needed for metadata

        if compiler := nvcc():
            os.environ["CUDACXX"] = compiler  # which CMake reads
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / ext.name
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-G",
            "Ninja",
            str(ROOT),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DDDPM_FAST_CUDA={cuda_choice()}",
        ]
        architectures = os.environ.get("DDPM_FAST_CUDA_ARCHS") or present_architectures()
        if architectures:
            configure.append(f"-DDDPM_FAST_CUDA_ARCHS={architectures}")
        try:
            subprocess.run(configure, cwd=build, check=True)
            subprocess.run(["cmake", "--build", ".", *parallel()], cwd=build, check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"ddpm_fast: {' '.join(error.cmd[:2])} failed; the compiler's message stands above") from None


def check_compiler() -> None:
    given = os.environ.get("CXX", "")
    if given and not given.strip():
        raise SystemExit(f"CXX must name a compiler or be unset, got {given!r}")
    names = given.split()[:1] or ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in names):
        raise SystemExit(NO_COMPILER.format(looked_for=", ".join(names)))


def cuda_choice() -> str:
    choice = os.environ.get("DDPM_FAST_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"DDPM_FAST_CUDA must be auto, 0 or 1, got {choice!r}")
    return choice


def nvcc() -> str:
    """The CUDA compiler: CUDACXX, nvcc on PATH, or that of a toolkit that CUDA_HOME or CUDA_PATH names or that lies at /usr/local/cuda."""
    if os.environ.get("CUDACXX", "").strip():
        return os.environ["CUDACXX"]
    toolkits = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + [USUAL_TOOLKIT]
    found = [shutil.which("nvcc"), *(shutil.which("nvcc", path=str(Path(toolkit, "bin"))) for toolkit in toolkits if toolkit)]
    return next(filter(None, found), "")


def present_architectures() -> str:
    """Compute capabilities of the GPUs in this machine, for CMake; empty, for the default, where there are none.

    Empty too where the nvcc at hand is too old for one of them: the default's PTX serves it.
    """
    present = re.findall(r"^(\d+)\.(\d+)$", output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"), re.MULTILINE)
    known = output(nvcc() or "nvcc", "--list-gpu-arch")
    architectures = sorted({major + minor for major, minor in present})
    return ";".join(architectures) if all(f"compute_{a}" in known for a in architectures) else ""


def output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def parallel() -> list[str]:
    return [] if "CMAKE_BUILD_PARALLEL_LEVEL" in os.environ else ["--parallel", str(os.cpu_count() or 1)]


setup(ext_modules=[Extension("ddpm_fast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
