"""Sums over a sample, for the ops that give one value a sample: first over each program's elements, then over the programs.

The second launch is left out if a sample is one tile. The order of every sum depends only on the sample's size: neighbouring
pairs, then pairs of pairs. If the compiler chose the order, it would depend on which thread holds which element, and that
changes with the alignment of the pointers.
"""

import torch
import triton
import triton.language as tl

from ddpm_fast.ops.triton import _launch

BLOCK = tl.constexpr(1024)


@triton.jit
def sum_pairs(x):
    """(ROWS,): each row's sum of (ROWS, COLUMNS), at most 1024 columns, a power of two."""
    for _ in tl.static_range(10):
        if x.shape[1] > 1:
            x = tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)), 2)
    return tl.reshape(x, (x.shape[0],))


@triton.jit
def store_total(ptr, value, inside, n, samples, factor, quantity=0):
    """factor (ROWS, 1) times each sample's sum of the elements in this program, into (quantities, samples, tiles)."""
    place = (quantity * samples + n) * tl.num_programs(0) + tl.program_id(0)
    total = factor * sum_pairs(tl.where(inside, value, 0.0))[:, None]
    tl.store(ptr + place[:, None], total, mask=(n < samples)[:, None])


@triton.jit(do_not_specialize=["tiles"])
def _sum_kernel(
    sums_ptr,  # (rows, tiles) fp32
    result_ptr,  # (rows,)
    tiles: tl.int64,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)[None, :]
    lanes = tl.zeros([1, BLOCK], tl.float32)
    for first in range(0, tiles, BLOCK):
        lanes += tl.load(sums_ptr + row * tiles + first + at, mask=first + at < tiles, other=0.0)
    tl.store(result_ptr + row + tl.arange(0, 1), sum_pairs(lanes))


def workspace(tiles, result):
    """Tensor for the sums that store_total writes: ``result`` (quantities · N,) if a sample is one tile, else new fp32 (…, tiles)."""
    count = tiles.plan.tiles
    return result if count == 1 else torch.empty(result.numel(), count, dtype=torch.float32, device=result.device)


def finish(sums, result):
    """Adds up the workspace over the tiles, into ``result``."""
    if sums is not result:
        rows, count = sums.shape
        _launch.start(result.device, _sum_kernel, (rows, 1, 1), dict(sums_ptr=sums), dict(result_ptr=result), dict(tiles=count), {})
