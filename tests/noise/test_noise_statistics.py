"""Statistics of the noise. Keys are fixed, so a test passes or fails for ever; |z| < 4 fails one good generator in 16,000."""

import math

import pytest
import torch
from scipy import stats

from ddpm_fast import Noise

DRAWS = 1 << 22
KEY = Noise(seed=20_200_619, stream=3)  # the day the DDPM paper appeared


@pytest.fixture(scope="module")
def draws():
    """Four million normals, in float64, as (samples, elements)."""
    return KEY.materialize((64, DRAWS // 64)).double()


def z_of_mean(values, expected=0.0, deviation=1.0):
    """How many standard errors the mean is off."""
    return float((values.mean() - expected) / deviation * math.sqrt(values.numel()))


def test_moments_to_the_fourth_order(draws):
    # E x^k and the standard deviation of x^k for a standard normal.
    for power, mean, deviation in ((1, 0, 1), (2, 1, math.sqrt(2)), (3, 0, math.sqrt(15)), (4, 3, math.sqrt(96))):
        assert abs(z_of_mean(draws**power, mean, deviation)) < 4, f"moment {power}"


@pytest.mark.parametrize("element", range(4))
def test_each_place_of_a_block_is_normal(draws, element):
    values = draws[:, element::4].flatten()[:200_000].numpy()
    assert stats.kstest(values, "norm").pvalue > 1e-4


def test_kolmogorov_smirnov(draws):
    assert stats.kstest(draws.flatten()[: 1 << 20].numpy(), "norm").pvalue > 1e-4


@pytest.mark.parametrize("sigmas", [3.0, 4.0, 4.5, 5.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_tails(draws, sigmas, sign):
    count = int((sign * draws > sigmas).sum())
    expected = DRAWS * stats.norm.sf(sigmas)
    low, high = stats.poisson.ppf([1e-4, 1 - 1e-4], expected)
    assert low <= count <= high, f"{count} draws beyond {sigmas} sigma, expected {expected:.1f}"


def test_nothing_is_beyond_the_largest_radius(draws):
    assert 5 < float(draws.abs().max()) < math.sqrt(66 * math.log(2))


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 64, 1024])
def test_elements_are_not_correlated(draws, lag):
    product = (draws[:, :-lag] * draws[:, lag:]).flatten()
    assert abs(z_of_mean(product)) < 4
    squares = ((draws[:, :-lag] ** 2 - 1) * (draws[:, lag:] ** 2 - 1)).flatten()  # Box-Muller's own pairs share a radius
    assert abs(z_of_mean(squares, deviation=2)) < 4


@pytest.mark.parametrize("first, second", [(0, 1), (0, 2), (0, 3), (1, 2), (2, 3)])
def test_places_of_a_block_are_jointly_normal(draws, first, second):
    blocks = stats.norm.cdf(draws[:16].reshape(-1, 4).numpy())
    cell = (blocks[:, first] * 16).astype(int) * 16 + (blocks[:, second] * 16).astype(int)
    counts = torch.bincount(torch.from_numpy(cell), minlength=256)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


@pytest.mark.parametrize(
    "other",
    [
        KEY.at(stream=KEY.stream + 1), KEY.at(stream=KEY.stream ^ 1 << 31), KEY.at(first_sample=1), KEY.at(first_sample=1 << 32),
        Noise(KEY.seed + 1, KEY.stream), Noise(KEY.seed ^ 1 << 63, KEY.stream), KEY.fold_in(0), KEY.fold_in(1),
    ],
    ids=["stream + 1", "stream, top bit", "next sample", "sample + 2^32", "seed + 1", "seed, top bit", "fold_in(0)", "fold_in(1)"],
)  # fmt: skip
def test_neighbouring_keys_are_not_correlated(draws, other):
    mine, theirs = draws[0], other.materialize((1, draws.shape[1])).double()[0]
    for lag in range(4):  # within a block too: a shift by one would be a repeated counter
        a, b = mine[: len(mine) - lag], theirs[lag:]
        assert abs(z_of_mean(a * b)) < 4
        assert abs(z_of_mean((a**2 - 1) * (b**2 - 1), deviation=2)) < 4


def test_folded_keys_are_not_correlated(draws):
    a, b = (KEY.fold_in(k).materialize((1, 1 << 18)).double() for k in (0, 1))
    assert abs(z_of_mean(a * b)) < 4


def test_the_same_element_of_many_samples(draws):
    """Down the batch, one element each: where samples differ in their counter's upper words alone."""
    values = KEY.materialize((1 << 17, 4)).double()
    for element in range(4):
        column = values[:, element]
        assert stats.kstest(column.numpy(), "norm").pvalue > 1e-4
        assert abs(z_of_mean(column[1:] * column[:-1])) < 4


def test_the_same_element_of_many_streams():
    values = torch.cat([KEY.at(stream=stream).materialize((1, 4)) for stream in range(4096)]).double()
    assert stats.kstest(values.flatten().numpy(), "norm").pvalue > 1e-4
    assert abs(z_of_mean(values[1:] * values[:-1])) < 4


@pytest.mark.parametrize("high", [2, 10, 1000, 4096])
def test_integers_are_uniform(high):
    counts = torch.bincount(KEY.integers(1 << 17, high), minlength=high)
    assert len(counts) == high
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_neighbouring_integers_are_independent():
    t = KEY.integers(1 << 17, 32)
    counts = torch.bincount(t[:-1] * 32 + t[1:], minlength=1024)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_uniform_is_uniform():
    values = KEY.uniform(1 << 17)
    assert float(values.min()) >= 0 and float(values.max()) < 1
    assert stats.kstest(values.numpy(), "uniform").pvalue > 1e-4
