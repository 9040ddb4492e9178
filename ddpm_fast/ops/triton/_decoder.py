"""The decoder's bins (Ho et al. 2020, eq. 13), with the operations of csrc/common/diffusion_math.h, which has the reasons.

Each decoder returns the probability of the grey level x_start, and the derivatives of its logarithm by the mean and by the log of the
deviation.
"""

import triton
import triton.language as tl

from ddpm_fast.ops.triton._elementary import clamp, excess_of, exponential, normal_erf, normal_tanh


@triton.jit
def saturate(x):
    """The CDF is 0 or 1 beyond 100 deviations."""
    return clamp(x, -100.0, 100.0)


@triton.jit
def decoder_tanh(x_start, mean, inverse, half):
    """Decoder with the tanh CDF, whose difference is computed as a product: Φ(a) - Φ(b) = Φ(a) Φ(-b) (1 - e^-gap)."""
    centered = x_start - mean
    a, b = saturate(inverse * (centered + half)), saturate(inverse * (centered - half))
    width = saturate(inverse * half) * 2.0
    squares = a * (a + b) + b * b
    first, last = x_start < -0.999, x_start > 0.999
    bounded = ~(first | last)
    upper, upper_tail, upper_slope = normal_tanh(a)
    lower, lower_tail, lower_slope = normal_tanh(b)
    scale = 1.59576912 * width
    growth, _ = excess_of(-(scale * (squares * 0.044715 + 1.0)))
    within = -2.0 * growth
    probability = (tl.where(last, 1.0, upper) * tl.where(first, 1.0, lower_tail)) * tl.where(bounded, within, 1.0)
    by_a, by_b = tl.where(last, 0.0, upper_slope * upper_tail), tl.where(first, 0.0, lower_slope * lower)
    by_gap = tl.where(bounded, tl.div_rn(1.0 - within, within) * scale, 0.0)
    by_mean = inverse * ((by_b - by_a) - (by_gap * 0.13414499) * (a + b))
    by_log_deviation = (b * by_b - a * by_a) - by_gap * (squares * 0.13414499 + 1.0)
    return probability, by_mean, by_log_deviation


@triton.jit
def add_node(z, weight, mass, first, second):
    """Adds a node to the integrals of φ, zφ and (1 - z²)φ."""
    square = z * z
    term = weight * exponential(-0.5 * square)
    return mass + term, first + z * term, second + (1.0 - square) * term


@triton.jit
def decoder_erf(x_start, mean, inverse, half):
    """Decoder with the exact CDF: Gauss-Legendre if a bin is narrower than 0.4 deviations, else a difference of small numbers."""
    centered = x_start - mean
    upper, lower = saturate(inverse * (centered + half)), saturate(inverse * (centered - half))
    first, last = x_start < -0.999, x_start > 0.999
    bounded = ~(first | last)
    mirrored = last | (~first & (centered > 0.0))
    a, b, inner = tl.where(mirrored, -lower, upper), tl.where(mirrored, -upper, lower), tl.where(bounded, 1.0, 0.0)
    cdf_a, density_a = normal_erf(a)
    cdf_b, density_b = normal_erf(b)
    difference, density = cdf_a - inner * cdf_b, density_a - inner * density_b

    middle, reach = saturate(inverse * centered), saturate(inverse * half)
    width = 0.79788456 * reach
    nothing = tl.zeros(middle.shape, tl.float32)
    mass, mass_first, mass_second = add_node(middle, 0.284444444 * width, nothing, nothing, nothing)
    mass, mass_first, mass_second = add_node(middle - 0.53846931 * reach, 0.239314335 * width, mass, mass_first, mass_second)
    mass, mass_first, mass_second = add_node(middle + 0.53846931 * reach, 0.239314335 * width, mass, mass_first, mass_second)
    mass, mass_first, mass_second = add_node(middle - 0.906179846 * reach, 0.118463443 * width, mass, mass_first, mass_second)
    mass, mass_first, mass_second = add_node(middle + 0.906179846 * reach, 0.118463443 * width, mass, mass_first, mass_second)

    narrow = reach < tl.where(bounded, 0.2, 0.0)
    probability = tl.where(narrow, mass, difference)
    slope = tl.where(narrow, mass_first, tl.where(mirrored, density, -density))
    curve = tl.where(narrow, mass_second, a * density_a - inner * (b * density_b))
    return probability, tl.div_rn(inverse * slope, probability), -tl.div_rn(curve, probability)
