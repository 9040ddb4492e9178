"""Few steps of a long chain: jumps whose beta rounds to 1, against decimal arithmetic of 80 digits."""

from decimal import Decimal, localcontext
from itertools import accumulate
from operator import mul

import pytest
import torch
from numerics import assert_bits_equal, assert_close_to_exact

from ddpm_fast import GaussianDiffusion, NoiseSchedule, sample
from ddpm_fast.diffusion.samplers import make_table, spaced_timesteps
from ddpm_fast.ops._p_step import COLUMNS

EPS = 2.0**-52
TINY = torch.finfo(torch.float64).tiny
CHAINS = {
    "linear 10000": (NoiseSchedule.linear(10000), 5, "even"),
    "linear 10000, dense near the data": (NoiseSchedule.linear(10000), 12, "quadratic"),
    "linear 10000, by log-SNR": (NoiseSchedule.linear(10000), 7, "logsnr"),
    # alphas_bar ends at e^-1012 and underflows; its logarithm does not.
    "linear 100000": (NoiseSchedule.linear(100000), 6, "quadratic"),
    "large betas": (NoiseSchedule.constant(400, 0.8), 4, "even"),
    "ordinary": (NoiseSchedule.linear(1000), 10, "even"),
    "cosine": (NoiseSchedule.cosine(2000), 5, "even"),
}


def exact(schedule, timesteps):
    """What a jump from each listed step to the one before is made of, in decimals."""
    bars = list(accumulate((1 - Decimal(beta) for beta in schedule.betas.tolist()), mul))
    bar = [bars[t] for t in timesteps]
    before = [Decimal(1), *bar[:-1]]
    return bar, before, [a / p for a, p in zip(bar, before, strict=True)]


def tensor(values):
    return torch.tensor([float(x) for x in values], dtype=torch.float64)


@pytest.fixture(params=CHAINS.values(), ids=CHAINS, scope="module")
def chain(request):
    """(schedule, the listed steps, the exact jumps, the error of log ᾱ): a sum of T terms, each partial sum rounded once."""
    schedule, steps, spacing = request.param
    timesteps = spaced_timesteps(len(schedule), steps, spacing, schedule.log_snr).tolist()
    with localcontext() as context:
        context.prec = 80
        yield schedule, timesteps, exact(schedule, timesteps), len(schedule) * EPS * max(1.0, -float(schedule.log_alphas_bar[-1]))


def test_tables_of_few_steps_agree_with_exact_arithmetic(chain):
    schedule, timesteps, (bar, before, alpha), error = chain
    respaced = schedule.respace(timesteps)
    variance = [(1 - a) * (1 - p) / (1 - b) for a, p, b in zip(alpha, before, bar, strict=True)]
    floored = [variance[1], *variance[1:]]
    expected = {
        "alphas": alpha,
        "betas": [1 - a for a in alpha],
        "alphas_bar": bar,
        "one_minus_alphas_bar": [1 - b for b in bar],
        "alphas_bar_prev": before,
        "log_alphas_bar": [b.ln() for b in bar],
        "snr": [b / (1 - b) for b in bar],
        "log_snr": [(b / (1 - b)).ln() for b in bar],
        "posterior_variance": variance,
        "posterior_log_variance": [v.ln() for v in floored],
        "fixed_large_log_variance": [v.ln() for v in (floored[0], *(1 - a for a in alpha[1:]))],
        "posterior_mean_coef1": [(1 - a) * p.sqrt() / (1 - b) for a, p, b in zip(alpha, before, bar, strict=True)],
        "posterior_mean_coef2": [(1 - p) * a.sqrt() / (1 - b) for a, p, b in zip(alpha, before, bar, strict=True)],
    }
    # A relative error of 1 - e^-d is at most that of d; no listed jump removes less than 1e-4 of the signal but the first step, whose
    # logarithm is a single term.
    relative = 8 * error * max(1.0, 1e-4 / float(min(-a.ln() for a in alpha)))
    for name, values in expected.items():
        atol = relative if "log" in name else TINY  # below TINY numbers have fewer digits
        assert_close_to_exact(getattr(respaced, name), tensor(values), rtol=relative, atol=atol, what=name)


@pytest.mark.parametrize("sampler, eta", [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.4), ("ddim", 1.0), ("dpmpp_2m", 0.0)])
def test_steps_of_a_long_chain_agree_with_exact_arithmetic(chain, sampler, eta):
    schedule, timesteps, (bar, before, alpha), error = chain
    table = make_table(GaussianDiffusion(schedule, "v", "fixed_small"), sampler, timesteps, eta).table
    variance = [(1 - a) * (1 - p) / (1 - b) for a, p, b in zip(alpha, before, bar, strict=True)]
    previous = [Decimal(0)] * len(bar)
    if sampler == "ddpm":
        from_x_start = [(1 - a) * p.sqrt() / (1 - b) for a, p, b in zip(alpha, before, bar, strict=True)]
        from_x_t = [(1 - p) * a.sqrt() / (1 - b) for a, p, b in zip(alpha, before, bar, strict=True)]
    elif sampler == "ddim":
        share = Decimal(eta) ** 2
        from_x_t = [((1 - p - share * v) / (1 - b)).sqrt() for p, v, b in zip(before, variance, bar, strict=True)]
        from_x_start = [p.sqrt() - c * b.sqrt() for p, c, b in zip(before, from_x_t, bar, strict=True)]
    else:
        half_log_snr = [(b / (1 - b)).ln() / 2 for b in bar]
        h = [None, *(half_log_snr[k - 1] - half_log_snr[k] for k in range(1, len(bar)))]
        from_x_t = [((1 - p) / (1 - b)).sqrt() for p, b in zip(before, bar, strict=True)]
        from_x_start = [Decimal(1), *(-before[k].sqrt() * ((-h[k]).exp() - 1) for k in range(1, len(bar)))]
        for k in range(1, len(bar) - 1):
            previous[k] = -from_x_start[k] * h[k] / (2 * h[k + 1])
        from_x_start = [x - y for x, y in zip(from_x_start, previous, strict=True)]
    # Terms of order 1 that cancel: the error is of theirs. The solver divides by an h, all above 0.1 here.
    tolerance = dict(rtol=64 * error, atol=8 * EPS + (64 * error if sampler != "ddpm" else 0.0))
    for name, values in (("x_start", from_x_start), ("x_t", from_x_t), ("previous", previous)):
        assert_close_to_exact(table[:, COLUMNS.index(name)], tensor(values), **tolerance, what=name)


def test_small_weights_keep_their_digits():
    # In the last jump of this chain β rounds to 1, and what DDIM with full noise keeps of x_t is 1e-9: the difference of two numbers near
    # 1 under the root would have no digit of it.
    schedule, listed = NoiseSchedule.linear(10000), [0, 2500, 5000, 7500, 9999]
    respaced = schedule.respace(listed)
    assert respaced.betas[-1] == 1.0 and 0 < respaced.alphas[-1] < 1e-18
    weight = make_table(GaussianDiffusion(schedule, "v"), "ddim", listed, 1.0).table[-1, COLUMNS.index("x_t")]
    with localcontext() as context:
        context.prec = 80
        bar, before, alpha = exact(schedule, listed)
        expected = (1 - before[-1]) * alpha[-1].sqrt() / (1 - bar[-1])
    assert_close_to_exact(weight, torch.tensor(float(expected), dtype=torch.float64), rtol=8 * len(schedule) * EPS * 101)


@pytest.mark.parametrize("spacing", ["even", "quadratic", "logsnr"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_a_perfect_model_of_a_long_chain_returns_the_data(sampler, spacing):
    x_start = torch.linspace(-1, 1, 12).view(2, 6)
    for schedule in (NoiseSchedule.linear(10000), NoiseSchedule.linear(100000)):
        diffusion = GaussianDiffusion(schedule, "x_start")
        images = sample(lambda x, t: x_start, diffusion, (2, 6), sampler=sampler, steps=5, spacing=spacing)
        assert_close_to_exact(images, x_start.double(), atol=8 * 2.0**-23)


def test_marginals_of_a_respaced_schedule_are_the_very_same():
    base = NoiseSchedule.linear(10000)
    respaced = base.respace([3, 4000, 9999])
    for name in ("log_alphas_bar", "alphas_bar", "one_minus_alphas_bar", "sqrt_one_minus_alphas_bar", "snr", "log_snr"):
        assert_bits_equal(getattr(respaced, name), getattr(base, name)[[3, 4000, 9999]], name)
    again = respaced.respace([0, 2])
    assert again.timesteps.tolist() == [3, 9999]
    assert_bits_equal(again.betas, base.respace([3, 9999]).betas)
