"""The method itself: chain and closed form, Bayes' rule, the bound as an expectation, and Gaussian data, where all is known.

Monte-Carlo tests use fixed seeds and allow five standard errors of the estimate.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from numerics import assert_close_to_exact

from ddpm_fast import GaussianDiffusion, Noise, NoiseSchedule, gaussian_kl, sample
from ddpm_fast.diffusion.samplers import ddim_table, ddpm_table, dpm_solver_table, make_table
from ddpm_fast.ops import p_step
from ddpm_fast.sampling.sampler import sample_loop
from ddpm_fast.sampling.step import ReverseStep

EPS = 2.0**-52
SIGMAS = 5.0  # standard errors; a sound estimate fails once in two million


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def assert_moments(x, mean, variance):
    """Sample mean and variance of Gaussian draws against the truth, by their standard errors √(v/n) and v √(2/(n-1))."""
    n = x.numel()
    assert abs(x.mean().item() - mean) <= SIGMAS * math.sqrt(variance / n)
    assert abs(x.var().item() - variance) <= SIGMAS * variance * math.sqrt(2 / (n - 1))


# The forward chain.


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(1000), NoiseSchedule.cosine(40)], ids=["linear 1000", "cosine 40"])
def test_composed_steps_have_the_closed_forms_mean_and_variance(schedule):
    # q_step is the linear map x -> r x + s ε. From x_0 with T independent ε the mean is multiplied by r each step, and the variance
    # v becomes r² v + s². Both come out of q_step itself, fed with (1, 0) and (0, 1).
    diffusion = GaussianDiffusion(schedule, "x_start")
    t = torch.arange(len(schedule))
    one, zero = torch.ones(len(t), 1, dtype=torch.float64), torch.zeros(len(t), 1, dtype=torch.float64)
    r, s = diffusion.q_step(one, t, zero).flatten().tolist(), diffusion.q_step(zero, t, one).flatten().tolist()
    mean, variance, means, variances = 1.0, 0.0, [], []
    for a, b in zip(r, s, strict=True):
        mean, variance = a * mean, a * a * variance + b * b
        means.append([mean])
        variances.append([variance])
    rounding = 4 * len(t) * EPS * max(1.0, -math.log(schedule.alphas_bar[-1]))
    assert_close_to_exact(diffusion.q_sample(one, t, zero), torch.tensor(means, dtype=torch.float64), rtol=rounding)
    assert_close_to_exact(diffusion.q_sample(zero, t, one) ** 2, torch.tensor(variances, dtype=torch.float64), rtol=rounding)
    closed_mean, closed_variance, closed_log_variance = diffusion.q_mean_variance(one, t)
    assert_close_to_exact(closed_mean, torch.tensor(means, dtype=torch.float64), rtol=rounding)
    assert_close_to_exact(closed_variance, torch.tensor(variances, dtype=torch.float64), rtol=rounding)
    assert_close_to_exact(closed_log_variance, torch.tensor(variances, dtype=torch.float64).log(), atol=rounding)


def test_walking_the_chain_and_jumping_draw_from_the_same_distribution():
    schedule, x0, n = NoiseSchedule.linear(12, 0.02, 0.3), 0.7, 2**14
    diffusion = GaussianDiffusion(schedule)
    x = torch.full((n, 1), x0)
    for step in range(len(schedule)):
        x = diffusion.q_step(x, torch.full((n,), step), Noise(1, stream=step))
    jump = diffusion.q_sample(torch.full((n, 1), x0), torch.full((n,), len(schedule) - 1), Noise(2))
    for draws in (x, jump):
        assert_moments(draws.double(), x0 * math.sqrt(schedule.alphas_bar[-1]), schedule.one_minus_alphas_bar[-1].item())


# The posterior.


@pytest.mark.parametrize("t", [1, 5, 19])
@pytest.mark.parametrize(("x0", "x_t"), [(0.8, -0.5), (-1.0, 2.0)])
def test_posterior_is_bayes_rule(t, x0, x_t):
    # q(x_{t-1} | x_t, x_0) ∝ q(x_t | x_{t-1}) q(x_{t-1} | x_0), multiplied and normalised on a grid. The trapezoid rule is exact to
    # rounding for Gaussians that the grid covers.
    schedule = NoiseSchedule.linear(20, 0.01, 0.4)
    diffusion = GaussianDiffusion(schedule)
    beta = schedule.betas[t]
    prior_mean, prior_variance, _ = diffusion.q_mean_variance(f64([x0]), torch.tensor([t - 1]))
    x = torch.linspace(-12, 12, 40001, dtype=torch.float64)
    log_density = -((x_t - (1 - beta).sqrt() * x) ** 2) / (2 * beta) - (x - prior_mean) ** 2 / (2 * prior_variance)
    density = (log_density - log_density.max()).exp().flatten()
    density = density / torch.trapezoid(density, x)
    mean = torch.trapezoid(density * x, x)
    variance = torch.trapezoid(density * (x - mean) ** 2, x)
    got_mean, got_variance, got_log_variance = diffusion.q_posterior(f64([x0]), f64([x_t]), torch.tensor([t]))
    assert_close_to_exact(got_mean.flatten(), mean[None], rtol=1e-11)
    assert_close_to_exact(got_variance.flatten(), variance[None], rtol=1e-10)
    assert_close_to_exact(got_log_variance.flatten(), variance.log()[None], atol=1e-10)


def test_posterior_at_zero_is_the_data_itself():
    diffusion = GaussianDiffusion(NoiseSchedule.linear(20))
    mean, variance, log_variance = diffusion.q_posterior(f64([0.3]), f64([5.0]), torch.tensor([0]))
    assert_close_to_exact(mean, f64([0.3]), ulps=4)
    assert variance.item() == 0 and log_variance.item() == diffusion.schedule.posterior_variance[1].log().item()


def test_posterior_averages_back_to_the_marginal():
    # Drawing x_t, then x_{t-1} from the posterior, gives q(x_{t-1} | x_0): by the laws of total expectation and variance.
    schedule = NoiseSchedule.cosine(30)
    c1, c2 = schedule.posterior_mean_coef1, schedule.posterior_mean_coef2
    assert_close_to_exact(c1 + c2 * schedule.sqrt_alphas_bar, schedule.alphas_bar_prev.sqrt(), rtol=1e-13)
    variance = schedule.posterior_variance + c2**2 * schedule.one_minus_alphas_bar
    assert_close_to_exact(variance[1:], schedule.one_minus_alphas_bar[:-1], rtol=1e-12)


# The bound.


@pytest.mark.parametrize("x0", [0.0, -1.0, 0.25])
def test_prior_term_is_the_kl_to_a_standard_normal(x0):
    schedule = NoiseSchedule.linear(10, 0.05, 0.4)
    a = schedule.alphas_bar[-1].item()
    exact = 0.5 * (a * x0**2 + (1 - a) - 1 - math.log(1 - a)) / math.log(2)
    got = GaussianDiffusion(schedule).prior_bpd(torch.full((2, 3, 4), x0, dtype=torch.float64))
    assert_close_to_exact(got, f64(exact, exact), rtol=1e-12)
    p, q = torch.distributions.Normal(f64(math.sqrt(a) * x0), math.sqrt(1 - a)), torch.distributions.Normal(f64(0.0), 1.0)
    assert_close_to_exact(got[:1], torch.distributions.kl_divergence(p, q) / math.log(2), rtol=1e-6)  # its scale is an fp32 number


def toy_model(x_t, t):
    return 0.6 * x_t * (1 + 0.05 * t.view(-1, 1).to(x_t.dtype))


def data_mean(x):
    return x.mean().item(), x.std().item() / math.sqrt(x.numel())


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_bound_is_the_unreduced_expectation(variance):
    # The definition, before any algebra: E_q[-log p(x_T) - Σ log p_θ(x_{t-1}|x_t) + Σ_{t≥1} log q(x_t|x_{t-1})], the chain walked step
    # by step. Ho et al. reduce it by Bayes' rule to L_T + Σ KL + decoder, which bits_per_dim computes.
    schedule, levels, n = NoiseSchedule.linear(6, 0.05, 0.5), 17, 2**13
    diffusion = GaussianDiffusion(schedule, "epsilon", variance, levels, cdf="erf")
    x0 = torch.full((n, 1), 2 * 11 / 16 - 1, dtype=torch.float64)

    def log_normal(x, mean, var):
        return -0.5 * (math.log(2 * math.pi * var) + (x - mean) ** 2 / var)

    total, x = torch.zeros(n, 1, dtype=torch.float64), x0
    for step in range(len(schedule)):
        t, beta = torch.full((n,), step), schedule.betas[step].item()
        after = diffusion.q_step(x, t, Noise(3, stream=step))
        p = diffusion.p_mean_variance(toy_model(after, t), after, t, clip=False)
        if step == 0:
            z = [(x0 + side / (levels - 1) - p.mean) / p.variance.sqrt() for side in (1, -1)]
            mass = torch.special.ndtr(z[0]) - torch.special.ndtr(z[1])
            total -= mass.clamp_min(1e-12).log()
        else:
            total -= log_normal(x, p.mean, p.variance[0, 0].item())
        total += log_normal(after, math.sqrt(1 - beta) * x, beta)
        x = after
    total -= log_normal(x, 0.0, 1.0)
    walked, walked_error = data_mean(total / math.log(2))
    reduced, reduced_error = data_mean(diffusion.bits_per_dim(toy_model, x0, clip=False, noise=Noise(4)))
    assert abs(walked - reduced) <= SIGMAS * math.hypot(walked_error, reduced_error)


def test_terms_are_monte_carlo_estimates_of_the_expected_kl():
    # For a linear model the difference of the means is linear in ε, so E[KL] is closed: constant + (bias² + slope²) / 2σ².
    schedule, n, x0 = NoiseSchedule.linear(6, 0.05, 0.5), 2**14, 0.375
    diffusion = GaussianDiffusion(schedule, "epsilon", "fixed_large", 17)
    bound = diffusion.bound_terms(toy_model, torch.full((n, 1), x0), clip=False, noise=Noise(5))
    assert bound.terms.shape == bound.mse.shape == (n, 6)
    for step in range(1, 6):
        a, s = schedule.sqrt_alphas_bar[step].item(), schedule.sqrt_one_minus_alphas_bar[step].item()
        gain = 0.6 * (1 + 0.05 * step)
        # x̂0 - x0 = (x_t - s k x_t)/a - x0 with x_t = a x0 + s ε.
        bias, slope = -s * gain * x0, (1 - s * gain) * s / a
        d = math.log(schedule.posterior_variance[step] / schedule.betas[step])
        c1 = schedule.posterior_mean_coef1[step].item()
        kl = 0.5 * (math.expm1(d) - d + c1**2 * (bias**2 + slope**2) / schedule.betas[step].item())
        mean, error = data_mean(bound.terms[:, step].double())
        assert abs(mean - kl / math.log(2)) <= SIGMAS * error
        mean, error = data_mean(bound.mse[:, step].double())
        assert abs(mean - bias**2 - slope**2) <= SIGMAS * error


# Gaussian data N(m, v): the best model is known, E[x_0 | x_t] is linear and p(x_{t-1} | x_t) is a Gaussian.


def best_guess(schedule, m, v, x_t, t):
    """(E[x_0 | x_t], Var[x_0 | x_t])."""
    a = schedule.alphas_bar[t].view(-1, 1).to(x_t.dtype)
    gain = a.sqrt() * v / (a * v + 1 - a)
    return m + gain * (x_t - a.sqrt() * m), v * (1 - a) / (a * v + 1 - a)


def best_output(schedule, m, v, learned):
    def model(x_t, t):
        guess, left = best_guess(schedule, m, v, x_t, t)
        if not learned:
            return guess
        c1 = schedule.posterior_mean_coef1[t].view(-1, 1).to(x_t.dtype)
        variance = schedule.posterior_variance[t].view(-1, 1).to(x_t.dtype) + c1**2 * left
        return torch.cat([guess, variance.log().expand_as(x_t)], 1)

    return model


def continuous_bound(diffusion, model, m, v):
    """Expected bound in nats on Gaussian data with a density for a decoder, exactly: each term is quadratic in (x_0, ε), for which
    Gauss-Hermite quadrature of 3 nodes each is exact. Returns (L_T, Σ_{t>0} L_t, decoder)."""
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.hermite_e.hermegauss(3))
    weight = (weights[:, None] * weights[None, :]).flatten() / weights.sum() ** 2
    T = len(diffusion)
    x0 = (m + math.sqrt(v) * nodes).repeat_interleave(3).repeat(T)[:, None]
    t = torch.arange(T).repeat_interleave(9)
    x_t = diffusion.q_sample(x0, t, nodes.repeat(3).repeat(T)[:, None])
    out = model(x_t, t)
    terms = diffusion.vlb_terms(out, x0, x_t, t).view(T, 9) @ weight * math.log(2)
    p = diffusion.p_mean_variance(out[:9], x_t[:9], t[:9], clip=False)
    density = 0.5 * (math.log(2 * math.pi) + p.log_variance + (x0[:9] - p.mean) ** 2 / p.variance)
    prior = weight @ diffusion.prior_bpd(x0[:9]) * math.log(2)
    return prior.item(), terms[1:].sum().item(), (weight @ density.flatten()).item()


@pytest.mark.parametrize("T", [1, 3, 40])
@pytest.mark.parametrize(("m", "v"), [(0.0, 1.0), (0.2, 0.09)])
def test_bound_of_the_exact_reverse_process_is_the_entropy(m, v, T):
    # With the true conditional mean and variance p_θ(x_{t-1}|x_t) = q(x_{t-1}|x_t), so all that is lost is KL(q(x_T) ‖ N(0, 1)).
    schedule = NoiseSchedule.linear(T, 0.02, 0.35)
    bound = sum(continuous_bound(GaussianDiffusion(schedule, "x_start", "learned"), best_output(schedule, m, v, True), m, v))
    entropy = 0.5 * math.log(2 * math.pi * math.e * v)
    a = schedule.alphas_bar[-1].item()
    end = gaussian_kl(f64(math.sqrt(a) * m), f64(math.log(a * v + 1 - a)), f64(0.0), f64(0.0)).item()
    assert bound == pytest.approx(entropy + end, abs=1e-11 * T)


def gap_to_entropy(T, variance, m, v):
    """Bound minus entropy in nats on T steps of variance 8/T, less what is not the steps' doing: the end of the chain and the
    decoder, whose variance is pinned to that of t = 1 and costs ½ (r - 1 - log r) for r = true / pinned."""
    schedule = NoiseSchedule.constant(T, 8 / T)
    bound = sum(continuous_bound(GaussianDiffusion(schedule, "x_start", variance), best_output(schedule, m, v, False), m, v))
    r = best_guess(schedule, m, v, f64([0.0]), torch.tensor([0]))[1].item() / schedule.posterior_variance[1].item()
    a = schedule.alphas_bar[-1].item()
    end = gaussian_kl(f64(math.sqrt(a) * m), f64(math.log(a * v + 1 - a)), f64(0.0), f64(0.0)).item()
    return bound - 0.5 * math.log(2 * math.pi * math.e * v) - end - 0.5 * (r - 1 - math.log(r))


@pytest.mark.parametrize("T", [50, 400])
def test_large_variance_is_exact_for_data_of_unit_variance(T):
    # Ho et al., section 3.2: σ² = β is optimal for x_0 ~ N(0, I). Then Var[x_{t-1} | x_t] is β itself.
    assert abs(gap_to_entropy(T, "fixed_large", 0.1, 1.0)) < 1e-12 * T


def test_small_variance_is_exact_for_a_single_data_point():
    # And σ² = β̃ is optimal for a deterministic x_0: then p_θ is the posterior itself.
    diffusion = GaussianDiffusion(NoiseSchedule.linear(1000), "x_start", "fixed_small")
    x0, t = torch.full((999, 1), 0.3, dtype=torch.float64), torch.arange(1, 1000)
    assert diffusion.vlb_terms(x0, x0, diffusion.q_sample(x0, t, Noise(1)), t).abs().max() == 0


def test_bound_with_large_variance_approaches_the_entropy():
    # For other data Var[x_{t-1} | x_t] = β + O(β²) / (what t has added so far): the gap falls like 1/T.
    gaps = [gap_to_entropy(T, "fixed_large", 0.1, 0.25) for T in (400, 1600, 6400)]
    assert gaps[0] > 3 * gaps[1] > 9 * gaps[2] > 0


def test_bound_with_small_variance_stops_at_half_of_eulers_constant():
    # Near the data, where 1-ᾱ is far below the data's variance, the true variance is (t+1)/t times β̃: step t loses
    # ½ (1/t - log(1 + 1/t)), and the sum over t of that is γ/2 = 0.29 nats, however many steps there are.
    errors = [abs(gap_to_entropy(T, "fixed_small", 0.1, 1.0) - 0.5 * float(np.euler_gamma)) for T in (400, 1600, 6400)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.01 * 0.5 * np.euler_gamma  # within a percent


def propagate(table, model, steps, mean, variance):
    """Mean and variance through a sampler whose model is affine: the step is A x + B + C z, read off p_step itself."""
    table_rows, kind = table.table, table.variance
    for row in range(steps - 1, -1, -1):
        x, z = f64([0.0], [1.0], [0.0]), f64([0.0], [0.0], [1.0])
        t = torch.full((3,), row)
        at_zero, at_one, with_noise = p_step(x, model(x, t), t, table_rows, z, variance=kind, clip=False)[0].flatten().tolist()
        slope, spread = at_one - at_zero, with_noise - at_zero
        mean, variance = at_zero + slope * mean, slope**2 * variance + spread**2
    return mean, variance


@pytest.mark.parametrize(("m", "v"), [(0.0, 1.0), (0.2, 0.09), (-0.4, 2.0)])
def test_ancestral_sampling_with_the_exact_reverse_process_gives_the_data(m, v):
    # By the law of total variance the last step, a mean without noise, leaves out Var[x_0 | x_1]. What remains is that the chain
    # starts from N(0, 1) and not from q(x_T), an error that the whole chain damps by Cov(x_0, x_T) / Var(x_T).
    schedule = NoiseSchedule.linear(50, 1e-3, 0.3)
    table = ddpm_table(GaussianDiffusion(schedule, "x_start", "learned"))
    mean, variance = propagate(table, best_output(schedule, m, v, True), 50, 0.0, 1.0)
    a = schedule.alphas_bar[-1].item()
    true = a * v + 1 - a
    damping = math.sqrt(a) * v / true
    left_out = best_guess(schedule, m, v, f64([0.0]), torch.tensor([0]))[1].item()
    assert mean == pytest.approx(m - damping * math.sqrt(a) * m, abs=1e-12)
    assert variance == pytest.approx(v - left_out + damping**2 * (1 - true), abs=1e-12)


@pytest.mark.parametrize("sampler", ["fixed_small", "fixed_large", "ddim"])
def test_samplers_converge_to_the_data_as_steps_get_short(sampler):
    # Ancestral sampling with a fixed variance and DDIM's Euler steps along the flow are of first order, up to a logarithm.
    m, v = 0.2, 0.5
    errors = []
    for T in (50, 200, 800):
        schedule = NoiseSchedule.constant(T, 8 / T)
        diffusion = GaussianDiffusion(schedule, "x_start", "fixed_small" if sampler == "ddim" else sampler)
        table = ddim_table(diffusion) if sampler == "ddim" else ddpm_table(diffusion)
        mean, variance = propagate(table, best_output(schedule, m, v, False), T, 0.0, 1.0)
        # The chain starts from a mean of 0 instead of √ᾱ m, and only damps that.
        assert abs(mean - m) <= math.sqrt(schedule.alphas_bar[-1]) * m
        errors.append(abs(variance - v))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@pytest.mark.parametrize("options", [{}, {"sampler": "ddim"}, {"sampler": "ddim", "eta": 1.0}, {"steps": 10}], ids=str)
def test_samples_have_the_propagated_mean_and_variance(options):
    m, v, n = 0.2, 0.09, 2**12
    schedule = NoiseSchedule.linear(30, 1e-3, 0.4)
    diffusion = GaussianDiffusion(schedule, "x_start", "fixed_small")
    model = best_output(schedule, m, v, False)
    table = make_table(diffusion, options.get("sampler", "ddpm"), options.get("steps"), options.get("eta", 0.0))
    mean, variance = propagate(table, lambda x, row: model(x, table.timesteps[row]), len(table.timesteps), 0.0, 1.0)
    x = sample(model, diffusion, (n, 1), seed=6, clip=False, **options)
    assert_moments(x.double().flatten(), mean, variance)


def flow_errors(make, counts, m=0.2, v=0.3):
    """Distance from the probability flow of Gaussian data, whose solution is known: x_t keeps its place in N(√ᾱ m, ᾱ v + 1 - ᾱ).

    Of the state before the last step, which leaves the flow for x̂0. In float64, on evenly spaced steps of a fine chain, the last of
    which is the same for every number of steps.
    """
    fine = 8001
    schedule = NoiseSchedule.linear(fine, 1e-4 / 8, 0.02 / 8)
    diffusion = GaussianDiffusion(schedule, "x_start", "fixed_small")
    first, last = 400, 8000
    start = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    place = lambda x, t: (x - schedule.sqrt_alphas_bar[t] * m) / (schedule.alphas_bar[t] * v + 1 - schedule.alphas_bar[t]).sqrt()  # noqa: E731
    errors = []
    for count in counts:
        steps = torch.linspace(first, last, count + 1).round().long()
        table = make(diffusion, torch.cat([torch.tensor([0]), steps]))
        step = ReverseStep(best_output(schedule, m, v, False), table, start, clip=False)
        states = {t: x for t, x, _ in sample_loop(step, start, Noise(0))}
        x = states[int(steps[1])]  # after the step from there it is at `first`
        errors.append((place(x, first) - place(start, last)).abs().max().item())
    return errors


@pytest.mark.parametrize(("make", "order"), [(ddim_table, 1), (dpm_solver_table, 2)], ids=["ddim", "dpmpp_2m"])
def test_solvers_of_the_flow_converge_at_their_order(make, order):
    errors = flow_errors(make, (25, 50, 100))
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders[-1] == pytest.approx(order, abs=0.15)  # of the finer halving; the coarser one still shows higher orders
    assert all(abs(found - order) < 0.5 for found in orders)


def test_second_order_needs_few_steps():
    # The point of it: as near to the flow in 20 steps as DDIM is in some hundred.
    assert flow_errors(dpm_solver_table, (20,))[0] < flow_errors(ddim_table, (100,))[0]


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "ddim"},
        {"sampler": "dpmpp_2m"},
        {"sampler": "dpmpp_2m", "spacing": "logsnr"},
        {"sampler": "ddim", "spacing": "quadratic"},
    ],
    ids=str,
)
def test_deterministic_samplers_map_the_start_onto_the_data(options):
    # The map is affine, so two points of it say what it does to N(0, 1): mean and variance of the samples without drawing any.
    m, v = 0.2, 0.5
    schedule = NoiseSchedule.linear(1000)
    diffusion = GaussianDiffusion(schedule, "x_start", "fixed_small")
    errors = []
    for steps in (25, 200):
        start = f64([0.0], [1.0])
        step = ReverseStep(best_output(schedule, m, v, False), make_table(diffusion, steps=steps, **options), start, clip=False)
        at_zero, at_one = [x for _, x, _ in sample_loop(step, start, Noise(0))][-1].flatten().tolist()
        assert at_zero == pytest.approx(m, abs=0.01)
        errors.append(abs((at_one - at_zero) ** 2 - v) / v)
    assert errors[1] < (0.03 if options["sampler"] == "ddim" else 0.01) and errors[0] > 3 * errors[1]
