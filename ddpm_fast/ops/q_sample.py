"""q_sample: x_t = signal[t] · x_start + sigma[t] · ε.

Ho et al. 2020, eq. 4 (tables √ᾱ and √(1-ᾱ)); with √(1-β) and √β it is one step of the chain, eq. 2. The reference twin is
here; the kernel is csrc/cpu/q_sample.cpp, its formula csrc/common/diffusion_math.h.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.backends import NATIVE_DTYPES, BackendTable, native
from ddpm_fast.noise import Noise
from ddpm_fast.ops._common import (
    check_data,
    check_noise,
    check_t,
    check_table,
    gather,
    goes_through_dispatcher,
    in_functorch,
    library,
    noise_arguments,
    resolve_noise,
    sample_sizes,
    table_dtype,
    unsigned64,
)

_NO_NOISE, _TENSOR_NOISE, _GENERATED_NOISE = 0, 1, 2  # csrc/common/arguments.h


def q_sample_reference(x_start: Tensor, t: Tensor, signal: Tensor, sigma: Tensor, noise: Noise | Tensor) -> Tensor:
    """The formula in plain PyTorch; fp32 arithmetic (float64 for float64 data), one rounding at the end."""
    mean = gather(signal, t, x_start) * x_start.to(table_dtype(x_start.dtype))
    return (mean + gather(sigma, t, x_start) * resolve_noise(noise, x_start)).to(x_start.dtype).contiguous()


def _q_sample_cpu(x_start: Tensor, t: Tensor, signal: Tensor, sigma: Tensor, noise: Noise | Tensor) -> Tensor:
    if isinstance(noise, Noise):
        return _launch(x_start, t, signal, sigma, None, _GENERATED_NOISE, noise.seed, noise.stream, noise.first_sample)
    return _launch(x_start, t, signal, sigma, noise, _TENSOR_NOISE, 0, 0, 0)


def _launch(x_start, t, signal, sigma, noise, source, seed, stream, first_sample):
    # Tensors made contiguous here must outlive the call: the kernel sees only their addresses.
    x_start, t = x_start.contiguous(), t.contiguous()
    noise = None if noise is None else noise.contiguous()
    out = torch.empty_like(x_start)
    native.cpu_q_sample(
        x_start.data_ptr(), 0 if noise is None else noise.data_ptr(), out.data_ptr(), t.data_ptr(), signal.data_ptr(),
        0 if sigma is None else sigma.data_ptr(), *sample_sizes(x_start), NATIVE_DTYPES[x_start.dtype], source,
        seed, stream, first_sample, torch.get_num_threads(),
    )  # fmt: skip
    return out


backends = BackendTable("q_sample", reference=q_sample_reference, cpu=_q_sample_cpu)


def scale_rows(x: Tensor, t: Tensor, table: Tensor) -> Tensor:
    """table[t] · x, the gradient of either term. Without the noise the kernel computes just that, in one pass."""
    if x.device.type != "cpu" or native is None or x.dtype not in NATIVE_DTYPES or torch.is_grad_enabled():
        return (gather(table, t, x) * x.to(table.dtype)).to(x.dtype)  # also under create_graph: differentiable again
    return _launch(x, t, table, None, None, _NO_NOISE, 0, 0, 0)


class _QSample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_start, t, signal, sigma, noise, implementation, noise_tensor):
        # The tensor of `noise` is passed once more by itself, where autograd sees it.
        ctx.save_for_backward(t, signal, sigma)
        return implementation(x_start, t, signal, sigma, noise)

    @staticmethod
    def backward(ctx, grad):
        t, signal, sigma = ctx.saved_tensors
        grad_x = scale_rows(grad, t, signal) if ctx.needs_input_grad[0] else None
        grad_noise = scale_rows(grad, t, sigma) if ctx.needs_input_grad[6] else None
        return grad_x, None, None, None, None, None, grad_noise


def q_sample(x_start: Tensor, t: Tensor, signal: Tensor, sigma: Tensor, noise: Noise | Tensor, *, backend: str | None = None) -> Tensor:
    """Noised data, x_t = signal[t] · x_start + sigma[t] · ε, in one pass.

    Args:
        x_start: (N, ...), float32, bfloat16, float16 or float64; made contiguous if it is not.
        t: (N,) int64 in 0..T-1, on x_start's device. Values are checked on CPU only.
        signal, sigma: (T,) tables, float32 (float64 for float64 data). They get no gradient.
        noise: a :class:`~ddpm_fast.Noise`, drawn inside the kernel and never stored, or a tensor like x_start.
        backend: force "reference" or "cpu".

    Returns:
        Contiguous tensor like x_start. Differentiable in x_start and in a noise tensor, any number of times.

    Raises:
        TypeError, ValueError: what was expected and what came.
        RuntimeError: for a forced backend that is not available here.
    """
    _check(x_start, t, signal, sigma, noise)
    noise_tensor = None if isinstance(noise, Noise) else noise
    if in_functorch():
        return q_sample_reference(x_start, t, signal, sigma, noise)
    if backend is None and goes_through_dispatcher(x_start, t, noise_tensor):
        return torch.ops.ddpm_fast.q_sample(x_start, t, signal, sigma, *noise_arguments(noise))
    implementation = backends.choose(x_start.device, x_start.dtype, backend)
    needs_grad = x_start.requires_grad or (noise_tensor is not None and noise_tensor.requires_grad)
    if needs_grad and torch.is_grad_enabled() and implementation is not q_sample_reference:
        return _QSample.apply(x_start, t, signal, sigma, noise, implementation, noise_tensor)
    return implementation(x_start, t, signal, sigma, noise)


def _check(x_start: Tensor, t: Tensor, signal: Tensor, sigma: Tensor, noise: Noise | Tensor) -> None:
    check_data("x_start", x_start)
    check_table("signal", signal, "x_start", x_start)
    check_table("sigma", sigma, "x_start", x_start, tuple(signal.shape))
    check_t(t, "x_start", x_start, signal.shape[0])
    check_noise(noise, "x_start", x_start)


library.define(
    "q_sample(Tensor x_start, Tensor t, Tensor signal, Tensor sigma, Tensor? noise, SymInt seed, SymInt stream, SymInt first_sample) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(library, "q_sample", "CompositeExplicitAutograd")
def _q_sample_op(x_start, t, signal, sigma, noise, seed, stream, first_sample):
    if noise is None:
        noise = Noise(unsigned64(seed), stream, unsigned64(first_sample))
    _check(x_start, t, signal, sigma, noise)  # a compiled graph has not seen the values of t yet
    return backends.choose(x_start.device, x_start.dtype)(x_start, t, signal, sigma, noise).contiguous()


@torch.library.register_fake("ddpm_fast::q_sample", lib=library)
def _q_sample_fake(x_start, t, signal, sigma, noise, seed, stream, first_sample):
    return torch.empty_like(x_start, memory_format=torch.contiguous_format)


def _q_sample_setup(ctx, inputs, output):
    _, t, signal, sigma, noise, *_ = inputs
    ctx.has_noise = noise is not None
    ctx.save_for_backward(t, signal, sigma)


def _q_sample_backward(ctx, grad):
    # Plain PyTorch, which a compiler fuses with its neighbours.
    t, signal, sigma = ctx.saved_tensors
    grad_x = (gather(signal, t, grad) * grad.to(signal.dtype)).to(grad.dtype)
    grad_noise = (gather(sigma, t, grad) * grad.to(sigma.dtype)).to(grad.dtype) if ctx.has_noise else None
    return grad_x, None, None, None, grad_noise, None, None, None


torch.library.register_autograd("ddpm_fast::q_sample", _q_sample_backward, setup_context=_q_sample_setup, lib=library)
