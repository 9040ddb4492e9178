"""conv3x3: 3 × 3 convolution of stride 1 and padding 1, plus a bias and a residual, for inference.

    y = conv(x, weight) + bias + residual

On CPU by Winograd's minimal filtering F(2×2, 3×3) (Lavin & Gray 2016, https://arxiv.org/abs/1509.09308): 16 multiplications where the
sum has 36, with float32's usual error. The transformed weight is kept from call to call. Where the kernel does not serve, PyTorch's
convolution does, which is the reference twin. The kernel is csrc/cpu/conv3x3.cpp.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from ddpm_fast.backends import BackendTable, native
from ddpm_fast.ops._common import FLOATING, check_device
from ddpm_fast.ops._native import address
from ddpm_fast.ops._op import goes_through_dispatcher, in_functorch

_LAYOUT = torch.channels_last
FEWEST_CHANNELS = 16  # of x: with fewer the transforms cost more than they save, and PyTorch's convolution is mostly faster


def conv3x3_reference(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """The formula in plain PyTorch."""
    y = F.conv2d(x, weight, bias, padding=1)
    return y if residual is None else residual + y


class _Transformed:
    """What a weight became, and which state of it that was. Kept as an attribute of the weight, with which it goes; it is not pickled."""

    def __init__(self, weight: Tensor, values: Tensor) -> None:
        self.version, self.place, self.values = weight._version, weight.data_ptr(), values

    def __reduce__(self) -> tuple:
        return type(None), ()


def _transform(weight: Tensor) -> Tensor:
    out_channels, in_channels = weight.shape[:2]
    values = torch.empty((native.cpu_conv3x3_floats(in_channels, out_channels),), dtype=torch.float32, device="cpu")
    kept = _Transformed(weight, values)  # of before: what is written meanwhile is noticed
    native.cpu_conv3x3_weight(weight.data_ptr(), weight.stride(), in_channels, out_channels, values.data_ptr(), torch.get_num_threads())
    weight._conv3x3_transformed = kept
    return values


def _transformed_weight(weight: Tensor) -> Tensor:
    """Of now: PyTorch counts what is written to a tensor, except through ``.data`` or an address, which the kernel's probe notices."""
    kept = getattr(weight, "_conv3x3_transformed", None)
    if kept is not None and kept.version == weight._version and kept.place == weight.data_ptr():
        return kept.values
    return _transform(weight)


def _forward_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    samples, _, height, width = x.shape
    y = torch.empty((samples, weight.shape[0], height, width), dtype=torch.float32, device="cpu", memory_format=_LAYOUT)
    (function, arguments), _ = conv3x3_cpu_call(x, weight, bias, residual, y)
    while not function(*arguments):
        arguments = (*arguments[:2], _transform(weight).data_ptr(), *arguments[3:])
    return y


def conv3x3_cpu_call(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, y: Tensor) -> tuple[tuple[Callable, tuple], tuple]:
    """The kernel and its arguments for tensors that lie well for it, y by its memory alone; and what must live as long as the call is made.

    A call gives False, and has done nothing, where the weight has changed since.
    """
    samples, in_channels, height, width = x.shape
    values = _transformed_weight(weight)
    addresses = x.data_ptr(), weight.data_ptr(), values.data_ptr(), address(bias), address(residual), y.data_ptr()
    arguments = (*addresses, samples, height, width, in_channels, weight.shape[0], torch.get_num_threads())
    return (native.cpu_conv3x3, arguments), (x, weight, values, bias, residual, y)


def _obstacle(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> str:
    """Why the kernel cannot serve a call, but for shapes; empty where it can."""
    if goes_through_dispatcher() or in_functorch() or forward_ad._current_level >= 0:
        return "is not for compiling, tracing or transforming: it is no operator of PyTorch"
    with_grad = torch.is_grad_enabled()
    for y in (x, weight, bias, residual):
        if y is None:
            continue
        if type(y) is not Tensor and type(y) is not Parameter:
            return f"takes plain tensors, got {type(y).__name__}"
        if not y.is_cpu:
            return f"takes CPU tensors, got {y.device}"
        if y.is_neg():
            return "takes no view that negates what it reads"
        if y.dtype is not torch.float32:
            return f"takes float32, got {y.dtype}"
        if with_grad and y.requires_grad:
            return "has no gradient; call it under torch.no_grad()"
    if weight.is_inference():
        return "takes no weight made in torch.inference_mode(), whose changes nobody counts"
    return ""


def _lies_well(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
    """In memory, for the kernel."""
    return (
        x.is_contiguous(memory_format=_LAYOUT)
        and (weight.is_contiguous(memory_format=_LAYOUT) or weight.is_contiguous())
        and (bias is None or bias.is_contiguous())
        and (residual is None or residual.is_contiguous(memory_format=_LAYOUT))
    )


backends = BackendTable("conv3x3", reference=conv3x3_reference, cpu=_forward_cpu)


def _check_kinds(**tensors: Tensor | None) -> None:
    for name, y in tensors.items():
        if y is None and name in ("bias", "residual"):
            continue
        if not isinstance(y, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(y).__name__}")
        if y.dtype not in FLOATING:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {y.dtype}")
        check_device(name, y, "x", tensors["x"])


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
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """3 × 3 convolution of stride 1 and padding 1, plus a bias, plus a residual.

    The CPU kernel serves float32 data in channels_last of at least 16 channels where no gradient is needed; it gives the same bits
    for any number of threads, and an image's the same in any batch. Everything else (gradients, autocast, other dtypes, layouts and
    devices, compiling, torch.func) is PyTorch's ``F.conv2d``, differentiable as ever.

    The kernel keeps the transformed weight, 16/9 of its memory, as long as the weight lives, and makes it anew when the weight
    has changed. (What is written to a few of its elements through ``weight.data`` or a raw address may go unnoticed.)

    A tile of 2 × 2 pixels is computed together: where a pixel of x is not finite, or near float32's largest numbers, pixels of y
    up to two away from it are not, and NaN stands where the sum would be infinite. Other images stay as they are.

    Args:
        x: (N, C, H, W), N >= 0.
        weight: (K, C, 3, 3).
        bias: (K,) or None.
        residual: (N, K, H, W) or None, added to the result.
        backend: force "reference" or "cpu"; "cpu" takes any number of channels, and makes x and residual channels_last where they
            are not.

    Returns:
        (N, K, H, W), from the kernel in channels_last.

    Raises:
        TypeError, ValueError: what was expected and what came.
        RuntimeError: for a forced backend that is not available here, or that cannot serve the call.

    The formula is equation 8 of Lavin & Gray (2016).
    """
    obstacle = _obstacle(x, weight, bias, residual)
    if obstacle:  # without one they are float32 on the CPU
        _check_kinds(x=x, weight=weight, bias=bias, residual=residual)
    _check_shapes(x, weight, bias, residual)
    implementation = backends.choose(x.device, x.dtype, backend)
    if implementation is not _forward_cpu:
        return implementation(x, weight, bias, residual)
    if backend is None:
        worth_it = not obstacle and x.shape[1] >= FEWEST_CHANNELS and not torch.is_autocast_enabled("cpu")
        return (_forward_cpu if worth_it and _lies_well(x, weight, bias, residual) else conv3x3_reference)(x, weight, bias, residual)
    if obstacle:
        raise RuntimeError(f"backend 'cpu' of conv3x3 {obstacle}")
    if not _lies_well(x, weight, bias, residual):
        x, residual = (y if y is None else y.contiguous(memory_format=_LAYOUT) for y in (x, residual))
        weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    return _forward_cpu(x, weight, bias, residual)
