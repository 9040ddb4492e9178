"""Rate and distortion of a diffusion model as a progressive code (Ho et al. 2020, section 4.3).

A sender transmits x_T, x_{T-1}, ..., x_0 (algorithm 3). The receiver can stop after any of them and show x̂0 (algorithm 4). The bits
received with x_t are those of x_T and of every step down to x_t::

    rate(t) = L_T + Σ_{s > t} L_s,    distortion(t) = √ mean (x̂0(x_t) - x_0)²

At t = 0 only the decoder's bits L_0 are missing, which make the code lossless. The paper calls L_T + Σ_{s > 0} L_s the rate and L_0
the distortion, in bits, of its models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ddpm_fast import checks
from ddpm_fast.evaluation.bound import Bound, standard_error

# Black and white are 2 apart in the data and 255 in an 8-bit image. Other numbers of levels are put on that scale too.
SCALE = 255.0 / 2.0


@dataclass(frozen=True)
class RateDistortion:
    """The curve from t = T-1, where almost nothing is known of the image, to t = 0: tensors (K,) on the CPU.

    Attributes:
        t: int64, the step whose x_t the receiver has.
        rate, rate_standard_error: bits per dimension received so far.
        distortion, distortion_standard_error: root mean squared error of x̂0(x_t) over all images, on a scale of [0, 255].
    """

    t: Tensor
    rate: Tensor
    rate_standard_error: Tensor
    distortion: Tensor
    distortion_standard_error: Tensor


def rate_distortion(bound: Bound) -> RateDistortion:
    """The rate/distortion curve of a bound.

    A full evaluation gives it at each t. An estimate gives it at the last t of each interval, where the rate is unbiased. The squared
    error there is interpolated in t between the middles of the intervals, and constant after the last middle. That is rough near t = T,
    where intervals are long and the error changes fast.

    Source: Ho et al. 2020, section 4.3 and fig. 5.
    """
    checks.instance("bound", bound, Bound)
    spent = bound.terms * bound.counts
    after = spent.flip(1).cumsum(1).flip(1) - spent
    rate = bound.prior[:, None] + after
    t = bound.first + bound.counts - 1
    # Row k of the identity, interpolated, says what interval k contributes at each edge.
    centers, edges = bound.centers.numpy(), t.numpy()
    weights = torch.from_numpy(np.stack([np.interp(edges, centers, row) for row in np.eye(len(edges))]))
    error = bound.mse @ weights
    distortion = error.mean(0).sqrt()
    # The error of a root is the error divided by twice the root.
    spread = torch.where(distortion > 0, standard_error(error) / (2 * distortion), 0.0)
    columns = t, rate.mean(0), standard_error(rate), SCALE * distortion, SCALE * spread
    return RateDistortion(*(column.flip(0) for column in columns))
