"""group_norm: GroupNorm and what stands around it in a UNet, in one op.

With x̂ the values of x + pre_bias, normalised over each group of channels of a sample (Wu & He 2018)::

    z = (x̂ · weight + bias) · (1 + scale) + shift
    y = dropout(silu(z))

Everything but the norm is optional. scale and shift, one value for each channel of a sample, are FiLM (Perez et al. 2018).
Backward needs x and the mean and 1 / deviation of each group, and computes the rest again, the dropout's mask too. The reference
twin is here; the kernels are csrc/cpu/group_norm*.cpp and csrc/cuda/group_norm*.cu.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_fast import checks
from ddpm_fast._pytorch import draw
from ddpm_fast.backends import NATIVE_DTYPES, native
from ddpm_fast.noise import MAX_ELEMENTS_PER_SAMPLE, Noise
from ddpm_fast.noise.philox import dropout_mask_reference
from ddpm_fast.ops._common import check_data, check_device, table_dtype
from ddpm_fast.ops._native import contiguous, laid_out_as, memory_format, stream_of, workspace_floats
from ddpm_fast.ops._op import Op
from ddpm_fast.ops._operator import NOISE
from ddpm_fast.types import Activation, Backend


def group_norm_reference(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    pre_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    silu: bool,
    dropout: float,
    noise: Noise | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula in plain PyTorch; returns y, and the mean and 1 / deviation of each group, (N, groups)."""
    dtype, channels = table_dtype(x.dtype), x.shape[1]

    def over_pixels(values: Tensor) -> Tensor:  # (C,) or (N, C)
        return values.to(dtype).reshape(-1, channels, *[1] * (x.ndim - 2))

    h = x.to(dtype)
    if pre_bias is not None:
        h = h + over_pixels(pre_bias)
    grouped = h.reshape(x.shape[0], groups, channels // groups * math.prod(x.shape[2:]))
    if x.shape[0]:
        variance, mean = torch.var_mean(grouped, dim=2, correction=0)
    else:  # PyTorch warns of a variance of nothing
        variance = mean = grouped.sum(2)
    rstd = torch.rsqrt(variance + eps)
    z = ((grouped - mean[..., None]) * rstd[..., None]).reshape(x.shape)
    if weight is not None:
        z = z * over_pixels(weight)
    if bias is not None:
        z = z + over_pixels(bias)
    if scale is not None:
        z = z * (1.0 + over_pixels(scale))
    if shift is not None:
        z = z + over_pixels(shift)
    if silu:
        z = F.silu(z)
    if dropout > 0.0 and noise is not None:
        key = (noise.seed, noise.stream, noise.first_sample)
        kept = draw(lambda count: dropout_mask_reference((count, *x.shape[1:]), dropout, *key, x.device), x.shape[0], x)
        z = torch.where(kept, z * (1.0 / (1.0 - dropout)), 0.0)
    return laid_out_as(z.to(x.dtype), x), mean.detach(), rstd.detach()


_DIFFERENTIABLE = ("x", "weight", "bias", "pre_bias", "scale", "shift")


class _Call:
    """The arguments of one call in the form that both backends take."""

    def __init__(self, arguments: Any) -> None:
        x, self.groups, weight, bias, pre_bias, scale, shift, eps, silu, dropout, noise = self.arguments = arguments
        self.layout = memory_format(x)
        x = x.contiguous(memory_format=self.layout)
        self.x = x
        samples, channels = x.shape[:2]
        self.sizes = (samples, channels, x.numel() // (samples * channels), self.groups)
        if weight is not None or bias is not None:
            weight, bias = _in_one_dtype(weight, bias)
            weight, bias = contiguous(weight), contiguous(bias)
        rows: Sequence[Tensor | None] = (pre_bias, scale, shift)
        if pre_bias is not None or scale is not None or shift is not None:
            rows = [y if y is None or y.stride(1) == 1 or y.shape[1] == 1 else y.contiguous() for y in _in_one_dtype(*rows)]
        self.taken = (x, weight, bias, *rows)
        # What every kernel is called with.
        self.common = dict(
            channels_last=self.layout != torch.contiguous_format, samples=samples, channels=channels, pixels=self.sizes[2],
            groups=self.groups, eps=eps, silu=silu, dropout=None if noise is None else (dropout, noise), x=x, weight=weight, bias=bias,
            pre_bias=rows[0], scale=rows[1], shift=rows[2],
        )  # fmt: skip

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        return _results(self.x, self.groups)

    def gradients(self, needs: Any) -> dict[str, Tensor | None]:
        """New tensors for the gradients that are needed, by the kernels' names, in the dtypes that the kernels write."""
        return {
            f"grad_{name}": torch.empty_like(y) if getattr(needs, name) else None
            for name, y in zip(_DIFFERENTIABLE, self.taken, strict=True)
        }

    def returned(self, made: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        given = self.arguments
        return {
            name: None if x is None else x.to(getattr(given, name).dtype) for name, x in zip(_DIFFERENTIABLE, made.values(), strict=True)
        }

    def workspace(self, plan: Callable[..., dict[str, int]]) -> Tensor:
        sms = torch.cuda.get_device_properties(self.x.device).multi_processor_count
        floats = workspace_floats(plan, *self.sizes, self.layout != torch.contiguous_format, NATIVE_DTYPES[self.x.dtype], sms=sms)
        return self.x.new_empty((floats,), dtype=torch.float32)


def _in_one_dtype(*tensors: Tensor | None) -> Sequence[Tensor | None]:
    """The tensors in one dtype, as the kernels take them: unchanged if they have one, else float32."""
    first = next(y for y in tensors if y is not None).dtype
    if all([y is None or y.dtype == first for y in tensors]):
        return tensors
    return [None if y is None else y.float() for y in tensors]


def _results(x: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    shape, dtype = (x.shape[0], groups), table_dtype(x.dtype)
    return torch.empty_like(x, memory_format=memory_format(x)), x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _forward_cpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(arguments)
    y, mean, rstd = call.results()
    native.cpu_group_norm(**call.common, y=y, mean=mean, rstd=rstd)
    return y, mean, rstd


def group_norm_prepared(
    x: Tensor, y: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, pre_bias: Tensor | None
) -> Callable[[], None]:
    """Prepares a call of the CPU kernel that can be repeated; it keeps its tensors alive, and reads their values anew each time.

    Args:
        x: (N, C, ...), contiguous or channels_last.
        y: like x, which the call writes.
        groups, weight, bias, eps, pre_bias: as :func:`group_norm` takes them.
        silu: apply SiLU.

    Returns:
        A function without arguments.
    """
    call = _Call((x, groups, weight, bias, pre_bias, None, None, eps, silu, 0.0, None))
    _, mean, rstd = call.results()
    return native.cpu_group_norm_prepared(**call.common, y=y, mean=mean, rstd=rstd)


def _forward_cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(arguments)
    y, mean, rstd = call.results()
    workspace = call.workspace(native.cuda_group_norm_plan)
    native.cuda_group_norm(**call.common, y=y, mean=mean, rstd=rstd, workspace=workspace, **stream_of(call.x))
    return y, mean, rstd


def _backward_cpu(arguments: Any, needs: Any, grads: Any, results: Any) -> dict[str, Tensor | None]:
    call = _Call(arguments)
    grad_y = grads[0].contiguous(memory_format=call.layout)
    made, (mean, rstd) = call.gradients(needs), results
    native.cpu_group_norm_backward(**call.common, mean=mean, rstd=rstd, grad_y=grad_y, **made)
    return call.returned(made)


def _backward_cuda(arguments: Any, needs: Any, grads: Any, results: Any) -> dict[str, Tensor | None]:
    call = _Call(arguments)
    grad_y = grads[0].contiguous(memory_format=call.layout)
    made, (mean, rstd) = call.gradients(needs), results
    workspace = call.workspace(native.cuda_group_norm_backward_plan)
    native.cuda_group_norm_backward(**call.common, mean=mean, rstd=rstd, grad_y=grad_y, **made, workspace=workspace, **stream_of(call.x))
    return call.returned(made)


def _check(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    pre_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    silu: bool,
    dropout: float,
    noise: Noise | Tensor | None,
) -> None:
    check_data("x", x)
    if x.ndim < 2:
        raise ValueError(f"x must have shape (N, C, ...), got {tuple(x.shape)}")
    samples, channels = x.shape[:2]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide the channels of x, {channels}, got {groups}")
    if weight is not None:
        _check_small("weight", weight, (channels,), x)
    if bias is not None:
        _check_small("bias", bias, (channels,), x)
    for name, rows in (("pre_bias", pre_bias), ("scale", scale), ("shift", shift)):
        if rows is not None:
            _check_small(name, rows, (samples, channels), x)
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and at least 0, got {eps}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"the probability of dropout must lie in [0, 1), got {dropout}")
    if dropout > 0.0:
        if not isinstance(noise, Noise):
            raise TypeError(f"dropout takes its mask from a Noise, got {type(noise).__name__}")
        if x.numel() > MAX_ELEMENTS_PER_SAMPLE and x.numel() // samples > MAX_ELEMENTS_PER_SAMPLE:
            raise ValueError(f"a sample may have at most 2^34 elements with dropout, got {x.numel() // samples}")


def _check_small(name: str, values: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(values).__name__}")
    if values.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(values.shape)}")
    if values.dtype != x.dtype and values.dtype != torch.float32:
        raise TypeError(f"{name} must have the dtype of x, {x.dtype}, or float32, got {values.dtype}")
    check_device(name, values, "x", x)


def _fake(x: Tensor, groups: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _results(x, groups)


_op = Op(
    "group_norm",
    "Tensor x, int groups, Tensor? weight, Tensor? bias, Tensor? pre_bias, Tensor? scale, Tensor? shift, float eps, bool silu, "
    f"float dropout, {NOISE}",
    "(Tensor, Tensor, Tensor)",
    check=_check,
    fake=_fake,
    reference=group_norm_reference,
    differentiable=_DIFFERENTIABLE,
    backward_reads_results=(1, 2),
    gradients_in_layout=True,
    cpu=_forward_cpu,
    cuda=_forward_cuda,
    backward=dict(cpu=_backward_cpu, cuda=_backward_cuda),
)
backends = _op.backends


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: Activation | None = None,
    pre_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    dropout: tuple[float, Noise] | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """GroupNorm of x + pre_bias, then ·(1 + scale) + shift, then SiLU, then dropout, in one op; all but the norm are optional.

    Args:
        x: (N, C, ...), contiguous or channels_last; others are made contiguous.
        groups: number of groups, which divides C.
        weight, bias: (C,), in the dtype of x or float32.
        eps: added to the variance.
        activation: "silu" or None.
        pre_bias: (N, C), added to x before the norm: a time embedding's projection, for instance.
        scale, shift: (N, C), after weight and bias. Halves of one (N, 2C) tensor are read where they lie.
        dropout: (probability in [0, 1), Noise that the mask is made from): the mask depends on the noise and the element's place
            alone, not on device, layout or batch size. None, or 0, for none.
        backend: force "reference" or "cpu" or "cuda".

    Returns:
        Like x, in its layout. Differentiable in all tensors. Statistics and arithmetic are in float32 (float64 for float64 data).

    Raises:
        TypeError, ValueError: what was expected and what came.
        RuntimeError: for a forced backend that is not available here.
    """
    if activation not in ("silu", None):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
    groups, eps = checks.index("groups", groups), checks.real("eps", eps)
    probability, noise = 0.0, None
    if dropout is not None:
        probability, noise = checks.pair("dropout", dropout, "(probability, Noise)")
        probability = checks.real("the probability of dropout", probability)
    arguments = (x, groups, weight, bias, pre_bias, scale, shift, eps, activation == "silu", probability, noise if probability else None)
    _check(*arguments)
    return _op(arguments, x, x.dtype, backend)[0]
