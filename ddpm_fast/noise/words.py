"""Words: the generator's integers, one for each sample, of which :class:`~ddpm_fast.Noise` makes its integers and uniform numbers.

The reference twin is here; kernels: `noise_words` in csrc/bindings.cpp and ops/triton/words.py. All give the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast._pytorch import goes_through_dispatcher
from ddpm_fast.backends import BackendTable, native, triton_function
from ddpm_fast.noise.philox import MASK32, philox4x32_10, sample_index, split64


def words_reference(count: int, seed: int, stream: int, first_sample: int, device: torch.device) -> Tensor:
    sample = sample_index(count, first_sample, device)
    return philox4x32_10(torch.zeros_like(sample), stream, *split64(sample), seed & MASK32, seed >> 32)[0]


def _words_cpu(count: int, seed: int, stream: int, first_sample: int, device: torch.device) -> Tensor:
    made = torch.empty(count, dtype=torch.int64, device=device)
    native.noise_words(made, seed, stream, first_sample)
    return made


backends = BackendTable("words", reference=words_reference, cpu=_words_cpu, triton=triton_function("words", "words"))


def words(count: int, seed: int, stream: int, first_sample: int, device: torch.device) -> Tensor:
    """First 32-bit word of the first block of each of ``count`` samples.

    Returns:
        int64 tensor of shape (count,), with values of 0..2^32-1.
    """
    # A compiler traces the reference, and makes a kernel of it. float32 stands for a dtype that the kernels have.
    traced = goes_through_dispatcher()
    return (words_reference if traced else backends.choose(device, torch.float32))(count, seed, stream, first_sample, device)
