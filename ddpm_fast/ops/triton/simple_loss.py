"""simple_loss: weight[t] mean (model_output - (x_start_coef[t] x_start + noise_coef[t] ε))², one value a sample, and its gradient.

Reads the prediction once, x_start and ε where their coefficients are not 0; ε is drawn forward and again backward, which
moves fewer bytes than a gradient written in forward and scaled in backward.
"""

import triton
import triton.language as tl

from ddpm_fast.ops._native import contiguous, new_like
from ddpm_fast.ops._output import per_sample, sample_stride
from ddpm_fast.ops.triton._launch import SIZES, Tiles, noise_arguments
from ddpm_fast.ops.triton._reduce import finish, store_total, workspace
from ddpm_fast.ops.triton._tile import each, entry, epsilon, read, tile, timestep


@triton.jit(do_not_specialize=SIZES)
def _simple_loss_kernel(
    model_output_ptr,  # (samples, stride): the prediction, and what else the model gives
    x_start_ptr,  # (samples, elements)
    noise_ptr,  # the same, or None
    t_ptr,  # (samples,) int64
    weight_ptr,  # (steps,)
    x_start_coef_ptr,  # (steps,)
    noise_coef_ptr,  # (steps,)
    grad_loss_ptr,  # (samples,): backward
    sums_ptr,  # (samples, tiles): forward, or None
    grad_model_output_ptr,  # like model_output: backward, or None
    share,  # forward 1 / elements, backward 2 / elements
    samples: tl.int64,
    vectors: tl.int64,
    steps: tl.int64,
    seed: tl.uint64,
    noise_stream: tl.uint32,
    first_sample: tl.uint64,
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
    c0, c1 = entry(x_start_coef_ptr, t, known), entry(noise_coef_ptr, t, known)
    noisy = (c1 != 0.0) & (n < samples)[:, None]
    # A term whose coefficient is 0 is neither read nor drawn, so that nothing but a number can come of it.
    x = tl.load(x_start_ptr + place, mask=inside & (c0 != 0.0), other=0.0).to(tl.float32)
    e = epsilon(noise_ptr, place, n, noisy, inside, seed, noise_stream, first_sample, NOISE, WIDE, COLUMNS)
    target = c0 * x + tl.where(noisy, c1 * e, 0.0)
    residual = read(model_output_ptr, out_place, inside) - target
    factor = entry(weight_ptr, t, known) * share
    if grad_model_output_ptr is None:
        store_total(sums_ptr, residual * residual, inside, n, samples, factor)
    else:
        scale = each(grad_loss_ptr, n, samples) * factor
        tl.store(grad_model_output_ptr + out_place, scale * residual, mask=inside)
        if DOUBLED == 2:
            tl.store(grad_model_output_ptr + out_place + elements, tl.zeros(inside.shape, tl.float32), mask=inside)


def _tiles(arguments):
    model_output, x_start, *_ = arguments
    return Tiles(x_start.shape, x_start, model_output)


def _launch(tiles, arguments, share, grad_loss, sums, grad_model_output):
    model_output, x_start, t, weight, x_start_coef, noise_coef, noise = arguments
    model_output, x_start, t = model_output.contiguous(), x_start.contiguous(), t.contiguous()
    reads, numbers, constants = noise_arguments(contiguous(noise))
    tiles.launch(
        _simple_loss_kernel,
        dict(
            model_output_ptr=model_output, x_start_ptr=x_start, t_ptr=t, weight_ptr=weight,
            x_start_coef_ptr=x_start_coef, noise_coef_ptr=noise_coef, grad_loss_ptr=grad_loss,
        ) | reads,
        dict(sums_ptr=sums, grad_model_output_ptr=grad_model_output),
        dict(share=share / tiles.elements, steps=weight.numel()) | numbers,
        dict(DOUBLED=sample_stride(model_output) // tiles.elements, WIDE=tiles.wide) | constants,
    )  # fmt: skip


def forward(*arguments):
    _, x_start, *_ = arguments
    loss, tiles = per_sample(x_start), _tiles(arguments)
    sums = workspace(tiles, loss)
    _launch(tiles, arguments, 1.0, None, sums, None)
    finish(sums, loss)
    return loss


def backward(arguments, needs, grads):
    grad_model_output = new_like(arguments.model_output)
    _launch(_tiles(arguments), arguments, 2.0, grads[0].contiguous(), None, grad_model_output)
    return {"model_output": grad_model_output}
