"""How the benchmarks time: sides that alternate in one process, and what is written beside a figure."""

from __future__ import annotations

import platform
import re
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import ddpm_fast
from ddpm_fast.backends import native

SAMPLE_SECONDS = 0.003  # long against the clock's and the scheduler's grain, short against a change of the machine's mood


@dataclass
class Side:
    """One side's times, in seconds a call."""

    times: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile."""
        low, _, high = statistics.quantiles(self.times, n=4)
        return low, high


def alternate(sides: dict[str, Callable[[], object]], rounds: int = 40) -> dict[str, Side]:
    """Times each side in turn, round after round, so that whatever slows the machine slows them all.

    Args:
        sides: name to what is called; each is warmed up first.
        rounds: samples a side; a sample is as many calls as take about `SAMPLE_SECONDS`.
    """
    calls = {name: _calls_in_a_sample(function) for name, function in sides.items()}
    names, times = list(sides), {name: [] for name in sides}
    for turn in range(rounds):
        for k in range(len(names)):
            name = names[(turn + k) % len(names)]  # no side always follows the same one
            times[name].append(_seconds(sides[name], calls[name]) / calls[name])
    return {name: Side(values) for name, values in times.items()}


def table(results: dict[str, Side], ours: str, needed_bytes: int) -> str:
    """Medians, quartiles, effective bandwidth, and how many times the time of ``ours`` each side takes (median of the rounds' ratios)."""
    lines = [f"  {'side':<22}{'median us':>11}{'quartiles':>20}{'GB/s':>8}{'x ours':>8}{'quartiles':>14}"]
    for name, side in results.items():
        ratios = [theirs / mine for theirs, mine in zip(side.times, results[ours].times, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        spread = "{:.1f}..{:.1f}".format(*(1e6 * second for second in side.spread))
        bandwidth, ratios = needed_bytes / side.median / 1e9, f"{low:.2f}..{high:.2f}"
        lines.append(f"  {name:<22}{1e6 * side.median:>11.1f}{spread:>20}{bandwidth:>8.2f}{middle:>8.2f}{ratios:>14}")
    return "\n".join(lines)


@contextmanager
def threads_set(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def environment() -> dict[str, str]:
    """What a figure means nothing without."""
    return {
        "processor": processor(),
        "isa": native.isa() if native is not None else "none: ddpm_fast._C was not built",
        "ddpm_fast": ddpm_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _calls_in_a_sample(function: Callable[[], object]) -> int:
    for _ in range(3):
        function()
    calls = 1
    while (seconds := _seconds(function, calls)) < SAMPLE_SECONDS:
        calls = max(calls + 1, min(10 * calls, round(calls * SAMPLE_SECONDS / max(seconds, 1e-9))))
    return calls


def _seconds(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return time.perf_counter() - start
