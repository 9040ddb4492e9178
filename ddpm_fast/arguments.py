"""Numbers as arguments: whatever is one is taken, NumPy's too; what is none is named."""
from __future__ import annotations

import operator
from typing import Any

import torch


def integer(name: str, value: Any) -> int:
    """An int of anything that is an integer: NumPy's too, and a tensor of one. Not of a bool."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    try:
        return operator.index(value)
    except TypeError:  # a tensor or an array of something else
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def number(name: str, value: Any) -> float:
    """A number that compares as a float does, from anything but a text that says one."""
    if isinstance(value, (int, float, torch.SymFloat)):
        return value
    if not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def pair(name: str, value: Any, of: str) -> tuple:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name} must be {of}, got {value!r}")
    return tuple(value)
