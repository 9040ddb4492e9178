"""gaussian_kl: KL(N(mean1, e^logvar1) ‖ N(mean2, e^logvar2)) in nats, elementwise or the mean over each sample, and its gradients.

Reads each operand once; one that is broadcast is read where it lies, and its gradient summed over the sample. Backward
writes the gradients that are wanted, in one launch where they are elementwise and two where one is summed over several tiles.
"""

import math

import triton
import triton.language as tl

from ddpm_fast.ops.triton._elementary import excess_of
from ddpm_fast.ops.triton._launch import SIZES, Tiles
from ddpm_fast.ops.triton._output import inverse_deviation
from ddpm_fast.ops.triton._reduce import finish, store_total, workspace
from ddpm_fast.ops.triton._tile import each, read, tile

_STRIDES = ("stride1", "stride2", "stride3", "stride4")


@triton.jit
def _operand(ptr, n, i, stride, samples, inside, WHOLE: tl.constexpr, VECTOR: tl.constexpr):
    """(ROWS, COLUMNS), or (ROWS, 1) where a sample has one value."""
    if WHOLE:
        return read(ptr, n[:, None] * (stride * VECTOR) + i, inside)
    else:
        return tl.load(ptr + n * stride, mask=n < samples).to(tl.float32)[:, None]


@triton.jit
def _store_grad(ptr, sums_ptr, grad, place, inside, n, samples, PLACE: tl.constexpr):
    """Stores the gradient of an operand with one value an element, or the sum for one with one value a sample, if it is wanted."""
    if ptr is not None:
        tl.store(ptr + place, grad, mask=inside)
    elif PLACE >= 0:
        store_total(sums_ptr, grad, inside, n, samples, 1.0, PLACE)


@triton.jit(do_not_specialize=(*SIZES, *_STRIDES))
def _gaussian_kl_fwd_kernel(
    mean1_ptr,  # each (samples, elements), or (samples,) where its WHOLE is 0; one sample for all where its stride is 0
    logvar1_ptr,
    mean2_ptr,
    logvar2_ptr,
    kl_ptr,  # (samples, elements), or the sums (samples, tiles) where REDUCED
    stride1: tl.int64,  # from sample to sample, in VECTORs of an operand that is WHOLE
    stride2: tl.int64,
    stride3: tl.int64,
    stride4: tl.int64,
    share,  # 1 / elements
    samples: tl.int64,
    vectors: tl.int64,
    REDUCED: tl.constexpr,
    WHOLE1: tl.constexpr,
    WHOLE2: tl.constexpr,
    WHOLE3: tl.constexpr,
    WHOLE4: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    elements = vectors * VECTOR
    n, i, inside = tile(samples, elements, ROWS, COLUMNS)
    mean1, logvar1 = (
        _operand(mean1_ptr, n, i, stride1, samples, inside, WHOLE1, VECTOR),
        _operand(logvar1_ptr, n, i, stride2, samples, inside, WHOLE2, VECTOR),
    )
    mean2, logvar2 = (
        _operand(mean2_ptr, n, i, stride3, samples, inside, WHOLE3, VECTOR),
        _operand(logvar2_ptr, n, i, stride4, samples, inside, WHOLE4, VECTOR),
    )
    distance = (mean1 - mean2) * inverse_deviation(logvar2)
    _, beyond_linear = excess_of(logvar1 - logvar2)
    kl = beyond_linear + (0.5 * distance) * distance
    if REDUCED:
        store_total(kl_ptr, kl, inside, n, samples, share)
    else:
        tl.store(kl_ptr + n[:, None] * elements + i, kl, mask=inside)


@triton.jit(do_not_specialize=(*SIZES, *_STRIDES))
def _gaussian_kl_bwd_kernel(
    mean1_ptr,  # as forward has them
    logvar1_ptr,
    mean2_ptr,
    logvar2_ptr,
    grad_kl_ptr,  # (samples, elements), or (samples,) where REDUCED
    grad1_ptr,  # (samples, elements) each; None where not wanted, or where it is summed
    grad2_ptr,
    grad3_ptr,
    grad4_ptr,
    sums_ptr,  # (operands summed, samples, tiles), or None
    stride1: tl.int64,
    stride2: tl.int64,
    stride3: tl.int64,
    stride4: tl.int64,
    share,
    samples: tl.int64,
    vectors: tl.int64,
    REDUCED: tl.constexpr,
    WHOLE1: tl.constexpr,
    WHOLE2: tl.constexpr,
    WHOLE3: tl.constexpr,
    WHOLE4: tl.constexpr,
    SUM1: tl.constexpr,  # which of the sums the operand's gradient is, or -1
    SUM2: tl.constexpr,
    SUM3: tl.constexpr,
    SUM4: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    elements = vectors * VECTOR
    n, i, inside = tile(samples, elements, ROWS, COLUMNS)
    place = n[:, None] * elements + i
    mean1, logvar1 = (
        _operand(mean1_ptr, n, i, stride1, samples, inside, WHOLE1, VECTOR),
        _operand(logvar1_ptr, n, i, stride2, samples, inside, WHOLE2, VECTOR),
    )
    mean2, logvar2 = (
        _operand(mean2_ptr, n, i, stride3, samples, inside, WHOLE3, VECTOR),
        _operand(logvar2_ptr, n, i, stride4, samples, inside, WHOLE4, VECTOR),
    )
    grad = each(grad_kl_ptr, n, samples) * share if REDUCED else read(grad_kl_ptr, place, inside)
    inverse = inverse_deviation(logvar2)
    distance = (mean1 - mean2) * inverse
    growth, _ = excess_of(logvar1 - logvar2)
    pull = grad * (distance * inverse)
    _store_grad(grad1_ptr, sums_ptr, pull, place, inside, n, samples, SUM1)
    _store_grad(grad2_ptr, sums_ptr, grad * growth, place, inside, n, samples, SUM2)
    _store_grad(grad3_ptr, sums_ptr, -pull, place, inside, n, samples, SUM3)
    _store_grad(grad4_ptr, sums_ptr, (-grad) * (growth + (0.5 * distance) * distance), place, inside, n, samples, SUM4)


def _operands(operands, tiles):
    """(reads, numbers, constants) of [(tensor, sample stride, element stride)]; lowers the tiles' vector to what all rows allow."""
    tiles.vector = math.gcd(tiles.vector, *(stride for _, stride, element in operands if element))
    reads = dict(zip(("mean1_ptr", "logvar1_ptr", "mean2_ptr", "logvar2_ptr"), (x for x, _, _ in operands), strict=True))
    numbers = {name: stride // tiles.vector if element else stride for name, (_, stride, element) in zip(_STRIDES, operands, strict=True)}
    return reads, numbers | dict(share=1.0 / tiles.elements), {f"WHOLE{k}": element for k, (_, _, element) in enumerate(operands, 1)}


def forward(operands, kl, shape, reduced):
    """Writes the divergence into ``kl``.

    Args:
        operands: (tensor, sample stride, element stride) each.
        kl: (N, ...), or (N,) where ``reduced``.
        shape: (N, ...) of the broadcast operands.
        reduced: take the mean over each sample.
    """
    tiles = Tiles(shape, *(x for x, _, _ in operands))
    reads, numbers, constants = _operands(operands, tiles)
    sums = workspace(tiles, kl) if reduced else kl
    tiles.launch(_gaussian_kl_fwd_kernel, reads, dict(kl_ptr=sums), numbers, constants | dict(REDUCED=reduced))
    if reduced:
        finish(sums, kl)


def backward(operands, grad_kl, grads, shape, reduced):
    """Writes the gradients of the operands into ``grads``.

    Args:
        operands, shape, reduced: as :func:`forward`.
        grad_kl: the upstream gradient, like kl.
        grads: a tensor for each operand, None where its gradient is not wanted: (N, ...) for an operand with one value an element,
            fp32 (N,) for one with one value a sample. Those (N,) are the rows of one tensor, in order.
    """
    tiles = Tiles(shape, *(x for x, _, _ in operands), *(grad for grad in grads))
    reads, numbers, constants = _operands(operands, tiles)
    summed = [k for k, (_, _, element) in enumerate(operands) if grads[k] is not None and not element]
    totals = grads[summed[0]].as_strided((len(summed) * shape[0],), (1,)) if summed else None
    sums = workspace(tiles, totals) if summed else None
    tiles.launch(
        _gaussian_kl_bwd_kernel,
        reads | dict(grad_kl_ptr=grad_kl),
        {f"grad{k + 1}_ptr": None if k in summed else grad for k, grad in enumerate(grads)} | dict(sums_ptr=sums),
        numbers,
        constants | {f"SUM{k + 1}": summed.index(k) if k in summed else -1 for k in range(4)} | dict(REDUCED=reduced),
    )
    if summed:
        finish(sums, totals)
