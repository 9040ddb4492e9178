"""Parameterisations: each inverts exactly, all are one model, and weights follow a model from one to another."""

import math

import pytest
import torch
from numerics import assert_bits_equal, assert_close_to_exact

from ddpm_fast import GaussianDiffusion, NoiseSchedule
from ddpm_fast.diffusion.parameterisation import (
    PREDICTIONS,
    VARIANCES,
    WEIGHTS,
    bound_table,
    log_variance_range,
    loss_weights,
    target_coefficients,
    x_start_coefficients,
)

EPS = 2.0**-52
SCHEDULES = [NoiseSchedule.linear(1000), NoiseSchedule.cosine(50), NoiseSchedule.constant(1, 0.3)]
IDS = ["linear 1000", "cosine 50", "one step"]


def case(schedule, dims=5, seed=0):
    """float64 (x_0, ε, x_t, t) for every t of a schedule."""
    generator = torch.Generator().manual_seed(seed)
    T = len(schedule)
    x_start = torch.rand(T, 1, dims, generator=generator, dtype=torch.float64) * 2 - 1
    noise = torch.randn(T, 1, dims, generator=generator, dtype=torch.float64)
    t = torch.arange(T)
    x_t = schedule.sqrt_alphas_bar.view(-1, 1, 1) * x_start + schedule.sqrt_one_minus_alphas_bar.view(-1, 1, 1) * noise
    return x_start, noise, x_t, t


def outputs_of(schedule, x_hat, x_t):
    """The output that each parameterisation would give for the same guess x̂0, by the definitions in the papers."""
    a, s = schedule.alphas_bar.sqrt().view(-1, 1, 1), schedule.one_minus_alphas_bar.sqrt().view(-1, 1, 1)
    c1, c2 = schedule.posterior_mean_coef1.view(-1, 1, 1), schedule.posterior_mean_coef2.view(-1, 1, 1)
    epsilon = (x_t - a * x_hat) / s
    return {"epsilon": epsilon, "x_start": x_hat, "v": a * epsilon - s * x_hat, "mean": c1 * x_hat + c2 * x_t}


def conditioning(schedule, prediction):
    """How much solving for x̂0 multiplies a rounding error: the largest of the terms that cancel, at each t, for data of order 5."""
    from_x_t, from_out = x_start_coefficients(schedule, prediction)
    c0, c1 = target_coefficients(schedule, prediction)
    return 5 * (1 + from_x_t.abs() + (from_out * c0).abs() + (from_out * c1).abs())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=IDS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x_start_coefficients_invert_the_target(prediction, schedule):
    # x̂0 = p (a x0 + s ε) + q (c0 x0 + c1 ε) must be x0 for every (x0, ε): two equations, exact up to the rounding of their terms.
    c0, c1 = target_coefficients(schedule, prediction)
    p, q = x_start_coefficients(schedule, prediction)
    a, s = schedule.sqrt_alphas_bar, schedule.sqrt_one_minus_alphas_bar
    zero = torch.zeros_like(a)
    assert_close_to_exact((p * a + q * c0 - 1) / (1 + (p * a).abs() + (q * c0).abs()), zero, atol=8 * EPS)
    assert_close_to_exact((p * s + q * c1) / (1 + (p * s).abs() + (q * c1).abs()), zero, atol=8 * EPS)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=IDS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_target_is_what_the_definition_says(prediction, schedule):
    x_start, noise, x_t, t = case(schedule)
    target = GaussianDiffusion(schedule, prediction).target(x_start, t, noise)
    # The definitions divide by the sigma of t: near data they lose the digits that the subtraction cancels.
    s = schedule.sqrt_one_minus_alphas_bar.view(-1, 1, 1)
    exact = outputs_of(schedule, x_start, x_t)[prediction]
    assert_close_to_exact((target - exact) * s, torch.zeros_like(target), atol=64 * EPS)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=IDS)
def test_mean_target_is_the_posterior_mean(schedule):
    x_start, noise, x_t, t = case(schedule)
    diffusion = GaussianDiffusion(schedule, "mean")
    assert_close_to_exact(diffusion.target(x_start, t, noise), diffusion.q_posterior(x_start, x_t, t)[0], rtol=0, atol=32 * EPS)


@pytest.mark.parametrize("schedule", SCHEDULES[:2], ids=IDS[:2])
def test_epsilon_gives_the_mean_of_equation_11(schedule):
    # Ho et al., eq. 11: μ = (x_t - β/√(1-ᾱ) ε) / √α, which never mentions x̂0.
    generator = torch.Generator().manual_seed(3)
    _, _, x_t, t = case(schedule)
    out = torch.randn(x_t.shape, generator=generator, dtype=torch.float64)
    alpha, beta, rest = (x.view(-1, 1, 1) for x in (schedule.alphas, schedule.betas, schedule.one_minus_alphas_bar))
    exact = (x_t - beta / rest.sqrt() * out) / alpha.sqrt()
    mean = GaussianDiffusion(schedule).p_mean_variance(out, x_t, t, clip=False).mean
    # c1 x̂0 + c2 x_t: the weight of x_t is c1/a + c2, of ε c1 s/a; up to 16 roundings of terms of order 5 · these.
    scale = 5 * (schedule.posterior_mean_coef1 / schedule.sqrt_alphas_bar + schedule.posterior_mean_coef2 + 1).view(-1, 1, 1)
    tables = 4 * len(schedule) * EPS * max(1.0, -math.log(schedule.alphas_bar[-1]))  # the tables' own error, as in test_schedules.py
    assert_close_to_exact((mean - exact) / scale, torch.zeros_like(mean), atol=16 * EPS + tables)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=IDS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [False, True])
def test_every_parameterisation_of_one_model_has_the_same_reverse_step(prediction, schedule, clip):
    _, _, x_t, t = case(schedule)
    x_hat = torch.rand(x_t.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3 - 1.5
    out = outputs_of(schedule, x_hat, x_t)[prediction]
    p = GaussianDiffusion(schedule, prediction).p_mean_variance(out, x_t, t, clip=clip)
    expected = x_hat.clamp(-1, 1) if clip else x_hat
    error = 32 * EPS * conditioning(schedule, prediction).view(-1, 1, 1)
    zero = torch.zeros_like(x_t)
    assert_close_to_exact((p.x_start - expected) / error, zero, atol=1.0)
    # The mean is the output itself where that is what it predicts, clipped or not: tests/diffusion/test_mean_prediction.py.
    mean = GaussianDiffusion(schedule).q_posterior(x_hat if prediction == "mean" else expected, x_t, t)[0]
    assert_close_to_exact((p.mean - mean) / (error + 32 * EPS), zero, atol=1.0)


# The published formulas of each weight, as functions of the signal-to-noise ratio.
SNR_WEIGHTS = {
    ("min_snr", "x_start"): lambda snr: snr.clamp_max(5),
    ("min_snr", "epsilon"): lambda snr: (5 / snr).clamp_max(1),
    ("min_snr", "v"): lambda snr: snr.clamp_max(5) / (snr + 1),
    ("p2", "epsilon"): lambda snr: 1 / (1 + snr),
    ("p2", "x_start"): lambda snr: snr / (1 + snr),
    ("p2", "v"): lambda snr: snr / (1 + snr) ** 2,
}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=IDS)
@pytest.mark.parametrize(("weight", "prediction"), SNR_WEIGHTS)
def test_weights_are_the_published_functions_of_snr(weight, prediction, schedule):
    exact = SNR_WEIGHTS[weight, prediction](schedule.snr)
    # v's determinant a² + s² is 1 to the error of the tables.
    assert_close_to_exact(loss_weights(schedule, prediction, weight), exact, rtol=32 * EPS)


def test_weight_parameters():
    schedule = SCHEDULES[0]
    assert_close_to_exact(loss_weights(schedule, "x_start", "min_snr", gamma=2.0), schedule.snr.clamp_max(2), rtol=8 * EPS)
    assert_close_to_exact(loss_weights(schedule, "epsilon", "p2", gamma=0.5), (1 + schedule.snr) ** -0.5, rtol=32 * EPS)
    assert_bits_equal(loss_weights(schedule, "epsilon", "p2", gamma=0.0).round(decimals=12), torch.ones(1000, dtype=torch.float64))
    assert_bits_equal(loss_weights(schedule, "v", "uniform"), torch.ones(1000, dtype=torch.float64))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=IDS)
@pytest.mark.parametrize("weight", [w for w in WEIGHTS if w != "uniform"])
def test_one_model_gets_the_same_weighted_loss_in_every_parameterisation(weight, schedule):
    x_start, noise, x_t, t = case(schedule)
    x_hat = x_start + 0.3 * torch.randn(x_t.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    outputs = outputs_of(schedule, x_hat, x_t)
    losses = {p: GaussianDiffusion(schedule, p).simple_loss(outputs[p], x_start, t, noise, weight=weight) for p in PREDICTIONS}
    for prediction in ("epsilon", "v", "mean"):
        # The error of the output, a difference of numbers of order 5, is 0.3/|q| for data errors of 0.3.
        error = float((conditioning(schedule, prediction).max() + conditioning(schedule, "epsilon").max()) * 64 * EPS / 0.1)
        assert_close_to_exact(losses[prediction], losses["x_start"], rtol=error, what=prediction)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES[:2], ids=IDS[:2])
def test_vlb_weight_times_squared_error_is_the_kl(prediction, schedule):
    # With p_θ's variance equal to the posterior's the KL is |μ - μ_θ|² / 2σ², so the weighted loss *is* the bound's term.
    x_start, noise, x_t, t = case(schedule)
    x_hat = x_start + 0.3 * torch.randn(x_t.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    out = outputs_of(schedule, x_hat, x_t)[prediction]
    diffusion = GaussianDiffusion(schedule, prediction, "fixed_small")
    kl = diffusion.vlb_terms(out, x_start, x_t, t) * math.log(2)  # bits to nats
    loss = diffusion.simple_loss(out, x_start, t, noise, weight="vlb")
    # The two means differ by about 0.3 c1, of terms of order 5; the errors of x̂0 are as in `conditioning`.
    error = 32 * EPS * (conditioning(schedule, prediction) + 5 / schedule.posterior_mean_coef1) / 0.1
    assert_close_to_exact(((loss - kl) / kl / error)[1:], torch.zeros(len(schedule) - 1, dtype=torch.float64), atol=1.0)


def test_vlb_weight_of_epsilon_is_equation_12():
    schedule = SCHEDULES[0]
    sigma2 = schedule.posterior_log_variance.exp()
    exact = schedule.betas**2 / (2 * sigma2 * schedule.alphas * schedule.one_minus_alphas_bar)
    assert_close_to_exact(loss_weights(schedule, "epsilon", "vlb"), exact, rtol=1000 * 16 * EPS)


def test_vlb_weight_at_zero_uses_the_variance_of_one():
    schedule = SCHEDULES[0]
    assert math.isclose(loss_weights(schedule, "x_start", "vlb")[0], 0.5 / schedule.posterior_variance[1], rel_tol=1e-12)


def test_log_variance_range_of_each_choice():
    schedule = SCHEDULES[0]
    small, large = schedule.posterior_log_variance, schedule.fixed_large_log_variance
    for variance, (low, high) in {
        "fixed_small": (small, small),
        "fixed_large": (large, large),
        "learned_range": (small, schedule.betas.log()),
    }.items():
        got = log_variance_range(schedule, variance)
        assert_bits_equal(got[0], low, variance)
        assert_bits_equal(got[1], high, variance)
    # β̃ <= β, so the range never turns round.
    assert (small <= schedule.betas.log()).all()


@pytest.mark.parametrize("variance", VARIANCES)
def test_bound_table_has_a_row_for_each_step(variance):
    table = bound_table(SCHEDULES[1], "epsilon", variance)
    assert table.shape == (50, 8) and table.dtype == torch.float64 and table.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: target_coefficients(s, "score"), "prediction must be one of epsilon, x_start, v, mean, got 'score'"),
        (lambda s: x_start_coefficients(s, "score"), "prediction must be one of epsilon, x_start, v, mean, got 'score'"),
        (lambda s: log_variance_range(s, "fixed"), "variance must be one of fixed_small, fixed_large, learned, learned_range, got 'fixed'"),
        (lambda s: loss_weights(s, "v", "snr"), "weight must be one of uniform, min_snr, p2, vlb, got 'snr'"),
    ],
)
def test_unknown_names_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(SCHEDULES[1])
