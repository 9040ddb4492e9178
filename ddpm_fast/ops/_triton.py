"""The Triton implementations of an op, imported when one is first called: Triton is slow to import and not on every platform."""
from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any


def triton_kernels(op: str) -> Any:
    """The module of an op's kernels."""
    return importlib.import_module(f"ddpm_fast.triton_kernels.{op}")


def triton_function(op: str, name: str) -> Callable:
    """A launcher of that module, as a function that can be listed as a backend before the module is there."""

    @functools.cache
    def load() -> Callable:
        return getattr(triton_kernels(op), name)

    def launch(*arguments: Any, **into: Any) -> Any:
        return load()(*arguments, **into)

    launch.__name__ = launch.__qualname__ = f"{op}_{name}_triton"
    return launch
