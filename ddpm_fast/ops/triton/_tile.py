"""Parts that every kernel begins with: a program's elements, the row of the tables for each sample, and the noise."""

import triton
import triton.language as tl

from ddpm_fast.ops.triton import _launch
from ddpm_fast.ops.triton._philox import normals

DRAWN = tl.constexpr(_launch.DRAWN)


@triton.jit
def tile(samples, elements, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(n, i, inside): samples (ROWS,), elements of a sample (1, COLUMNS), and which pairs exist (ROWS, COLUMNS).

    What belongs to a sample is read in the shape (ROWS,) and only then made a column (ROWS, 1): a column would be read once
    for every element that a thread has.
    """
    rows = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    n = rows * ROWS + tl.arange(0, ROWS)
    i = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return n, i, (n < samples)[:, None] & (i < elements)


@triton.jit
def timestep(t_ptr, n, samples, steps):
    """(t, known), both (ROWS,). ``known`` is false where t lies outside 0..steps-1: nothing may be read at such an index."""
    t = tl.load(t_ptr + n, mask=n < samples, other=-1)
    return t, (t >= 0) & (t < steps)


@triton.jit
def entry(table_ptr, at, known):
    """A column (ROWS, 1) of a table's numbers. It is NaN where t is not ``known``: the error shows in the result, and the GPU goes on."""
    return tl.load(table_ptr + at, mask=known, other=float("nan"))[:, None]


@triton.jit
def each(ptr, n, samples):
    """A column (ROWS, 1): the one number of each sample, in fp32."""
    return tl.load(ptr + n, mask=n < samples, other=0.0).to(tl.float32)[:, None]


@triton.jit
def any_row(condition):
    """True if a condition (ROWS,) holds for any sample of the program: a scalar to branch on."""
    return tl.max(condition.to(tl.int32), 0) != 0


@triton.jit
def read(ptr, place, inside):
    return tl.load(ptr + place, mask=inside).to(tl.float32)


@triton.jit
def epsilon(
    noise_ptr, place, n, wanted, inside, seed, stream, first_sample, NOISE: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr
):
    """ε (ROWS, COLUMNS), read or drawn. Samples that are not ``wanted`` (ROWS, 1) get arbitrary values: select, do not multiply by 0."""
    if NOISE == DRAWN:
        e = tl.zeros(inside.shape, tl.float32)
        if any_row(tl.max(wanted.to(tl.int32), 1)):
            e = normals(n, tl.program_id(0).to(tl.int64) * COLUMNS, seed, stream, first_sample, COLUMNS, WIDE)
    else:
        e = read(noise_ptr, place, inside & wanted)
    return e
