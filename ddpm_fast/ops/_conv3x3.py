"""conv3x3: 3 × 3 convolution of stride 1 and padding 1, plus a bias and a residual, for inference.

    y = conv(x, weight) + bias + residual

On CPU by Winograd's minimal filtering F(2×2, 3×3) (Lavin & Gray 2016, https://arxiv.org/abs/1509.09308): 16 multiplications where the
sum has 36, with float32's usual error. The weight is transformed on each call and the result is not kept: a weight can be changed in ways
that leave no trace, and a kept result would then be wrong. Calls that the kernel cannot serve go to PyTorch's convolution, which is the
reference twin. The kernel is csrc/cpu/conv3x3.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from ddpm_fast._pytorch import goes_through_dispatcher, in_forward_mode, in_functorch
from ddpm_fast.backends import FLOATING, BackendTable, native
from ddpm_fast.ops._common import check_device
from ddpm_fast.types import Backend

_LAYOUT = torch.channels_last
FEWEST_CHANNELS = 16  # of x: with fewer the transforms cost more than they save, and PyTorch's convolution is mostly faster
FEWEST_TILES = 64  # of 2 × 2 pixels, in all images: with fewer the weight's transform costs more than they save (docs/kernels.md)


def conv3x3_reference(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """The formula in plain PyTorch."""
    y = F.conv2d(x, weight, bias, padding=1)
    return y if residual is None else residual + y


def _forward_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    samples, _, height, width = x.shape
    y = torch.empty((samples, weight.shape[0], height, width), dtype=torch.float32, device="cpu", memory_format=_LAYOUT)
    if not samples:
        return y
    native.cpu_conv3x3(**_arguments(x, weight, bias, residual, y))
    return y


def conv3x3_prepared(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, y: Tensor) -> Callable[[], None]:
    """Prepares a call of the kernel that can be repeated, for tensors that :func:`_lies_well` accepts.

    The call keeps the tensors alive, and reads x, bias and residual anew each time. The weight is transformed here, so later changes of
    it have no effect. The transformed weight takes 16/9 of the weight's memory, with the output channels rounded up to 32.

    Args:
        x, weight, bias, residual: as :func:`conv3x3` takes them.
        y: (N, K, H, W) float32, channels_last, which the call writes.

    Returns:
        A function without arguments.
    """
    return native.cpu_conv3x3_prepared(**_arguments(x, weight, bias, residual, y))


def _arguments(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, y: Tensor) -> dict[str, Any]:
    samples, channels_in, height, width = x.shape
    channels = dict(channels_in=channels_in, channels_out=weight.shape[0])
    transformed = torch.empty((native.conv3x3_floats(**channels),), dtype=torch.float32, device="cpu")
    native.cpu_conv3x3_weight(**channels, weight=weight, transformed=transformed)
    return dict(samples=samples, height=height, width=width, **channels, x=x, weight=transformed, bias=bias, residual=residual, y=y)


def _obstacle(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> str:
    """Reason why the kernel cannot serve a call, shapes apart; empty where it can."""
    if goes_through_dispatcher() or in_functorch() or in_forward_mode():
        return "is not for compiling, tracing or transforming: it is no operator of PyTorch"
    with_grad = torch.is_grad_enabled()
    for y in (x, weight, bias, residual):
        if y is None:
            continue
        if type(y) is not Tensor and type(y) is not Parameter:
            return f"takes plain tensors, got {type(y).__name__}"
        if not y.is_cpu:
            return f"takes CPU tensors, got {y.device}"
        if y.dtype is not torch.float32:
            return f"takes float32, got {y.dtype}"
        if with_grad and y.requires_grad:
            return "has no gradient; call it under torch.no_grad()"
    return ""


def _tiles(x: Tensor) -> int:
    samples, _, height, width = x.shape
    return samples * ((height + 1) // 2) * ((width + 1) // 2)


def _lies_well(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
    """True for tensors that the kernel can read where they are: channels_last, the weight also contiguous, and no negative views."""
    return (
        not any([y is not None and y.is_neg() for y in (x, weight, bias, residual)])  # memory that has the values' opposites
        and x.is_contiguous(memory_format=_LAYOUT)
        and (weight.is_contiguous(memory_format=_LAYOUT) or weight.is_contiguous())
        and (bias is None or bias.is_contiguous())
        and (residual is None or residual.is_contiguous(memory_format=_LAYOUT))
    )


def _laid_well(y: Tensor, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """y in a layout that :func:`_lies_well` accepts."""
    return y.resolve_neg().contiguous(memory_format=layout)


backends = BackendTable("conv3x3", reference=conv3x3_reference, cpu=_forward_cpu)


def _check_kinds(x: Tensor, **others: Tensor | None) -> None:
    for name, y in {"x": x, **others}.items():
        if y is None and name in ("bias", "residual"):
            continue
        if not isinstance(y, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(y).__name__}")
        if y.dtype not in FLOATING:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {y.dtype}")
        check_device(name, y, "x", x)


def _check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x must have shape (N, C, H, W), got {tuple(x.shape)}")
    samples, in_channels, height, width = x.shape
    if weight.dim() != 4 or weight.shape[1:] != (in_channels, 3, 3) or weight.shape[0] == 0:
        raise ValueError(f"weight must have shape (K, {in_channels}, 3, 3), got {tuple(weight.shape)}")
    out_channels = weight.shape[0]
    if bias is not None and bias.shape != (out_channels,):
        raise ValueError(f"bias must have shape ({out_channels},), got {tuple(bias.shape)}")
    if residual is not None and residual.shape != (samples, out_channels, height, width):
        raise ValueError(f"residual must have shape {(samples, out_channels, height, width)}, got {tuple(residual.shape)}")


def conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None, backend: Backend | None = None
) -> Tensor:
    """3 × 3 convolution of stride 1 and padding 1, plus a bias, plus a residual.

    The CPU kernel is used for float32 data in channels_last, with at least 16 channels and, in all images together, 64 tiles of 2 × 2
    pixels, if no gradient is needed. It gives the same bits for any number of threads, and for an image in any batch. All other calls
    (gradients, autocast, fewer tiles, other dtypes, layouts and devices, compiling, torch.func) go to PyTorch's ``F.conv2d``, which is
    differentiable.

    The kernel computes the four pixels of a tile together. If a pixel of x is not finite, or near float32's largest number, pixels of y
    up to two away from it are not finite either, and may be NaN where the exact sum is infinite. Other images are not affected.

    Args:
        x: (N, C, H, W), N >= 0.
        weight: (K, C, 3, 3).
        bias: (K,) or None.
        residual: (N, K, H, W) or None, added to the result.
        backend: force "reference" or "cpu"; "cpu" takes any number of channels and tiles, and makes x and residual channels_last where they
            are not.

    Returns:
        (N, K, H, W), from the kernel in channels_last.

    Raises:
        TypeError, ValueError: what was expected and what came.
        RuntimeError: for a forced backend that is not available here, or that cannot serve the call.

    The formula is equation 8 of Lavin & Gray (2016).
    """
    obstacle = _obstacle(x, weight, bias, residual)
    if obstacle or x is None or weight is None:  # else they are float32 on the CPU
        _check_kinds(x=x, weight=weight, bias=bias, residual=residual)
    _check_shapes(x, weight, bias, residual)
    implementation = backends.choose(x.device, x.dtype, backend)
    if implementation is not _forward_cpu:
        return implementation(x, weight, bias, residual)
    if backend is None:
        worth_it = x.shape[1] >= FEWEST_CHANNELS and _tiles(x) >= FEWEST_TILES and not torch.is_autocast_enabled("cpu")
        return (_forward_cpu if not obstacle and worth_it and _lies_well(x, weight, bias, residual) else conv3x3_reference)(
            x, weight, bias, residual
        )
    if obstacle:
        raise RuntimeError(f"backend 'cpu' of conv3x3 {obstacle}")
    if not _lies_well(x, weight, bias, residual):
        x, weight = _laid_well(x, _LAYOUT), _laid_well(weight)
        residual = None if residual is None else _laid_well(residual, _LAYOUT)
        bias = None if bias is None else _laid_well(bias)
    return _forward_cpu(x, weight, bias, residual)
