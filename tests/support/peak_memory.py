"""Measures the peak of a process's memory while an op runs; `python peak_memory.py` prints all of op_cases.py's as JSON.

The kernel keeps the peak of the resident set (VmHWM in /proc/self/status), and writing 5 to /proc/self/clear_refs sets it back to
what is resident now. So PyTorch's memory is counted, and what C++ takes by malloc or new just so: a profiler sees only the first.
Where it can fail: memory that is freed and stays resident is used again without a trace, so glibc must give every large block
back to the system, for which its thresholds are set in the environment (ENVIRONMENT) before the process starts; memory that is
taken but never touched is not counted, nor need it be; the counters are kept for each processor and added up in steps, which is
worth some hundred KiB.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from op_cases import NAMES, TABLES, Case, make, thread_count, upstreams

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
SHAPE, COPIES = (2, 2, 256, 256), 8  # together 8 MiB in float32, 4 MiB in bfloat16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _peak() -> int:
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def extra(call: Callable[[], list[torch.Tensor | None]]) -> int:
    """Bytes that a call needs at its peak, beyond what was there before and what it returns."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak()
    results = call()
    return _peak() - before - sum(x.numel() * x.element_size() for x in results if x is not None)


def forward(case: Case) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(case())


def forward_and_backward(case: Case, grads: list[torch.Tensor]) -> list[torch.Tensor]:
    results = case()
    return [*results, *torch.autograd.grad(results, case.inputs(), grads)]


def with_a_copy(case: Case) -> list[torch.Tensor]:
    """What must be found: a temporary of PyTorch's."""
    first = case.leaves[0]
    return forward(case.given(**{first: case.arguments[first] * 1.0}))


def with_a_buffer(case: Case) -> list[torch.Tensor]:
    """And one of C++'s, which PyTorch knows nothing of."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    size = data_bytes(case)
    place = libc.malloc(size)
    ctypes.memset(place, 1, size)
    results = forward(case)
    libc.free(place)
    return results


def data_bytes(case: Case) -> int:
    x = case.arguments[case.leaves[0]]
    return x.numel() * x.element_size()


def measure(name: str, given: str | None, dtype: str) -> dict[str, int]:
    few = make(name, given, SHAPE, DTYPES[dtype])  # drawing that many numbers would take longer than all that is measured
    case = few.map(lambda part, x: x if part in TABLES else x.repeat(COPIES, *[1] * (x.ndim - 1))).watched()
    grads = upstreams(case())
    forward_and_backward(case, grads)  # what is made once: threads, caches, code
    return {
        "data": data_bytes(case),
        "forward": extra(lambda: forward(case)),
        "forward and backward": extra(lambda: forward_and_backward(case, grads)),
        "with a copy": extra(lambda: with_a_copy(case)),
        "with a buffer": extra(lambda: with_a_buffer(case)),
    }


if __name__ == "__main__":
    gc.disable()  # nothing here is in a cycle, and memory must be given back when it is, not at some later time
    with thread_count(2):
        print(json.dumps([[name, given, dtype, measure(name, given, dtype)] for name, given in NAMES for dtype in DTYPES]))
