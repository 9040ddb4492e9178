"""randn: :class:`~ddpm_fast.Noise` written out as a tensor.

The reference twin is `noise_reference` in ddpm_fast/noise.py, beside the contract; kernels: csrc/cpu/randn.cpp and
csrc/cuda/randn.cu. All give the same bits.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from ddpm_fast.backends import NATIVE_DTYPES, BackendTable, native
from ddpm_fast.noise import MAX_ELEMENTS_PER_SAMPLE, Noise, noise_reference
from ddpm_fast.ops._common import FLOATING, goes_through_dispatcher, in_functorch, library, signed64, unsigned64


def randn_reference(shape: torch.Size, seed: int, stream: int, first_sample: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return noise_reference(shape, seed, stream, first_sample, device).to(dtype)


def _randn_cpu(shape, seed, stream, first_sample, dtype, device):
    out = torch.empty(shape, dtype=dtype, device=device)
    count, elements = shape[0], math.prod(shape[1:])
    native.cpu_randn(out.data_ptr(), count, elements, NATIVE_DTYPES[dtype], seed, stream, first_sample, torch.get_num_threads())
    return out


def _randn_cuda(shape, seed, stream, first_sample, dtype, device):
    out = torch.empty(shape, dtype=dtype, device=device)
    count, elements = shape[0], math.prod(shape[1:])
    current = torch.cuda.current_stream(out.device).cuda_stream
    native.cuda_randn(out.data_ptr(), count, elements, NATIVE_DTYPES[dtype], seed, stream, first_sample, out.device.index, current)
    return out


backends = BackendTable("randn", reference=randn_reference, cpu=_randn_cpu, cuda=_randn_cuda)


def randn(
    shape: tuple[int, ...] | torch.Size,
    noise: Noise,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """Standard normals of a :class:`Noise` as a tensor.

    Args:
        shape: (N, ...), the first dimension counts samples; empty shapes give empty tensors.
        noise: where the values come from.
        dtype: float32, bfloat16, float16 or float64; values are computed in fp32 and rounded (or widened) to it.
        backend: force one of "reference", "cpu", "cuda".

    Returns:
        Contiguous tensor of ``shape``. Not differentiable: it has no inputs.

    Raises:
        TypeError, ValueError: for a dtype that is not floating, a shape without dimensions, a negative size, or a sample
            of more than 2^34 elements.
    """
    shape = torch.Size(shape)
    if not isinstance(noise, Noise):
        raise TypeError(f"noise must be a Noise, got {type(noise).__name__}")
    if dtype not in FLOATING:
        raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    if len(shape) == 0 or any(size < 0 for size in shape):
        raise ValueError(f"shape must be (N, ...) with no negative size, got {tuple(shape)}")
    if math.prod(shape[1:]) > MAX_ELEMENTS_PER_SAMPLE:
        raise ValueError(f"a sample may have at most 2^34 elements, got {math.prod(shape[1:])}")
    device = torch.device(device)
    if backend is None and (goes_through_dispatcher() or in_functorch()):
        return torch.ops.ddpm_fast.randn(shape, signed64(noise.seed), noise.stream, signed64(noise.first_sample), dtype, device)
    return backends.choose(device, dtype, backend)(shape, noise.seed, noise.stream, noise.first_sample, dtype, device)


library.define(
    "randn(SymInt[] shape, SymInt seed, SymInt stream, SymInt first_sample, ScalarType dtype, Device device) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(library, "randn", "CompositeExplicitAutograd")
def _randn_op(shape, seed, stream, first_sample, dtype, device):
    return backends.choose(device, dtype)(torch.Size(shape), unsigned64(seed), stream, unsigned64(first_sample), dtype, device)


@torch.library.register_fake("ddpm_fast::randn", lib=library)
def _randn_fake(shape, seed, stream, first_sample, dtype, device):
    return torch.empty(shape, dtype=dtype, device=device)
