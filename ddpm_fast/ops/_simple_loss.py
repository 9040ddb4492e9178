"""simple_loss: per-sample weight[t] · mean (out - (x_start_coef[t] · x_start + noise_coef[t] · ε))².

Ho et al. 2020, eq. 14, for any prediction: the target is a row of two coefficients (tables.target_coefficients), the
weight any function of t (1, min-SNR, P2). The reference twin is here; the kernels are
csrc/cpu/simple_loss.cpp and ops/triton/simple_loss.py.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast._memory import address
from ddpm_fast.backends import native, triton_function
from ddpm_fast.noise import Noise
from ddpm_fast.ops._common import check_data, check_noise, check_t, check_table, gather, resolve_noise, table_dtype, take
from ddpm_fast.ops._native import contiguous_noise, dtype_tag, native_noise, native_sizes, new_like
from ddpm_fast.ops._op import NOISE, Op
from ddpm_fast.ops._output import arithmetic_dtype, check_output, per_sample, prediction_half, sample_stride, split_output


def simple_loss_reference(
    out: Tensor, x_start: Tensor, t: Tensor, weight: Tensor, x_start_coef: Tensor, noise_coef: Tensor, noise: Noise | Tensor
) -> Tensor:
    """The formula in plain PyTorch; fp32 arithmetic (float64 for float64 data)."""
    prediction, _ = split_output(out, x_start)
    target = gather(x_start_coef, t, x_start) * x_start.to(table_dtype(x_start.dtype))
    target = target + gather(noise_coef, t, x_start) * resolve_noise(noise, x_start)
    return take(weight, t) * (prediction - target).square().flatten(1).mean(1)


def _launch(arguments, loss: Tensor | None, grad_loss: Tensor | None, grad_out: Tensor | None) -> None:
    """Writes the loss, the gradient of out (for grad_loss, or for ones), or both."""
    out, x_start, t, weight, x_start_coef, noise_coef, noise = arguments
    out, x_start, t, noise = out.contiguous(), x_start.contiguous(), t.contiguous(), contiguous_noise(noise)
    native.cpu_simple_loss(
        out.data_ptr(), dtype_tag(out), sample_stride(out), x_start.data_ptr(), dtype_tag(x_start), t.data_ptr(),
        weight.data_ptr(), x_start_coef.data_ptr(), noise_coef.data_ptr(), native_noise(noise),
        address(loss), address(grad_loss), address(grad_out), *native_sizes(x_start),
    )  # fmt: skip


def _simple_loss_cpu(*arguments) -> Tensor:
    loss = per_sample(arguments[1])
    _launch(arguments, loss, None, None)
    return loss


def _ahead_cpu(arguments, needs):
    if arguments[0].dtype != torch.float32 or any(needs[1:]):
        return None
    loss, grad_out = per_sample(arguments[1]), new_like(arguments[0])
    _launch(arguments, loss, None, grad_out)
    return loss, (grad_out, *[None] * 6), [prediction_half(grad_out, arguments[1])]


def _backward_cpu(arguments, needs, grads):
    grad_out = new_like(arguments[0])
    _launch(arguments, None, grads[0].contiguous(), grad_out)
    return grad_out, *[None] * 6


def _check(out, x_start, t, weight, x_start_coef, noise_coef, noise) -> None:
    check_data("x_start", x_start)
    check_output(out, "x_start", x_start)
    check_table("weight", weight, "x_start", x_start)
    for name, table in (("x_start_coef", x_start_coef), ("noise_coef", noise_coef)):
        check_table(name, table, "x_start", x_start, tuple(weight.shape))
    check_t(t, "x_start", x_start, weight.shape[0])
    check_noise(noise, "x_start", x_start)


_op = Op(
    "simple_loss",
    f"Tensor out, Tensor x_start, Tensor t, Tensor weight, Tensor x_start_coef, Tensor noise_coef, {NOISE}",
    "Tensor",
    check=_check,
    fake=lambda out, x_start, *_: per_sample(x_start),
    reference=simple_loss_reference,
    differentiable=(0,),
    noise=6,
    cpu=_simple_loss_cpu,
    triton=triton_function("simple_loss", "forward"),
    backward=dict(cpu=_backward_cpu, triton=triton_function("simple_loss", "backward")),
    ahead=dict(cpu=_ahead_cpu),
)
backends = _op.backends


def simple_loss(
    out: Tensor,
    x_start: Tensor,
    t: Tensor,
    weight: Tensor,
    x_start_coef: Tensor,
    noise_coef: Tensor,
    noise: Noise | Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Weighted squared error of a model's output against its target, one value a sample.

    Args:
        out: (N, C, ...) the model's output, any floating dtype; (N, 2C, ...) where it also gives a variance, whose half
            is not read.
        x_start: (N, C, ...) clean data.
        t: (N,) int64 in 0..T-1.
        weight, x_start_coef, noise_coef: (T,) tables, float32 (float64 for float64 data). Where a coefficient is 0 a
            kernel neither reads nor draws what it multiplies.
        noise: the :class:`~ddpm_fast.Noise` or tensor that x_t was made with. A Noise is drawn again in backward.
        backend: force "reference", "cpu" or "triton".

    Returns:
        (N,) float32 (float64 for float64 data). Differentiable in out, any number of times.

    Raises:
        TypeError, ValueError: what was expected and what came.
        RuntimeError: for a forced backend that is not available here.
    """
    arguments = (out, x_start, t, weight, x_start_coef, noise_coef, noise)
    _check(*arguments)
    return _op(arguments, x_start, arithmetic_dtype(out, x_start), backend)
