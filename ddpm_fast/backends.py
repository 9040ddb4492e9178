"""Choice of the implementation of an op, and the reasons why a backend cannot run here.

Backends: ``reference`` (plain PyTorch, any device), ``cpu`` and ``cuda`` (C++, in ``ddpm_fast._C``), ``triton``. An op lists
the ones it has in a :class:`BackendTable`. A backend that cannot run on this machine stays in the list, with the reason:
``ddpm-fast info`` prints it, and a call that forces the backend (``backend="..."``) raises it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import shutil
import warnings
from collections.abc import Callable
from typing import Any, get_args

import torch

from ddpm_fast.types import Backend

BACKENDS: tuple[Backend, ...] = get_args(Backend)
# Device types whose tensors a backend takes. Triton's interpreter, which replaces its compiler in a process that is started with
# TRITON_INTERPRET=1, also takes CPU tensors where it is forced: for tests.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TAKES = {"cpu": ("cpu",), "triton": ("cuda", "cpu") if _INTERPRETED else ("cuda",), "cuda": ("cuda",)}
OLDEST_CAPABILITY = (7, 5)  # the oldest that the Triton kernels have been compiled for
DEFAULTS: dict[str, tuple[Backend, ...]] = {
    "cpu": ("cpu",),
    "cuda": ("triton", "cuda"),
}  # by device type: the first that an op has and that is not missing here
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NATIVE_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/common/dtype.h

native: Any = None  # ddpm_fast._C, where it loads
try:
    from ddpm_fast import _C

    native = _C
    native_missing = ""
except ImportError as error:
    native_missing = f"ddpm_fast._C was not built or does not load ({error}); run `pip install -e .` again and read its output"


_switched_off: dict[str, str] = {}  # backend: the reason, or an empty one


@functools.cache
def missing(backend: str, device: torch.device | None = None) -> str:
    """Reason why a backend cannot run; empty where it can.

    Args:
        backend: its name.
        device: the GPU in question. Without one, or without its number, a backend is there if it runs on any GPU of this machine.
    """
    if _switched_off.get(backend):
        return _switched_off[backend]
    if backend == "cpu":
        return native_missing
    if backend not in ("cuda", "triton"):
        return ""
    reason = _missing_everywhere(backend)
    if reason or (backend == "triton" and _INTERPRETED):
        return reason
    if device is not None and device.type == "cuda" and device.index is not None:
        return _missing_on(backend, device.index)
    reasons = [_missing_on(backend, index) for index in range(torch.cuda.device_count())]
    return "" if "" in reasons else reasons[0]


def disable(backend: Backend) -> None:
    """Switches a backend off in this process, for all ops: the next one that an op has runs instead, at last the reference.

    For a GPU whose driver or toolkit has a fault, and to compare. A kernel that has failed with an illegal access cannot be switched off
    in its process: PyTorch can no longer use the GPU there. Call this at the start of the next one.

    Args:
        backend: "cpu", "triton" or "cuda".

    Raises:
        ValueError: for another name.
    """
    _switch(backend, f"switched off by backends.disable({backend!r})")


def enable(backend: Backend) -> None:
    """Switches a backend on again after :func:`disable`. Raises ValueError as that does."""
    _switch(backend, "")


def _switch(backend: str, reason: str) -> None:
    if backend not in TAKES:
        raise ValueError(f"backend must be one of {', '.join(TAKES)}, got {backend!r}")
    _switched_off[backend] = reason
    missing.cache_clear()
    for table in tables.values():
        table.forget()


def _missing_everywhere(backend: str) -> str:
    """Reason why a backend for GPUs cannot run on any; empty where one must be asked."""
    if backend == "cuda" and native_missing:
        return native_missing
    if backend == "cuda" and native.build_info()["cuda"] is None:
        return f"ddpm_fast._C was built without CUDA: {native.build_info()['cuda_missing']}"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if backend == "triton" and _INTERPRETED:
        return ""
    if not torch.version.cuda:
        return "this PyTorch was built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    return _triton_cannot_start() if backend == "triton" else ""


def _missing_on(backend: str, index: int) -> str:
    """Reason why a backend cannot run on one GPU; empty where it can."""
    if backend == "triton":
        return _too_old("Triton needs", OLDEST_CAPABILITY, index)
    built = [int(number) for number in re.findall(r"\d+", native.build_info()["cuda_architectures"])]
    # The kernels themselves are asked last: a driver that is older than the toolkit, an architecture without code.
    return (_too_old("ddpm_fast._C was built for", divmod(min(built), 10), index) if built else "") or native.cuda_problem(index)


def _too_old(who: str, needed: tuple[int, int], index: int) -> str:
    """Reason why kernels cannot start on a GPU; empty where they can. ``needed`` is a compute capability."""
    present = torch.cuda.get_device_capability(index)
    numbers = ["{}.{}".format(*capability) for capability in (needed, present)]
    return f"{who} a compute capability of {numbers[0]} or more, cuda:{index} has {numbers[1]}" if present < needed else ""


def _triton_cannot_start() -> str:
    """Reason why Triton could not start its driver, which it does in the middle of a program; empty where it can.

    It compiles a part of it in C, for which it needs a compiler, Python.h and libcuda.
    """
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton builds its launcher with a C compiler, and there is no gcc or clang on PATH and no CC"
    try:
        _start_triton()
    except Exception as error:  # of the compiler, of the loader, of Triton
        return f"Triton's driver does not start: {' '.join(f'{type(error).__name__}: {error}'.split())[:300]}"
    return ""


def _start_triton() -> None:
    from triton.runtime import driver

    driver.active.get_current_target()


class BackendTable:
    """The implementations of one op, all with the same arguments.

    Args:
        op: its name, for messages.
        implementations: backend name to function; ``reference`` must be there.
    """

    def __init__(self, op: str, **implementations: Callable[..., Any]) -> None:
        self.op = op
        self.implementations = implementations
        self._defaults: dict[tuple[torch.device, torch.dtype], Callable[..., Any]] = {}
        tables[op] = self

    def choose(self, device: torch.device, dtype: torch.dtype, backend: str | None = None) -> Callable[..., Any]:
        """The function to call for tensors of this device and dtype; ``backend`` forces one.

        Raises:
            ValueError: for an unknown backend, or one that does not do this device or dtype.
            RuntimeError: for a backend that is missing on this machine, with the reason.
        """
        if backend is None:
            chosen = self._defaults.get((device, dtype))
            if chosen is None:
                name = self.default(device, dtype)
                if name == "reference":
                    self._say_why(device, dtype)
                chosen = self._defaults[device, dtype] = self.implementations[name]
            return chosen
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        if backend not in self.implementations:
            raise ValueError(f"{self.op} has no {backend} backend; it has {', '.join(self.implementations)}")
        if backend != "reference":
            if device.type not in TAKES[backend]:
                raise ValueError(f"backend {backend!r} of {self.op} takes {'CPU' if backend == 'cpu' else 'CUDA'} tensors, got {device}")
            if dtype not in NATIVE_DTYPES:
                raise ValueError(f"backend {backend!r} of {self.op} takes float32, bfloat16 or float16, got {dtype}")
            if missing(backend, device):
                raise RuntimeError(f"backend {backend!r} is not available: {missing(backend, device)}")
        return self.implementations[backend]

    def default(self, device: torch.device, dtype: torch.dtype) -> str:
        """Name of the backend that runs unless one is forced. float64 always goes to the reference."""
        for backend in self._candidates(device, dtype):
            if not missing(backend, device):
                return backend
        return "reference"

    def forget(self) -> None:
        """Chooses anew from the next call on."""
        self._defaults.clear()

    def _candidates(self, device: torch.device, dtype: torch.dtype) -> list[Backend]:
        return [b for b in DEFAULTS.get(device.type, ()) if b in self.implementations and dtype in NATIVE_DTYPES]

    def _say_why(self, device: torch.device, dtype: torch.dtype) -> None:
        """Warns where a GPU runs an op in plain PyTorch because its kernels are missing: the same reason once in a process."""
        reasons = [missing(backend, device) for backend in self._candidates(device, dtype) if not _switched_off.get(backend)]
        if device.type == "cuda" and reasons and torch.cuda.is_available():  # else there is nothing to run on
            _warn_of("; ".join(reasons), f"{self.op} runs in plain PyTorch on {device}")


_warned_of: set[str] = set()


def _warn_of(reason: str, what: str) -> None:
    if reason not in _warned_of:
        _warned_of.add(reason)
        warnings.warn(f"{what}, in many small operations, since its kernels are missing: {reason}", RuntimeWarning, stacklevel=6)


tables: dict[str, BackendTable] = {}
library = torch.library.Library("ddpm_fast", "DEF")  # the operators that a compiler sees


def triton_kernels(op: str) -> Any:
    """The module of an op's Triton kernels, imported when one is first called: Triton is slow to import and not on every platform."""
    return importlib.import_module(f"ddpm_fast.ops.triton.{op}")


def triton_function(op: str, name: str) -> Callable[..., Any]:
    """A launcher of that module, as a function that can be listed as a backend before the module is there."""

    @functools.cache
    def load() -> Callable[..., Any]:
        return getattr(triton_kernels(op), name)

    def launch(*arguments: Any, **into: Any) -> Any:
        return load()(*arguments, **into)

    launch.__name__ = launch.__qualname__ = f"{op}_{name}_triton"
    return launch
