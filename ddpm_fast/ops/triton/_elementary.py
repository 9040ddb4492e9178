"""Elementary functions in fp32, with the operations of csrc/common/elementary.h, which has the reasons."""

import triton
import triton.language as tl

from ddpm_fast.ops.triton._philox import log_unit


@triton.jit
def exponent_of(x):
    """(k, r, p): x = k ln 2 + r and e^x = 2^k (1 + r + p), for |x| < 2^21."""
    k = (x * 1.44269504 + 12582912.0) - 12582912.0
    r = (x + k * -0.693359375) + k * 2.12194440e-4
    p = r * 1.9875691500e-4 + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    return k, r, p * (r * r)


@triton.jit
def power_of_two(k, SHIFT: tl.constexpr):
    """2^(k + SHIFT) for an integer k, the sum in [-126, 127]."""
    bits = (k + 12582912.0).to(tl.uint32, bitcast=True) << 23
    return (bits + ((127 + SHIFT) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def exponential(x):
    """e^x within 1.1 ulp for x <= 89, where it is infinite; 0 below e^-86.6."""
    vanishes = x < -86.6
    k, r, p = exponent_of(tl.where(vanishes, -86.6, x))
    result = (((p + r) + 1.0) * power_of_two(k, -1)) * 2.0
    return tl.where(vanishes, 0.0, result)


@triton.jit
def excess_of(d):
    """(½ (e^d - 1), ½ (e^d - 1 - d)), each with its relative precision down to d = 0, the second never negative."""
    linear = tl.where(d > 89.7, 89.7, d)
    k, r, p = exponent_of(tl.where(linear < -85.9, -85.9, linear))
    power = power_of_two(k, -2)
    rest = power - 0.25
    return 2.0 * (power * (r + p) + rest), 2.0 * (power * p + ((power * r + rest) + -0.25 * linear))


@triton.jit
def logarithm(x):
    """Natural logarithm of a positive normal number; NaN stays NaN."""
    return log_unit(x) + (x - x)


@triton.jit
def clamp(x, low, high):
    """x clipped to [low, high]; NaN stays NaN."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def passes(x, limit):
    """1 where a gradient passes clamp(x, -limit, limit), ends included, else 0."""
    return tl.where((x >= -limit) & (x <= limit), 1.0, 0.0)


@triton.jit
def normal_tanh(x):
    """(Φ, 1 - Φ, derivative of the argument) of the tanh approximation of the normal CDF, |x| <= 100."""
    square = x * x
    twice_u = (x * 1.59576912) * (square * 0.044715 + 1.0)
    e = exponential(tl.where(twice_u < 0.0, twice_u, -twice_u))
    larger = tl.div_rn(1.0, 1.0 + e)
    smaller = e * larger
    below = x < 0.0
    return tl.where(below, smaller, larger), tl.where(below, larger, smaller), 1.59576912 * (square * 0.13414499 + 1.0)


@triton.jit
def normal_erf(x):
    """(Φ, density) of the normal distribution, |x| <= 100."""
    magnitude = tl.where(x < 0.0, -x, x)
    z = magnitude * 0.70710678
    z = tl.where(z > 10.2, 10.2, z)
    t = tl.div_rn(z - 2.0, z + 2.0)
    p = t * -4.0829342e-4 + -1.2390090e-3
    p = p * t + 1.3208493e-3
    p = p * t + 8.6411564e-3
    p = p * t + -8.0622835e-3
    p = p * t + -5.4207395e-2
    p = p * t + 1.6405569e-1
    p = p * t + -1.6603111e-1
    p = p * t + -9.2763998e-2
    p = p * t + 1.2769784
    high = (z.to(tl.uint32, bitcast=True) & 0xFFFFF000).to(tl.float32, bitcast=True)
    low = z - high
    gauss = exponential(-(high * high)) * exponential(-((z + high) * low))  # e^-z²
    tail = 0.5 * tl.div_rn(p * gauss, z * 2.0 + 1.0)
    return tl.where(x < 0.0, tail, 1.0 - tail), 0.39894228 * tl.where(magnitude > 14.0, 0.0, gauss)
