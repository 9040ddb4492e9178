"""Noise: a virtual tensor of standard normals that is generated where it is needed and never stored.

The contract, version 1. The generator is Philox4x32-10 (Salmon et al. 2011, Random123). For element i (row-major,
within its sample) of sample n::

    key     = (seed low 32, seed high 32)
    counter = (j, stream, sample low 32, sample high 32),   j = i // 4,   sample = first_sample + n

The four words of a block are two Box-Muller pairs; i % 4 picks the element. Logarithm, sine and cosine are fixed
polynomials evaluated with separately rounded fp32 multiplications and additions, so every backend gives the same bits:
`noise_reference` in philox.py, csrc/common/philox.h on CPU and CUDA, ops/triton/_philox.py in Triton.
tests/noise/golden_noise.json pins values for ever.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast import checks
from ddpm_fast._pytorch import draw
from ddpm_fast.noise.philox import MASK32, philox4x32_10
from ddpm_fast.noise.randn import normals
from ddpm_fast.noise.words import words

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

    Every function that takes a noise tensor takes a Noise. The values depend on (seed, stream, sample index, element index)
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
    seed: int
    stream: int
    first_sample: int

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

    def __reduce__(self) -> tuple[type[Noise], tuple[int, int, int]]:
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

    def materialize(
        self, shape: tuple[int, ...] | torch.Size, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The noise as a tensor.

        Args:
            shape: (N, ...); the first dimension counts samples.
            dtype: floating; the values are computed in fp32 and rounded (or widened) to it.

        Returns:
            Contiguous tensor of that shape.
        """
        return normals(shape, self.seed, self.stream, self.first_sample, device, dtype)

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

        return draw(lambda count: words(count, self.seed, self.stream, self.first_sample, device), count)


def _check_integer(name: str, value: int, bits: int) -> int:
    value = checks.index(name, value)
    if value < 0 or value >= 1 << bits:
        raise ValueError(f"{name} must lie in 0..2^{bits}-1, got {value}")
    return value
