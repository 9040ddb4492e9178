"""randn: a noise written out as a tensor, below :class:`~ddpm_fast.Noise` itself.

The reference twin is `noise_reference` in philox.py; kernels: csrc/cpu/randn.cpp and ops/triton/randn.py. All give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ddpm_fast import checks
from ddpm_fast._memory import check_target, was_written
from ddpm_fast._pytorch import draw, goes_through_dispatcher, in_functorch
from ddpm_fast.backends import FLOATING, BackendTable, library, native, triton_function
from ddpm_fast.noise.philox import MAX_ELEMENTS_PER_SAMPLE, noise_reference, signed64, unsigned64
from ddpm_fast.types import Backend


def randn_reference(shape: torch.Size, seed: int, stream: int, first_sample: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return noise_reference(shape, seed, stream, first_sample, device).to(dtype)


def _randn_cpu(
    shape: torch.Size,
    seed: int,
    stream: int,
    first_sample: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    out: Tensor | None = None,
) -> Tensor:
    out = torch.empty(shape, dtype=dtype, device=device) if out is None else out
    native.cpu_randn(sizes=out, out=out, key=(seed, stream, first_sample))
    return out


backends = BackendTable("randn", reference=randn_reference, cpu=_randn_cpu, triton=triton_function("randn", "randn"))


def normals(
    shape: tuple[int, ...] | torch.Size,
    seed: int,
    stream: int,
    first_sample: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """The standard normals of a key as a tensor; arguments and errors as of :func:`ddpm_fast.ops.randn`."""
    if not isinstance(shape, Iterable):
        raise TypeError(f"shape must be sizes (N, ...), got {checks.shown(shape)}")
    shape = torch.Size([checks.index("a size", size) for size in shape])
    if dtype not in FLOATING:
        raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    if len(shape) == 0 or min(shape) < 0:
        raise ValueError(f"shape must be (N, ...) with no negative size, got {tuple(shape)}")
    elements = math.prod(shape[1:])
    if elements > MAX_ELEMENTS_PER_SAMPLE:
        raise ValueError(f"a sample may have at most 2^34 elements, got {elements}")
    device = checks.device("device", device)
    if out is not None:
        _check_out(out, shape, dtype, device)
    if backend is None and (goes_through_dispatcher() or in_functorch()):
        key = signed64(seed), stream, signed64(first_sample)
        drawn = draw(lambda count: torch.ops.ddpm_fast.randn((count, *shape[1:]), *key, dtype, device), shape[0])
        return drawn if out is None else out.copy_(drawn)
    implementation = backends.choose(device, dtype, backend)
    if out is None:
        return implementation(shape, seed, stream, first_sample, dtype, device)
    if implementation is randn_reference:
        return out.copy_(randn_reference(shape, seed, stream, first_sample, dtype, device))
    implementation(shape, seed, stream, first_sample, dtype, device, out=out)
    was_written(out)
    return out


def _check_out(out: Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor, got {type(out).__name__}")
    if out.shape != shape or out.dtype != dtype or out.device.type != device.type:
        raise ValueError(
            f"out must be {dtype} of shape {tuple(shape)} on {device}, got {out.dtype} of shape {tuple(out.shape)} on {out.device}"
        )
    check_target("out", out)


library.define(
    "randn(SymInt[] shape, SymInt seed, SymInt stream, SymInt first_sample, ScalarType dtype, Device device) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(library, "randn", "CompositeExplicitAutograd")
def _randn_op(shape: list[int], seed: int, stream: int, first_sample: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return backends.choose(device, dtype)(torch.Size(shape), unsigned64(seed), stream, unsigned64(first_sample), dtype, device)


def _randn_fake(shape: list[int], seed: int, stream: int, first_sample: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


torch.library.register_fake("ddpm_fast::randn", _randn_fake, lib=library)
