"""Noise: a virtual tensor of standard normals that is generated where it is needed and never stored.

The contract, version 1. The generator is Philox4x32-10 (Salmon et al. 2011, Random123). For element i (row-major,
within its sample) of sample n::

    key     = (seed low 32, seed high 32)
    counter = (j, stream, sample low 32, sample high 32),   j = i // 4,   sample = first_sample + n

The four words of a block are two Box-Muller pairs; i % 4 picks the element. Logarithm, sine and cosine are fixed
polynomials evaluated with separately rounded fp32 multiplications and additions, so every backend gives the same bits:
`noise_reference` here, csrc/common/philox.h on CPU and CUDA. tests/golden_noise.json pins values for ever.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from ddpm_fast import checks
from ddpm_fast.functorch import draw

MASK32 = 0xFFFFFFFF
MASK64 = 0xFFFFFFFFFFFFFFFF
MAX_ELEMENTS_PER_SAMPLE = 2**34  # j is a 32-bit word and makes four elements
_FOLD_TAG = 0x464F4C44  # "FOLD": keeps derived keys apart from the counters of any noise

# What a key is folded with before it serves a purpose, so that the parts of a run never share their noise.
FOLD_TRAIN_NOISE = 1
FOLD_TRAIN_TIMESTEPS = 2
FOLD_SAMPLE_START = 3
FOLD_SAMPLE_STEPS = 4
FOLD_EVAL_NOISE = 5
FOLD_EVAL_TIMESTEPS = 6
FOLD_AUGMENT = 7
FOLD_LABELS = 8
FOLD_DROPOUT = 9
FOLD_SAMPLE_KNOWN = 10


class Noise:
    """ε ~ N(0, I) of any shape, given by three integers instead of a tensor. Immutable.

    Stands wherever a noise tensor may be given. The values depend on (seed, stream, sample index, element index)
    alone: not on the device, the batch size, the memory layout, the number of threads or of ranks. Under torch.func.vmap its
    ``randomness`` decides: "different" draws by the batch index, as a batch would, "error" (the default) refuses.

    Args:
        seed: 0..2^64-1, the key.
        stream: 0..2^32-1, one for each draw of a run (training step s uses s, reverse step t uses t).
        first_sample: 0..2^64-1, global index of the batch's first sample; sample n of the batch is first_sample + n.

    Raises:
        TypeError, ValueError: for an argument that is not an integer in its range.

    Example:
        >>> Noise(seed=0, stream=3).materialize((64, 3, 32, 32))
    """

    __slots__ = ("first_sample", "seed", "stream")

    def __init__(self, seed: int, stream: int = 0, first_sample: int = 0) -> None:
        object.__setattr__(self, "seed", _check_integer("seed", seed, 64))
        object.__setattr__(self, "stream", _check_integer("stream", stream, 32))
        object.__setattr__(self, "first_sample", _check_integer("first_sample", first_sample, 64))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Noise is immutable; make another one, for instance with at({name}=...)")

    def __repr__(self) -> str:
        return f"Noise(seed={self.seed}, stream={self.stream}, first_sample={self.first_sample})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Noise) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __reduce__(self) -> tuple:
        return Noise, self._key()

    def _key(self) -> tuple[int, int, int]:
        return self.seed, self.stream, self.first_sample

    def fold_in(self, k: int) -> Noise:
        """An independent key derived from this one and ``k`` (0..2^64-1); stream and first_sample stay."""
        _check_integer("k", k, 64)
        words = philox4x32_10(k & MASK32, k >> 32, _FOLD_TAG, MASK32, self.seed & MASK32, self.seed >> 32)
        return Noise(words[0] | words[1] << 32, self.stream, self.first_sample)

    def at(self, *, stream: int | None = None, first_sample: int | None = None) -> Noise:
        """The same key at another stream or first sample."""
        return Noise(
            self.seed,
            self.stream if stream is None else stream,
            self.first_sample if first_sample is None else first_sample,
        )

    def materialize(self, shape: tuple[int, ...] | torch.Size, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """The noise as a tensor.

        Args:
            shape: (N, ...); the first dimension counts samples.
            dtype: floating; the values are computed in fp32 and rounded (or widened) to it.

        Returns:
            Contiguous tensor of that shape.
        """
        from ddpm_fast.ops.randn import randn  # noise.py is below the ops, which import it

        return randn(shape, self, device=device, dtype=dtype)

    def integers(self, count: int, high: int, device: torch.device | str = "cpu") -> Tensor:
        """``count`` integers, uniform over 0..high-1 (high <= 2^31), one per sample. Used to draw t.

        They come from the words that :meth:`materialize` makes normals of: fold a key of their own in first.

        The bias of the multiply-and-shift is below high / 2^32.

        Returns:
            int64 tensor of shape (count,).
        """
        high = checks.index("high", high)
        if not 1 <= high <= 2**31:
            raise ValueError(f"high must lie in 1..2^31, got {high}")
        return (self._words(count, device) * high) >> 32

    def uniform(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        """``count`` float64 numbers, uniform over [0, 1), one per sample; shape (count,)."""
        return self._words(count, device).double() * 2.0**-32

    def _words(self, count: int, device: torch.device | str) -> Tensor:
        """The first 32-bit word of each sample's first block, as int64."""
        count = checks.index("count", count)
        if count < 0:
            raise ValueError(f"count must be at least 0, got {count}")

        device = checks.device("device", device)

        def words(count: int) -> Tensor:
            sample = _sample_index(count, self.first_sample, device)
            counter = (torch.zeros_like(sample), self.stream, *_split64(sample))
            return philox4x32_10(*counter, self.seed & MASK32, self.seed >> 32)[0]

        return draw(words, count)


def noise_reference(shape: tuple[int, ...] | torch.Size, seed: int, stream: int, first_sample: int, device: torch.device) -> Tensor:
    """The contract in plain PyTorch (int64 for the 32-bit words): float32 tensor of ``shape``, any device."""
    count, elements = shape[0], math.prod(shape[1:])
    sample = _sample_index(count, first_sample, device)[:, None]
    j = torch.arange((elements + 3) // 4, device=device)[None, :].expand(count, -1)
    words = philox4x32_10(j, stream, *_split64(sample), seed & MASK32, (seed >> 32) & MASK32)
    blocks = torch.stack([*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3])], -1)
    return blocks.flatten(1)[:, :elements].reshape(shape).contiguous()


def dropout_mask_reference(
    shape: tuple[int, ...] | torch.Size, probability: float, seed: int, stream: int, first_sample: int, device: torch.device
) -> Tensor:
    """What a dropout keeps, in plain PyTorch: bool tensor of ``shape`` (N, C, ...).

    Element (c, pixel) of a sample is kept where word i % 4 of block j = i // 4 is at least ⌊probability · 2^32⌋, i = pixel·C + c:
    channels run fastest, which is the order in memory of the layout that networks run in. Any layout of the data gives the same.
    """
    count, channels, *space = shape
    pixels = math.prod(space)
    sample = _sample_index(count, first_sample, device)[:, None]
    j = torch.arange((pixels * channels + 3) // 4, device=device)[None, :].expand(count, -1)
    words = philox4x32_10(j, stream, *_split64(sample), seed & MASK32, (seed >> 32) & MASK32)
    kept = torch.stack(words, -1).flatten(1)[:, : pixels * channels] >= int(probability * 2**32)
    return kept.view(count, pixels, channels).transpose(1, 2).reshape(shape)


def philox4x32_10(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 on words of 32 bits, held in ints or int64 tensors. Returns four words."""
    for _ in range(10):
        high0, low0 = _multiply_wide(0xD2511F53, c0)
        high1, low1 = _multiply_wide(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def _multiply_wide(a, b):
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


def _sample_index(count: int, first_sample: int, device: torch.device) -> Tensor:
    """Global sample indices as int64 bit patterns: indices from 2^63 on wrap to negative numbers, as intended."""
    first = first_sample - 2**64 if first_sample >= 2**63 else first_sample
    return torch.arange(count, device=device) + first


def _split64(x: Tensor) -> tuple[Tensor, Tensor]:
    return x & MASK32, (x >> 32) & MASK32


def _check_integer(name: str, value: int, bits: int) -> int:
    value = checks.index(name, value)
    if value < 0 or value >= 1 << bits:
        raise ValueError(f"{name} must lie in 0..2^{bits}-1, got {value}")
    return value
