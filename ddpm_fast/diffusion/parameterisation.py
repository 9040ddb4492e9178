"""Tables that the ops read, made from a schedule and a parameterisation. Everything here is float64, on CPU.

A model's output ("prediction") is linear in (x_0, ε) as a target and, together with x_t, gives x̂0 linearly; the two pairs
of coefficients below are all that distinguishes ε-, x0-, v- and mean-prediction.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from ddpm_fast import checks
from ddpm_fast.diffusion.schedules import NoiseSchedule
from ddpm_fast.ops._output import FIXED, LEARNED, LEARNED_RANGE
from ddpm_fast.types import Prediction, Variance, VarianceKind, Weight

PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)
WEIGHTS: tuple[Weight, ...] = get_args(Weight)
# How the ops treat a variance, by its name.
VARIANCES: dict[Variance, VarianceKind] = {
    "fixed_small": FIXED,
    "fixed_large": FIXED,
    "learned": LEARNED,
    "learned_range": LEARNED_RANGE,
}


def target_coefficients(schedule: NoiseSchedule, prediction: Prediction) -> tuple[Tensor, Tensor]:
    """(weight of x_0, weight of ε) in what the model is to predict.

    "v" is √ᾱ ε - √(1-ᾱ) x_0 (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512); "mean" is the posterior's mean, Ho et
    al., eq. 7, with x_t written as eq. 4.
    """
    signal, sigma = schedule.sqrt_alphas_bar, schedule.sqrt_one_minus_alphas_bar
    zero, one = torch.zeros_like(signal), torch.ones_like(signal)
    if prediction == "epsilon":
        return zero, one
    if prediction == "x_start":
        return one, zero
    if prediction == "v":
        return -sigma, signal
    if prediction == "mean":
        c1, c2 = schedule.posterior_mean_coef1, schedule.posterior_mean_coef2
        return c1 + c2 * signal, c2 * sigma
    raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")


def x_start_coefficients(schedule: NoiseSchedule, prediction: Prediction) -> tuple[Tensor, Tensor]:
    """(weight of x_t, weight of the output) in x̂0: solves target and eq. 4 for x_0."""
    c0, c1 = target_coefficients(schedule, prediction)
    signal, sigma = schedule.sqrt_alphas_bar, schedule.sqrt_one_minus_alphas_bar
    if prediction == "mean":  # simplest from eq. 7 itself
        return -schedule.posterior_mean_coef2 / schedule.posterior_mean_coef1, 1.0 / schedule.posterior_mean_coef1
    # x_t = signal x_0 + sigma ε and out = c0 x_0 + c1 ε, by Cramer's rule.
    determinant = signal * c1 - sigma * c0
    return c1 / determinant, -sigma / determinant


def log_variance_range(schedule: NoiseSchedule, variance: Variance) -> tuple[Tensor, Tensor]:
    """(low, high) log-variance of p_θ in nats: equal for a fixed variance, β̃ and β for a learned one."""
    small, large = schedule.posterior_log_variance, schedule.fixed_large_log_variance
    if variance == "fixed_small":
        return small, small
    if variance == "fixed_large":
        return large, large
    if variance in ("learned", "learned_range"):
        return small, schedule.log_betas
    raise ValueError(f"variance must be one of {', '.join(VARIANCES)}, got {variance!r}")


def bound_table(schedule: NoiseSchedule, prediction: Prediction, variance: Variance) -> Tensor:
    """(T, 8) table of :func:`ddpm_fast.ops.vlb_terms`."""
    columns = (
        *x_start_coefficients(schedule, prediction),
        schedule.posterior_mean_coef1,
        schedule.posterior_mean_coef2,
        schedule.posterior_log_variance,
        *log_variance_range(schedule, variance),
        torch.zeros(len(schedule), dtype=torch.float64, device="cpu"),
    )
    return torch.stack(columns, 1)


def loss_weights(schedule: NoiseSchedule, prediction: Prediction, weight: Weight, *, gamma: float | None = None) -> Tensor:
    """(T,) weights of the squared error of a prediction.

    Args:
        weight: "uniform" (Ho's simple loss); "min_snr": min(SNR, γ) as a weight of the x_0 error (Hang et al. 2023,
            https://arxiv.org/abs/2303.09556, γ = 5); "p2": 1 / (1 + SNR)^γ times the ε error (Choi et al. 2022,
            https://arxiv.org/abs/2204.00227, γ = 1); "vlb": the weight of the bound itself with fixed_small variance, in
            nats a dimension (Ho et al., eq. 12; t = 0 as for t = 1).

    Weights of another quantity are divided by the squared factor between its error and the prediction's, so that the
    same model gets the same loss whatever it predicts.
    """
    from_out = x_start_coefficients(schedule, prediction)[1]
    x_start_error = from_out.square()  # squared error of x̂0 = this · squared error of the output
    if weight == "uniform":
        return torch.ones_like(from_out)
    if weight == "min_snr":
        return schedule.snr.clamp_max(5.0 if gamma is None else checks.number("gamma", gamma)) * x_start_error
    if weight == "p2":
        return x_start_error * schedule.snr / (1.0 + schedule.snr) ** (1.0 if gamma is None else checks.number("gamma", gamma))
    if weight == "vlb":
        return 0.5 * schedule.posterior_mean_coef1.square() * x_start_error / schedule.posterior_log_variance.exp()
    raise ValueError(f"weight must be one of {', '.join(WEIGHTS)}, got {weight!r}")
