"""How the ops read a model's output: the prediction, and the half that gives the variance where there is one."""
from __future__ import annotations

from torch import Tensor

from ddpm_fast.ops._common import FLOATING, check_device, table_dtype

FIXED, LEARNED, LEARNED_RANGE = "fixed", "learned", "learned_range"
VARIANCE_KINDS = (FIXED, LEARNED, LEARNED_RANGE)


def check_output(out: Tensor, x_name: str, x: Tensor, kind: str | None = None) -> None:
    """(N, C, ...) like x, or (N, 2C, ...); a learned variance needs the second half."""
    if not isinstance(out, Tensor):
        raise TypeError(f"the model output must be a tensor, got {type(out).__name__}")
    if out.dtype not in FLOATING:
        raise TypeError(f"the model output must be float32, bfloat16, float16 or float64, got {out.dtype}")
    if x.ndim < 2:
        raise ValueError(f"{x_name} must have shape (N, C, ...), got {tuple(x.shape)}")
    doubled = (x.shape[0], 2 * x.shape[1], *x.shape[2:])
    learned = kind in (LEARNED, LEARNED_RANGE)
    allowed = (doubled,) if learned else (tuple(x.shape), doubled)
    if tuple(out.shape) not in allowed:
        expected = " or ".join(map(str, allowed))
        raise ValueError(f"the model output must have shape {expected}{' for a learned variance' if learned else ''}, got {tuple(out.shape)}")
    check_device("the model output", out, x_name, x)


def split_output(out: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(prediction, variance half or None), in the dtype of the arithmetic."""
    out = out.to(table_dtype(x.dtype))
    if out.shape[1] == x.shape[1]:
        return out, None
    return out[:, : x.shape[1]], out[:, x.shape[1] :]


def log_variance(kind: str, low: Tensor, high: Tensor, raw: Tensor | None) -> Tensor:
    """The model's log-variance, nats.

    "fixed" is low; "learned" is the raw output; "learned_range" goes from low to high as the raw output goes from -1 to
    1, without bounds (Nichol & Dhariwal 2021, eq. 15, with v = (raw + 1) / 2).
    """
    if kind == FIXED:
        return low
    if kind == LEARNED:
        return raw
    return low + 0.5 * (raw + 1.0) * (high - low)
