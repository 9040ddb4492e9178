"""gaussian_kl: KL(N(mean1, e^logvar1) ‖ N(mean2, e^logvar2)) of diagonal Gaussians, in nats.

½ (e^d - 1 - d + (mean1 - mean2)² e^-logvar2) with d = logvar1 - logvar2: the form of Ho et al. 2020, eq. 8, whose first
part is computed without cancellation, so that the result is never negative and exact near equality.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from ddpm_fast.backends import BackendTable
from ddpm_fast.ops._common import check_data, check_device, table_dtype

REDUCTIONS = (None, "mean_per_sample")
_SERIES_BELOW = 0.3


def exp_minus_one_minus(d: Tensor) -> Tensor:
    """e^d - 1 - d, with full relative precision near 0: its Taylor series there, expm1(d) - d elsewhere."""
    near = d.abs() < _SERIES_BELOW
    small = torch.where(near, d, 0.0)  # no overflow, and so no NaN gradient, from the branch that is not taken
    terms = 15 if d.dtype == torch.float64 else 8  # what is left out is below half an ulp at _SERIES_BELOW
    series = torch.full_like(d, 1.0 / math.factorial(terms + 1))
    for k in range(terms, 1, -1):
        series = series * small + 1.0 / math.factorial(k)
    far = torch.where(near, 1.0, d)
    return torch.where(near, series * small * small, torch.expm1(far) - far)


def gaussian_kl_reference(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor, reduction: str | None = None) -> Tensor:
    """The formula in plain PyTorch; fp32 arithmetic (float64 for float64 data), the mean included."""
    dtype = mean1.dtype
    mean1, logvar1, mean2, logvar2 = (x.to(table_dtype(dtype)) for x in (mean1, logvar1, mean2, logvar2))
    # Squared last: e^-logvar2 alone overflows fp32 below -88, and times a distance of 0 it would be NaN.
    distance = ((mean1 - mean2) * torch.exp(-0.5 * logvar2)).square()
    kl = 0.5 * (exp_minus_one_minus(logvar1 - logvar2) + distance)
    return (kl if reduction is None else kl.reshape(len(kl), -1).mean(1)).to(dtype)


backends = BackendTable("gaussian_kl", reference=gaussian_kl_reference)


def gaussian_kl(
    mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor, *, reduction: str | None = None, backend: str | None = None
) -> Tensor:
    """KL divergence of diagonal Gaussians in nats.

    Args:
        mean1, logvar1, mean2, logvar2: floating tensors on one device, broadcast against each other; log-variances are
            natural logarithms.
        reduction: None for one value an element, "mean_per_sample" for the mean over all but the first dimension.
        backend: force "reference".

    Returns:
        Tensor of the broadcast shape, or (N,). Differentiable in all four.

    Raises:
        TypeError, ValueError: what was expected and what came.
    """
    names = ("mean1", "logvar1", "mean2", "logvar2")
    inputs = (mean1, logvar1, mean2, logvar2)
    for name, x in zip(names, inputs, strict=True):
        check_data(name, x)
        check_device(name, x, "mean1", mean1)
        if x.dtype != mean1.dtype:
            raise TypeError(f"{name} must have the dtype of mean1, {mean1.dtype}, got {x.dtype}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be None or 'mean_per_sample', got {reduction!r}")
    try:
        inputs = torch.broadcast_tensors(*inputs)
    except RuntimeError:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in zip(names, inputs, strict=True))
        raise ValueError(f"shapes must broadcast against each other, got {shapes}") from None
    return backends.choose(mean1.device, mean1.dtype, backend)(*inputs, reduction)
