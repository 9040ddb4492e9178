"""randn: the noise contract written out. Writes samples · elements values, reads nothing."""

import torch
import triton
import triton.language as tl

from ddpm_fast.ops.triton._launch import SIZES, Tiles
from ddpm_fast.ops.triton._philox import normals
from ddpm_fast.ops.triton._tile import tile


@triton.jit(do_not_specialize=SIZES)
def _randn_kernel(
    out_ptr,  # (samples, elements)
    samples: tl.int64,
    vectors: tl.int64,
    seed: tl.uint64,
    noise_stream: tl.uint32,
    first_sample: tl.uint64,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    elements = vectors * VECTOR
    n, i, inside = tile(samples, elements, ROWS, COLUMNS)
    first = tl.program_id(0).to(tl.int64) * COLUMNS
    tl.store(out_ptr + n[:, None] * elements + i, normals(n, first, seed, noise_stream, first_sample, COLUMNS, WIDE), mask=inside)


def randn(shape, seed, stream, first_sample, dtype, device, *, out=None):
    out = torch.empty(shape, dtype=dtype, device=device) if out is None else out
    if out.numel():
        tiles = Tiles(shape, out)
        tiles.launch(
            _randn_kernel, {}, dict(out_ptr=out), dict(seed=seed, noise_stream=stream, first_sample=first_sample), dict(WIDE=tiles.wide)
        )
    return out
