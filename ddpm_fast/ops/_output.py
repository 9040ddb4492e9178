"""Functions to read a model's output: the prediction, and the second half of the channels if it gives the variance."""

from __future__ import annotations

from typing import Any, Final, get_args

import torch
from torch import Tensor

from ddpm_fast.backends import FLOATING, NATIVE_DTYPES
from ddpm_fast.ops._common import check_device, table_dtype
from ddpm_fast.types import VarianceKind

FIXED: Final = "fixed"
LEARNED: Final = "learned"
LEARNED_RANGE: Final = "learned_range"
VARIANCE_KINDS: tuple[VarianceKind, ...] = get_args(VarianceKind)


def check_variance(kind: str) -> None:
    if kind not in VARIANCE_KINDS:
        raise ValueError(f"variance must be one of {', '.join(VARIANCE_KINDS)}, got {kind!r}")


def check_output(model_output: Tensor, x_name: str, x: Tensor, kind: str | None = None) -> None:
    """Checks that a model's output has shape (N, C, ...), like x, or (N, 2C, ...), which a learned variance needs.

    Raises:
        TypeError, ValueError: what was expected and what came.
    """
    if not isinstance(model_output, Tensor):
        raise TypeError(f"the model output must be a tensor, got {type(model_output).__name__}")
    if model_output.dtype not in FLOATING:
        raise TypeError(f"the model output must be float32, bfloat16, float16 or float64, got {model_output.dtype}")
    shape, learned = x.shape, kind is not None and kind != FIXED
    if len(shape) < 2:
        raise ValueError(f"{x_name} must have shape (N, C, ...), got {tuple(shape)}")
    given = model_output.shape
    if learned or given != shape:
        doubled = (shape[0], 2 * shape[1], *shape[2:])
        if given != doubled:
            expected = str(doubled) if learned else f"{tuple(shape)} or {doubled}"
            raise ValueError(
                f"the model output must have shape {expected}{' for a learned variance' if learned else ''}, got {tuple(given)}"
            )
    check_device("the model output", model_output, x_name, x)


def arithmetic_dtype(model_output: Tensor, x: Tensor) -> torch.dtype:
    """The dtype that decides the backend: float64, for which only the reference exists, if either of the two has it."""
    return x.dtype if model_output.dtype in NATIVE_DTYPES else model_output.dtype


def sample_stride(model_output: Tensor) -> int:
    """Elements of one sample of a contiguous output."""
    return model_output.numel() // model_output.shape[0]


def per_sample(x: Tensor) -> Tensor:
    """A new (N,) for a loss, in the dtype of the arithmetic."""
    return x.new_empty(x.shape[0], dtype=table_dtype(x.dtype))


def prediction_half(model_output: Tensor, x: Tensor) -> Tensor:
    """A view of an output, or of its gradient, without the variance half."""
    return model_output if model_output.shape[1] == x.shape[1] else model_output[:, : x.shape[1]]


def split_output(model_output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Splits an output into (prediction, variance half or None), in the dtype of the arithmetic."""
    model_output = model_output.to(table_dtype(x.dtype))
    if model_output.shape[1] == x.shape[1]:
        return model_output, None
    return model_output[:, : x.shape[1]], model_output[:, x.shape[1] :]


def guess_x_start(from_x_t: Tensor, from_out: Tensor, x_t: Tensor, prediction: Tensor) -> Tensor:
    """x̂0, before it is clipped, by the first two columns of a table's row."""
    return from_x_t * x_t + from_out * prediction


def clipped(x: Tensor) -> Tensor:
    """x, moved into [-1, 1]. A gradient passes inside it and at its ends; torch.clamp's passes there as the version of PyTorch has it."""
    return torch.where(x.abs() <= 1.0, x, x.detach().clamp(-1.0, 1.0))


def log_variance(kind: str, low: Tensor, high: Tensor, raw: Any) -> Tensor:
    """The model's log-variance, nats. ``raw`` is a tensor, or None for a fixed variance, which does not read it.

    "fixed" is low; "learned" is the raw output; "learned_range" goes from low to high as the raw output goes from -1 to
    1, without bounds (Nichol & Dhariwal 2021, eq. 15, with v = (raw + 1) / 2).
    """
    if kind == FIXED:
        return low
    if kind == LEARNED:
        return raw
    return low + 0.5 * (raw + 1.0) * (high - low)
