"""Checks of the arguments that are not data: numbers, names, functions.

Each check returns the plain Python value, or raises an error that says in one line what was expected and what came. NumPy's numbers and
tensors of one element are accepted as Python's numbers are. A bool is not accepted as a number.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch

Name = TypeVar("Name", bound=str)
Kind = TypeVar("Kind")
Callback = TypeVar("Callback")


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """An integer in low..high."""
    try:
        found = None if _is_bool(value) else operator.index(value)
    except TypeError:
        found = None
    if found is None or found < low or (high is not None and found > high):
        wanted = f"of at least {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name} must be an integer {wanted}, got {shown(value)}")
    return found


def index(name: str, value: Any) -> int:
    """An integer of any size, for an op's argument: a SymInt, which a compiler puts in place of a number, is returned as it is."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return cast(int, value)
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    try:
        return operator.index(value)
    except TypeError:  # a tensor or an array of something else
        raise TypeError(f"{name} must be an integer, got {shown(value)}") from None


def real(name: str, value: Any) -> float:
    """A real number, for an op's argument. A SymFloat, which a compiler puts in place of a number, is returned as it is.

    Infinity and NaN are accepted; the op looks at the value itself. A text is not, even if it could be read as a number.
    """
    if isinstance(value, (int, float, torch.SymFloat)):
        return cast(float, value)
    if not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # an array of several
        raise TypeError(f"{name} must be a number, got {type(value).__name__}") from None


def pair(name: str, value: Any, of: str) -> tuple[Any, Any]:
    """A tuple or a list of two values, whose meaning ``of`` gives for the message."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name} must be {of}, got {shown(value)}")
    return value[0], value[1]


def number(name: str, value: Any, wanted: str = "be a finite number") -> float:
    """A finite number. ``wanted`` is what follows "must" in the message."""
    try:
        found = math.nan if _is_bool(value) or not hasattr(value, "__float__") else float(value)
    except (TypeError, ValueError, RuntimeError):  # an array of several
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"{name} must {wanted}, got {shown(value)}")
    return found


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if value is True or value is False:  # fast: each step of a loop asks
        return value
    if not isinstance(value, np.bool_):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def choice(name: str, value: Any, choices: Sequence[Name]) -> Name:
    """One of some names."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {shown(value)}")
    return cast(Name, value)


def function(name: str, value: Callback) -> Callback:
    """Anything that can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {type(value).__name__}")
    return value


def tensor(name: str, value: Any) -> torch.Tensor:
    """A tensor, for callers that read its dtype or device before the op checks it. Anything else raises TypeError."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    return value


def device(name: str, value: Any) -> torch.device:
    """A device, or the name of one."""
    if isinstance(value, torch.device):
        return value
    try:
        return torch.device(value)
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(f"{name} must be a torch.device or its name, got {shown(value)}") from None


def instance(name: str, value: Any, kind: type[Kind]) -> Kind:
    """An object of a class."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}, got {type(value).__name__}")
    return value


def shown(value: Any) -> str:
    """Text for a value in a message, in one line: an array is shown by its shape, a long text is cut off."""
    if getattr(value, "shape", ()) and hasattr(value, "dtype"):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 200 else f"{text[:200]}..."


def _is_bool(value: Any) -> bool:
    return isinstance(value, (bool, np.bool_)) or getattr(value, "dtype", None) in (torch.bool, np.bool_)
