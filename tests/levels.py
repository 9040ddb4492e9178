"""The numeric tests on other processors' algorithms: ``python tests/levels.py``, then any pytest arguments.

PyTorch's own kernels, with which the tests compare, add up in another order or by another algorithm on every processor. Three
libraries choose for themselves: ATen, oneDNN and MKL. Each of LEVELS holds them to an older processor or switches one off; every
level runs with 1, 2 and 4 threads, in a process of its own. Levels that this processor does not have are named. A table of the
results comes last, with each test that failed; the exit status is the number of runs with failures.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from support.machine import processor_flags

ROOT = Path(__file__).resolve().parents[1]
THREADS = (1, 2, 4)


def machine(aten: str, onednn: str, mkl: str) -> dict[str, str]:
    return {"ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn, "MKL_ENABLE_INSTRUCTIONS": mkl}


WITHOUT_ONEDNN = {"TEST_WITHOUT_ONEDNN": "1"}
COMPATIBLE = {"MKL_CBWR": "COMPATIBLE"}  # MKL cannot be switched off: this is its code without any of its own instruction sets

# name -> (what the processor must have, environment). MKL has no code for AVX any more and takes SSE 4.2's.
LEVELS = {
    "this processor": ((), {}),
    "SSE 4": ((), machine("default", "SSE41", "SSE4_2")),
    "AVX": (("avx",), machine("default", "AVX", "SSE4_2")),
    "AVX2": (("avx2", "fma"), machine("avx2", "AVX2", "AVX2")),
    "AVX-512": (("avx512f", "avx512bw", "avx512vl", "avx512dq"), machine("avx512", "AVX512_CORE", "AVX512")),
    "AMX": (("amx_tile", "amx_bf16"), machine("avx512", "AVX512_CORE_AMX", "AVX512")),
    # Beside oneDNN with AMX PyTorch's flash attention takes a way that ATen without AVX-512 has not: "pack_vnni2 is only supported".
    "ATen without vectors": ((), {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}),
    "MKL compatible": ((), COMPATIBLE),
    "without oneDNN": ((), WITHOUT_ONEDNN),
    "AVX2 without oneDNN": (("avx2", "fma"), machine("avx2", "AVX2", "AVX2") | WITHOUT_ONEDNN),
    "nothing": ((), machine("default", "SSE41", "SSE4_2") | WITHOUT_ONEDNN | COMPATIBLE),
}

# Files that compare numbers; what compiles for a GPU, or looks at pixels and files, calls no kernel of PyTorch's that differs.
ELSEWHERE = re.compile(r"_cuda|triton|autotune|cli|plots|data|numerics|study")
COMPARES = re.compile(r"numerics|assert_close|allclose|approx")

RUN = """
import os, sys
import torch
torch.backends.mkldnn.set_flags("TEST_WITHOUT_ONEDNN" not in os.environ)
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--level", action="append", choices=list(LEVELS), help="this one alone (may be repeated)")
    parser.add_argument("--threads", type=int, action="append", help=f"this number alone (may be repeated); {THREADS} without")
    arguments, pytest_arguments = parser.parse_known_args()
    files = [] if any(Path(x.partition("::")[0]).exists() for x in pytest_arguments) else numeric_tests()
    rows, failed = [], {}
    for level in arguments.level or LEVELS:
        needs, environment = LEVELS[level]
        if lacking := [flag for flag in needs if flag not in processor_flags()]:
            rows.append((level, "-", f"this processor lacks {' '.join(lacking)}"))
            continue
        for threads in arguments.threads or THREADS:
            start = time.monotonic()
            command = [sys.executable, "-c", RUN, "-q", "-rf", "--tb=line", "-p", "no:cacheprovider", *pytest_arguments, *files]
            done = subprocess.run(
                command, cwd=ROOT, env={**os.environ, **environment, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True
            )
            tests = re.findall(r"^(?:FAILED|ERROR) (\S+.*?)(?: - .*)?$", done.stdout, re.M)
            if done.returncode and not tests:  # it never came to the tests
                print(done.stdout, done.stderr, sep="\n")
            for test in tests or ["pytest itself"] * bool(done.returncode):
                failed.setdefault(test, []).append(f"{level}, {threads}")
            rows.append((level, threads, f"{done.stdout.strip().splitlines()[-1] if done.stdout else 'no output'}"))
            print(f"{level}, {threads} threads: {rows[-1][2]} ({time.monotonic() - start:.0f} s)", flush=True)
    width = max(len(row[0]) for row in rows)
    print(f"\n{'level':{width}}  threads  result")
    for level, threads, result in rows:
        print(f"{level:{width}}  {threads!s:7}  {result}")
    for test, places in failed.items():
        print(f"{test}\n    fails at {'; '.join(places)}")
    return min(255, sum(any(f"{level}, {threads}" in places for places in failed.values()) for level, threads, _ in rows))


def numeric_tests() -> list[str]:
    files = (path for path in (ROOT / "tests").glob("*/test_*.py") if not ELSEWHERE.search(path.stem))
    return sorted(str(path.relative_to(ROOT)) for path in files if COMPARES.search(path.read_text()))


if __name__ == "__main__":
    sys.exit(main())
