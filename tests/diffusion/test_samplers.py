"""The tables of samplers: which steps they take, and that each is its published update."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_bits_equal, assert_close_to_exact

from ddpm_fast import GaussianDiffusion, NoiseSchedule
from ddpm_fast.diffusion.samplers import SPACINGS, ddim_table, ddpm_table, dpm_solver_table, make_table, spaced_timesteps, start_row
from ddpm_fast.ops._p_step import COLUMNS

T = 20
SCHEDULE = NoiseSchedule.linear(T, 1e-3, 0.3)
DIFFUSION = GaussianDiffusion(SCHEDULE)


def test_make_table_by_name():
    assert_bits_equal(make_table(DIFFUSION).table, ddpm_table(DIFFUSION).table)
    assert_bits_equal(make_table(DIFFUSION, "ddpm", T).table, ddpm_table(DIFFUSION).table)
    assert_bits_equal(make_table(DIFFUSION, "ddpm", 5).table, ddpm_table(DIFFUSION, spaced_timesteps(T, 5)).table)
    assert_bits_equal(make_table(DIFFUSION, "ddim", 5, 0.3).table, ddim_table(DIFFUSION, spaced_timesteps(T, 5), 0.3).table)
    for table in (make_table(DIFFUSION), make_table(DIFFUSION, "ddim", 5, 0.3)):
        assert table.table.dtype == torch.float64 and table.table.shape == (len(table.timesteps), 8)
        assert table.table.isfinite().all() and table.table.float().isfinite().all()


def test_all_listed_steps_are_all_steps():
    for make in (ddpm_table, ddim_table):
        assert_bits_equal(make(DIFFUSION, range(T)).table, make(DIFFUSION).table)


def test_respaced_schedule_is_sampled_with_its_own_times():
    # A diffusion built on a respaced schedule tells the model the original t.
    diffusion = GaussianDiffusion(SCHEDULE.respace([2, 5, 11, 19]))
    assert make_table(diffusion).timesteps.tolist() == [2, 5, 11, 19]
    assert make_table(diffusion, steps=2).timesteps.tolist() == [2, 19]


@pytest.mark.parametrize(("steps", "expected"), [(1, [19]), (2, [0, 19]), (3, [0, 10, 19]), (20, list(range(20)))])
def test_spaced_timesteps_include_both_ends(steps, expected):
    # 9.5 is rounded to even.
    assert spaced_timesteps(20, steps).tolist() == expected


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_spaced_timesteps_ascend_evenly(sizes):
    total, steps = sizes
    timesteps = spaced_timesteps(total, steps)
    assert len(timesteps) == steps and timesteps[-1] == total - 1 and timesteps.dtype == torch.int64
    if steps > 1:
        gaps = timesteps.diff()
        assert timesteps[0] == 0 and gaps.min() >= 1
        assert (gaps - (total - 1) / (steps - 1)).abs().max() < 1 + 1e-9  # each end is rounded by at most a half


@pytest.mark.parametrize("spacing", SPACINGS)
@settings(derandomize=True, deadline=None, max_examples=50)
@given(sizes=st.integers(1, 1000).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_every_spacing_takes_different_steps_with_both_ends(spacing, sizes):
    total, steps = sizes
    log_snr = NoiseSchedule.linear(total, 1e-4, 0.02).snr.log()
    timesteps = spaced_timesteps(total, steps, spacing, log_snr)
    assert len(timesteps) == steps and timesteps[-1] == total - 1
    assert (timesteps.diff() >= 1).all() and (steps == 1 or timesteps[0] == 0)


def test_quadratic_steps_are_squares():
    assert spaced_timesteps(101, 11, "quadratic").tolist() == [k * k for k in range(11)]
    assert spaced_timesteps(10, 9, "quadratic").tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 9]  # each step once where squares would repeat


def test_logsnr_steps_are_the_nearest_to_even_in_log_snr():
    log_snr = NoiseSchedule.cosine(1000).snr.log()
    timesteps = spaced_timesteps(1000, 12, "logsnr", log_snr)
    wanted = torch.linspace(float(log_snr[0]), float(log_snr[-1]), 12, dtype=torch.float64)
    nearest = (log_snr[:, None] - wanted).abs().argmin(0)
    place = torch.arange(12)
    free = (nearest >= place) & (nearest <= 1000 - 12 + place)  # the others make room so that none is taken twice
    assert free.sum() > 6
    assert timesteps[free].tolist() == nearest[free].tolist()


def half_log_snr(t):
    return 0.5 * math.log(SCHEDULE.snr[t])


def test_dpm_solver_is_the_published_update():
    # Algorithm 2 of the paper, written with its own symbols.
    listed = [1, 4, 6, 13, 19]
    table = dpm_solver_table(DIFFUSION, listed)
    rows = {name: table.table[:, k].tolist() for k, name in enumerate(COLUMNS)}
    for row in range(1, len(listed)):
        s, t = listed[row - 1], listed[row]
        alpha, sigma = SCHEDULE.sqrt_alphas_bar[s].item(), SCHEDULE.sqrt_one_minus_alphas_bar[s].item()
        h = half_log_snr(s) - half_log_snr(t)
        weight = -alpha * math.expm1(-h)
        share = 0.0  # the first step has no history
        if row + 1 < len(listed):
            share = h / (half_log_snr(t) - half_log_snr(listed[row + 1])) / 2
        assert rows["x_start"][row] == pytest.approx(weight * (1 + share), rel=1e-12)
        assert rows["previous"][row] == pytest.approx(-weight * share, rel=1e-12)
        assert rows["x_t"][row] == pytest.approx(sigma / SCHEDULE.sqrt_one_minus_alphas_bar[t].item(), rel=1e-12)
    # The last step returns x̂0, and none takes noise.
    assert [rows[name][0] for name in ("x_start", "x_t", "previous")] == [1.0, 0.0, 0.0]
    assert table.multistep and not table.draws


def test_first_order_steps_of_the_solver_are_ddim():
    # With two steps neither has a history: DPM-Solver++ of first order is DDIM (Lu et al., appendix B).
    a, b = dpm_solver_table(DIFFUSION, [3, 19]).table, ddim_table(DIFFUSION, [3, 19]).table
    for name in ("from_x_t", "from_out", "x_start", "x_t", "previous"):
        assert_close_to_exact(a[:, COLUMNS.index(name)], b[:, COLUMNS.index(name)], atol=1e-12)


def test_explicit_steps_by_name():
    for sampler in ("ddpm", "ddim", "dpmpp_2m"):
        assert make_table(DIFFUSION, sampler, [0, 5, 19]).timesteps.tolist() == [0, 5, 19]
    assert make_table(DIFFUSION, "ddim", steps=5, spacing="quadratic").timesteps.tolist() == spaced_timesteps(T, 5, "quadratic").tolist()


def test_start_row_is_the_last_step_not_after_t():
    table = make_table(DIFFUSION, "ddim", [2, 5, 11, 19])
    assert [start_row(table, t) for t in (2, 4, 5, 18, 19)] == [0, 0, 1, 2, 3]
    with pytest.raises(ValueError, match="t must be at least the first of the sampler's time steps, 2, got 1"):
        start_row(table, 1)


@pytest.mark.parametrize("make", [ddpm_table, ddim_table, dpm_solver_table])
def test_list_of_steps_must_ascend(make):
    with pytest.raises(ValueError, match=r"timesteps must ascend strictly within 0\.\.19"):
        make(DIFFUSION, [5, 3])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(spacing="cubic", steps=3), "spacing must be one of even, quadratic, logsnr, got 'cubic'"),
        (dict(eta=0.5), "eta is a part of sampler 'ddim', got 0.5 for 'ddpm'"),
        (dict(steps=[0, 30]), r"steps must ascend strictly within 0\.\.19, got \[0, 30\]"),
        (dict(steps=list(range(T))[::-1]), "steps must ascend strictly"),
        (dict(steps=[float(t) for t in range(T)]), "steps must be integers"),
        (dict(spacing="quadratic"), "spacing is of a number of steps, got 'quadratic' for all of them"),
        (dict(spacing="logsnr", steps=[0, 5]), "spacing is of a number of steps, got 'logsnr' for a list of them"),
        (dict(steps=[]), "steps must be integers of shape"),
    ],
)
def test_bad_choices_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_table(DIFFUSION, **options)
