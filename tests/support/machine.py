"""What this machine has for the tests: instruction sets, the CUDA compiler and Triton."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

from ddpm_fast.backends import native, native_missing

# Builds of the CPU kernels and what a processor must have for them (CMakeLists.txt).
ISAS = {"portable": (), "avx2": ("avx2", "fma"), "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq", "fma")}
SIMULATED_ARCHS = ("sm_80", "sm_90")


def isa_missing(isa: str) -> str:
    """Why a build of the CPU kernels does not run here; empty where it does."""
    if native is None:
        return native_missing
    if isa in native.build_info()["isas"]:
        return ""
    lacking = [flag for flag in ISAS[isa] if flag not in processor_flags()]
    return f"this processor lacks {' '.join(lacking)}" if lacking else f"ddpm_fast._C was built without {isa}"


def nvcc_missing() -> str:
    return "" if shutil.which("nvcc") else "nvcc is not on PATH, so there is no PTX to simulate"


def nvcc_version() -> str:
    found = re.search(r"release ([\d.]+)", subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout)
    return f"nvcc {found[1]}" if found else "nvcc"


def triton_missing() -> str:
    return "" if importlib.util.find_spec("triton") else "Triton is not installed"


def triton_version() -> str:
    return importlib.metadata.version("triton")


def processor_flags() -> set[str]:
    try:
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return set(found[1].split()) if found else set()
