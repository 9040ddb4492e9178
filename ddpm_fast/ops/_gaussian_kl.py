"""gaussian_kl: KL(N(mean1, e^logvar1) ‖ N(mean2, e^logvar2)) of diagonal Gaussians, in nats.

½ (e^d - 1 - d + (mean1 - mean2)² e^-logvar2) with d = logvar1 - logvar2: the form of Ho et al. 2020, eq. 8, whose first
part is computed without cancellation, so that the result is never negative and exact near equality. The reference twin is
here; the kernels are csrc/cpu/gaussian_kl.cpp and ops/triton/gaussian_kl.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, get_args

import torch
from torch import Tensor

from ddpm_fast.backends import native, triton_kernels
from ddpm_fast.ops._common import check_data, check_device, table_dtype
from ddpm_fast.ops._native import new_like
from ddpm_fast.ops._op import Op
from ddpm_fast.types import Backend, Reduction

_Operand: TypeAlias = tuple[Tensor, int, int]  # with its sample stride and its element stride
_OPERANDS = ("mean1", "logvar1", "mean2", "logvar2")
REDUCTIONS: tuple[Reduction | None, ...] = (None, *get_args(Reduction))
_NO_GRADIENTS = (None,) * 4
_SERIES_BELOW = 0.3
_INFINITE = 1000.0  # e^_INFINITE is, in float64 too
_MAX_EXPONENT = {torch.float32: 88.0, torch.float64: 709.0}  # of e^(-½ logvar2): an infinity times a distance of 0 would be NaN


def exp_minus_one_minus(d: Tensor) -> Tensor:
    """e^d - 1 - d, with full relative precision near 0: its Taylor series there, expm1(d) - d elsewhere."""
    near = d.abs() < _SERIES_BELOW
    small = torch.where(near, d, 0.0)  # no overflow, and so no NaN gradient, from the branch that is not taken
    terms = 15 if d.dtype == torch.float64 else 8  # what is left out is below half an ulp at _SERIES_BELOW
    series = torch.full_like(d, 1.0 / math.factorial(terms + 1))
    for k in range(terms, 1, -1):
        series = series * small + 1.0 / math.factorial(k)
    far = torch.where(near, 1.0, d)
    # d is bounded where e^d is infinite: infinity less infinity would be NaN.
    return torch.where(near, series * small * small, torch.expm1(far) - far.clamp_max(_INFINITE))


def gaussian_kl_reference(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor, reduction: str | None = None) -> Tensor:
    """The formula in plain PyTorch; fp32 arithmetic (float64 for float64 data), the mean included."""
    dtype = mean1.dtype
    mean1, logvar1, mean2, logvar2 = (x.to(table_dtype(dtype)) for x in (mean1, logvar1, mean2, logvar2))
    # Squared last: e^-logvar2 alone overflows fp32 below -88.
    distance = ((mean1 - mean2) * torch.exp((-0.5 * logvar2).clamp_max(_MAX_EXPONENT[logvar2.dtype]))).square()
    kl = 0.5 * (exp_minus_one_minus(logvar1 - logvar2) + distance)
    return (kl if reduction is None else kl.reshape(kl.shape[0], math.prod(kl.shape[1:])).mean(1)).to(dtype)


def _operand(x: Tensor, shape: torch.Size) -> _Operand:
    """A tensor expanded to ``shape``, with the stride between its samples and between its elements (0 or 1).

    A tensor with one value for each sample, one sample for all, or one value for all is not copied. Any other broadcast is.
    """
    spread = x.expand(shape)
    samples, inner = spread.stride(0), spread[0]
    if not any([size > 1 and stride for size, stride in zip(inner.shape, inner.stride(), strict=True)]):
        return spread, samples, 0
    if inner.is_contiguous():
        return spread, samples, 1
    return _operand(spread.contiguous(), shape)


def _shape(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> torch.Size:
    shape = mean1.shape
    if logvar1.shape == shape and mean2.shape == shape and logvar2.shape == shape:
        return shape
    return torch.broadcast_shapes(shape, logvar1.shape, mean2.shape, logvar2.shape)


def _operands(tensors: Sequence[Tensor], shape: torch.Size) -> list[_Operand]:
    elements = math.prod(shape[1:])
    return [(x.contiguous(), elements, 1) if x.shape == shape else _operand(x, shape) for x in tensors]


def _launch(
    operands: Sequence[_Operand], reduced: bool, kl: Tensor | None, grad_kl: Tensor | None, grads: Sequence[Tensor | None] = _NO_GRADIENTS
) -> None:
    """Writes the divergence ``kl``, or the gradients that are wanted, or both. Without ``grad_kl`` the upstream gradient is ones."""
    mean1, logvar1, mean2, logvar2 = operands
    of_mean1, of_logvar1, of_mean2, of_logvar2 = grads
    native.cpu_gaussian_kl(
        sizes=mean1[0], mean1=mean1, logvar1=logvar1, mean2=mean2, logvar2=logvar2, reduced=reduced, kl=kl, grad_kl=grad_kl,
        grad_mean1=of_mean1, grad_logvar1=of_logvar1, grad_mean2=of_mean2, grad_logvar2=of_logvar2,
    )  # fmt: skip


def _new_kl(*arguments: Any) -> Tensor:
    *tensors, reduction = arguments
    shape = _shape(*tensors)
    return tensors[0].new_empty(shape if reduction is None else shape[:1])


def _gaussian_kl_cpu(*arguments: Any) -> Tensor:
    *tensors, reduction = arguments
    kl = _new_kl(*arguments)
    _launch(_operands(tensors, _shape(*tensors)), reduction is not None, kl, None)
    return kl


def _ahead_cpu(arguments: Any, needs: Any) -> tuple[Tensor, dict[str, Tensor | None], list[Tensor]] | None:
    *tensors, reduction = arguments
    shape = tensors[0].shape
    if reduction is None or tensors[0].dtype != torch.float32 or any(x.shape != shape for x in tensors):
        return None
    kl, grads = (
        _new_kl(*arguments),
        [x.new_empty(shape) if getattr(needs, name) else None for name, x in zip(_OPERANDS, tensors, strict=True)],
    )
    _launch(_operands(tensors, shape), True, kl, None, grads)
    return kl, dict(zip(_OPERANDS, grads, strict=True)), [grad for grad in grads if grad is not None]


def _gaussian_kl_triton(*arguments: Any) -> Tensor:
    *tensors, reduction = arguments
    shape, kl = _shape(*tensors), _new_kl(*arguments)
    triton_kernels("gaussian_kl").forward(_operands(tensors, shape), kl, shape, reduction is not None)
    return kl


def _backward(arguments: Any, needs: Any, grads: Any, kernel: Callable[..., None]) -> dict[str, Tensor | None]:
    *tensors, reduction = arguments
    shape = _shape(*tensors)
    operands = _operands(tensors, shape)
    # A kernel sums the gradient of an operand with one value a sample. What is left to sum here is summed in fp32.
    operands = [
        (x.expand(shape).contiguous(), math.prod(shape[1:]), 1)
        if needs[k] and not element and _varies(tensors[k], shape)
        else (x, sample, element)
        for k, (x, sample, element) in enumerate(operands)
    ]
    summed = [k for k, (_, _, element) in enumerate(operands) if needs[k] and not element]
    totals = iter(tensors[0].new_empty(len(summed), shape[0], dtype=torch.float32) if summed else ())
    results: list[Any] = [None] * 4  # tensors, of the gradients that are wanted
    for k, (x, _, element) in enumerate(operands):
        if needs[k]:
            results[k] = (
                next(totals) if not element else new_like(x) if x.shape == tensors[k].shape else x.new_empty(shape, dtype=torch.float32)
            )
    kernel(operands, grads[0].contiguous(), results, shape, reduction is not None)
    for k in summed:
        results[k] = results[k].view(-1, *[1] * (len(shape) - 1))
    triples = zip(_OPERANDS, results, tensors, strict=True)
    return {name: None if grad is None else grad.sum_to_size(x.shape).to(x.dtype) for name, grad, x in triples}


def _varies(x: Tensor, shape: torch.Size) -> bool:
    """Answer whether an operand has more than one value for each sample of the broadcast ``shape``.

    Its gradient then has as many, even where the operand's own values are one number in memory that was expanded.
    """
    return x.shape[-(len(shape) - 1) :].numel() > 1 if len(shape) > 1 else False


def _backward_cpu(arguments: Any, needs: Any, grads: Any) -> dict[str, Tensor | None]:
    return _backward(
        arguments, needs, grads, lambda operands, grad_kl, results, shape, reduced: _launch(operands, reduced, None, grad_kl, results)
    )


def _backward_triton(arguments: Any, needs: Any, grads: Any) -> dict[str, Tensor | None]:
    return _backward(arguments, needs, grads, triton_kernels("gaussian_kl").backward)


def _check(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor, reduction: str | None) -> None:
    inputs = dict(mean1=mean1, logvar1=logvar1, mean2=mean2, logvar2=logvar2)
    for name, x in inputs.items():
        check_data(name, x)
        check_device(name, x, "mean1", mean1)
        if x.dtype != mean1.dtype:
            raise TypeError(f"{name} must have the dtype of mean1, {mean1.dtype}, got {x.dtype}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be None or 'mean_per_sample', got {reduction!r}")
    try:
        _shape(mean1, logvar1, mean2, logvar2)
    except RuntimeError:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in inputs.items())
        raise ValueError(f"shapes must broadcast against each other, got {shapes}") from None


_op = Op(
    "gaussian_kl",
    "Tensor mean1, Tensor logvar1, Tensor mean2, Tensor logvar2, str? reduction",
    "Tensor",
    check=_check,
    fake=_new_kl,
    reference=gaussian_kl_reference,
    differentiable=_OPERANDS,
    cpu=_gaussian_kl_cpu,
    triton=_gaussian_kl_triton,
    backward=dict(cpu=_backward_cpu, triton=_backward_triton),
    ahead=dict(cpu=_ahead_cpu),
)
backends = _op.backends


def gaussian_kl(
    mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor, *, reduction: Reduction | None = None, backend: Backend | None = None
) -> Tensor:
    """KL divergence of diagonal Gaussians in nats.

    Args:
        mean1, logvar1, mean2, logvar2: floating tensors of one dtype on one device, broadcast against each other. A tensor with one
            value a sample, or one for all, is not copied to the full shape. Log-variances are natural logarithms.
        reduction: None for one value an element, "mean_per_sample" for the mean over all but the first dimension.
        backend: force "reference", "cpu" or "triton".

    Returns:
        Tensor of the broadcast shape, or (N,). Differentiable in all four, any number of times.

    Raises:
        TypeError, ValueError: what was expected and what came.
        RuntimeError: for a forced backend that is not available here.
    """
    arguments = (mean1, logvar1, mean2, logvar2, reduction)
    _check(*arguments)
    if not (mean1.numel() and logvar1.numel() and mean2.numel() and logvar2.numel()):
        backend = "reference"
    return _op(arguments, mean1, mean1.dtype, backend)
