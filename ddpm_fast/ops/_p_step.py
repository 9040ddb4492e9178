"""p_step: one reverse step, for every sampler.

With one row of the table for each sample::

    x̂0 = clip(from_x_t · x_t + from_out · model_output)
    x' = x_start · x̂0 + x_t_coef · x_t + previous · x̂0_previous + noise · exp(½ log_variance) · z

Ho et al. 2020, algorithm 2. A sampler is a table (diffusion/samplers.py): ancestral and strided DDPM, DDIM(η) and second-order
multistep solvers differ in nothing else. The reference twin is here; the kernels are
csrc/cpu/p_step.cpp and ops/triton/p_step.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_fast import checks
from ddpm_fast.backends import native, triton_function
from ddpm_fast.noise import Noise
from ddpm_fast.ops._common import (
    check_data,
    check_destination,
    check_like,
    check_noise,
    check_t,
    check_table,
    gather,
    gather_columns,
    resolve_noise,
    table_dtype,
)
from ddpm_fast.ops._native import contiguous, new_like
from ddpm_fast.ops._op import Op
from ddpm_fast.ops._operator import NOISE
from ddpm_fast.ops._output import arithmetic_dtype, check_output, check_variance, clipped, guess_x_start, log_variance, split_output
from ddpm_fast.types import Backend, VarianceKind

# The table's columns; a row is 32 bytes in fp32.
COLUMNS = ("from_x_t", "from_out", "x_start", "x_t", "previous", "log_variance_low", "log_variance_high", "noise")
GUESS_COLUMNS = ("from_x_t", "from_out")  # those that make x̂0
_DIFFERENTIABLE = ("x_t", "model_output", "noise", "x_start_previous", "without")


def gather_row(table: Tensor, t: Tensor, x: Tensor, names: tuple[str, ...] = COLUMNS) -> dict[str, Tensor]:
    """Columns of a table at t, by name, each shaped to broadcast over x (N, ...)."""
    return {name: gather(table[:, COLUMNS.index(name)], t, x) for name in names}


def p_step_reference(
    x_t: Tensor,
    model_output: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Noise | Tensor | None,
    variance: str,
    clip: bool,
    x_start_previous: Tensor | None = None,
    without: Tensor | None = None,
    scale: float = 1.0,
    with_x_start: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The formula in plain PyTorch; returns (x', x̂0). ``without`` and ``scale`` are the guidance."""
    from_x_t, from_out, a, b, h, low, high, sigma = gather_columns(table, t, x_t)
    prediction, raw = split_output(model_output, x_t)
    if without is not None:
        unconditional, _ = split_output(without, x_t)
        prediction = unconditional + scale * (prediction - unconditional)
    x = x_t.to(table_dtype(x_t.dtype))
    x_start = guess_x_start(from_x_t, from_out, x, prediction)
    if clip:
        x_start = clipped(x_start)
    x_next = a * x_start + b * x
    if x_start_previous is not None:
        x_next = x_next + h * x_start_previous.to(x.dtype)
    if noise is not None:
        deviation = sigma * torch.exp(0.5 * log_variance(variance, low, high, raw))
        # Selected, not multiplied: a learned log-variance may be infinite in the last row.
        x_next = x_next + torch.where(sigma != 0, deviation * resolve_noise(noise, x_t), 0.0)
    return x_next.to(x_t.dtype), x_start.to(x_t.dtype) if with_x_start else None


def _p_step_cpu(
    x_t: Tensor,
    model_output: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Noise | Tensor | None,
    variance: str,
    clip: bool,
    x_start_previous: Tensor | None,
    without: Tensor | None,
    scale: float,
    with_x_start: bool,
    *,
    x_next: Tensor | None = None,
    x_start: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    x_t = x_t.contiguous()
    x_next = torch.empty_like(x_t) if x_next is None else x_next
    if x_start is None and with_x_start:
        x_start = torch.empty_like(x_t)
    native.cpu_p_step(
        sizes=x_t, x_t=x_t, model_output=model_output.contiguous(), t=t.contiguous(), table=table, noise=contiguous(noise),
        variance=variance, clip=clip, x_start_previous=contiguous(x_start_previous), without=contiguous(without), guidance=scale,
        x_next=x_next, x_start=x_start,
    )  # fmt: skip
    return x_next, x_start


def _backward_cpu(arguments: Any, needs: Any, grads: Any) -> dict[str, Tensor | None]:
    x_t, model_output, t, table, noise, variance, clip, x_start_previous, without, scale, _ = arguments
    results = {name: new_like(getattr(arguments, name)) if getattr(needs, name) else None for name in _DIFFERENTIABLE}
    grad_x_next, grad_x_start = grads
    native.cpu_p_step_backward(
        sizes=x_t, x_t=x_t.contiguous(), model_output=model_output.contiguous(), t=t.contiguous(), table=table, noise=contiguous(noise),
        variance=variance, clip=clip, x_start_previous=contiguous(x_start_previous), without=contiguous(without), guidance=scale,
        grad_x_next=contiguous(grad_x_next), grad_x_start=contiguous(grad_x_start),
        **{f"grad_{name}": result for name, result in results.items()},
    )  # fmt: skip
    return results


def _check(
    x_t: Tensor,
    model_output: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Noise | Tensor | None,
    variance: str,
    clip: bool,
    x_start_previous: Tensor | None,
    without: Tensor | None,
    scale: float,
    with_x_start: bool,
) -> None:
    check_data("x_t", x_t)
    check_variance(variance)
    check_output(model_output, "x_t", x_t, variance)
    check_table("table", table, "x_t", x_t, columns=len(COLUMNS))
    check_t(t, "x_t", x_t, table.shape[0])
    if noise is not None:
        check_noise(noise, "x_t", x_t)
    if x_start_previous is not None:
        check_like("x_start_previous", x_start_previous, "x_t", x_t)
    if without is not None:
        check_like("the output without the condition", without, "the model output", model_output)


def _fake(x_t: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return new_like(x_t), new_like(x_t) if others[-1] else x_t.new_empty(0)


_op = Op(
    "p_step",
    f"Tensor x_t, Tensor model_output, Tensor t, Tensor table, {NOISE}, str variance, bool clip, Tensor? x_start_previous, "
    "Tensor? without, float scale, bool with_x_start",
    "(Tensor, Tensor)",
    check=_check,
    fake=_fake,
    reference=p_step_reference,
    differentiable=_DIFFERENTIABLE,
    cpu=_p_step_cpu,
    triton=triton_function("p_step", "forward"),
    backward=dict(cpu=_backward_cpu, triton=triton_function("p_step", "backward")),
)
backends = _op.backends


def p_step(
    x_t: Tensor,
    model_output: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Noise | Tensor | None,
    *,
    variance: VarianceKind = "fixed",
    clip: bool = True,
    x_start_previous: Tensor | None = None,
    guidance: tuple[Tensor, float] | None = None,
    x_next: Tensor | None = None,
    x_start: bool | Tensor = True,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One reverse step by a table, in one pass.

    Args:
        x_t: (N, C, ...) the current state.
        model_output: (N, C, ...) the model's output, or (N, 2C, ...) with a variance half, which a fixed variance does not read.
        t: (N,) int64, the row of the table for each sample.
        table: (S, 8) float32 (float64 for float64 data), columns as in COLUMNS above.
        noise: z, as :class:`~ddpm_fast.Noise`, drawn inside the kernel, or a tensor like x_t; None leaves the last term out.
        variance: "fixed" (log_variance_low), "learned" (the raw half) or "learned_range" (between low and high).
        clip: clip x̂0 to [-1, 1].
        x_start_previous: x̂0 of the step before, for multistep tables.
        guidance: (output without the condition, scale): classifier-free guidance, without + scale · (model_output - without).
        x_next: contiguous tensor like x_t to write x' into, which may be x_t itself; only without gradients.
        x_start: True to get x̂0, False to leave it out, or a tensor to write it into, which may be x_start_previous itself.
        backend: force "reference", "cpu" or "triton".

    Returns:
        (x', x̂0), each like x_t and contiguous; x̂0 is None where it is not wanted. Differentiable in x_t, model_output, a noise
        tensor, x_start_previous and the output without the condition.

    Raises:
        TypeError, ValueError: what was expected and what came.
        RuntimeError: for a forced backend that is not available here, or a tensor to write into where a gradient is needed.
    """
    without, scale = (None, 1.0) if guidance is None else checks.pair("guidance", guidance, "(output, scale)")
    with_x_start, clip = x_start is not False, checks.flag("clip", clip)
    arguments = (x_t, model_output, t, table, noise, variance, clip, x_start_previous, without, scale, with_x_start)
    _check(*arguments)
    into: dict[str, Any] | None = None  # tensors, or None for a result that goes into new memory
    if x_next is not None or not isinstance(x_start, bool):
        into = {"x_next": x_next, "x_start": None if isinstance(x_start, bool) else x_start}
        _check_destinations(into, arguments)
    results = _op(arguments, x_t, arithmetic_dtype(model_output, x_t), backend, into)
    return results if with_x_start else (results[0], None)


def _check_destinations(into: dict[str, Any], arguments: Sequence[Any]) -> None:
    x_t, model_output, t, table, noise, _, _, x_start_previous, without, *_ = arguments
    x_next, x_start = into.values()
    if x_next is not None:
        check_destination("x_next", x_next, "x_t", x_t, model_output, t, table, noise, x_start_previous, without)
    if x_start is not None:
        other, name = (x_t, "x_t") if x_start_previous is None else (x_start_previous, "x_start_previous")
        check_destination(
            "x_start",
            x_start,
            name,
            other,
            model_output,
            t,
            table,
            noise,
            without,
            x_next,
            None if other is x_t else x_t,
            in_place=x_start_previous is not None,
        )
