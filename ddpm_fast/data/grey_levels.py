"""Values of files as grey levels: which range is taken for black to white, and what was found.

`to_unit` and `to_levels` are the one place for the mapping between levels and floats in [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

_FLOAT_TOLERANCE = 1e-3  # of values beyond the range, where it is 2 wide: for rounding
_BLOCK = 2**22  # values converted at a time: what is between the file's type and uint8 takes eight bytes each
_WIDEST = 2**32  # of a range of integers: what is computed from them stays below 2**63


class DataError(ValueError):
    """Data that cannot be used; says what was expected and what came."""


def to_unit(x: torch.Tensor, levels: int = 256) -> torch.Tensor:
    """Grey levels 0..levels-1 (any shape, integer) to float32 in [-1, 1], both ends exact."""
    return x.to(torch.float32) * 2 / (levels - 1) - 1


def to_levels(x: torch.Tensor, levels: int = 256) -> torch.Tensor:
    """Floats to the nearest of the grey levels 0..levels-1, as uint8; values outside [-1, 1] are clamped.

    Raises:
        ValueError: `x` holds NaN, for which there is no level.
    """
    if torch.isnan(x).any():
        raise ValueError(f"x must hold no NaN, got {int(torch.isnan(x).sum())} of {x.numel()} values")
    return ((x.to(torch.float32) + 1) * ((levels - 1) / 2)).round().clamp(0, levels - 1).to(torch.uint8)


class Scale:
    """Maps the values of a data set to grey levels, in the same way for every file of it, be it a PNG or a .npy.

    Without a range integers of 8 bits span 0..255, those of 16 bits 0..65535, wider ones 0..255 and floats -1..1. The range is
    divided into `levels` grey levels, a value goes to the nearest. Without `levels` a given range of integers has one level
    for each of them, at most 256; all else has 256. Without a range but with `levels`, integers are the levels themselves.

    Attributes:
        seen: by range, the least and the greatest value that were read with it.

    Raises:
        DataError: the range is empty or too wide, or there are not 2..256 levels.
    """

    def __init__(self, value_range: Sequence[float] | None = None, levels: int | None = None) -> None:
        if levels is not None and not 2 <= levels <= 256:
            raise DataError(f"levels must be in 2..256, got {levels}")
        if value_range is not None:
            numbers = [float(value) for value in value_range]
            if len(numbers) != 2 or not (math.isfinite(numbers[1] - numbers[0]) and numbers[0] < numbers[1]):
                raise DataError(f"value_range (--range) must be two numbers, the smaller first, got {' '.join(map(str, value_range))}")
            low, high = (int(number) if number.is_integer() else number for number in numbers)
        self.value_range: tuple[float, float] | None = None if value_range is None else (low, high)
        self._levels = levels
        self.seen: dict[tuple[float, float], tuple[float, float]] = {}
        self._kind = ""

    @property
    def levels(self) -> int:
        """Number of grey levels, once something was read."""
        if self._levels is not None:
            return self._levels
        if self.value_range is not None and self._kind == "integers":
            return min(int(self.value_range[1] - self.value_range[0]) + 1, 256)
        return 256

    def __call__(self, values: np.ndarray, where: str) -> np.ndarray:
        """Values (N, ...) to uint8 of the same shape, in C order.

        Raises:
            DataError: `where` holds values outside the range, or NaN, or another kind than what was read before.
        """
        kind = {"i": "integers", "u": "integers", "f": "floats"}.get(values.dtype.kind)
        if kind is None:
            raise DataError(f"{where} must hold integers or floats, got {values.dtype}")
        if self._kind not in ("", kind):
            raise DataError(f"{where} must hold {self._kind} like the others, got {kind}")
        self._kind = kind
        self._check(values, span := self._range(values.dtype), where)
        if values.dtype == np.uint8 and span == (0, 255) and self.levels == 256:
            return np.array(values, order="C")
        result = np.empty(values.shape, np.uint8)
        rows = max(1, _BLOCK // max(1, values[0].size))
        for first in range(0, len(values), rows):
            result[first : first + rows] = self._convert(values[first : first + rows], *span)
        return result

    def notes(self, where: str) -> list[str]:
        """Doubts about all that was read; none where the range or the levels were given.

        Raises:
            DataError: the values use so little of the range that is assumed that they would lose what they hold.
        """
        if self.value_range is not None or self._levels is not None:
            return []
        result = []
        for (low, high), (least, most) in self.seen.items():
            span = f"values {bounds(least, most)}, a part of {bounds(low, high)}"
            if self._kind == "floats" and (least >= -0.5 or most <= 0.5):
                # Taken at its word, such data would train on a part of the range without a sign.
                raise DataError(
                    f"{where} must hold floats in [-1, 1] that reach both ends, got {bounds(least, most)}; {_offer(least, most)} says "
                    f"what they can span, {option(-1, 1)} takes them as they are"
                )
            if self._kind == "floats" or most - least >= (high - low) / 2:
                continue
            if high > 255:
                kept = _rescaled(int(most), int(high)) - _rescaled(int(least), int(high)) + 1
                raise DataError(
                    f"{where} holds {span}, of which 256 grey levels would keep {kept}; {_offer(least, most)} says what they can "
                    f"span, {option(low, high)} takes them as they are"
                )
            result.append(
                f"{where} holds {span}, taken for dark or flat pictures of 256 grey levels; if the values can span no "
                f"more, give {_offer(least, most)}, else {option(low, high)}"
            )
        return result

    def _range(self, dtype: np.dtype) -> tuple[float, float]:
        if dtype.kind == "f":
            return self.value_range or (-1, 1)
        if self.value_range is None:
            return (0, (self._levels or (65536 if dtype.kind == "u" and dtype.itemsize == 2 else 256)) - 1)
        low, high = self.value_range
        if not (isinstance(low, int) and isinstance(high, int) and high - low <= _WIDEST and max(-low, high) <= _WIDEST):
            raise DataError(f"value_range (--range) of integers must be two integers of at most 2**32, got {_number(low)} {_number(high)}")
        return low, high

    def _check(self, values: np.ndarray, span: tuple[float, float], where: str) -> None:
        with np.errstate(invalid="ignore"):
            least, most = values.min().item(), values.max().item()
        low, high = span
        slack = 0.0
        if self._kind == "floats":
            if not (math.isfinite(least) and math.isfinite(most)):
                count = int((~np.isfinite(values)).sum())
                raise DataError(f"{where} must be finite, got {count} NaN or infinite of {values.size} values")
            slack = _FLOAT_TOLERANCE * (high - low) / 2
        if least < low - slack or most > high + slack:
            wanted = f"[{_number(low)}, {_number(high)}]" if self._kind == "floats" else bounds(low, high)
            advice = (
                f"; {_offer(least, most)} says what they can span"
                if self.value_range is None and (self._kind == "floats" or max(-2 * least, most) < _WIDEST)
                else ""
            )
            raise DataError(f"{where} must hold {self._kind} in {wanted}, got {bounds(least, most)}{advice}")
        before = self.seen.get(span, (least, most))
        self.seen[span] = min(before[0], least), max(before[1], most)

    def _convert(self, values: np.ndarray, low: float, high: float) -> np.ndarray:
        if self._kind == "floats":
            if (low, high) != (-1, 1):
                values = (values.astype(np.float64) - low) * (2 / (high - low)) - 1
            return to_levels(torch.from_numpy(values.astype(np.float32)), self.levels).numpy()
        span, top = high - low, self.levels - 1
        values = values.astype(np.int64) - low
        return values if span == top else (2 * top * values + span) // (2 * span)


def option(low: float, high: float) -> str:
    """The text that gives a range."""
    return f"value_range=({_number(low)}, {_number(high)}) (--range {_number(low)} {_number(high)})"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def bounds(low: float, high: float) -> str:
    """A range as text."""
    return f"{_number(low)}..{_number(high)}"


def _offer(least: float, most: float) -> str:
    """The range that such values probably have: from 0, and up to all bits set where they take more than eight."""
    if isinstance(least, int) and isinstance(most, int):
        return option(min(least, 0), max(1, most) if most < 256 else 2 ** most.bit_length() - 1)
    if (least >= -_FLOAT_TOLERANCE and most <= 1 + _FLOAT_TOLERANCE) or least == most:
        return option(0, 1)
    return option(0, 255) if least >= 0 and 128 <= most <= 255 else option(least, most)


def _rescaled(value: int, high: int) -> int:
    return (2 * 255 * value + high) // (2 * high)
