"""simple_loss: per-sample weight[t] · mean (out - (x_start_coef[t] · x_start + noise_coef[t] · ε))².

Ho et al. 2020, eq. 14, for any prediction: the target is a row of two coefficients (tables.target_coefficients), the
weight any function of t (1, min-SNR, P2).
"""
from __future__ import annotations

from torch import Tensor

from ddpm_fast.backends import BackendTable
from ddpm_fast.noise import Noise
from ddpm_fast.ops._common import check_data, check_noise, check_t, check_table, gather, resolve_noise, table_dtype
from ddpm_fast.ops._output import check_output, split_output


def simple_loss_reference(
    out: Tensor, x_start: Tensor, t: Tensor, weight: Tensor, x_start_coef: Tensor, noise_coef: Tensor, noise: Noise | Tensor
) -> Tensor:
    """The formula in plain PyTorch; fp32 arithmetic (float64 for float64 data)."""
    prediction, _ = split_output(out, x_start)
    target = gather(x_start_coef, t, x_start) * x_start.to(table_dtype(x_start.dtype))
    target = target + gather(noise_coef, t, x_start) * resolve_noise(noise, x_start)
    return weight[t] * (prediction - target).square().flatten(1).mean(1)


backends = BackendTable("simple_loss", reference=simple_loss_reference)


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
        weight, x_start_coef, noise_coef: (T,) tables, float32 (float64 for float64 data).
        noise: the :class:`~ddpm_fast.Noise` or tensor that x_t was made with.
        backend: force "reference".

    Returns:
        (N,) float32 (float64 for float64 data). Differentiable in out.

    Raises:
        TypeError, ValueError: what was expected and what came.
    """
    check_data("x_start", x_start)
    check_output(out, "x_start", x_start)
    check_table("weight", weight, "x_start", x_start)
    for name, table in (("x_start_coef", x_start_coef), ("noise_coef", noise_coef)):
        check_table(name, table, "x_start", x_start, tuple(weight.shape))
    check_t(t, "x_start", x_start, weight.shape[0])
    check_noise(noise, "x_start", x_start)
    return backends.choose(x_start.device, x_start.dtype, backend)(out, x_start, t, weight, x_start_coef, noise_coef, noise)
