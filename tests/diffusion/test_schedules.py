"""Schedules: each constructor against its published formula, each table against decimal arithmetic of 60 digits."""

import math
from decimal import Decimal, localcontext
from itertools import accumulate
from operator import mul

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_bits_equal, assert_close_to_exact

from ddpm_fast import NoiseSchedule
from ddpm_fast.diffusion.schedules import SCHEDULES

EPS = 2.0**-52


def exact_tables(betas: list[float]) -> dict[str, list[float]]:
    """Every table from the betas in decimals of 60 digits, rounded once at the end."""
    with localcontext() as context:
        context.prec = 60
        beta = [Decimal(b) for b in betas]  # exact
        bar = list(accumulate((1 - b for b in beta), mul))
        previous = [Decimal(1), *bar[:-1]]
        rows = list(zip(beta, previous, bar, strict=True))
        variance = [b * (1 - p) / (1 - a) for b, p, a in rows]
        floored = [variance[1] if len(beta) > 1 else beta[0], *variance[1:]]
        tables = {
            "alphas": [1 - b for b in beta],
            "alphas_bar": bar,
            "alphas_bar_prev": previous,
            "one_minus_alphas_bar": [1 - a for a in bar],
            "sqrt_alphas_bar": [a.sqrt() for a in bar],
            "sqrt_one_minus_alphas_bar": [(1 - a).sqrt() for a in bar],
            "snr": [a / (1 - a) for a in bar],
            "posterior_variance": variance,
            "posterior_log_variance": [v.ln() for v in floored],
            "posterior_mean_coef1": [b * p.sqrt() / (1 - a) for b, p, a in rows],
            "posterior_mean_coef2": [(1 - p) * (1 - b).sqrt() / (1 - a) for b, p, a in rows],
            "fixed_large_log_variance": [x.ln() for x in (floored[0], *beta[1:])],
            "log_betas": [b.ln() for b in beta],
        }
    return {name: [float(x) for x in values] for name, values in tables.items()}


def check_tables(schedule: NoiseSchedule) -> None:
    """The library sums T logarithms: a relative error of T eps of the sum, so T eps |log alphas_bar| of the product. At most
    four such errors meet in a table; an absolute error of a logarithm is the relative error of its argument."""
    betas = schedule.betas.tolist()
    relative = 4 * (len(betas) + 4) * EPS * max(1.0, -float(torch.log1p(-schedule.betas).sum()))
    for name, values in exact_tables(betas).items():
        table = getattr(schedule, name)
        assert table.dtype == torch.float64 and table.shape == (len(betas),)
        atol = relative if "log" in name else 0.0
        assert_close_to_exact(table, torch.tensor(values, dtype=torch.float64), rtol=relative, atol=atol, what=f"{schedule.name} {name}")


# The betas by NumPy and math, straight from the papers.


def numpy_cosine(T, s=0.008):
    def f(t):
        return math.cos((t / T + s) / (1 + s) * math.pi / 2) ** 2

    return [min(1 - f(t + 1) / f(t), 0.999) for t in range(T)]


FORMULAS = {
    "linear": (lambda T: NoiseSchedule.linear(T), lambda T: np.linspace(1e-4, 0.02, T)),
    "linear, other ends": (lambda T: NoiseSchedule.linear(T, 1e-3, 0.5), lambda T: 1e-3 + (0.5 - 1e-3) / max(T - 1, 1) * np.arange(T)),
    "linear, rescaled": (lambda T: NoiseSchedule.linear(T, rescale=True), lambda T: np.linspace(0.1 / T, 20.0 / T, T)),
    "quadratic": (lambda T: NoiseSchedule.quadratic(T), lambda T: np.linspace(1e-4**0.5, 0.02**0.5, T) ** 2),
    "constant": (lambda T: NoiseSchedule.constant(T, 0.03), lambda T: np.full(T, 0.03)),
    "jsd": (lambda T: NoiseSchedule.jsd(T), lambda T: [min(1 / (T - t), 0.999) for t in range(T)]),
    "sigmoid": (lambda T: NoiseSchedule.sigmoid(T), lambda T: [1e-4 + 0.0199 / (1 + math.exp(-u)) for u in np.linspace(-6, 6, T)]),
    "cosine": (lambda T: NoiseSchedule.cosine(T), numpy_cosine),
    "cosine, other s": (lambda T: NoiseSchedule.cosine(T, s=0.05), lambda T: numpy_cosine(T, 0.05)),
    "betas": (lambda T: NoiseSchedule([0.3] * T), lambda T: [0.3] * T),
}


# 25: the shortest round length that the rescaled schedule takes; 1000: the papers'.
@pytest.mark.parametrize("T", [25, 1000])
@pytest.mark.parametrize("name", FORMULAS)
def test_betas_follow_the_published_formula(name, T):
    make, formula = FORMULAS[name]
    # A few roundings of numbers up to 1 (for the cosine, of a ratio of cosines, some of which are near 0).
    cancelled = 64 * EPS / math.cos((1 - 1.0 / T + 0.008) / 1.008 * math.pi / 2) if "cosine" in name else 4 * EPS
    assert_close_to_exact(make(T).betas, torch.as_tensor(np.array(formula(T)), dtype=torch.float64), rtol=8 * EPS, atol=cancelled)


@pytest.mark.parametrize("name", FORMULAS)
def test_tables_agree_with_exact_arithmetic(name):
    check_tables(FORMULAS[name][0](60))


def test_tables_agree_with_exact_arithmetic_at_full_length():
    check_tables(NoiseSchedule.linear(1000))


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.lists(st.floats(1e-9, 0.999), min_size=1, max_size=12))
def test_tables_of_any_betas(betas):
    check_tables(NoiseSchedule(betas))


@pytest.mark.parametrize("name", SCHEDULES)
def test_from_name_is_the_constructor(name):
    assert_bits_equal(NoiseSchedule.from_name(name, 40).betas, getattr(NoiseSchedule, name)(40).betas)


def test_the_paper_ends_the_linear_schedule_near_pure_noise():
    # Ho et al., section 4: with these constants the signal-to-noise ratio at T is as small as possible,
    # L_T of about 1e-5 bits per dimension: alphas_bar_T is 4.0e-5.
    schedule = NoiseSchedule.linear(1000, 1e-4, 0.02)
    assert schedule.betas[0] == 1e-4 and schedule.betas[-1] == 0.02
    assert 4.0e-5 < schedule.alphas_bar[-1] < 4.1e-5


def test_rescaling_keeps_the_total_noise():
    # sum of betas = T · 1000/T · mean: the same for each T. The logarithm of alphas_bar_T differs by terms of beta² only.
    total = [float(NoiseSchedule.linear(T, rescale=True).betas.sum()) for T in (50, 1000, 4000)]
    assert max(total) - min(total) < 1e-10
    assert float(NoiseSchedule.linear(1000, rescale=True).betas[7]) == float(NoiseSchedule.linear(1000).betas[7])


def test_cosine_alphas_bar_is_the_cosine_itself_until_the_cap():
    T, s = 100, 0.008
    u = (np.arange(T + 1) / T + s) / (1 + s)
    f = np.cos(u * np.pi / 2) ** 2
    schedule = NoiseSchedule.cosine(T)
    assert schedule.betas[-1] == 0.999 and schedule.betas[-2] < 0.999
    assert_close_to_exact(schedule.alphas_bar[:-1], torch.from_numpy(f[1:-1] / f[0]), rtol=1e-10)


def test_jsd_erases_the_same_share_of_the_signal_each_step():
    schedule = NoiseSchedule.jsd(10)
    # Π (1 - 1/(T - k)) telescopes to (T - 1 - t) / T; the last step is capped short of erasing all.
    assert_close_to_exact(schedule.alphas_bar[:-1], torch.arange(9, 0, -1, dtype=torch.float64) / 10, rtol=1e-14)
    assert schedule.betas[-1] == 0.999 and 0 < schedule.alphas_bar[-1] < 1e-3


# Pinned definitions.


@pytest.mark.parametrize("name", SCHEDULES)
def test_posterior_log_variance_at_zero_is_that_of_one(name):
    schedule = NoiseSchedule.from_name(name, 50)
    assert schedule.posterior_variance[0] == 0
    assert schedule.posterior_log_variance[0] == schedule.posterior_log_variance[1] == schedule.posterior_variance[1].log()
    assert schedule.fixed_large_log_variance[0] == schedule.posterior_log_variance[1]
    assert_bits_equal(schedule.fixed_large_log_variance[1:], schedule.betas[1:].log())


def test_one_step_schedule_is_finite():
    schedule = NoiseSchedule.linear(1, 0.25, 0.25)
    assert schedule.alphas_bar.tolist() == [0.75] and schedule.posterior_variance.tolist() == [0]
    assert_close_to_exact(schedule.posterior_mean_coef1, torch.ones(1, dtype=torch.float64), ulps=4)
    assert schedule.posterior_mean_coef2.tolist() == [0.0]
    assert schedule.posterior_log_variance.tolist() == [math.log(0.25)] == schedule.fixed_large_log_variance.tolist()


def test_one_minus_alphas_bar_keeps_tiny_betas():
    # 1 - alphas_bar by subtraction would have no correct digit here: 1 - 1e-17 is 1.
    schedule = NoiseSchedule([1e-17] * 4)
    assert (1 - schedule.alphas_bar).abs().max() == 0
    assert_close_to_exact(schedule.one_minus_alphas_bar, 1e-17 * torch.arange(1, 5, dtype=torch.float64), rtol=16 * EPS)
    assert_close_to_exact(schedule.posterior_variance[1:], 1e-17 * torch.tensor([1 / 2, 2 / 3, 3 / 4], dtype=torch.float64), rtol=64 * EPS)


def test_noise_of_the_first_steps_survives_the_cast():
    schedule = NoiseSchedule.linear(1000)
    # The trap: alphas_bar cast to bf16 first is 1 for the first ten steps, and the noise is gone.
    trap = (1 - schedule.alphas_bar.bfloat16().float()).sqrt()
    assert (trap[:10] == 0).all()
    table = schedule.sqrt_one_minus_alphas_bar.float()[:11]
    assert (table > 0).all()
    assert_close_to_exact(table, schedule.sqrt_one_minus_alphas_bar[:11], ulps=1)
    assert (table.bfloat16() > 0).all() and (table.bfloat16().diff() > 0).all()


# Strided steps.


# The odd list is uneven, has the first step, and lacks the last.
@pytest.mark.parametrize("timesteps", [[0, 1, 2, 30, 31, 70], [99], [0], [5, 99], list(range(1, 100, 7))])
def test_respaced_schedule_has_the_same_marginals(timesteps):
    base = NoiseSchedule.linear(100)
    schedule = base.respace(timesteps)
    assert schedule.timesteps.tolist() == timesteps and len(schedule) == len(timesteps)
    # exp and log1p of the summed logarithms: 100 roundings.
    assert_close_to_exact(schedule.alphas_bar, base.alphas_bar[timesteps], rtol=200 * EPS)
    assert_close_to_exact(schedule.one_minus_alphas_bar, base.one_minus_alphas_bar[timesteps], rtol=200 * EPS)
    # t_prev is the entry before in the list, whatever the stride.
    previous = [1.0, *base.alphas_bar[timesteps[:-1]].tolist()]
    assert_close_to_exact(schedule.alphas_bar_prev, torch.tensor(previous, dtype=torch.float64), rtol=200 * EPS)


def test_respacing_twice_keeps_the_models_timesteps():
    base = NoiseSchedule.cosine(50)
    twice = base.respace([3, 10, 20, 49]).respace([0, 2, 3])
    assert twice.timesteps.tolist() == [3, 20, 49]
    assert_close_to_exact(twice.betas, base.respace([3, 20, 49]).betas, rtol=1e-12)


def test_respacing_to_all_steps_changes_nothing():
    base = NoiseSchedule.linear(20, 1e-3, 0.1)
    assert_bits_equal(base.respace(range(20)).betas, base.betas)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.sets(st.integers(0, 63), min_size=1), st.sampled_from(["linear", "cosine", "quadratic", "sigmoid"]))
def test_respacing_any_subset(subset, name):
    base = NoiseSchedule.from_name(name, 64)
    schedule = base.respace(sorted(subset))
    assert ((schedule.betas > 0) & (schedule.betas < 1)).all()
    # The cosine ends at alphas_bar = 1e-6 or below: its logarithm, near -14, multiplies the error of the sum.
    assert_close_to_exact(schedule.alphas_bar, base.alphas_bar[sorted(subset)], rtol=64 * 20 * EPS)


# What is refused, one a test.


@pytest.mark.parametrize("beta", [0.0, 1.0, 1.5, -0.1, math.nan, math.inf])
def test_beta_outside_the_open_interval_is_named(beta):
    with pytest.raises(ValueError, match=r"every beta must lie inside \(0, 1\), got betas\[1\] = "):
        NoiseSchedule([0.1, beta, 0.1])


@pytest.mark.parametrize("shape", [(0,), (2, 2), ()])
def test_betas_must_be_a_vector(shape):
    with pytest.raises(ValueError, match=r"betas must have shape \(T,\) with T >= 1, got "):
        NoiseSchedule(torch.full(shape, 0.1))


@pytest.mark.parametrize("T", [0, -3, 10.0, "10", True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_number_of_steps_must_be_a_positive_integer(name, T):
    with pytest.raises(ValueError, match="T must be an integer of at least 1, got "):
        getattr(NoiseSchedule, name)(T)


def test_rescaled_schedule_needs_more_than_twenty_steps():
    message = (
        r"the betas of linear\(20, rescale\) must lie inside \(0, 1\), but run from 0.005 to 1: "
        r"take more steps, smaller betas or the cosine schedule"
    )
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.linear(20, rescale=True)
    assert NoiseSchedule.linear(21, rescale=True).betas[-1] < 1


@pytest.mark.parametrize("name", ["linear", "quadratic", "sigmoid"])
@pytest.mark.parametrize("ends", [(-1e-4, 0.02), (0.0, 0.5), (0.1, 1.0)])
def test_ends_outside_the_open_interval_come_with_advice(name, ends):
    with pytest.raises(
        ValueError, match=rf"the betas of {name}\(10\) must lie inside \(0, 1\), but run from .*: take more steps, smaller betas or"
    ):
        getattr(NoiseSchedule, name)(10, *ends)


def test_unknown_schedule_is_named():
    with pytest.raises(ValueError, match=r"schedule must be one of linear, .*, got 'cubic'"):
        NoiseSchedule.from_name("cubic", 10)


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ([], "timesteps must be integers of shape"),
        ([[1, 2]], "timesteps must be integers of shape"),
        ([1.0, 2.0], "timesteps must be integers of shape"),
        ([True, False], "timesteps must be integers of shape"),
        (["1", "2"], "timesteps must be integers of shape"),
        (3, "timesteps must be integers of shape"),
        (None, "timesteps must be integers of shape"),
        ([2, 1], "must ascend strictly within 0..9"),
        ([1, 1], "must ascend strictly within 0..9"),
        ([-1, 3], "must ascend strictly within 0..9"),
        ([3, 10], "must ascend strictly within 0..9"),
    ],
)
def test_respace_refuses_a_bad_list(timesteps, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.linear(10).respace(timesteps)


def test_the_callers_betas_are_copied():
    betas = torch.full((3,), 0.1, dtype=torch.float64)
    schedule = NoiseSchedule(betas)
    betas.zero_()
    assert schedule.betas.tolist() == [0.1, 0.1, 0.1]


def test_the_callers_graph_stays_with_the_caller():
    betas = torch.full((3,), 0.1, dtype=torch.float64, requires_grad=True)
    schedule = NoiseSchedule(betas)
    assert not any(table.requires_grad for table in vars(schedule).values() if isinstance(table, torch.Tensor))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble])
def test_betas_of_numpy(dtype):
    betas = np.array([0.125, 0.25], dtype=dtype)
    assert NoiseSchedule(betas).betas.tolist() == NoiseSchedule(list(betas)).betas.tolist() == [0.125, 0.25]
    assert NoiseSchedule(torch.tensor([0.125, 0.25], dtype=torch.bfloat16)).betas.tolist() == [0.125, 0.25]


@pytest.mark.parametrize("T", [np.int64(12), np.uint8(12), np.array(12), torch.tensor(12)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_numpy_integers_count_steps(name, T):
    assert_bits_equal(NoiseSchedule.from_name(name, T).betas, NoiseSchedule.from_name(name, 12).betas)


def test_arrays_and_tensors_list_timesteps():
    expected = NoiseSchedule.linear(20).respace([0, 7, 19])
    for timesteps in (
        np.array([0, 7, 19]),
        np.array([0, 7, 19], dtype=np.uint16),
        torch.tensor([0, 7, 19], dtype=torch.int32),
        (0, np.int8(7), 19),
    ):
        found = NoiseSchedule.linear(20).respace(timesteps)
        assert found.timesteps.dtype == torch.int64
        assert_bits_equal(found.betas, expected.betas)


@pytest.mark.parametrize(
    "betas",
    [[True, False], [1, 0], torch.ones(3, dtype=torch.bool), torch.tensor([0.1j]), np.array([0.1j]), ["a"], None, [[0.1], [0.1, 0.2]]],
)
def test_betas_must_be_floating_point(betas):
    with pytest.raises(ValueError, match="betas must be floating-point numbers"):
        NoiseSchedule(betas)
