"""How the autotuner times candidates, and how it finds one whose result is wrong."""
from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

WARM_UPS = 2  # after the call that is compared: caches, clocks, the allocator's blocks
ROUNDS = 9
SAMPLE_SECONDS = 0.001  # long against the clock of CUDA events (half a microsecond), short for whoever waits
MAX_CALLS = 50  # in a sample
# Half of the digits of the results' dtype, but not more than TF32's, in which PyTorch may be allowed to compute fp32: a wrong result is
# off by far more, and a right one by less.
LEAST_TOLERANCE = 2.0**-8


def measure(candidates: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Median seconds of a call of each candidate.

    The candidates alternate, round after round, so that whatever slows the machine slows them all. On CUDA the time is that between
    two events on the current stream, so it includes the host's where the host is what a call waits for, and the inputs are in the
    cache as far as they fit.

    Args:
        candidates: name to what is called.
        device: where they run; "cpu" or "cuda".
    """
    sample = _cuda_sample if device.type == "cuda" else _host_sample
    for function in candidates.values():
        for _ in range(WARM_UPS):
            function()
    calls = {name: _calls(sample(function, 1, device)()) for name, function in candidates.items()}
    names, waiting = list(candidates), {name: [] for name in candidates}
    for turn in range(ROUNDS):
        for k in range(len(names)):
            name = names[(turn + k) % len(names)]  # none always follows the same one
            waiting[name].append(sample(candidates[name], calls[name], device))
    return {name: statistics.median(seconds() for seconds in samples) for name, samples in waiting.items()}


def _calls(seconds: float) -> int:
    return max(1, min(MAX_CALLS, math.ceil(SAMPLE_SECONDS / max(seconds, 1e-9))))


def _host_sample(function: Callable[[], object], calls: int, device: torch.device) -> Callable[[], float]:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    seconds = (time.perf_counter() - start) / calls
    return lambda: seconds


def _cuda_sample(function: Callable[[], object], calls: int, device: torch.device) -> Callable[[], float]:
    """The reading waits, not the sample: the device does not run idle between two of them."""
    stream = torch.cuda.current_stream(device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record(stream)
    for _ in range(calls):
        function()
    end.record(stream)

    def seconds() -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1000 / calls

    return seconds


def tensors(result: object) -> Iterator[Tensor]:
    """The tensors of a result: one, or a nested tuple or list of them and None."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for part in result:
            yield from tensors(part)
    elif result is not None:
        raise TypeError(f"a candidate must return a tensor or a tuple or list of them, got {type(result).__name__}")


def difference(result: list[Tensor], baseline: list[Tensor], of: str, tolerance: float | None = None) -> str:
    """Why a result is not the baseline's, named ``of``; empty where it is.

    Args:
        result, baseline: the tensors to compare, in order.
        tolerance: largest difference allowed, as a fraction of the largest value of the baseline's tensor. None takes half of the
            dtype's digits. Where the baseline is not finite nothing is compared.
    """
    theirs, ours = [[(tuple(x.shape), x.dtype) for x in side] for side in (result, baseline)]
    if theirs != ours:
        return f"its result is {theirs}, that of {of} is {ours}"
    for number, (x, y) in enumerate(zip(result, baseline)):
        if not x.numel():
            continue
        where = f"result {number} " if len(result) > 1 else "its result "
        wide = torch.promote_types(x.dtype, torch.float32)
        x, y = x.detach().to(wide), y.detach().to(wide)
        known = y.isfinite()
        if (known & ~x.isfinite()).any():
            return f"{where}is not finite where that of {of} is"
        error = torch.where(known, x - y, 0).abs().max().item()
        allowed = _tolerance(baseline[number].dtype, tolerance) * torch.where(known, y, 0).abs().max().item()
        if error > allowed:
            return f"{where}differs from that of {of} by {error:.2g}, more than {allowed:.2g}"
    return ""


def _tolerance(dtype: torch.dtype, tolerance: float | None) -> float:
    if tolerance is not None:
        return tolerance
    return max(torch.finfo(dtype).eps ** 0.5, LEAST_TOLERANCE) if dtype.is_floating_point else 0.0
