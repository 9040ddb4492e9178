"""Results of a diffusion's methods, where they are more than one tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class PMeanVariance(NamedTuple):
    """p_θ(x_{t-1} | x_t): each (N, C, ...); log_variance in nats; x_start is the model's x̂0."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    x_start: Tensor


@dataclass(frozen=True)
class BoundTerms:
    """The terms of the bound of N samples at K times each (Ho et al., eq. 5).

    Attributes:
        prior: (N,) L_T, in bits per dimension.
        terms: (N, K) L_t at each of the times, in bits per dimension; that of t = 0 is the decoder's.
        mse: (N, K) mean squared error of x̂0 at these times, on the data's scale of [-1, 1].
    """

    prior: Tensor
    terms: Tensor
    mse: Tensor
