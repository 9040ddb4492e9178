"""p_step: every backend against float64 for each variance and option, and against the method's own mean and variance."""

import math

import pytest
import torch
from numerics import assert_as_accurate, assert_bits_equal, assert_close_to_exact
from op_inputs import p_step_inputs as case

from ddpm_fast import GaussianDiffusion, Noise, NoiseSchedule
from ddpm_fast.diffusion.parameterisation import PREDICTIONS, VARIANCES
from ddpm_fast.diffusion.samplers import ddim_table, ddpm_table
from ddpm_fast.ops import p_step
from ddpm_fast.ops._p_step import COLUMNS, p_step_reference

EPS = 2.0**-52
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One element; one short of a block; a prime number of them; small colour images.
SHAPES = [(1, 1), (3, 1023), (2, 3, 43), (4, 3, 16, 16)]
KINDS = ["fixed", "learned", "learned_range"]


def exact_step(x_t, out, t, table, noise, kind="fixed", clip=True, previous=None, guidance=None):
    """The docstring's two lines, sample by sample, in float64."""
    x_t, out, table = (x.detach().cpu().double() for x in (x_t, out, table))
    channels = x_t.shape[1]
    results, starts = [], []
    for n in range(x_t.shape[0]):
        row = dict(zip(COLUMNS, table[t[n]].tolist(), strict=True))
        prediction = out[n, :channels]
        if guidance is not None:
            prediction = (1 - guidance[1]) * guidance[0][n, :channels].double().cpu() + guidance[1] * prediction
        x_start = row["from_x_t"] * x_t[n] + row["from_out"] * prediction
        x_start = x_start.clamp(-1, 1) if clip else x_start
        result = row["x_start"] * x_start + row["x_t"] * x_t[n]
        if previous is not None:
            result = result + row["previous"] * previous[n].double().cpu()
        if row["noise"] and noise is not None:
            low, high = row["log_variance_low"], row["log_variance_high"]
            if kind == "fixed":
                log_variance = torch.tensor(low, dtype=torch.float64)
            elif kind == "learned":
                log_variance = out[n, channels:]
            else:
                fraction = (out[n, channels:] + 1) / 2
                log_variance = fraction * high + (1 - fraction) * low
            result = result + row["noise"] * (log_variance / 2).exp() * noise[n].double().cpu()
        results.append(result)
        starts.append(x_start)
    return torch.stack(results), torch.stack(starts)


def run_against_exact(backend, x_t, out, t, table, noise, kind, clip=True, previous=None, guidance=None, written=None):
    got = p_step(x_t, out, t, table, noise, variance=kind, clip=clip, x_start_previous=previous, guidance=guidance, backend=backend.name)
    baseline = p_step_reference(x_t, out, t, table, noise, kind, clip, previous, *(guidance or (None, 1.0)))
    exact = exact_step(x_t, out, t, table, noise if written is None else written, kind, clip, previous, guidance)
    for name, a, b, e in zip(("x'", "x̂0"), got, baseline, exact, strict=True):
        assert a.dtype == x_t.dtype
        assert_as_accurate(a, b, e, floor=2.0, what=name)


@pytest.mark.backends("p_step")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_backend_and_dtype_is_accurate(backend, kind, shape, dtype):
    x_t, out, t, table, noise = case(shape, dtype, backend.device, kind)
    run_against_exact(backend, x_t, out, t, table, noise, kind)


@pytest.mark.backends("p_step")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_generated_noise_is_the_materialised_one(backend, kind, dtype):
    x_t, out, t, table, _ = case((3, 2, 13), dtype, backend.device, kind)
    noise = Noise(9, stream=2, first_sample=2**40)
    run_against_exact(backend, x_t, out, t, table, noise, kind, written=noise.materialize(x_t.shape))


@pytest.mark.backends("p_step")
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_previous_x_start_guidance_and_no_noise(backend, dtype, clip):
    x_t, out, t, table, noise = case((3, 2, 13), dtype, backend.device)
    other, without, _, _, _ = case((3, 2, 13), dtype, backend.device, seed=1)
    run_against_exact(backend, x_t, out, t, table, noise, "fixed", clip=clip, previous=other)
    run_against_exact(backend, x_t, out, t, table, noise, "fixed", clip=clip, guidance=(without, 3.5))
    run_against_exact(backend, x_t, out, t, table, None, "fixed", clip=clip, previous=other, guidance=(without, 0.0))


@pytest.mark.backends("p_step")
@pytest.mark.parametrize("kind", ["learned", "learned_range"])
def test_guidance_leaves_the_variance_half_alone(backend, kind):
    x_t, out, t, table, noise = case((3, 2, 13), torch.float32, backend.device, kind)
    without = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(backend.device)
    run_against_exact(backend, x_t, out, t, table, noise, kind, guidance=(without, 2.0))


def test_guidance_of_scale_one_is_no_guidance_and_of_zero_the_other_output():
    x_t, out, t, table, noise = (x.double() if x.is_floating_point() else x for x in case((3, 2, 13)))
    without = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for scale, same in ((1.0, out), (0.0, without)):
        guided = p_step(x_t, out, t, table, noise, guidance=(without, scale), clip=False)[0]
        assert_close_to_exact(guided, p_step(x_t, same, t, table, noise, clip=False)[0], rtol=0, atol=1e-13)


@pytest.mark.backends("p_step")
def test_a_fixed_variance_does_not_read_the_second_half(backend):
    x_t, out, t, table, noise = case((3, 2, 13), torch.float32, backend.device)
    doubled = torch.cat([out, torch.full_like(out, torch.nan)], 1)
    for a, b in zip(
        p_step(x_t, doubled, t, table, noise, backend=backend.name), p_step(x_t, out, t, table, noise, backend=backend.name), strict=True
    ):
        assert_bits_equal(a, b)


@pytest.mark.backends("p_step")
@pytest.mark.parametrize("raw", [math.inf, 1e30, math.nan])
def test_last_row_takes_no_noise_whatever_the_learned_variance(backend, raw):
    x_t, out, _, table, noise = case((3, 2, 13), torch.float32, backend.device, "learned")
    out[:, 2:] = raw
    t = torch.zeros(3, dtype=torch.int64, device=backend.device)
    got = p_step(x_t, out, t, table, noise, variance="learned", backend=backend.name)[0]
    assert_bits_equal(got, p_step(x_t, out, t, table, None, variance="learned", backend=backend.name)[0])
    assert got.isfinite().all()


@pytest.mark.backends("p_step")
def test_clipping_is_of_x_start_not_of_the_step(backend):
    x_t, out, t, table, _ = case((3, 2, 13), torch.float32, backend.device)
    table[:, 0], table[:, 1] = 0.0, 1.0  # x̂0 is the output
    table[:, 2], table[:, 3] = 5.0, 0.0
    out = out * 3
    x_next, x_start = p_step(x_t, out, t, table, None, backend=backend.name)
    assert_bits_equal(x_start, out.clamp(-1, 1))
    assert_close_to_exact(x_next, 5.0 * out.clamp(-1, 1).double().cpu(), ulps=1)
    assert x_next.abs().max() == 5.0
    assert_bits_equal(p_step(x_t, out, t, table, None, clip=False, backend=backend.name)[1], out)


# What the tables of the samplers make of it.


def diffusion_case(prediction, variance, steps=40):
    """Every t at once, float64."""
    diffusion = GaussianDiffusion(NoiseSchedule.cosine(steps), prediction, variance)
    generator = torch.Generator().manual_seed(0)
    shape = (steps, 2, 6)
    x_t, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    out = 0.5 * torch.randn(steps, 4 if diffusion.learns_variance else 2, 6, generator=generator, dtype=torch.float64)
    return diffusion, x_t, out, torch.arange(steps), noise


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ancestral_step_is_the_posterior_of_the_guess(prediction, variance, clip):
    # Algorithm 2: x_{t-1} = mean + σ z with the mean of q(x_{t-1} | x_t, x̂0), and no noise at t = 0.
    diffusion, x_t, out, t, noise = diffusion_case(prediction, variance)
    p = diffusion.p_mean_variance(out, x_t, t, clip=clip)
    assert p.mean.shape == p.variance.shape == p.log_variance.shape == p.x_start.shape == x_t.shape
    # Where the output is the mean itself, clipping leaves the step as it is: tests/diffusion/test_mean_prediction.py.
    guess = diffusion.predict_x_start(out, x_t, t) if prediction == "mean" else p.x_start
    mean = diffusion.q_posterior(guess, x_t, t)[0]
    scale = 1 + guess.abs().max().item()
    assert_close_to_exact(p.mean, mean, atol=8 * EPS * scale)
    assert_close_to_exact(p.variance, p.log_variance.exp(), rtol=EPS)
    expected = mean + (t > 0).view(-1, 1, 1) * (p.log_variance / 2).exp() * noise
    assert_close_to_exact(diffusion.p_step(x_t, out, t, noise, clip=clip), expected, atol=32 * EPS * scale)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_without_noise_is_the_published_update(prediction):
    # Song et al., eq. 12 with σ = 0: √ᾱ_prev x̂0 + √(1-ᾱ_prev) ε̂, where ε̂ = (x_t - √ᾱ x̂0)/√(1-ᾱ) comes from the *clipped* x̂0.
    diffusion, x_t, out, t, noise = diffusion_case(prediction, "fixed_small")
    s = diffusion.schedule
    x_start = diffusion.p_mean_variance(out, x_t, t, clip=True).x_start
    assert (x_start.abs() == 1).any() and (x_start.abs() < 1).any()
    a, rest, previous = (x.view(-1, 1, 1) for x in (s.alphas_bar, s.one_minus_alphas_bar, s.alphas_bar_prev))
    epsilon = (x_t - a.sqrt() * x_start) / rest.sqrt()
    expected = previous.sqrt() * x_start + (1 - previous).sqrt() * epsilon
    table = ddim_table(diffusion).table
    got = p_step(x_t, out, t, table, noise)[0]
    assert_close_to_exact(got, expected, atol=1e-12)  # √(1-ᾱ_prev) by subtraction: 1e-16 / √1e-4 at the least t
    assert_bits_equal(got, p_step(x_t, out, t, table, Noise(77))[0], "the noise is not used")


def test_ddim_with_full_noise_is_ancestral_sampling_with_the_small_variance():
    # With η = 1 DDIM's σ² is β̃ and its mean the posterior's: the two tables are one sampler.
    diffusion, x_t, out, t, noise = diffusion_case("epsilon", "fixed_small")
    ddim, ddpm = (
        p_step(x_t, out, t, make(diffusion), noise)[0] for make in (lambda d: ddim_table(d, eta=1.0).table, lambda d: ddpm_table(d).table)
    )
    assert_close_to_exact(ddim, ddpm, atol=1e-11)
    columns = ddim_table(diffusion, eta=1.0).table
    assert_close_to_exact(columns[1:, 5].exp(), diffusion.schedule.posterior_variance[1:], rtol=1e-13)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_keeps_the_marginals(eta):
    # If x_t = √ᾱ x0 + √(1-ᾱ) ε and x̂0 = x0, the step gives √ᾱ_prev x0 + noise of variance 1-ᾱ_prev in all: eq. 7 of Song et al.
    diffusion, _, _, t, _ = diffusion_case("x_start", "fixed_small")
    table = ddim_table(diffusion, eta=eta).table
    a, b, variance = table[:, 2], table[:, 3], table[:, 5].exp() * table[:, 7]
    s = diffusion.schedule
    assert_close_to_exact(a + b * s.sqrt_alphas_bar, s.alphas_bar_prev.sqrt(), rtol=16 * EPS)
    assert_close_to_exact((b * s.sqrt_one_minus_alphas_bar) ** 2 + variance, 1 - s.alphas_bar_prev, atol=1e-14)
    assert len(t) == len(table)


@pytest.mark.parametrize("variance", VARIANCES)
def test_strided_step_jumps_to_the_listed_step_before(variance):
    # The posterior of a jump from t to t_prev, from its own two marginals: β of the jump is 1 - ᾱ_t/ᾱ_prev.
    diffusion = GaussianDiffusion(NoiseSchedule.linear(100), "x_start", variance)
    timesteps = [0, 7, 8, 50, 99]
    table = ddpm_table(diffusion, timesteps).table
    bar = diffusion.schedule.alphas_bar.tolist()
    for row in range(1, 5):
        now, before = bar[timesteps[row]], bar[timesteps[row - 1]]
        beta = 1 - now / before
        assert math.isclose(table[row, 2], math.sqrt(before) * beta / (1 - now), rel_tol=1e-11)
        assert math.isclose(table[row, 3], math.sqrt(now / before) * (1 - before) / (1 - now), rel_tol=1e-11)
        small = math.log(beta * (1 - before) / (1 - now))
        low = math.log(beta) if variance == "fixed_large" else small
        high = small if variance == "fixed_small" else math.log(beta)
        assert math.isclose(table[row, 5], low, rel_tol=1e-11) and math.isclose(table[row, 6], high, rel_tol=1e-11)
    assert table[0, 2:4].tolist() == pytest.approx([1.0, 0.0], abs=1e-15) and table[0, 7] == 0


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_strided_step_reads_the_model_on_the_schedule_it_was_trained_on(prediction):
    diffusion, timesteps = GaussianDiffusion(NoiseSchedule.linear(100), prediction), [0, 7, 8, 50, 99]
    for make in (ddpm_table, ddim_table):
        assert_bits_equal(make(diffusion, timesteps).table[:, :2], make(diffusion).table[timesteps, :2])
        assert make(diffusion, timesteps).timesteps.tolist() == timesteps


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_output": torch.zeros(2, 5)}, ValueError, r"the model output must have shape \(2, 3\) or \(2, 6\), got \(2, 5\)"),
        ({"variance": "learned"}, ValueError, r"the model output must have shape \(2, 6\) for a learned variance, got \(2, 3\)"),
        ({"variance": "small"}, ValueError, "variance must be one of fixed, learned, learned_range, got 'small'"),
        ({"x_t": torch.zeros(2, 3).int()}, TypeError, "x_t must be float32, .* got torch.int32"),
        ({"t": torch.tensor([0, 4])}, ValueError, r"t must lie in 0..3, got t\[1\] = 4"),
        ({"t": torch.tensor([[0], [1]])}, ValueError, r"t must have shape \(2,\), got \(2, 1\)"),
        ({"t": torch.tensor([0, 1]).int()}, TypeError, "t must be int64, got torch.int32"),
        ({"table": torch.zeros(4, 7)}, ValueError, r"table must have shape \(4, 8\), got \(4, 7\)"),
        ({"table": torch.zeros(4, 8).double()}, TypeError, "table must be torch.float32 for torch.float32 data, got torch.float64"),
        ({"table": torch.zeros(8, 4).T}, ValueError, "table must be contiguous"),
        ({"noise": torch.zeros(3, 3)}, ValueError, r"noise must have the shape of x_t, \(2, 3\), got \(3, 3\)"),
        ({"x_start_previous": torch.zeros(2, 6)}, ValueError, r"x_start_previous must have the shape of x_t, \(2, 3\), got \(2, 6\)"),
        ({"x_start_previous": torch.zeros(2, 3).half()}, TypeError, "x_start_previous must have the dtype of x_t"),
        ({"guidance": (torch.zeros(2, 6), 2.0)}, ValueError, "the output without the condition must have the shape of the model output"),
        ({"backend": "tpu"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {
        "x_t": torch.zeros(2, 3),
        "model_output": torch.zeros(2, 3),
        "t": torch.tensor([0, 1]),
        "table": torch.zeros(4, 8),
        "noise": Noise(0),
    }
    with pytest.raises(error, match=message):
        p_step(**(arguments | change))
