"""The noise contract, version 1, in Triton: csrc/common/philox.h operation by operation. See ddpm_fast/noise/noise.py."""

import triton
import triton.language as tl


@triton.jit
def log_unit(x):
    """Natural logarithm of a positive normal number: Cephes' logf polynomial on the mantissa in [√½, √2), about 1 ulp."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # the bits of 0.70710677
    f = exponent.to(tl.float32)
    m = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    z = m * m
    y = m * 7.0376836e-2 + -1.1514610e-1
    y = y * m + 1.1676998e-1
    y = y * m + -1.2420141e-1
    y = y * m + 1.4249323e-1
    y = y * m + -1.6668058e-1
    y = y * m + 2.0000715e-1
    y = y * m + -2.4999994e-1
    y = y * m + 3.3333331e-1
    y = y * m * z
    y = y + -2.1219444e-4 * f
    y = y + -0.5 * z
    return (m + y) + 0.69335938 * f


@triton.jit
def box_muller(radius_word, angle_word):
    # word 2^-32 rounded once: the halves are planted in the mantissas of 2^7 and 2^-9.
    high = ((radius_word >> 16) | 0x43000000).to(tl.float32, bitcast=True)
    low = ((radius_word & 0xFFFF) | 0x3B000000).to(tl.float32, bitcast=True)
    u = ((high - 128.001953125) + low) + 1.1641532e-10
    squared = -2.0 * log_unit(u)
    radius = tl.sqrt_rn(tl.where(squared > 0.0, squared, 0.0))
    # The quadrant is in the two highest bits, the signed rest of the angle in quarters of a turn times 2^22.
    quadrant = angle_word + 0x20000000
    r = ((angle_word << 2).to(tl.int32, bitcast=True) >> 10).to(tl.float32) * 3.7450704e-7
    z = r * r
    sine = (z * -1.9515296e-4 + 8.3321609e-3) * z + -1.6666655e-1
    sine = sine * z * r + r
    cosine = (z * 2.4433157e-5 + -1.3887316e-3) * z + 4.1666646e-2
    cosine = (cosine * z * z + -0.5 * z) + 1.0
    odd = (quadrant & 0x40000000) != 0
    a = tl.where(odd, cosine, sine).to(tl.uint32, bitcast=True) ^ (quadrant & 0x80000000)
    b = tl.where(odd, sine, cosine).to(tl.uint32, bitcast=True) ^ ((quadrant + 0x40000000) & 0x80000000)
    return radius * b.to(tl.float32, bitcast=True), radius * a.to(tl.float32, bitcast=True)


@triton.jit
def philox4x32_10(c0, c1, c2, c3, seed):
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def normal4(sample, j, seed, stream):
    """The four normals of counter block j (uint32) of a sample (uint64), which broadcast against each other."""
    zero = (j ^ j) | (sample ^ sample).to(tl.uint32)
    c0, c1, c2, c3 = philox4x32_10(
        j | zero, stream.to(tl.uint32) | zero, sample.to(tl.uint32) | zero, (sample >> 32).to(tl.uint32) | zero, seed
    )
    a, b = box_muller(c0, c1)
    c, d = box_muller(c2, c3)
    return a, b, c, d


@triton.jit
def normals(n, first, seed, stream, first_sample, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """(ROWS, COLUMNS): ε of elements first .. first + COLUMNS, a multiple of 4, of samples n (ROWS,) of the batch.

    A thread makes what it will use, in the order it holds it: four normals side by side, or with WIDE eight.
    """
    sample, seed = first_sample.to(tl.uint64) + n[:, None].to(tl.uint64), seed.to(tl.uint64)
    j = (first // 4).to(tl.uint32)
    if WIDE:
        j += 2 * tl.arange(0, COLUMNS // 8)[None, :].to(tl.uint32)
        a, b, c, d = normal4(sample, j, seed, stream)
        e, f, g, h = normal4(sample, j + 1, seed, stream)
        even, odd = tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h))
    else:
        a, b, c, d = normal4(sample, j + tl.arange(0, COLUMNS // 4)[None, :].to(tl.uint32), seed, stream)
        even, odd = tl.join(a, c), tl.join(b, d)
    return tl.reshape(tl.join(even, odd), (n.shape[0], COLUMNS))
