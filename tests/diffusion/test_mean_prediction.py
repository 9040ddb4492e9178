"""prediction="mean": the output is the mean of p_θ itself, and clipping acts on x̂0 alone, as in Ho's and improved-diffusion's code.

The formulas here are written from ``p_mean_variance``, ``p_sample`` and ``_vb_terms_bpd`` of improved-diffusion's gaussian_diffusion.py
(ModelMeanType.PREVIOUS_X), in NumPy's float64.
"""

import math

import numpy as np
import pytest
import torch
from numerics import assert_as_accurate, assert_bits_equal, assert_close_to_exact

from ddpm_fast import GaussianDiffusion, Noise, NoiseSchedule, Sampler, ops, sample
from ddpm_fast.diffusion.samplers import ddim_table, ddpm_table, make_table
from ddpm_fast.evaluation import evaluate_bound
from ddpm_fast.ops._vlb_terms import discretized_gaussian_log_likelihood

T = 12
SCHEDULE = NoiseSchedule.linear(T, 1e-3, 0.4)
VARIANCES = ["fixed_small", "fixed_large", "learned_range"]


def published(diffusion, out, x_t, t, clip):
    """(mean, log-variance, x̂0) of improved-diffusion."""
    betas = SCHEDULE.betas.numpy()
    bar = np.cumprod(1.0 - betas)
    before = np.append(1.0, bar[:-1])
    variance = betas * (1.0 - before) / (1.0 - bar)
    small = np.log(np.append(variance[1], variance[1:]))
    coef1, coef2 = betas * np.sqrt(before) / (1.0 - bar), (1.0 - before) * np.sqrt(1.0 - betas) / (1.0 - bar)

    def at(values):
        return torch.from_numpy(np.asarray(values))[t].view(-1, *[1] * (x_t.ndim - 1))

    prediction = out[:, : x_t.shape[1]]
    if diffusion.variance == "learned_range":
        share = (out[:, x_t.shape[1] :] + 1) / 2
        log_variance = share * at(np.log(betas)) + (1 - share) * at(small)
    else:
        log_variance = at(small if diffusion.variance == "fixed_small" else np.log(np.append(variance[1], betas[1:]))).expand_as(x_t)
    x_start = (prediction - at(coef2) * x_t) / at(coef1)
    return prediction, log_variance, x_start.clamp(-1, 1) if clip else x_start, (at(coef1), at(coef2), at(small))


def published_terms(diffusion, out, x_start, x_t, t):
    mean, log_variance, _, (coef1, coef2, small) = published(diffusion, out, x_t, t, True)
    true_mean = coef1 * x_start + coef2 * x_t
    kl = 0.5 * (-1.0 + log_variance - small + torch.exp(small - log_variance) + (true_mean - mean) ** 2 * torch.exp(-log_variance))
    nll = -discretized_gaussian_log_likelihood(x_start, mean, 0.5 * log_variance, diffusion.levels)
    return torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2.0)


def case(diffusion, dtype=torch.float64):
    """A model whose guesses lie far outside [-1, 1], where clipping would move the mean most."""
    generator = torch.Generator().manual_seed(0)
    x_start = (torch.randint(0, 256, (T, 2, 5), generator=generator).double() / 127.5 - 1).to(dtype)
    t = torch.arange(T)
    x_t = diffusion.q_sample(x_start, t, Noise(1))
    out = torch.randn(T, 4 if diffusion.learns_variance else 2, 5, generator=generator, dtype=torch.float64).to(dtype)
    return out, x_start, x_t, t


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", VARIANCES)
def test_mean_is_the_output_and_only_the_guess_is_clipped(variance, clip):
    diffusion = GaussianDiffusion(SCHEDULE, "mean", variance)
    out, _, x_t, t = case(diffusion)
    p = diffusion.p_mean_variance(out, x_t, t, clip)
    mean, log_variance, x_start, _ = published(diffusion, out, x_t, t, clip)
    assert_bits_equal(p.mean, mean)
    # Coefficients after 12 products, divided by coef1 >= 0.02; x̂0 reaches 100.
    assert_close_to_exact(p.log_variance, log_variance, atol=1e-13)
    assert_close_to_exact(p.x_start, x_start, rtol=1e-13, atol=1e-12)
    assert (p.x_start.abs().max() <= 1) == clip


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_step_is_the_published_one(variance, backend):
    diffusion = GaussianDiffusion(SCHEDULE, "mean", variance)
    out, _, x_t, t = case(diffusion, torch.float64 if backend == "reference" else torch.float32)
    z = Noise(3).materialize(x_t.shape).to(x_t.dtype)
    mean, log_variance, _, _ = published(diffusion, out.double(), x_t.double(), t, True)
    exact = mean + (t != 0).view(-1, 1, 1) * torch.exp(0.5 * log_variance) * z
    stepped = diffusion.p_step(x_t, out, t, z)
    if backend == "reference":
        assert_close_to_exact(stepped, exact, atol=1e-13)
    else:
        table = ddpm_table(diffusion).table.float()
        baseline = ops.p_step(x_t, out, t, table, z, variance=diffusion.variance_kind, clip=False, backend="reference")[0]
        assert_as_accurate(stepped, baseline, exact)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("clip", [True, False])
def test_terms_of_the_bound_are_the_published_ones(variance, clip):
    diffusion = GaussianDiffusion(SCHEDULE, "mean", variance)
    out, x_start, x_t, t = case(diffusion)
    exact = published_terms(diffusion, out, x_start, x_t, t)
    assert_close_to_exact(diffusion.vlb_terms(out, x_start, x_t, t, clip), exact, rtol=1e-11)
    single = diffusion.vlb_terms(out.float(), x_start.float(), x_t.float(), t, clip)
    baseline = GaussianDiffusion(SCHEDULE, "mean", variance).vlb_terms(out.float(), x_start.float(), x_t.float(), t, False)
    assert_bits_equal(single, baseline)


def model(x, t):
    """Guesses that clipping would change at every step."""
    return 1.5 * x + 0.3 * torch.cos(7 * x)


def test_whole_bound_and_its_distortion():
    diffusion = GaussianDiffusion(SCHEDULE, "mean", "fixed_small")
    x_start = case(diffusion)[1][:3]
    bound = diffusion.bound_terms(model, x_start)
    again = evaluate_bound(model, diffusion, x_start)
    assert_close_to_exact(
        again.terms, diffusion.bound_terms(model, x_start, noise=Noise(0).fold_in(5)).terms, rtol=1e-12
    )  # 5: its noise's key
    for step in range(T):
        t = torch.full((3,), step)
        x_t = diffusion.q_sample(x_start, t, Noise(0, stream=step))
        out = model(x_t, t)
        assert_close_to_exact(bound.terms[:, step], published_terms(diffusion, out, x_start, x_t, t), rtol=1e-11)
        guess = published(diffusion, out, x_t, t, True)[2]
        assert_close_to_exact(bound.mse[:, step], (guess - x_start).square().flatten(1).mean(1), rtol=1e-11)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ancestral_sampling_adds_noise_to_the_outputs(variance, graph):
    diffusion = GaussianDiffusion(SCHEDULE, "mean", variance)
    shape, seen = (2, 1, 6), []

    def bounded(x, t):
        return torch.sin(3 * x) + 0.2

    draw = Sampler(bounded, diffusion, graph=graph)
    draw._capture = lambda body, device: body
    images = draw(shape, 4, callback=lambda t, x, x_start: seen.append((t, x.double(), x_start.double())))
    x = Noise(4).fold_in(3).materialize(shape).double()
    for step, x_next, x_start in seen:
        t = torch.full((2,), step)
        mean, log_variance, guess, _ = published(diffusion, bounded(x, t), x, t, True)
        z = Noise(4).fold_in(4).at(stream=step).materialize(shape).double()
        # A step in fp32: roundings of terms up to 5, and those of x̂0 (the mean less coef2 x_t, over coef1 >= 0.02).
        assert_close_to_exact(x_next, mean + (step > 0) * torch.exp(0.5 * log_variance) * z, atol=32 * 2.0**-23)
        assert_close_to_exact(x_start, guess, atol=32 * 2.0**-23 / 0.02)
        x = x_next
    assert_bits_equal(images.double(), x)


def test_other_samplers_and_fewer_steps_go_through_the_clipped_guess():
    diffusion, as_x_start = GaussianDiffusion(SCHEDULE, "mean"), GaussianDiffusion(SCHEDULE, "x_start")

    def guess(x, t):  # the same model as one that predicts x_0
        return diffusion.predict_x_start(model(x, t), x, t)

    for options in (dict(sampler="ddim", eta=0.5), dict(sampler="dpmpp_2m", steps=5), dict(steps=5)):
        a = sample(model, diffusion, (2, 1, 6), **options)
        b = sample(guess, as_x_start, (2, 1, 6), **options)
        assert_close_to_exact(a, b.double(), atol=2e-3)  # fp32 guesses of up to 100 units, through 12 steps of slope up to 5
    assert not ddim_table(diffusion).output_is_mean and not make_table(diffusion, steps=5).output_is_mean
    assert make_table(diffusion).output_is_mean and ddpm_table(diffusion, range(T)).output_is_mean


def test_an_interpolation_takes_the_same_steps():
    diffusion = GaussianDiffusion(SCHEDULE, "mean")
    images = case(diffusion, torch.float32)[1]
    draw = Sampler(lambda x, t: torch.sin(3 * x) + 0.2, diffusion)
    ends = draw.interpolate(images[:1], images[1:2], [0.0], t=3)[0]
    x = diffusion.q_sample(images[:1], torch.tensor([3]), Noise(0).fold_in(10))
    for step in (3, 2, 1, 0):
        x = diffusion.p_step(x, draw.model(x, None), torch.tensor([step]), Noise(0).fold_in(4).at(stream=step))
    # The table of the first steps is the whole chain's but for the rounding of its float64 sums.
    assert_close_to_exact(ends, x.double(), atol=1e-4)


def test_a_threshold_of_what_the_step_does_not_read_is_refused():
    diffusion = GaussianDiffusion(SCHEDULE, "mean")
    with pytest.raises(ValueError, match="threshold acts on x̂0, which the steps of a model that predicts the mean do not read"):
        Sampler(model, diffusion, threshold=0.9)
    Sampler(model, diffusion, steps=5, threshold=0.9)
    Sampler(model, diffusion, "ddim", threshold=0.9)
