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
DEFAULTS = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}  # by device type: the first that an op has and that is not missing here
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NATIVE_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/common/dtype.h

native: Any = None  # ddpm_fast._C, where it loads
try:
    from ddpm_fast import _C

    native = _C
    native_missing = ""
except ImportError as error:
    native_missing = f"ddpm_fast._C was not built or does not load ({error}); run `pip install -e .` again and read its output"


@functools.cache
def missing(backend: str) -> str:
    """Reason why a backend cannot run on this machine; empty where it can."""
    if backend == "cpu":
        return native_missing
    if backend == "cuda":
        if native_missing:
            return native_missing
        if native.build_info()["cuda"] is None:
            return f"ddpm_fast._C was built without CUDA: {native.build_info()['cuda_missing']}"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if backend == "triton" and _INTERPRETED:
        return ""
    if backend in ("cuda", "triton"):
        if not torch.version.cuda:
            return "this PyTorch was built without CUDA"
        if not torch.cuda.is_available():
            return "PyTorch sees no CUDA device"
    if backend == "triton":
        return _too_old("Triton needs", OLDEST_CAPABILITY) or _triton_cannot_launch()
    if backend == "cuda":
        built = [int(number) for number in re.findall(r"\d+", native.build_info()["cuda_architectures"])]
        return _too_old("ddpm_fast._C was built for", divmod(min(built), 10)) if built else ""
    return ""


def _too_old(who: str, needed: tuple[int, int]) -> str:
    """Reason why kernels cannot start on the oldest GPU here; empty where they can. ``needed`` is a compute capability."""
    oldest = min((torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())), default=needed)
    numbers = ["{}.{}".format(*capability) for capability in (needed, oldest)]
    return f"{who} a compute capability of {numbers[0]} or more, the oldest GPU here has {numbers[1]}" if oldest < needed else ""


def _triton_cannot_launch() -> str:
    """Reason why Triton could not build its launcher, which it does in the middle of a program; empty where it can."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton builds its launcher with a C compiler, and there is no gcc or clang on PATH and no CC"
    return ""


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
                chosen = self._defaults[device, dtype] = self.implementations[self.default(device.type, dtype)]
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
            if missing(backend):
                raise RuntimeError(f"backend {backend!r} is not available: {missing(backend)}")
        return self.implementations[backend]

    def default(self, device_type: str, dtype: torch.dtype) -> str:
        """Name of the backend that runs unless one is forced. float64 always goes to the reference."""
        for backend in DEFAULTS.get(device_type, ()):
            if backend in self.implementations and dtype in NATIVE_DTYPES and not missing(backend):
                return backend
        return "reference"


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
