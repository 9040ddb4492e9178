"""Threads, and what is recorded with every figure."""
from __future__ import annotations

import pytest
import torch
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
    """Times a call and records the bytes that it must move, its bandwidth and the environment."""

    def run(function, needed_bytes: int) -> None:
        benchmark(function)
        benchmark.extra_info.update(environment() | {"threads": threads, "bytes": needed_bytes})
        if benchmark.stats is not None:  # --benchmark-disable
            benchmark.extra_info["GB/s"] = needed_bytes / benchmark.stats.stats.median / 1e9

    return run
