"""simple_loss: per-sample weight[t] · mean (model_output - (x_start_coef[t] · x_start + noise_coef[t] · ε))².

Ho et al. 2020, eq. 14, for any prediction: the target is a row of two coefficients (diffusion/parameterisation.py gives them), the
weight any function of t (1, min-SNR, P2). The reference twin is here; the kernels are csrc/cpu/simple_loss.cpp and
ops/triton/simple_loss.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpm_fast.backends import native, triton_function
from ddpm_fast.noise import Noise
from ddpm_fast.ops._common import check_data, check_noise, check_t, check_table, gather, resolve_noise, table_dtype, take
from ddpm_fast.ops._native import contiguous, new_like
from ddpm_fast.ops._op import Op
from ddpm_fast.ops._operator import NOISE
from ddpm_fast.ops._output import arithmetic_dtype, check_output, per_sample, prediction_half, split_output
from ddpm_fast.types import Backend


def simple_loss_reference(
    model_output: Tensor, x_start: Tensor, t: Tensor, weight: Tensor, x_start_coef: Tensor, noise_coef: Tensor, noise: Noise | Tensor
) -> Tensor:
    """The formula in plain PyTorch; fp32 arithmetic (float64 for float64 data)."""
    prediction, _ = split_output(model_output, x_start)
    target = gather(x_start_coef, t, x_start) * x_start.to(table_dtype(x_start.dtype))
    target = target + gather(noise_coef, t, x_start) * resolve_noise(noise, x_start)
    return take(weight, t) * (prediction - target).square().flatten(1).mean(1)


def _launch(arguments: Any, loss: Tensor | None, grad_loss: Tensor | None, grad_model_output: Tensor | None) -> None:
    """Writes the loss, the gradient of model_output (for grad_loss, or for ones), or both."""
    model_output, x_start, t, weight, x_start_coef, noise_coef, noise = arguments
    native.cpu_simple_loss(
        sizes=x_start, model_output=model_output.contiguous(), x_start=x_start.contiguous(), t=t.contiguous(), weight=weight,
        x_start_coef=x_start_coef, noise_coef=noise_coef, noise=contiguous(noise),
        loss=loss, grad_loss=grad_loss, grad_model_output=grad_model_output,
    )  # fmt: skip


def _simple_loss_cpu(*arguments: Any) -> Tensor:
    _, x_start, *_ = arguments
    loss = per_sample(x_start)
    _launch(arguments, loss, None, None)
    return loss


def _ahead_cpu(arguments: Any, needs: Any) -> tuple[Tensor, dict[str, Tensor | None], list[Tensor]] | None:
    model_output, x_start, *_ = arguments
    if model_output.dtype != torch.float32 or any(needs[1:]):
        return None
    loss, grad_model_output = per_sample(x_start), new_like(model_output)
    _launch(arguments, loss, None, grad_model_output)
    return loss, {"model_output": grad_model_output}, [prediction_half(grad_model_output, x_start)]


def _backward_cpu(arguments: Any, needs: Any, grads: Any) -> dict[str, Tensor | None]:
    grad_model_output = new_like(arguments.model_output)
    _launch(arguments, None, grads[0].contiguous(), grad_model_output)
    return {"model_output": grad_model_output}


def _check(
    model_output: Tensor, x_start: Tensor, t: Tensor, weight: Tensor, x_start_coef: Tensor, noise_coef: Tensor, noise: Noise | Tensor
) -> None:
    check_data("x_start", x_start)
    check_output(model_output, "x_start", x_start)
    check_table("weight", weight, "x_start", x_start)
    for name, table in (("x_start_coef", x_start_coef), ("noise_coef", noise_coef)):
        check_table(name, table, "x_start", x_start, tuple(weight.shape))
    check_t(t, "x_start", x_start, weight.shape[0])
    check_noise(noise, "x_start", x_start)


_op = Op(
    "simple_loss",
    f"Tensor model_output, Tensor x_start, Tensor t, Tensor weight, Tensor x_start_coef, Tensor noise_coef, {NOISE}",
    "Tensor",
    check=_check,
    fake=lambda model_output, x_start, *_: per_sample(x_start),
    reference=simple_loss_reference,
    differentiable=("model_output",),
    cpu=_simple_loss_cpu,
    triton=triton_function("simple_loss", "forward"),
    backward=dict(cpu=_backward_cpu, triton=triton_function("simple_loss", "backward")),
    ahead=dict(cpu=_ahead_cpu),
)
backends = _op.backends


def simple_loss(
    model_output: Tensor,
    x_start: Tensor,
    t: Tensor,
    weight: Tensor,
    x_start_coef: Tensor,
    noise_coef: Tensor,
    noise: Noise | Tensor,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Weighted squared error of a model's output against its target, one value a sample.

    Args:
        model_output: (N, C, ...) the model's output, any floating dtype; (N, 2C, ...) where it also gives a variance, whose half
            is not read.
        x_start: (N, C, ...) clean data.
        t: (N,) int64 in 0..T-1.
        weight, x_start_coef, noise_coef: (T,) tables, float32 (float64 for float64 data). Where a coefficient is 0 a
            kernel neither reads nor draws what it multiplies.
        noise: the :class:`~ddpm_fast.Noise` or tensor that x_t was made with. A Noise is drawn again in backward.
        backend: force "reference", "cpu" or "triton".

    Returns:
        (N,) float32 (float64 for float64 data). Differentiable in model_output, any number of times.

    Raises:
        TypeError, ValueError: what was expected and what came.
        RuntimeError: for a forced backend that is not available here.
    """
    arguments = (model_output, x_start, t, weight, x_start_coef, noise_coef, noise)
    _check(*arguments)
    return _op(arguments, x_start, arithmetic_dtype(model_output, x_start), backend)
