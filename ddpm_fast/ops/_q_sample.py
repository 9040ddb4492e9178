"""q_sample: x_t = signal[t] · x_start + sigma[t] · ε.

Ho et al. 2020, eq. 4 (tables √ᾱ and √(1-ᾱ)); with √(1-β) and √β it is one step of the chain, eq. 2. The reference twin is
here; the kernels are csrc/cpu/q_sample.cpp, with its formula in csrc/common/diffusion_math.h, and ops/triton/q_sample.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpm_fast.backends import native, triton_function
from ddpm_fast.noise import Noise
from ddpm_fast.ops._common import check_data, check_destination, check_noise, check_t, check_table, gather, resolve_noise, table_dtype
from ddpm_fast.ops._native import contiguous, new_like
from ddpm_fast.ops._op import Op
from ddpm_fast.ops._operator import NOISE
from ddpm_fast.types import Backend


def q_sample_reference(x_start: Tensor, t: Tensor, signal: Tensor, sigma: Tensor, noise: Noise | Tensor) -> Tensor:
    """The formula in plain PyTorch; fp32 arithmetic (float64 for float64 data), one rounding at the end."""
    mean = gather(signal, t, x_start) * x_start.to(table_dtype(x_start.dtype))
    return (mean + gather(sigma, t, x_start) * resolve_noise(noise, x_start)).to(x_start.dtype).contiguous()


def _q_sample_cpu(x_start: Tensor, t: Tensor, signal: Tensor, sigma: Tensor, noise: Noise | Tensor, *, out: Tensor | None = None) -> Tensor:
    x_start = x_start.contiguous()
    out = torch.empty_like(x_start) if out is None else out
    native.cpu_q_sample(sizes=x_start, x_start=x_start, t=t.contiguous(), signal=signal, sigma=sigma, noise=contiguous(noise), out=out)
    return out


def scale_rows_reference(x: Tensor, t: Tensor, table: Tensor) -> Tensor:
    """table[t] · x, the gradient of either term, in plain PyTorch: differentiable again."""
    return (gather(table, t, x) * x.to(table.dtype)).to(x.dtype)


def scale_rows(x: Tensor, t: Tensor, table: Tensor) -> Tensor:
    """The same by the CPU kernel, without its noise."""
    x = x.contiguous()
    out = torch.empty_like(x)
    native.cpu_scale(sizes=x, x_start=x, t=t.contiguous(), signal=table, out=out)
    return out


def _backward_cpu(arguments: Any, needs: Any, grads: Any) -> dict[str, Tensor | None]:
    t, (grad,) = arguments.t, grads
    return {
        "x_start": scale_rows(grad, t, arguments.signal) if needs.x_start else None,
        "noise": scale_rows(grad, t, arguments.sigma) if needs.noise else None,
    }


def _plain_backward(arguments: Any, needs: Any, grads: Any) -> dict[str, Tensor | None]:
    # Plain PyTorch, which a compiler fuses with its neighbours.
    if needs.signal or needs.sigma:
        raise RuntimeError("q_sample gives the tables signal and sigma no gradient; detach them")
    t, (grad,) = arguments.t, grads
    return {
        "x_start": scale_rows_reference(grad, t, arguments.signal) if needs.x_start else None,
        "noise": scale_rows_reference(grad, t, arguments.sigma) if needs.noise else None,
    }


def _check(x_start: Tensor, t: Tensor, signal: Tensor, sigma: Tensor, noise: Noise | Tensor) -> None:
    check_data("x_start", x_start)
    check_table("signal", signal, "x_start", x_start)
    check_table("sigma", sigma, "x_start", x_start, tuple(signal.shape))
    check_t(t, "x_start", x_start, signal.shape[0])
    check_noise(noise, "x_start", x_start)


_op = Op(
    "q_sample",
    f"Tensor x_start, Tensor t, Tensor signal, Tensor sigma, {NOISE}",
    "Tensor",
    check=_check,
    fake=lambda x_start, *_: new_like(x_start),
    reference=q_sample_reference,
    differentiable=("x_start", "noise"),
    backward_reads=("t", "signal", "sigma"),
    plain_backward=_plain_backward,
    cpu=_q_sample_cpu,
    triton=triton_function("q_sample", "forward"),
    backward=dict(cpu=_backward_cpu, triton=triton_function("q_sample", "backward")),
)
backends = _op.backends


def q_sample(
    x_start: Tensor,
    t: Tensor,
    signal: Tensor,
    sigma: Tensor,
    noise: Noise | Tensor,
    *,
    out: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Noised data, x_t = signal[t] · x_start + sigma[t] · ε, in one pass.

    Args:
        x_start: (N, ...), float32, bfloat16, float16 or float64; made contiguous if it is not.
        t: (N,) int64 in 0..T-1, on x_start's device. On CPU its values are
            checked; elsewhere one outside gives NaN.
        signal, sigma: (T,) tables, float32 (float64 for float64 data). They get no gradient.
        noise: a :class:`~ddpm_fast.Noise`, drawn inside the kernel and never stored, or a tensor like x_start.
        out: contiguous tensor like x_start to write into, which may be x_start itself; only without gradients.
        backend: force "reference", "cpu" or "triton".

    Returns:
        Contiguous tensor like x_start (``out`` where given). Differentiable in x_start and in a noise tensor, any number
        of times.

    Raises:
        TypeError, ValueError: what was expected and what came.
        RuntimeError: for a forced backend that is not available here, or ``out`` where a gradient is needed.
    """
    _check(x_start, t, signal, sigma, noise)
    if out is not None:
        check_destination("out", out, "x_start", x_start, t, signal, sigma, noise)
    return _op((x_start, t, signal, sigma, noise), x_start, x_start.dtype, backend, None if out is None else {"out": out})
