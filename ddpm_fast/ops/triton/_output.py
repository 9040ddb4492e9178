"""The variance that a model's output gives, with the operations of csrc/common/diffusion_math.h, and the rows of tables."""

import triton
import triton.language as tl

from ddpm_fast.ops._output import VARIANCE_KINDS
from ddpm_fast.ops.triton._elementary import exponential
from ddpm_fast.ops.triton._tile import entry

FIXED = tl.constexpr(VARIANCE_KINDS.index("fixed"))
LEARNED = tl.constexpr(VARIANCE_KINDS.index("learned"))


@triton.jit
def row(table_ptr, t, known):
    """The eight columns of a table's row, each (ROWS, 1)."""
    at = t * 8
    return (
        entry(table_ptr, at, known), entry(table_ptr, at + 1, known), entry(table_ptr, at + 2, known), entry(table_ptr, at + 3, known),
        entry(table_ptr, at + 4, known), entry(table_ptr, at + 5, known), entry(table_ptr, at + 6, known), entry(table_ptr, at + 7, known),
    )  # fmt: skip


@triton.jit
def log_variance_of(raw, low, high, VARIANCE: tl.constexpr):
    """The log-variance; ``raw`` is not used for a fixed one."""
    if VARIANCE == FIXED:
        return low
    elif VARIANCE == LEARNED:
        return raw
    else:
        return low + (0.5 * (high - low)) * (raw + 1.0)


@triton.jit
def log_variance_slope(low, high, VARIANCE: tl.constexpr):
    """Derivative of the log-variance by ``raw``, for a learned variance."""
    if VARIANCE == LEARNED:
        return 1.0  # and not an expression with low, which may be infinite
    else:
        return 0.5 * (high - low)


@triton.jit
def deviation(log_variance):
    """e^(½ log_variance)."""
    exponent = 0.5 * log_variance
    return exponential(tl.where(exponent > 89.0, 89.0, exponent))


@triton.jit
def inverse_deviation(log_variance):
    """e^(-½ log_variance), finite in fp32: a distance of 0 stays 0 however small the variance."""
    exponent = -0.5 * log_variance
    return exponential(tl.where(exponent > 88.0, 88.0, exponent))
