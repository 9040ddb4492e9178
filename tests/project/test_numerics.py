"""The comparison itself: it accepts what it must and bites where it must."""

import pytest
import torch
from numerics import assert_as_accurate, assert_bits_equal, assert_close_to_exact

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(dtype=torch.float32):
    """Inputs, result in the dtype and truth of a formula like q_sample's."""
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(4, 257, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    exact = 0.9 * x.double() + 0.3 * z.double()
    return x, z, (0.9 * x.float() + 0.3 * z.float()).to(dtype), exact


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_is_as_accurate_as_itself(dtype):
    _, _, baseline, exact = case(dtype)
    assert_as_accurate(baseline, baseline, exact)
    assert_as_accurate(exact.to(dtype), baseline, exact, floor=1.0)


def test_nan_fails():
    _, _, baseline, exact = case()
    actual = baseline.clone()
    actual[2, 13] = torch.nan
    with pytest.raises(AssertionError, match=r"the op: NaN or infinity at \(2, 13\) \(1 such\): got nan"):
        assert_as_accurate(actual, baseline, exact, what="the op")
    with pytest.raises(AssertionError, match=r"\(2, 13\)"):
        assert_close_to_exact(actual, exact, rtol=1e9, atol=1e9)


def test_nan_in_both_sides_does_not_excuse_it():
    _, _, baseline, exact = case()
    baseline[1, 1] = torch.nan
    with pytest.raises(AssertionError, match="the baseline itself"):
        assert_as_accurate(baseline, baseline, exact)


def test_true_nan_and_infinity_pass_and_wrong_ones_fail():
    exact = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, 1e9], dtype=torch.float64)
    good = exact.to(torch.float16)  # 1e9 overflows: infinity is the rounded truth
    assert_as_accurate(good, good, exact)
    for at, value in ((0, 1.0), (1, -torch.inf), (1, 65504.0), (2, torch.nan), (3, torch.inf), (4, 65504.0)):
        bad = good.clone()
        bad[at] = value
        with pytest.raises(AssertionError, match=rf"at \({at},\)"):
            assert_as_accurate(bad, good, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_element_in_its_neighbours_place_fails(dtype):
    _, _, baseline, exact = case(dtype)
    actual = baseline.clone()
    actual[3, :-1], actual[3, -1] = baseline[3, 1:], baseline[3, 0]
    with pytest.raises(AssertionError, match=r"\d+ of 1028 elements are too far off, the worst at \(3, \d+\)"):
        assert_as_accurate(actual, baseline, exact)


def test_one_wrong_element_is_named():
    _, _, baseline, exact = case()
    actual = baseline.clone()
    actual[0, 256] += 0.25
    with pytest.raises(AssertionError, match=r"1 of 1028 elements are too far off, the worst at \(0, 256\): .* error 2\.500e-01"):
        assert_as_accurate(actual, baseline, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swapped_coefficients_fail(dtype):
    x, z, baseline, exact = case(dtype)
    with pytest.raises(AssertionError, match="too far off"):
        assert_as_accurate((0.3 * x.float() + 0.9 * z.float()).to(dtype), baseline, exact)


def test_a_detour_through_bfloat16_fails():
    x, z, baseline, exact = case()
    with pytest.raises(AssertionError, match="too far off"):
        assert_as_accurate(0.9 * x + 0.3 * z.bfloat16().float(), baseline, exact)


def test_wrong_dtype_and_shape_fail():
    _, _, baseline, exact = case()
    with pytest.raises(AssertionError, match=r"dtype is torch\.float64, expected torch\.float32"):
        assert_as_accurate(baseline.double(), baseline, exact)
    with pytest.raises(AssertionError, match="shape is"):
        assert_as_accurate(baseline[:, :-1], baseline, exact)
    with pytest.raises(AssertionError, match="shape is"):
        assert_close_to_exact(baseline[:1], exact, rtol=1.0)  # would broadcast
    with pytest.raises(TypeError, match="exact must be float64"):
        assert_as_accurate(baseline, baseline, exact.float())


def test_close_to_exact_counts_ulps():
    exact = torch.tensor([1.0, 100.0], dtype=torch.float64)
    actual = exact.float() * (1 + 3 * 2.0**-23)
    assert_close_to_exact(actual, exact, ulps=3.5)
    with pytest.raises(AssertionError, match="too far off"):
        assert_close_to_exact(actual, exact, ulps=2)
    with pytest.raises(AssertionError):
        assert_close_to_exact(actual, exact)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.int64, torch.bool])
def test_bits(dtype):
    x = torch.arange(12).reshape(3, 4).to(dtype)
    assert_bits_equal(x, x.clone())
    y = x.clone()
    y[1, 2] = 0
    with pytest.raises(AssertionError, match=r"1 of 12 elements differ, the first at \(1, 2\)"):
        assert_bits_equal(x, y)


def test_bits_tell_zeros_apart_and_know_nan():
    nan = torch.tensor([torch.nan, 0.0])
    assert_bits_equal(nan, nan.clone())
    with pytest.raises(AssertionError, match=r"first at \(1,\): got 0\.0, expected -0\.0 \(bits 00000000 and 80000000\)"):
        assert_bits_equal(nan, torch.tensor([torch.nan, -0.0]))


def test_empty_and_scalar_tensors():
    empty = torch.empty(0, 3)
    assert_as_accurate(empty, empty, empty.double())
    assert_bits_equal(empty, empty)
    assert_as_accurate(torch.tensor(1.0), torch.tensor(1.0), torch.tensor(1.0, dtype=torch.float64))
    with pytest.raises(AssertionError, match=r"at \(\)"):
        assert_bits_equal(torch.tensor(1.0), torch.tensor(2.0))
