"""The noise contract in plain PyTorch: what every kernel must give, bit for bit. Philox4x32-10 and Box-Muller, see noise.py."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
MAX_ELEMENTS_PER_SAMPLE = 2**34  # j is a 32-bit word and makes four elements


def noise_reference(shape: tuple[int, ...] | torch.Size, seed: int, stream: int, first_sample: int, device: torch.device) -> Tensor:
    """The contract in plain PyTorch (int64 for the 32-bit words): float32 tensor of ``shape``, any device."""
    count, elements = shape[0], math.prod(shape[1:])
    sample = sample_index(count, first_sample, device)[:, None]
    j = torch.arange((elements + 3) // 4, device=device)[None, :].expand(count, -1)
    words = philox4x32_10(j, stream, *split64(sample), seed & MASK32, (seed >> 32) & MASK32)
    blocks = torch.stack([*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3])], -1)
    return blocks.flatten(1)[:, :elements].reshape(shape).contiguous()


def dropout_mask_reference(
    shape: tuple[int, ...] | torch.Size, probability: float, seed: int, stream: int, first_sample: int, device: torch.device
) -> Tensor:
    """Mask of what a dropout keeps, in plain PyTorch: bool tensor of ``shape`` (N, C, ...).

    Element (c, pixel) of a sample is kept where word i % 4 of block j = i // 4 is at least ⌊probability · 2^32⌋, i = pixel·C + c:
    channels run fastest, which is the order in memory of the layout that networks run in. Any layout of the data gives the same.
    """
    count, channels, *space = shape
    pixels = math.prod(space)
    sample = sample_index(count, first_sample, device)[:, None]
    j = torch.arange((pixels * channels + 3) // 4, device=device)[None, :].expand(count, -1)
    words = philox4x32_10(j, stream, *split64(sample), seed & MASK32, (seed >> 32) & MASK32)
    kept = torch.stack(words, -1).flatten(1)[:, : pixels * channels] >= int(probability * 2**32)
    return kept.view(count, pixels, channels).transpose(1, 2).reshape(shape)


def philox4x32_10(c0: Any, c1: Any, c2: Any, c3: Any, k0: int, k1: int) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10 on words of 32 bits, held in ints or int64 tensors. Returns four words."""
    for _ in range(10):
        high0, low0 = _multiply_wide(0xD2511F53, c0)
        high1, low1 = _multiply_wide(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def _multiply_wide(a: int, b: Any) -> tuple[Any, Any]:
    """High and low word of a 32 × 32 bit product, in two 48-bit halves: a 64-bit product would overflow int64."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = (low >> 16) + high
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def _log_unit(x: Tensor) -> Tensor:
    """Natural logarithm on [2^-33, 1]: Cephes' logf polynomial, about 1 ulp."""
    bits = x.view(torch.int32)
    exponent = (bits >> 23) - 126
    m = ((bits & 0x7FFFFF) | 0x3F000000).view(torch.float32)  # mantissa in [0.5, 1)
    low = m < 0.70710677
    f = torch.where(low, exponent - 1, exponent).float()
    m = torch.where(low, m + m - 1.0, m - 1.0)
    z = m * m
    y = torch.full_like(m, 7.0376836e-2)
    for c in (-1.1514610e-1, 1.1676998e-1, -1.2420141e-1, 1.4249323e-1, -1.6668058e-1, 2.0000715e-1, -2.4999994e-1, 3.3333331e-1):
        y = y * m + c
    y = y * m * z
    y = y + -2.1219444e-4 * f
    y = y + -0.5 * z
    return m + y + 0.69335938 * f


def _cos_sin_turn(turn: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of 2π·turn for turn in [0, 1): the quadrant, then polynomials on [-π/4, π/4]."""
    k = turn * 4.0
    quadrant = (k + 0.5).int()
    r = (k - quadrant.float()) * 1.5707964
    z = r * r
    sine = (z * -1.9515296e-4 + 8.3321609e-3) * z + -1.6666655e-1
    sine = sine * z * r + r
    cosine = (z * 2.4433157e-5 + -1.3887316e-3) * z + 4.1666646e-2
    cosine = cosine * z * z + -0.5 * z + 1.0
    odd = (quadrant & 1) == 1
    a, b = torch.where(odd, cosine, sine), torch.where(odd, sine, cosine)
    return torch.where(((quadrant + 1) & 2) == 2, -b, b), torch.where((quadrant & 2) == 2, -a, a)


def _box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    u = radius_word.float() * 2.3283064e-10 + 1.1641532e-10  # 2^-32, 2^-33: in (0, 1]
    squared = (-2.0 * _log_unit(u)).clamp_min(0.0)
    radius = torch.sqrt(squared.double()).float()  # fp32 torch.sqrt on CPU is not correctly rounded
    cosine, sine = _cos_sin_turn((angle_word >> 8).float() * 5.9604645e-8)  # 2^-24
    return radius * cosine, radius * sine


def sample_index(count: int, first_sample: int, device: torch.device) -> Tensor:
    """Global sample indices as int64 bit patterns: indices from 2^63 on wrap to negative numbers, as intended."""
    return torch.arange(count, device=device) + signed64(first_sample)


def split64(x: Tensor) -> tuple[Tensor, Tensor]:
    return x & MASK32, (x >> 32) & MASK32


def signed64(x: int) -> int:
    """The int64 of the same 64 bits: operators have no unsigned integers."""
    return x - 2**64 if x >= 2**63 else x


def unsigned64(x: int) -> int:
    return x + 2**64 if x < 0 else x
