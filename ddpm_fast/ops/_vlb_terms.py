"""vlb_terms: the terms of the variational bound, L_t in bits per dimension.

For t > 0 the KL divergence of q(x_{t-1} | x_t, x_0) from p_θ(x_{t-1} | x_t); at t = 0 the negative log-likelihood of the
discretised-Gaussian decoder (Ho et al. 2020, eq. 5, 8 and 13). The reference twin is here; the kernels are
csrc/cpu/vlb_terms.cpp and ops/triton/vlb_terms.py.
"""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from torch import Tensor

from ddpm_fast import checks
from ddpm_fast.backends import native, triton_function
from ddpm_fast.ops._common import check_data, check_like, check_t, check_table, gather_columns, table_dtype
from ddpm_fast.ops._gaussian_kl import gaussian_kl_reference
from ddpm_fast.ops._native import new_like
from ddpm_fast.ops._op import Op
from ddpm_fast.ops._output import (
    FIXED,
    arithmetic_dtype,
    check_output,
    check_variance,
    clipped,
    guess_x_start,
    log_variance,
    per_sample,
    prediction_half,
    split_output,
)
from ddpm_fast.types import Backend, Cdf, VarianceKind

# The table's columns. mean1 and mean2 weigh x̂0 (or x_0) and x_t in the posterior's mean.
COLUMNS = ("from_x_t", "from_out", "mean1", "mean2", "posterior_log_variance", "log_variance_low", "log_variance_high", "unused")
CDFS: tuple[Cdf, ...] = get_args(Cdf)
_FLOOR = 1e-12  # of a bin's probability, as in the published code
_EDGE = 0.999  # data beyond it lies in one of the two open bins
MAX_LEVELS = 2000  # with more, inner levels would lie beyond _EDGE
_SATURATED = 100.0  # Φ is 0 or 1 beyond it in fp32 and float64; a larger argument would overflow where it is cubed
_MIN_LOG_SCALE = -80.0  # e^80 is still finite in fp32; at this scale every argument that is not 0 is saturated


def normal_cdf(x: Tensor, cdf: Cdf) -> Tensor:
    """Φ(x): by the tanh approximation that published bounds were computed with, or exactly by erf."""
    x = x.clamp(-_SATURATED, _SATURATED)
    if cdf == "tanh":
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * torch.erfc(x * -math.sqrt(0.5))


def discretized_gaussian_log_likelihood(x_start: Tensor, mean: Tensor, log_scale: Tensor, levels: int, cdf: Cdf = "tanh") -> Tensor:
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
    probability = torch.where(
        x_start < -_EDGE, below, torch.where(x_start > _EDGE, normal_cdf(-lower, cdf), below - normal_cdf(lower, cdf))
    )
    return probability.clamp_min(_FLOOR).log()


def vlb_terms_reference(
    model_output: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    table: Tensor,
    variance: str,
    clip: bool,
    levels: int,
    cdf: Cdf,
    detach_mean: bool,
) -> Tensor:
    """The formulas in plain PyTorch; fp32 arithmetic (float64 for float64 data)."""
    from_x_t, from_out, mean1, mean2, true_log_variance, low, high, _ = gather_columns(table, t, x_t)
    prediction, raw = split_output(model_output, x_t)
    if detach_mean:
        prediction = prediction.detach()
    x0, x = x_start.to(table_dtype(x_t.dtype)), x_t.to(table_dtype(x_t.dtype))
    predicted = guess_x_start(from_x_t, from_out, x, prediction)
    if clip:
        predicted = clipped(predicted)
    mean = mean1 * predicted + mean2 * x
    log_var = log_variance(variance, low, high, raw)
    # Where t > 0 the decoder is not wanted, and the KL where t = 0: each is fed harmless values there, so that neither an
    # infinity nor its gradient leaks through the selection.
    last = (t == 0).view(low.shape)
    kl = gaussian_kl_reference(
        torch.where(last, mean, mean1 * x0 + mean2 * x), true_log_variance, mean, torch.where(last, true_log_variance, log_var)
    )
    nll = -discretized_gaussian_log_likelihood(x0, torch.where(last, mean, x0), torch.where(last, 0.5 * log_var, 0.0), levels, cdf)
    return torch.where(last, nll, kl).flatten(1).mean(1) / math.log(2.0)


def _launch(arguments: Any, terms: Tensor | None, grad_terms: Tensor | None, grad_model_output: Tensor | None) -> None:
    """Writes the terms, the gradient of model_output (for grad_terms, or for ones), or both."""
    model_output, x_start, x_t, t, table, variance, clip, levels, cdf, detach_mean = arguments
    native.cpu_vlb_terms(
        sizes=x_t, model_output=model_output.contiguous(), x_t=x_t.contiguous(), x_start=x_start.contiguous(), t=t.contiguous(),
        table=table, variance=variance, clip=clip, levels=levels, exact_cdf=cdf == "erf", detach_mean=detach_mean,
        terms=terms, grad_terms=grad_terms, grad_model_output=grad_model_output,
    )  # fmt: skip


def _vlb_terms_cpu(*arguments: Any) -> Tensor:
    _, _, x_t, *_ = arguments
    terms = per_sample(x_t)
    _launch(arguments, terms, None, None)
    return terms


def _ahead_cpu(arguments: Any, needs: Any) -> tuple[Tensor, dict[str, Tensor | None], list[Tensor]] | None:
    model_output, x_t = arguments.model_output, arguments.x_t
    if model_output.dtype != torch.float32 or any(needs[1:]):
        return None
    terms, grad_model_output = per_sample(x_t), new_like(model_output)
    _launch(arguments, terms, None, grad_model_output)
    # A half that gets no gradient stays zero whatever the upstream is.
    part = grad_model_output
    if arguments.variance == FIXED:
        part = prediction_half(grad_model_output, x_t)
    elif arguments.detach_mean:
        part = grad_model_output[:, x_t.shape[1] :]
    return terms, {"model_output": grad_model_output}, [part]


def _backward_cpu(arguments: Any, needs: Any, grads: Any) -> dict[str, Tensor | None]:
    grad_model_output = new_like(arguments.model_output)
    _launch(arguments, None, grads[0].contiguous(), grad_model_output)
    return {"model_output": grad_model_output}


def _check(
    model_output: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    table: Tensor,
    variance: str,
    clip: bool,
    levels: int,
    cdf: str,
    detach_mean: bool,
) -> None:
    check_data("x_t", x_t)
    check_like("x_start", x_start, "x_t", x_t)
    check_variance(variance)
    check_output(model_output, "x_t", x_t, variance)
    check_table("table", table, "x_t", x_t, columns=len(COLUMNS))
    check_t(t, "x_t", x_t, table.shape[0])
    if not 2 <= levels <= MAX_LEVELS:
        raise ValueError(f"levels must lie in 2..{MAX_LEVELS}, got {levels}")
    if cdf not in CDFS:
        raise ValueError(f"cdf must be one of {', '.join(CDFS)}, got {cdf!r}")


_op = Op(
    "vlb_terms",
    "Tensor model_output, Tensor x_start, Tensor x_t, Tensor t, Tensor table, str variance, bool clip, SymInt levels, str cdf, "
    "bool detach_mean",
    "Tensor",
    check=_check,
    fake=lambda model_output, x_start, x_t, *_: per_sample(x_t),
    reference=vlb_terms_reference,
    differentiable=("model_output",),
    cpu=_vlb_terms_cpu,
    triton=triton_function("vlb_terms", "forward"),
    backward=dict(cpu=_backward_cpu, triton=triton_function("vlb_terms", "backward")),
    ahead=dict(cpu=_ahead_cpu),
)
backends = _op.backends


def vlb_terms(
    model_output: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    table: Tensor,
    *,
    variance: VarianceKind = "fixed",
    clip: bool = False,
    levels: int = 256,
    cdf: Cdf = "tanh",
    detach_mean: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """L_t of each sample, bits per dimension.

    Args:
        model_output: (N, C, ...) the model's output, or (N, 2C, ...) with a variance half.
        x_start: (N, C, ...) clean data on the grid of ``levels`` values in [-1, 1].
        x_t: (N, C, ...) a draw of q(x_t | x_0).
        t: (N,) int64 in 0..T-1.
        table: (T, 8) float32 (float64 for float64 data), columns as in COLUMNS above.
        variance: "fixed", "learned" or "learned_range".
        clip: clip x̂0 to [-1, 1]; usual in evaluation, not in a loss.
        levels: grey levels, 2..2000: they set the decoder's bins.
        cdf: "tanh" (published numbers) or "erf" (exact).
        detach_mean: no gradient to the prediction, only to the variance half (the hybrid loss).
        backend: force "reference", "cpu" or "triton".

    Returns:
        (N,) float32 (float64 for float64 data). Differentiable in model_output, any number of times.

    Raises:
        TypeError, ValueError: what was expected and what came.
        RuntimeError: for a forced backend that is not available here.
    """
    levels, clip, detach_mean = checks.index("levels", levels), checks.flag("clip", clip), checks.flag("detach_mean", detach_mean)
    arguments = (model_output, x_start, x_t, t, table, variance, clip, levels, cdf, detach_mean)
    _check(*arguments)
    return _op(arguments, x_t, arithmetic_dtype(model_output, x_t), backend)
