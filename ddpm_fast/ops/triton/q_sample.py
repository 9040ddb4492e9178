"""q_sample: x_t = signal[t] x_start + sigma[t] ε, and the gradients of both terms. ε is drawn, never stored.

Forward reads x_start (and a noise tensor) and writes x_t; backward reads the gradient once and writes those wanted.
"""

import torch
import triton
import triton.language as tl

from ddpm_fast.ops._native import contiguous
from ddpm_fast.ops.triton._launch import SIZES, Tiles, noise_arguments
from ddpm_fast.ops.triton._tile import entry, epsilon, read, tile, timestep


@triton.jit(do_not_specialize=SIZES)
def _q_sample_fwd_kernel(
    x_start_ptr,  # (samples, elements)
    noise_ptr,  # the same, or None
    t_ptr,  # (samples,) int64
    signal_ptr,  # (steps,)
    sigma_ptr,  # (steps,)
    x_t_ptr,  # (samples, elements)
    samples: tl.int64,
    vectors: tl.int64,
    steps: tl.int64,
    seed: tl.uint64,
    noise_stream: tl.uint32,
    first_sample: tl.uint64,
    NOISE: tl.constexpr,
    WIDE: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    elements = vectors * VECTOR
    n, i, inside = tile(samples, elements, ROWS, COLUMNS)
    t, known = timestep(t_ptr, n, samples, steps)
    place = n[:, None] * elements + i
    e = epsilon(noise_ptr, place, n, (n < samples)[:, None], inside, seed, noise_stream, first_sample, NOISE, WIDE, COLUMNS)
    x = read(x_start_ptr, place, inside)
    tl.store(x_t_ptr + place, entry(signal_ptr, t, known) * x + entry(sigma_ptr, t, known) * e, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _q_sample_bwd_kernel(
    grad_ptr,  # (samples, elements)
    t_ptr,  # (samples,) int64
    signal_ptr,  # (steps,)
    sigma_ptr,  # (steps,)
    grad_x_ptr,  # (samples, elements), or None
    grad_noise_ptr,  # (samples, elements), or None
    samples: tl.int64,
    vectors: tl.int64,
    steps: tl.int64,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    elements = vectors * VECTOR
    n, i, inside = tile(samples, elements, ROWS, COLUMNS)
    t, known = timestep(t_ptr, n, samples, steps)
    place = n[:, None] * elements + i
    grad = read(grad_ptr, place, inside)
    if grad_x_ptr is not None:
        tl.store(grad_x_ptr + place, entry(signal_ptr, t, known) * grad, mask=inside)
    if grad_noise_ptr is not None:
        tl.store(grad_noise_ptr + place, entry(sigma_ptr, t, known) * grad, mask=inside)


def forward(x_start, t, signal, sigma, noise, *, out=None):
    x_start, t = x_start.contiguous(), t.contiguous()
    out = torch.empty_like(x_start) if out is None else out
    reads, numbers, constants = noise_arguments(contiguous(noise))
    tiles = Tiles(x_start.shape, x_start)
    tiles.launch(
        _q_sample_fwd_kernel,
        dict(x_start_ptr=x_start, t_ptr=t, signal_ptr=signal, sigma_ptr=sigma) | reads,
        dict(x_t_ptr=out),
        dict(steps=signal.numel()) | numbers,
        dict(WIDE=tiles.wide) | constants,
    )
    return out


def backward(arguments, needs, grads):
    signal, sigma = arguments.signal, arguments.sigma
    grad, t = grads[0].contiguous(), arguments.t.contiguous()
    grad_x, grad_noise = (torch.empty_like(grad) if needed else None for needed in (needs.x_start, needs.noise))
    Tiles(grad.shape, grad).launch(
        _q_sample_bwd_kernel,
        dict(grad_ptr=grad, t_ptr=t, signal_ptr=signal, sigma_ptr=sigma),
        dict(grad_x_ptr=grad_x, grad_noise_ptr=grad_noise),
        dict(steps=signal.numel()),
        {},
    )
    return {"x_start": grad_x, "noise": grad_noise}
