"""Peak extra memory of every differentiable op: its outputs only. How that is measured, and where it can fail: peak_memory.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import peak_memory
import pytest
from op_cases import every_case

from ddpm_fast.backends import native_missing

# Beyond the outputs: blocks of 1024 elements on the threads' stacks, a number for each chunk of a sample, the steps of the
# system's counters. A quarter of the smallest data measured.
ALLOWANCE = 1 << 20
DTYPES = pytest.mark.parametrize("dtype", list(peak_memory.DTYPES))


@pytest.fixture(scope="module")
def measured():
    """All measurements, from one process of its own."""
    if native_missing:
        pytest.skip(native_missing)
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("/proc/self/clear_refs, which resets the peak of the resident set, cannot be written here")
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = os.environ | peak_memory.ENVIRONMENT | {"PYTHONPATH": path}
    run = subprocess.run([sys.executable, str(Path(peak_memory.__file__))], env=environment, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stderr[-2000:]
    return {(name, given, dtype): sizes for name, given, dtype, sizes in json.loads(run.stdout)}


@pytest.mark.parametrize("what", ["forward", "forward and backward"])
@DTYPES
@every_case
def test_needs_its_outputs_only(name, given, dtype, what, measured):
    sizes = measured[name, given, dtype]
    assert sizes[what] <= ALLOWANCE, f"{sizes[what] / sizes['data']:.2f} times the data beyond the outputs"


# The measurement itself: it finds one temporary, whoever makes it.
@pytest.mark.parametrize("what", ["with a copy", "with a buffer"])
@DTYPES
@every_case
def test_a_temporary_is_found(name, given, dtype, what, measured):
    sizes = measured[name, given, dtype]
    assert sizes[what] > sizes["data"] - ALLOWANCE > ALLOWANCE
