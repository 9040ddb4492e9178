"""vlb_terms: L_t of the bound in bits per dimension, one value a sample, and its gradient by the model's output.

For t > 0 the KL divergence of the posterior from p_θ, at t = 0 the decoder's negative log-likelihood. Reads model_output, x_start and
x_t once, forward and again backward; a program computes the decoder only where one of its samples is at t = 0.
"""

import triton
import triton.language as tl

from ddpm_fast.ops._native import new_like
from ddpm_fast.ops._output import VARIANCE_KINDS, per_sample, sample_stride
from ddpm_fast.ops.triton._decoder import decoder_erf, decoder_tanh
from ddpm_fast.ops.triton._elementary import clamp, excess_of, exponential, logarithm, passes
from ddpm_fast.ops.triton._launch import SIZES, Tiles
from ddpm_fast.ops.triton._output import FIXED, inverse_deviation, log_variance_of, log_variance_slope, row
from ddpm_fast.ops.triton._reduce import finish, store_total, workspace
from ddpm_fast.ops.triton._tile import any_row, each, read, tile, timestep

_LN2 = 0.693147180559945309


@triton.jit
def _divergence(distance, posterior_log_variance, log_variance):
    """(KL in nats, its derivatives by the predicted mean and by the log-variance)."""
    inverse = inverse_deviation(log_variance)
    growth, beyond_linear = excess_of(posterior_log_variance - log_variance)
    distance = distance * inverse
    return beyond_linear + (0.5 * distance) * distance, -(distance * inverse), -(growth + (0.5 * distance) * distance)


@triton.jit
def _decoder(x_start, mean, log_variance, half, EXACT: tl.constexpr):
    """(-log P in nats, its derivatives by the mean and by the log-variance)."""
    log_scale = 0.5 * log_variance
    narrow = log_scale < -80.0
    inverse = exponential(-tl.where(narrow, -80.0, log_scale))
    if EXACT:
        probability, by_mean, by_log_deviation = decoder_erf(x_start, mean, inverse, half)
    else:
        probability, by_mean, by_log_deviation = decoder_tanh(x_start, mean, inverse, half)
    missed = probability < 1e-12
    by_log_variance = tl.where(missed | narrow, 0.0, -0.5 * by_log_deviation)
    return -logarithm(tl.where(missed, 1e-12, probability)), tl.where(missed, 0.0, -by_mean), by_log_variance


@triton.jit(do_not_specialize=SIZES)
def _vlb_terms_kernel(
    model_output_ptr,  # (samples, DOUBLED elements)
    x_start_ptr,  # (samples, elements)
    x_t_ptr,  # (samples, elements)
    t_ptr,  # (samples,) int64
    table_ptr,  # (steps, 8)
    grad_terms_ptr,  # (samples,): backward
    sums_ptr,  # (samples, tiles): forward, or None
    grad_model_output_ptr,  # like model_output: backward, or None
    half,  # half a bin's width
    share,  # bits of one element's nat: 1 / (elements ln 2)
    samples: tl.int64,
    vectors: tl.int64,
    steps: tl.int64,
    VARIANCE: tl.constexpr,
    CLIP: tl.constexpr,
    EXACT: tl.constexpr,
    DETACH: tl.constexpr,
    DOUBLED: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    elements = vectors * VECTOR
    n, i, inside = tile(samples, elements, ROWS, COLUMNS)
    t, known = timestep(t_ptr, n, samples, steps)
    place, out_place = n[:, None] * elements + i, n[:, None] * elements * DOUBLED + i
    from_x_t, from_out, mean1, mean2, posterior_log_variance, low, high, _ = row(table_ptr, t, known)
    x_start, x_t = read(x_start_ptr, place, inside), read(x_t_ptr, place, inside)
    raw = low if VARIANCE == FIXED else read(model_output_ptr, out_place + elements, inside)
    log_variance = log_variance_of(raw, low, high, VARIANCE)
    guess = from_x_t * x_t + from_out * read(model_output_ptr, out_place, inside)
    mean = mean1 * (clamp(guess, -1.0, 1.0) if CLIP else guess) + mean2 * x_t
    value, by_mean, by_log_variance = _divergence((mean1 * x_start + mean2 * x_t) - mean, posterior_log_variance, log_variance)
    by_log_variance += tl.zeros(inside.shape, tl.float32)
    last = (t == 0)[:, None]
    if any_row(t == 0):
        nll, nll_by_mean, nll_by_log_variance = _decoder(x_start, mean, log_variance, half, EXACT)
        value, by_mean = tl.where(last, nll, value), tl.where(last, nll_by_mean, by_mean)
        by_log_variance = tl.where(last, nll_by_log_variance, by_log_variance)
    if grad_model_output_ptr is None:
        store_total(sums_ptr, value, inside, n, samples, share)
    else:
        scale = each(grad_terms_ptr, n, samples) * share
        by_out = tl.zeros(inside.shape, tl.float32)
        if not DETACH:
            by_out = scale * (((mean1 * from_out) * by_mean) * (passes(guess, 1.0) if CLIP else 1.0))
        tl.store(grad_model_output_ptr + out_place, by_out, mask=inside)
        if DOUBLED == 2:
            by_raw = tl.zeros(inside.shape, tl.float32)
            if VARIANCE != FIXED:
                by_raw = scale * (log_variance_slope(low, high, VARIANCE) * by_log_variance)
            tl.store(grad_model_output_ptr + out_place + elements, by_raw, mask=inside)


def _tiles(arguments):
    model_output, _, x_t, *_ = arguments
    return Tiles(x_t.shape, x_t, model_output)


def _launch(tiles, arguments, grad_terms, sums, grad_model_output):
    model_output, x_start, x_t, t, table, variance, clip, levels, cdf, detach_mean = arguments
    model_output, x_start, x_t, t = model_output.contiguous(), x_start.contiguous(), x_t.contiguous(), t.contiguous()
    tiles.launch(
        _vlb_terms_kernel,
        dict(model_output_ptr=model_output, x_start_ptr=x_start, x_t_ptr=x_t, t_ptr=t, table_ptr=table, grad_terms_ptr=grad_terms),
        dict(sums_ptr=sums, grad_model_output_ptr=grad_model_output),
        dict(half=1.0 / (levels - 1), share=1.0 / (tiles.elements * _LN2), steps=table.shape[0]),
        dict(
            VARIANCE=VARIANCE_KINDS.index(variance), CLIP=bool(clip), EXACT=cdf == "erf",
            DETACH=bool(detach_mean) and grad_model_output is not None, DOUBLED=sample_stride(model_output) // tiles.elements,
        ),
    )  # fmt: skip


def forward(*arguments):
    _, _, x_t, *_ = arguments
    terms, tiles = per_sample(x_t), _tiles(arguments)
    sums = workspace(tiles, terms)
    _launch(tiles, arguments, None, sums, None)
    finish(sums, terms)
    return terms


def backward(arguments, needs, grads):
    grad_model_output = new_like(arguments.model_output)
    _launch(_tiles(arguments), arguments, grads[0].contiguous(), None, grad_model_output)
    return {"model_output": grad_model_output}
