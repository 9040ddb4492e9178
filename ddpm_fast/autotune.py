"""Which of several implementations of a call is the fastest here: each new kind of call is timed once, and the choice remembered.

Where PyTorch's own kernel may be faster than ours on some GPU at some shape, `choose` measures instead of guessing. A choice holds
for one device model, version of PyTorch and of ddpm_fast, op and key (shape, dtype and what else matters). It is kept in this process
and in ``ddpm_fast/autotune.json`` in the user's cache folder ($XDG_CACHE_HOME, ~/.cache, on macOS ~/Library/Caches), so that later
processes do not time again, and ``ddpm-fast info`` lists it. The candidate named as the default is only ever left for one that gave
the same result to within a tolerance and was measurably faster.

**Reproducibility.** Another kernel rounds otherwise, so a choice changes bits. On one machine a remembered choice makes later runs
equal, until the file is gone. For equal bits on any machine switch it off: ``autotune.enable(False)``, ``with autotune.disabled():``
or ``torch.use_deterministic_algorithms(True)``; then the default always runs. The ranks of a distributed run each choose for
themselves: they differ only where two candidates take nearly the same time, and not where the choice is in a file that they share.
"""
from __future__ import annotations

import math
import platform
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ddpm_fast._autotune_file import Choice, ChoiceFile
from ddpm_fast._autotune_measure import difference, measure, tensors

MARGIN = 1.02  # a gain below this is a tie: two measurements of the same kernel differ by as much
WAIT_SECONDS = 10.0  # for another thread that is timing the same
TIMED = ("cpu", "cuda")  # device types whose work can be timed here
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


@cache
def device_name(device: torch.device) -> str:
    """What a choice holds for: all GPUs of a model, or the processor of this host."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return f"{found.name}, compute capability {found.major}.{found.minor}"
    return f"{device.type} of {platform.node()}"


class Autotuner:
    """Choices in memory and in a file. The functions of this module are the methods of one for the whole process.

    Args:
        path: the file; by default in the user's cache folder.
        measure: ``measure(candidates, device)``, name to seconds a call.
    """

    def __init__(self, path: Path | None = None, measure: Callable[[dict[str, Callable], torch.device], dict[str, float]] = measure) -> None:
        self._file = ChoiceFile(path)
        self._measure = measure
        self._enabled, self._disabled = True, 0
        self._remembered: dict[tuple, Choice] = {}
        self._measured: dict[tuple, Choice] = {}  # by this process and fit for the file
        self._changed = threading.Condition()  # guards all of these
        self._writing = threading.Lock()
        self._timing: tuple | None = None  # what is being timed, and by which thread
        self._thread = 0

    def choose(
        self,
        op: str,
        key: str | tuple,
        candidates: dict[str, Callable[[], Any]],
        default: str,
        *,
        device: torch.device,
        tolerance: float | None = None,
    ) -> str:
        """The name of the candidate to call.

        The first time, each candidate is called (the default first, and the others' results compared with its), then those that are
        left are timed in turn. Another one than the default is chosen if it is faster by more than 2 %.

        - A candidate that raises, runs out of memory, or gives a result of another shape, not finite where the default's is, or
          further from it than the tolerance, is ruled out, and the reason kept. A time that is not finite does not win. A warning
          says that two results differ, as either may be the wrong one.
        - If the default fails and another one works, that one is chosen and a warning says so. If all fail, the default's exception
          is raised, nothing is remembered, and the next call tries again.
        - What hung on the moment is remembered in this process only: memory that ran out, results that differed, a failed timing.
        - Nothing is timed or recorded while a CUDA graph is being captured on the current stream of the device (a remembered choice
          holds, else the default), while the autotuner is off or torch.compile traces this call (the default holds), for tensors
          without data, in a call made by a candidate, or while another thread times something else (a remembered choice, else the
          default: its turn comes). A thread that asks for what another one is timing waits for it.

        Candidates run without grad mode, on the current stream. One that times its backward pass has to enable it on leaves of its
        own, and must leave no gradient behind. They must not draw from a global generator or change their inputs. Their results are
        freed at once.

        Args:
            op: name of the op.
            key: all that the choice depends on besides the device: shape, dtype, whether gradients are needed; on CPU the number of
                threads.
            candidates: name to a call without arguments, which returns a tensor or a nested tuple or list of tensors.
            default: the candidate to prefer.
            device: where the candidates run.
            tolerance: largest difference from the default's result, as a fraction of its largest value; by default half of the
                digits of the dtype.

        Raises:
            ValueError: the default is not a candidate.
            TypeError: the key is neither a string nor a tuple.
            Exception: what the default raised, where every candidate failed.
        """
        if default not in candidates:
            raise ValueError(f"default must be one of the candidates {', '.join(candidates)}, got {default!r}")
        if not isinstance(key, (str, tuple)):
            raise TypeError(f"key must be a str or a tuple, got {type(key).__name__}")
        if torch.compiler.is_compiling() or self.why_off() or len(candidates) == 1:
            return default
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        name = (device_name(device), op, key)
        choice = self._remembered.get(name)
        if choice is not None and choice.is_among(candidates):
            return choice.chosen
        with self._changed:
            if self._timing == name and self._thread != threading.get_ident():
                self._changed.wait_for(lambda: self._timing != name, WAIT_SECONDS)
            choice = self._recall(name, candidates)
            if choice is not None:
                return choice.chosen
            if self._timing is not None or device.type not in TIMED or _capturing(device):
                return default
            self._timing, self._thread = name, threading.get_ident()
        try:
            choice, lasting = self._decide(name, candidates, default, device, tolerance)
            with self._changed:
                self._remembered[name] = choice
                if lasting:
                    self._measured[choice.identity] = choice
        except _NothingToTimeError:
            return default
        finally:
            with self._changed:
                self._timing = None
                self._changed.notify_all()
        if lasting:
            with self._writing:
                self._file.add(list(self._measured.values()))
        return choice.chosen

    def enable(self, on: bool = True) -> None:
        """Switches the autotuner on or off, for the whole process. Off, every choice is the default, whatever was remembered."""
        self._enabled = bool(on)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Off within the block, for all threads."""
        with self._changed:
            self._disabled += 1
        try:
            yield
        finally:
            with self._changed:
                self._disabled -= 1

    def why_off(self) -> str:
        """Why every choice is the default; empty while the autotuner is on."""
        if not self._enabled or self._disabled:
            return "switched off"
        return "torch.use_deterministic_algorithms(True)" if torch.are_deterministic_algorithms_enabled() else ""

    def clear(self) -> None:
        """Forgets every choice, in this process and in the file; other processes keep theirs until they end."""
        with self._writing, self._changed:
            self._remembered.clear()
            self._measured.clear()
            self._file.remove()

    def choices(self) -> list[dict[str, Any]]:
        """What is remembered for these versions of PyTorch and ddpm_fast, here and in the file.

        Returns:
            For each a JSON-able dictionary: device, torch, ddpm_fast, op, key, chosen, seconds (candidate to median time of a call),
            ruled_out (candidate to reason), time (when it was made).
        """
        with self._changed:
            found = self._file.read() | {choice.identity: choice for choice in self._remembered.values()}
        return [asdict(choice) for identity, choice in sorted(found.items()) if identity[1:3] == _versions()]

    def _recall(self, name: tuple, candidates: dict[str, Callable]) -> Choice | None:
        """A choice among these candidates, from memory or the file; another process may have made it just now."""
        choice = self._remembered.get(name)
        if choice is None or not choice.is_among(candidates):
            choice = self._file.read().get(_identity(name))
        if choice is None or not choice.is_among(candidates):
            return None
        self._remembered[name] = choice
        return choice

    def _decide(
        self, name: tuple, candidates: dict[str, Callable], default: str, device: torch.device, tolerance: float | None
    ) -> tuple[Choice, bool]:
        """Tries and times the candidates: the choice, and whether it is fit for the file."""
        order = {default: candidates[default]} | candidates
        # The caller's hooks on saved tensors are not for candidates: a checkpoint counts what it sees.
        with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            failures = _try(order, device, tolerance)
            left = {n: function for n, function in order.items() if n not in failures}
            try:
                measured, failure = self._measure(left, device), ""
            except Exception as error:
                measured, failure = {}, f"timing failed: {_reason(error)}"
        seconds = {n: float(measured.get(n, math.nan)) for n in left}
        chosen = _fastest(seconds, default)
        ruled_out = {n: found.reason for n, found in failures.items()}
        ruled_out |= {n: failure or f"its time was {value}" for n, value in seconds.items() if not _is_time(value)}
        choice = Choice(*_identity(name), chosen, {n: value for n, value in seconds.items() if _is_time(value)}, ruled_out)
        if default in failures:
            warnings.warn(f"{name[1]}: {chosen!r} is used, because {default!r} failed: {ruled_out[default]}", RuntimeWarning, stacklevel=3)
        for n, found in failures.items():
            if found.differs:
                warnings.warn(f"{name[1]}: {n!r} is not used: {found.reason}", RuntimeWarning, stacklevel=3)
        return choice, len(choice.seconds) == len(left) and all(found.lasting for found in failures.values())


class _NothingToTimeError(Exception):
    """The tensors have no data: a program is being traced."""


class _Failure(NamedTuple):
    """Why a candidate is ruled out."""

    reason: str
    differs: bool = False  # its result is not the default's
    lasting: bool = False  # it would fail for any other values and with any other memory free


def _try(candidates: dict[str, Callable], device: torch.device, tolerance: float | None) -> dict[str, _Failure]:
    """Calls each once and compares it with the first that works. Gives those that are ruled out.

    Raises:
        Exception: that of the first, if all fail.
    """
    failures: dict[str, _Failure] = {}
    baseline = first_error = None
    try:
        for name, function in candidates.items():
            result = None
            try:
                result = list(tensors(function()))
                if any(type(x) not in (torch.Tensor, torch.nn.Parameter) for x in result):
                    raise _NothingToTimeError
                if device.type == "cuda":
                    torch.cuda.current_stream(device).synchronize()  # a fault on the device is then this candidate's
                if baseline is None:
                    baseline = (result, name)
                elif reason := difference(result, *baseline, tolerance):
                    failures[name] = _Failure(reason, differs=True)
            except Exception as error:
                first_error = first_error or error
                failures[name] = _Failure(_reason(error), lasting=result is None and not isinstance(error, OUT_OF_MEMORY))
        if len(failures) == len(candidates):
            raise first_error
        return failures
    finally:
        first_error = None  # it holds the candidate's frame and this one, with their tensors, and this one holds it


def _fastest(seconds: dict[str, float], default: str) -> str:
    timed = {name: value for name, value in seconds.items() if _is_time(value)}
    if not timed or (default in seconds and default not in timed):
        return default if default in seconds else next(iter(seconds))
    best = min(timed, key=timed.get)
    return default if default in timed and timed[default] <= MARGIN * timed[best] else best


def _is_time(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:200]


def _versions() -> tuple[str, str]:
    from ddpm_fast._version import __version__

    return str(torch.__version__), __version__


def _identity(name: tuple) -> tuple[str, ...]:
    device, op, key = name
    return device, *_versions(), op, key if isinstance(key, str) else ", ".join(map(_text, key))


def _text(part: object) -> str:
    return "x".join(map(str, part)) if isinstance(part, tuple) else str(part).removeprefix("torch.")


_autotuner = Autotuner()
choose, enable, disabled, why_off = _autotuner.choose, _autotuner.enable, _autotuner.disabled, _autotuner.why_off
clear, choices = _autotuner.clear, _autotuner.choices
