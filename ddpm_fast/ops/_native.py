"""How a tensor, a noise and sizes reach a native kernel: as addresses and tags. See csrc/bindings.cpp."""
from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ddpm_fast._memory import address
from ddpm_fast.backends import NATIVE_DTYPES, native
from ddpm_fast.noise import Noise

_NO_NOISE = (0, False, 0, 0, 0)


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def dtype_tag(x: Tensor) -> int:
    return NATIVE_DTYPES[x.dtype]


def native_noise(noise: Noise | Tensor | None) -> tuple[int, bool, int, int, int]:
    """(address, whether there is noise, seed, stream, first sample); a tensor must be contiguous and outlive the call."""
    if noise is None:
        return _NO_NOISE
    if isinstance(noise, Noise):
        return 0, True, noise.seed, noise.stream, noise.first_sample
    return address(noise), True, 0, 0, 0


def contiguous_noise(noise: Noise | Tensor | None) -> Noise | Tensor | None:
    return noise.contiguous() if isinstance(noise, Tensor) else noise


def native_sizes(x: Tensor) -> tuple[int, int, int]:
    """(samples, elements of each, threads)."""
    samples = x.shape[0]
    return samples, x.numel() // samples, torch.get_num_threads()


@lru_cache(maxsize=4096)
def workspace_floats(plan: Callable[..., dict], *sizes: int, **options: int) -> int:
    """What a launch plan of csrc/cuda asks for; the rest of it is for its launcher and the tests."""
    return plan(*sizes, **options)["workspace"]


def stream_of(x: Tensor) -> tuple[int, int]:
    """(device, stream) that a launcher of CUDA is to use for x: its device, and the stream that is current there."""
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def new_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def scale_samples(x: Tensor, factors: Tensor, t: Tensor | None = None, out: Tensor | None = None) -> None:
    """x ← factors[n] · x for sample n, or with t, factors[t[n]] · x; into ``out``, which is strided alike, where given.

    Args:
        x: (N, ...) whose samples are each contiguous, as half of a model's output is.
        factors: (N,) float32, or (T,) with t.
    """
    samples, elements, threads = native_sizes(x)
    native.cpu_scale(x.data_ptr(), address(x if out is None else out), dtype_tag(x), x.stride(0), address(t), factors.data_ptr(), samples, elements, threads)
