"""How mma adds: values that distinguish tensor cores from fp32 arithmetic, and exact fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest

from ptxsim.ops_matrix import PRODUCTS_AT_ONCE, multiply_accumulate


def one_sum(a, b, c, kind="tf32", half=False):
    """c + a b of one element: the first of 16 x 8."""
    depth = PRODUCTS_AT_ONCE[kind] * 2
    left, right, held = np.zeros((depth, 16, 1), "f4"), np.zeros((depth, 8), "f4"), np.zeros((16, 8), "f4")
    left[: len(a), 0, 0], right[: len(b), 0], held[0, 0] = a, b, c
    return float(multiply_accumulate(left, right, held, kind, half)[0, 0])


# Fasi et al. 2021, sections 3 and 4, on an A100: factors, c, result.
BELOW_ONE = 1 - 2.0**-24
MEASURED = {
    "subnormal c": ([], [], 2.0**-149, 2.0**-149),
    "subnormal product": ([2.0**-126], [0.5], 0, 2.0**-127),
    "products are exact": ([1 - 2.0**-11] * 4, [1 - 2.0**-11] * 4, 0, 4 * (1 - 2.0**-11) ** 2),
    "aligned to the largest": ([0.5] * 4, [2.0**-24] * 4, 1.0, 1.0),
    "the largest is a product": ([1, 0.5, 0.5, 0.5], [1, 2.0**-24, 2.0**-24, 2.0**-24], 2.0**-25, 1.0),
    "positive, not rounded up": ([1, 1], [2, 2.0**-23 + 2.0**-24], 0, 2.0),
    "negative, not rounded down": ([1, 1], [-2, -(2.0**-23) - 2.0**-24], 0, -2.0),
    "one extra bit": ([1], [1], -BELOW_ONE, 2.0**-24),
    "sums are not normalised": ([1] * 4, [2.0**-24] * 4, BELOW_ONE, 1 + 2.0**-23),
    "carries": ([1] * 4, [1, 1, 1, 2.0**-23], 1 + 2.0**-22 + 2.0**-23, 4 + 2.0**-21),
    "carries of a third bit": ([1] * 4, [1, 1.5, 1.75, 1.875], 1.875, 8.0),
    "cut off after carries": ([1] * 4, [1] * 4, 1 + 2.0**-22 + 2.0**-23, 5.0),
    "cut off after carries, negative": ([1] * 4, [-1] * 4, -1 - 2.0**-22 - 2.0**-23, -5.0),
}


@pytest.mark.parametrize("what", MEASURED)
def test_measured_on_hardware(what):
    a, b, c, expected = MEASURED[what]
    assert one_sum(a, b, c) == expected


def test_sums_are_not_monotonic():
    a, b = [0.5] * 4, [2.0**-24] * 3 + [2.0**-23 + 2.0**-24]
    assert one_sum(a, b, 1.0) < one_sum(a, b, BELOW_ONE)


def test_half_accumulators_are_rounded_to_nearest():
    assert one_sum([1], [2.0**-11 + 2.0**-13], 1.0, "f16", half=True) == 1 + 2.0**-10
    assert one_sum([1], [2.0**-11 + 2.0**-13], 1.0, "f16") == 1 + 2.0**-11 + 2.0**-13


def test_nonfinite():
    inf, nan = math.inf, math.nan
    assert one_sum([inf, 1], [1, 1], 0) == inf and one_sum([1], [1], -inf) == -inf
    assert math.isnan(one_sum([inf, inf], [1, -1], 0)) and math.isnan(one_sum([inf], [0], 0)) and math.isnan(one_sum([1], [nan], 0))
    assert one_sum([2.0**127], [4], 0) == inf


def reference(a, b, c, kind):
    for first in range(0, len(a), PRODUCTS_AT_ONCE[kind]):
        block = [(float(x), float(y)) for x, y in zip(a[first:], b[first:])][: PRODUCTS_AT_ONCE[kind]]
        exponent = lambda x: max(math.frexp(x)[1] - 1, -126)
        exponents = [exponent(x) + exponent(y) for x, y in block if x and y] + [exponent(c)] * bool(c)
        last = Fraction(2) ** max(max(exponents, default=0) - 24, -149)
        total = sum(int(term / last) for term in (*(Fraction(x) * Fraction(y) for x, y in block), Fraction(c)))  # int: toward zero
        shift = max(abs(total).bit_length() - 24, 0)
        c = float((abs(total) >> shift << shift) * last) * (-1 if total < 0 else 1)
    return c


@pytest.mark.parametrize("kind", PRODUCTS_AT_ONCE)
@pytest.mark.parametrize("spread, size", [(0, 0), (12, 0), (4, -62), (4, 40)])
def test_against_fractions(kind, spread, size, rng):
    """Numbers of one size, and of many; so small that results are subnormal, and large."""
    mask = np.uint32(0xFFFFE000 if kind == "tf32" else 0xFFFF0000)
    draw = lambda *shape: (rng.standard_normal(shape) * 2.0 ** (rng.integers(-spread, spread + 1, shape) + size)).astype("f4")
    left, right, c = draw(16, 16, 2), draw(16, 16), draw(16, 16) * np.float32(2.0**size)
    left, right = (left.view("u4") & mask).view("f4"), (right.view("u4") & mask).view("f4")
    left[rng.random(left.shape) < 0.1] = 0
    c[rng.random(c.shape) < 0.2] = 0
    found = multiply_accumulate(left, right, c, kind)
    for i in range(16):
        for j in range(16):
            assert float(found[i, j]) == reference(left[:, i, j // 8], right[:, j], float(c[i, j]), kind)


def test_f16_accumulators_of_mma(ptx):
    """Fragments of .f16 accumulators: two columns of a row in a register."""
    lanes = np.arange(32)
    row, column = lanes // 4, lanes % 4 * 2
    pack = lambda low, high: np.stack([low, high], -1).astype("f2").view("u4").reshape(-1)
    a, b, c = (np.random.default_rng(0).integers(-4, 5, shape).astype("f4") for shape in ((16, 16), (16, 8), (16, 8)))
    inputs = [pack(a[row + 8 * (j % 2), column + 8 * (j // 2)], a[row + 8 * (j % 2), column + 8 * (j // 2) + 1]) for j in range(4)]
    inputs += [pack(b[column + 8 * j, row], b[column + 8 * j + 1, row]) for j in range(2)]
    inputs += [pack(c[row + 8 * j, column], c[row + 8 * j, column + 1]) for j in range(2)]
    body = "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%o0, %o1}, {%a0, %a1, %a2, %a3}, {%a4, %a5}, {%a6, %a7};"
    found = [x.view("f2").reshape(32, 2).astype("f4") for x in ptx(body, inputs, ["u4", "u4"])]
    expected = a @ b + c
    for j in range(2):
        assert np.array_equal(found[j], np.stack([expected[row + 8 * j, column], expected[row + 8 * j, column + 1]], -1))
