"""randn: :class:`~ddpm_fast.Noise` written out as a tensor.

The kernels and their choice are in ddpm_fast/noise/randn.py, below the noise that is written by them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.noise import Noise
from ddpm_fast.noise.randn import normals
from ddpm_fast.types import Backend


def randn(
    shape: tuple[int, ...] | torch.Size,
    noise: Noise,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Standard normals of a :class:`Noise` as a tensor.

    Args:
        shape: (N, ...), the first dimension counts samples; empty shapes give empty tensors.
        noise: where the values come from.
        dtype: float32, bfloat16, float16 or float64; values are computed in fp32 and rounded (or widened) to it.
        out: contiguous tensor of that shape, dtype and device to write into.
        backend: force "reference", "cpu" or "triton".

    Returns:
        Contiguous tensor of ``shape`` (``out`` where given). Not differentiable: it has no inputs.

    Raises:
        TypeError, ValueError: for a dtype that is not floating, a shape without dimensions, a negative size, or a sample
            of more than 2^34 elements, or an ``out`` that is not like the result.
    """
    if not isinstance(noise, Noise):
        raise TypeError(f"noise must be a Noise, got {type(noise).__name__}")
    return normals(shape, noise.seed, noise.stream, noise.first_sample, device, dtype, out, backend)
