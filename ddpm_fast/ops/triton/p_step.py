"""p_step: one reverse step by a row of a sampler's table, and its gradients.

    x̂0 = clip(from_x_t x_t + from_out model_output),   x' = x_start x̂0 + x_t_coef x_t + previous x̂0_previous + noise e^(½ log_variance) z

Reads each input once and writes each result once; results may lie where an input does. z is drawn, unless no sample of a
program takes any. Backward recomputes x̂0, z and the deviation, and writes the gradients that are wanted.
"""

import triton
import triton.language as tl

from ddpm_fast.ops._native import contiguous, new_like
from ddpm_fast.ops._output import VARIANCE_KINDS, sample_stride
from ddpm_fast.ops.triton._elementary import clamp, passes
from ddpm_fast.ops.triton._launch import SIZES, Tiles, noise_arguments
from ddpm_fast.ops.triton._output import FIXED, deviation, log_variance_of, log_variance_slope, row
from ddpm_fast.ops.triton._tile import epsilon, read, tile, timestep


@triton.jit
def _prediction(model_output_ptr, without_ptr, place, inside, guidance):
    """The model's prediction, guided where there is an output without the condition."""
    prediction = read(model_output_ptr, place, inside)
    if without_ptr is not None:
        without = read(without_ptr, place, inside)
        prediction = without + guidance * (prediction - without)
    return prediction


@triton.jit
def _deviation(model_output_ptr, place, inside, noise, low, high, VARIANCE: tl.constexpr):
    """noise e^(½ log_variance): (ROWS, 1) for a fixed variance, else of each element. ``place`` is that of the variance half."""
    raw = low if VARIANCE == FIXED else read(model_output_ptr, place, inside & (noise != 0.0))
    return noise * deviation(log_variance_of(raw, low, high, VARIANCE))


@triton.jit(do_not_specialize=SIZES)
def _p_step_fwd_kernel(
    x_t_ptr,  # (samples, elements)
    model_output_ptr,  # (samples, DOUBLED elements)
    without_ptr,  # like model_output, or None
    previous_ptr,  # (samples, elements), or None
    noise_ptr,  # (samples, elements), or None
    t_ptr,  # (samples,) int64
    table_ptr,  # (steps, 8)
    x_next_ptr,  # (samples, elements)
    x_start_ptr,  # (samples, elements), or None
    guidance,
    samples: tl.int64,
    vectors: tl.int64,
    steps: tl.int64,
    seed: tl.uint64,
    noise_stream: tl.uint32,
    first_sample: tl.uint64,
    VARIANCE: tl.constexpr,
    CLIP: tl.constexpr,
    DOUBLED: tl.constexpr,
    NOISE: tl.constexpr,
    WIDE: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    elements = vectors * VECTOR
    n, i, inside = tile(samples, elements, ROWS, COLUMNS)
    t, known = timestep(t_ptr, n, samples, steps)
    place, out_place = n[:, None] * elements + i, n[:, None] * elements * DOUBLED + i
    from_x_t, from_out, x_start, x_t, previous, low, high, noise = row(table_ptr, t, known)
    x = read(x_t_ptr, place, inside)
    guess = from_x_t * x + from_out * _prediction(model_output_ptr, without_ptr, out_place, inside, guidance)
    if CLIP:
        guess = clamp(guess, -1.0, 1.0)
    x_next = x_start * guess + x_t * x
    if previous_ptr is not None:
        x_next = x_next + previous * read(previous_ptr, place, inside)
    if NOISE != 0:
        noisy = (noise != 0.0) & (n < samples)[:, None]
        z = epsilon(noise_ptr, place, n, noisy, inside, seed, noise_stream, first_sample, NOISE, WIDE, COLUMNS)
        width = _deviation(model_output_ptr, out_place + elements, inside, noise, low, high, VARIANCE)
        x_next = tl.where(noisy, x_next + width * z, x_next)
    tl.store(x_next_ptr + place, x_next, mask=inside)
    if x_start_ptr is not None:
        tl.store(x_start_ptr + place, guess, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _p_step_bwd_kernel(
    x_t_ptr,  # the inputs, as forward has them
    model_output_ptr,
    without_ptr,
    noise_ptr,
    t_ptr,
    table_ptr,
    grad_next_ptr,  # (samples, elements), or None
    grad_start_ptr,  # (samples, elements), or None
    grad_x_t_ptr,  # each like what it is the gradient of, or None
    grad_model_output_ptr,
    grad_without_ptr,
    grad_x_start_previous_ptr,
    grad_noise_ptr,
    guidance,
    samples: tl.int64,
    vectors: tl.int64,
    steps: tl.int64,
    seed: tl.uint64,
    noise_stream: tl.uint32,
    first_sample: tl.uint64,
    VARIANCE: tl.constexpr,
    CLIP: tl.constexpr,
    DOUBLED: tl.constexpr,
    NOISE: tl.constexpr,
    WIDE: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    elements = vectors * VECTOR
    n, i, inside = tile(samples, elements, ROWS, COLUMNS)
    t, known = timestep(t_ptr, n, samples, steps)
    place, out_place = n[:, None] * elements + i, n[:, None] * elements * DOUBLED + i
    from_x_t, from_out, x_start, x_t, previous, low, high, noise = row(table_ptr, t, known)
    nothing = tl.zeros(inside.shape, tl.float32)
    g = nothing if grad_next_ptr is None else read(grad_next_ptr, place, inside)
    g_start = x_start * g + (nothing if grad_start_ptr is None else read(grad_start_ptr, place, inside))
    if CLIP:
        guess = from_x_t * read(x_t_ptr, place, inside) + from_out * _prediction(model_output_ptr, without_ptr, out_place, inside, guidance)
        g_start = g_start * passes(guess, 1.0)
    if grad_x_t_ptr is not None:
        tl.store(grad_x_t_ptr + place, x_t * g + from_x_t * g_start, mask=inside)
    if grad_x_start_previous_ptr is not None:
        tl.store(grad_x_start_previous_ptr + place, previous * g, mask=inside)
    through = from_out if without_ptr is None else from_out * guidance
    if grad_model_output_ptr is not None:
        tl.store(grad_model_output_ptr + out_place, through * g_start, mask=inside)
    if grad_without_ptr is not None:
        tl.store(grad_without_ptr + out_place, (from_out - through) * g_start, mask=inside)
        if DOUBLED == 2:
            tl.store(grad_without_ptr + out_place + elements, nothing, mask=inside)
    grad_noise, grad_raw = nothing, nothing
    if NOISE != 0:
        noisy = (noise != 0.0) & (n < samples)[:, None]
        width = _deviation(model_output_ptr, out_place + elements, inside, noise, low, high, VARIANCE)
        grad_noise = tl.where(noisy, width * g, 0.0)
        if VARIANCE != FIXED and grad_model_output_ptr is not None:
            z = epsilon(noise_ptr, place, n, noisy, inside, seed, noise_stream, first_sample, NOISE, WIDE, COLUMNS)
            slope = 0.5 * log_variance_slope(low, high, VARIANCE)
            grad_raw = tl.where(noisy, (slope * width) * (z * g), 0.0)
    if grad_noise_ptr is not None:
        tl.store(grad_noise_ptr + place, grad_noise, mask=inside)
    if grad_model_output_ptr is not None and DOUBLED == 2:
        tl.store(grad_model_output_ptr + out_place + elements, grad_raw, mask=inside)


def _launch(kernel, arguments, reads, writes):
    x_t, model_output, t, table, noise, variance, clip, _, without, scale, _ = arguments
    x_t, model_output, without = x_t.contiguous(), model_output.contiguous(), contiguous(without)
    noise_reads, numbers, constants = noise_arguments(contiguous(noise))
    tiles = Tiles(x_t.shape, x_t, model_output)
    constants |= dict(
        VARIANCE=VARIANCE_KINDS.index(variance), CLIP=bool(clip), DOUBLED=sample_stride(model_output) // tiles.elements, WIDE=tiles.wide
    )
    tiles.launch(
        kernel,
        dict(x_t_ptr=x_t, model_output_ptr=model_output, without_ptr=without, t_ptr=t.contiguous(), table_ptr=table) | noise_reads | reads,
        writes,
        dict(guidance=float(scale), steps=table.shape[0]) | numbers,
        constants,
    )


def forward(*arguments, x_next=None, x_start=None):
    x_t, _, _, _, _, _, _, x_start_previous, _, _, with_x_start = arguments
    x_next = new_like(x_t) if x_next is None else x_next
    if x_start is None and with_x_start:
        x_start = new_like(x_t)
    reads = dict(previous_ptr=contiguous(x_start_previous))
    _launch(_p_step_fwd_kernel, arguments, reads, dict(x_next_ptr=x_next, x_start_ptr=x_start))
    return x_next, x_start


def backward(arguments, needs, grads):
    names = ("x_t", "model_output", "noise", "x_start_previous", "without")
    results = {name: new_like(getattr(arguments, name)) if getattr(needs, name) else None for name in names}
    grad_next, grad_start = (contiguous(grad) for grad in grads)
    reads = dict(grad_next_ptr=grad_next, grad_start_ptr=grad_start)
    _launch(_p_step_bwd_kernel, arguments, reads, {f"grad_{name}_ptr": result for name, result in results.items()})
    return results
