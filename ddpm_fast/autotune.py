"""Choice between kernels of one result: the first call of a kind times them, and this process remembers the fastest.

Another kernel rounds otherwise, so a choice changes bits. For equal bits in every run switch it off: ``autotune.enable(False)``,
``with autotune.disabled():`` or ``torch.use_deterministic_algorithms(True)``; then the default always runs. Each
rank of a distributed run chooses for itself. Their choices differ only if two kernels take nearly the same time.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

MARGIN = 1.02  # a gain below this is a tie: two measurements of the same kernel differ by as much
ROUNDS = 9
SAMPLE_SECONDS, MAX_CALLS = 0.001, 50  # of a sample: much longer than the wait for the device takes
# Half of the digits of the results' dtype, but not more than TF32's, in which PyTorch may be allowed to compute fp32: a wrong result is
# off by far more, and a right one by less.
LEAST_TOLERANCE = 2.0**-8

_enabled = True
_disabled: list[None] = []  # an entry for each `disabled` block, of any thread
_choices: dict[tuple[Any, ...], dict[str, Any]] = {}
_timing = threading.Lock()


def choose(
    op: str, key: tuple[Any, ...], candidates: dict[str, Callable[[], tuple[Tensor, ...]]], default: str, device: torch.device
) -> str:
    """Name of the candidate to call.

    - The first time, each candidate is called once and compared with the default. It is ruled out if it raises, if it differs by more
      than half of the dtype's digits, or if it is not finite where the default is. A warning says that results differ, as either may be
      wrong. The others are timed in turn, and one of them replaces the default if it is faster by more than 2 %.
    - If the default fails, another one is chosen, with a warning. If all fail, the first one's exception is raised, and the next call
      tries again.
    - The default is taken and nothing is timed while the autotuner is off or torch.compile traces the call. The same holds for a kind
      that is new while a CUDA graph is captured, or while any thread is timing.

    Candidates run without grad mode and without the caller's hooks on saved tensors: one that times its backward pass enables it on
    leaves of its own. They must not draw from a global generator or change their inputs.

    Args:
        op: name of the op.
        key: all that the choice depends on beside the device: shape, dtype, whether gradients are needed.
        candidates: name to a call without arguments, which returns a tuple of tensors.
        default: the candidate to prefer.
        device: where the candidates run.
    """
    if torch.compiler.is_compiling() or why_off():
        return default
    name = (device, op, *key)
    if name in _choices:
        return _choices[name]["chosen"]
    if _capturing(device) or not _timing.acquire(blocking=False):
        return default
    try:
        with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            ruled_out = _try({default: candidates[default]} | candidates, op, device)
            seconds = measure({n: call for n, call in candidates.items() if n not in ruled_out}, device)
        chosen = min(seconds, key=seconds.__getitem__)
        if default in ruled_out:
            warnings.warn(f"{op}: {chosen!r} is used, because {default!r} failed: {ruled_out[default]}", RuntimeWarning, stacklevel=2)
        elif seconds[default] <= MARGIN * seconds[chosen]:
            chosen = default
        _choices[name] = dict(device=str(device), op=op, key=list(map(str, key)), chosen=chosen, seconds=seconds, ruled_out=ruled_out)
        return chosen
    finally:
        _timing.release()


def enable(on: bool = True) -> None:
    """Switches the autotuner on or off, for the whole process. Off, every choice is the default, whatever was remembered."""
    global _enabled
    _enabled = bool(on)


@contextmanager
def disabled() -> Iterator[None]:
    """Switches the autotuner off within the block, for all threads."""
    _disabled.append(None)
    try:
        yield
    finally:
        _disabled.pop()


def why_off() -> str:
    """Reason why every choice is the default; empty while the autotuner is on."""
    if not _enabled or _disabled:
        return "switched off"
    return "torch.use_deterministic_algorithms(True)" if torch.are_deterministic_algorithms_enabled() else ""


def clear() -> None:
    """Forgets every choice."""
    _choices.clear()


def choices() -> list[dict[str, Any]]:
    """Lists what this process has chosen, as JSON values.

    Returns:
        A dict for each choice: device, op, key, chosen (the name), seconds (the median of a call, by name) and ruled_out (the reason,
        by name).
    """
    return list(_choices.values())


def measure(candidates: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Median seconds of a call of each candidate. They alternate, so that whatever slows the machine slows them all."""

    def sample(call: Callable[[], object], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        _wait(device)
        return (time.perf_counter() - start) / calls

    for call in candidates.values():
        sample(call, 2)  # caches, clocks, the allocator's blocks
    calls = {n: max(1, min(MAX_CALLS, math.ceil(SAMPLE_SECONDS / max(sample(call, 1), 1e-9)))) for n, call in candidates.items()}
    samples: dict[str, list[float]] = {n: [] for n in candidates}
    for turn in range(ROUNDS):
        for n in list(candidates)[:: -1 if turn % 2 else 1]:  # none always follows the same one
            samples[n].append(sample(candidates[n], calls[n]))
    return {n: statistics.median(values) for n, values in samples.items()}


def difference(result: tuple[Tensor, ...], expected: tuple[Tensor, ...], of: str) -> str:
    """Compares a result with the expected one, which is the candidate ``of``'s.

    Values are not compared where the expected one is infinite or NaN.

    Returns:
        The difference in words; empty where there is none beyond the tolerance.
    """
    theirs, ours = [[(tuple(x.shape), x.dtype) for x in side] for side in (result, expected)]
    if theirs != ours:
        return f"its result is {theirs}, that of {of} is {ours}"
    for x, y in zip(result, expected, strict=True):
        known = y.isfinite()
        if (known & ~x.isfinite()).any():
            return f"its result is not finite where that of {of} is"
        allowed = max(torch.finfo(y.dtype).eps ** 0.5, LEAST_TOLERANCE) * torch.where(known, y, 0).abs().max().item()
        if (error := torch.where(known, x.float() - y.float(), 0).abs().max().item()) > allowed:
            return f"its result differs from that of {of} by {error:.2g}, more than {allowed:.2g}"
    return ""


def _try(candidates: dict[str, Callable[[], tuple[Tensor, ...]]], op: str, device: torch.device) -> dict[str, str]:
    """Calls each candidate once and compares its result with that of the first that works.

    Returns:
        The reason, by name, for each candidate that is ruled out.
    """
    ruled_out, works, errors = {}, None, []
    for name, call in candidates.items():
        try:
            result = call()
            _wait(device)  # a fault on the device is then this candidate's
            works = works or (result, name)
            if reason := difference(result, *works):
                ruled_out[name] = reason
                warnings.warn(f"{op}: {name!r} is not used: {reason}", RuntimeWarning, stacklevel=3)
        except Exception as error:
            errors.append(error)
            ruled_out[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    try:
        if works is None:
            raise errors[0]
        return ruled_out
    finally:
        del errors  # they hold this frame with its tensors, and this one holds them


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
