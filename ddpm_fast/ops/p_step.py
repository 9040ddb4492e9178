"""p_step: one reverse step, for every sampler.

With one row of the table for each sample::

    x̂0 = clip(from_x_t · x_t + from_out · out)
    x' = x_start · x̂0 + x_t_coef · x_t + previous · x̂0_previous + noise · exp(½ log_variance) · z

Ho et al. 2020, algorithm 2. A sampler is a table (sampling.py): ancestral and strided DDPM, DDIM(η) and second-order
multistep solvers differ in nothing else.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.backends import BackendTable
from ddpm_fast.noise import Noise
from ddpm_fast.ops._common import check_data, check_like, check_noise, check_t, check_table, gather, resolve_noise, table_dtype
from ddpm_fast.ops._output import VARIANCE_KINDS, check_output, log_variance, split_output

# The table's columns; a row is 32 bytes in fp32.
COLUMNS = ("from_x_t", "from_out", "x_start", "x_t", "previous", "log_variance_low", "log_variance_high", "noise")


def p_step_reference(
    x_t: Tensor,
    out: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Noise | Tensor | None,
    variance: str,
    clip: bool,
    x_start_previous: Tensor | None,
    guidance: tuple[Tensor, float] | None,
) -> tuple[Tensor, Tensor]:
    """The formula in plain PyTorch; returns (x', x̂0)."""
    from_x_t, from_out, a, b, h, low, high, sigma = (gather(column, t, x_t) for column in table.unbind(1))
    prediction, raw = split_output(out, x_t)
    if guidance is not None:
        without, _ = split_output(guidance[0], x_t)
        prediction = without + guidance[1] * (prediction - without)
    x = x_t.to(table_dtype(x_t.dtype))
    x_start = from_x_t * x + from_out * prediction
    if clip:
        x_start = x_start.clamp(-1.0, 1.0)
    x_next = a * x_start + b * x
    if x_start_previous is not None:
        x_next = x_next + h * x_start_previous.to(x.dtype)
    if noise is not None:
        deviation = sigma * torch.exp(0.5 * log_variance(variance, low, high, raw))
        # Selected, not multiplied: a learned log-variance may be infinite in the last row.
        x_next = x_next + torch.where(sigma != 0, deviation * resolve_noise(noise, x_t), 0.0)
    return x_next.to(x_t.dtype), x_start.to(x_t.dtype)


backends = BackendTable("p_step", reference=p_step_reference)


def p_step(
    x_t: Tensor,
    out: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Noise | Tensor | None,
    *,
    variance: str = "fixed",
    clip: bool = True,
    x_start_previous: Tensor | None = None,
    guidance: tuple[Tensor, float] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One reverse step by a table.

    Args:
        x_t: (N, C, ...) the current state.
        out: (N, C, ...) the model's output, or (N, 2C, ...) with a variance half, which a fixed variance does not read.
        t: (N,) int64, the row of the table for each sample.
        table: (S, 8) float32 (float64 for float64 data), columns as in COLUMNS above.
        noise: z, as :class:`~ddpm_fast.Noise` or a tensor like x_t; None leaves the last term out.
        variance: "fixed" (log_variance_low), "learned" (the raw half) or "learned_range" (between low and high).
        clip: clip x̂0 to [-1, 1].
        x_start_previous: x̂0 of the step before, for multistep tables.
        guidance: (output without the condition, scale): classifier-free guidance, without + scale · (out - without).
        backend: force "reference".

    Returns:
        (x', x̂0), each like x_t.

    Raises:
        TypeError, ValueError: what was expected and what came.
    """
    check_data("x_t", x_t)
    if variance not in VARIANCE_KINDS:
        raise ValueError(f"variance must be one of {', '.join(VARIANCE_KINDS)}, got {variance!r}")
    check_output(out, "x_t", x_t, variance)
    check_table("table", table, "x_t", x_t, columns=len(COLUMNS))
    check_t(t, "x_t", x_t, table.shape[0])
    if noise is not None:
        check_noise(noise, "x_t", x_t)
    if x_start_previous is not None:
        check_like("x_start_previous", x_start_previous, "x_t", x_t)
    if guidance is not None:
        check_like("the output without the condition", guidance[0], "the model output", out)
    return backends.choose(x_t.device, x_t.dtype, backend)(x_t, out, t, table, noise, variance, clip, x_start_previous, guidance)
