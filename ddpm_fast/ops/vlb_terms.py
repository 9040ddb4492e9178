"""vlb_terms: the terms of the variational bound, L_t in bits per dimension.

For t > 0 the KL divergence of q(x_{t-1} | x_t, x_0) from p_θ(x_{t-1} | x_t); at t = 0 the negative log-likelihood of the
discretised-Gaussian decoder (Ho et al. 2020, eq. 5, 8 and 13).
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from ddpm_fast.backends import BackendTable
from ddpm_fast.ops._common import check_data, check_like, check_t, check_table, gather, table_dtype
from ddpm_fast.ops._output import VARIANCE_KINDS, check_output, log_variance, split_output
from ddpm_fast.ops.gaussian_kl import gaussian_kl_reference

# The table's columns. mean1 and mean2 weigh x̂0 (or x_0) and x_t in the posterior's mean.
COLUMNS = ("from_x_t", "from_out", "mean1", "mean2", "posterior_log_variance", "log_variance_low", "log_variance_high", "unused")
CDFS = ("tanh", "erf")
_FLOOR = 1e-12  # of a bin's probability, as in the published code
_EDGE = 0.999  # data beyond it lies in one of the two open bins
MAX_LEVELS = 2000  # with more, inner levels would lie beyond _EDGE
_SATURATED = 100.0  # Φ is 0 or 1 beyond it in fp32 and float64; a larger argument would overflow where it is cubed
_MIN_LOG_SCALE = -80.0  # e^80 is still finite in fp32; at this scale every argument that is not 0 is saturated


def normal_cdf(x: Tensor, cdf: str) -> Tensor:
    """Φ(x): by the tanh approximation that published bounds were computed with, or exactly by erf."""
    x = x.clamp(-_SATURATED, _SATURATED)
    if cdf == "tanh":
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * torch.erfc(x * -math.sqrt(0.5))


def discretized_gaussian_log_likelihood(x_start: Tensor, mean: Tensor, log_scale: Tensor, levels: int, cdf: str = "tanh") -> Tensor:
    """log P(x_start) in nats, elementwise, where P gives each grey level the mass of its bin under a Gaussian.

    Bins have the half-width 1 / (levels - 1); the first and the last are open (Ho et al., eq. 13).

    Args:
        x_start: data on the grid of ``levels`` values in [-1, 1].
        mean, log_scale: of the Gaussian; log_scale is the log of the standard deviation; broadcast against x_start.
    """
    half = 1.0 / (levels - 1)
    inverse_scale = torch.exp(-log_scale.clamp_min(_MIN_LOG_SCALE))
    centered = x_start - mean
    upper, lower = inverse_scale * (centered + half), inverse_scale * (centered - half)
    below = normal_cdf(upper, cdf)
    probability = torch.where(x_start < -_EDGE, below, torch.where(x_start > _EDGE, normal_cdf(-lower, cdf), below - normal_cdf(lower, cdf)))
    return probability.clamp_min(_FLOOR).log()


def vlb_terms_reference(
    out: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, table: Tensor, variance: str, clip: bool, levels: int, cdf: str, detach_mean: bool
) -> Tensor:
    """The formulas in plain PyTorch; fp32 arithmetic (float64 for float64 data)."""
    from_x_t, from_out, mean1, mean2, true_log_variance, low, high, _ = (gather(column, t, x_t) for column in table.unbind(1))
    prediction, raw = split_output(out, x_t)
    if detach_mean:
        prediction = prediction.detach()
    x0, x = x_start.to(table_dtype(x_t.dtype)), x_t.to(table_dtype(x_t.dtype))
    predicted = from_x_t * x + from_out * prediction
    if clip:
        predicted = predicted.clamp(-1.0, 1.0)
    mean = mean1 * predicted + mean2 * x
    log_var = log_variance(variance, low, high, raw)
    # Where t > 0 the decoder is not wanted, and the KL where t = 0: each is fed harmless values there, so that neither an
    # infinity nor its gradient leaks through the selection.
    last = (t == 0).view(low.shape)
    kl = gaussian_kl_reference(torch.where(last, mean, mean1 * x0 + mean2 * x), true_log_variance, mean, torch.where(last, true_log_variance, log_var))
    nll = -discretized_gaussian_log_likelihood(x0, torch.where(last, mean, x0), torch.where(last, 0.5 * log_var, 0.0), levels, cdf)
    return torch.where(last, nll, kl).flatten(1).mean(1) / math.log(2.0)


backends = BackendTable("vlb_terms", reference=vlb_terms_reference)


def vlb_terms(
    out: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    table: Tensor,
    *,
    variance: str = "fixed",
    clip: bool = False,
    levels: int = 256,
    cdf: str = "tanh",
    detach_mean: bool = False,
    backend: str | None = None,
) -> Tensor:
    """L_t of each sample, bits per dimension.

    Args:
        out: (N, C, ...) the model's output, or (N, 2C, ...) with a variance half.
        x_start: (N, C, ...) clean data on the grid of ``levels`` values in [-1, 1].
        x_t: (N, C, ...) a draw of q(x_t | x_0).
        t: (N,) int64 in 0..T-1.
        table: (T, 8) float32 (float64 for float64 data), columns as in COLUMNS above.
        variance: "fixed", "learned" or "learned_range".
        clip: clip x̂0 to [-1, 1]; usual in evaluation, not in a loss.
        levels: grey levels, 2..2000: they set the decoder's bins.
        cdf: "tanh" (published numbers) or "erf" (exact).
        detach_mean: no gradient to the prediction, only to the variance half (the hybrid loss).
        backend: force "reference".

    Returns:
        (N,) float32 (float64 for float64 data). Differentiable in out.

    Raises:
        TypeError, ValueError: what was expected and what came.
    """
    check_data("x_t", x_t)
    check_like("x_start", x_start, "x_t", x_t)
    if variance not in VARIANCE_KINDS:
        raise ValueError(f"variance must be one of {', '.join(VARIANCE_KINDS)}, got {variance!r}")
    check_output(out, "x_t", x_t, variance)
    check_table("table", table, "x_t", x_t, columns=len(COLUMNS))
    check_t(t, "x_t", x_t, table.shape[0])
    if not 2 <= levels <= MAX_LEVELS:
        raise ValueError(f"levels must lie in 2..{MAX_LEVELS}, got {levels}")
    if cdf not in CDFS:
        raise ValueError(f"cdf must be one of {', '.join(CDFS)}, got {cdf!r}")
    return backends.choose(x_t.device, x_t.dtype, backend)(out, x_start, x_t, t, table, variance, clip, levels, cdf, detach_mean)
