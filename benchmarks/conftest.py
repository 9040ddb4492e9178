"""Threads, and what is recorded with every figure."""

from __future__ import annotations

import pytest
import torch
from harness import COPY
from measure import environment, threads_set

ALL_THREADS = torch.get_num_threads()


def pytest_report_header(config):
    return "benchmarks on: " + ", ".join(f"{name} {value}" for name, value in environment().items())


@pytest.fixture(params=sorted({1, ALL_THREADS}), ids=lambda count: f"{count} thread{'s' * (count > 1)}")
def threads(request):
    with threads_set(request.param):
        yield request.param


@pytest.fixture
def timed(benchmark, threads):
    """Checks and times each side of a case, and records the bytes that it must move, its bandwidth and the environment."""

    def run(case, side: str) -> None:
        try:
            function = case.side(side)
        except LookupError as reason:
            pytest.skip(str(reason))
        if side != COPY:
            case.check(side)
        function()
        benchmark(function)
        benchmark.extra_info.update(environment() | {"threads": threads, "bytes": case.needed_bytes})
        if benchmark.stats is not None:  # --benchmark-disable
            benchmark.extra_info["GB/s"] = case.needed_bytes / benchmark.stats.stats.median / 1e9

    return run
