"""GaussianDiffusion: variances, losses and the bound's conventions, its tables, compilation, what it refuses."""

import inspect
import math

import pytest
import torch
from numerics import assert_bits_equal, assert_close_to_exact

from ddpm_fast import GaussianDiffusion, Noise, NoiseSchedule
from ddpm_fast.diffusion.parameterisation import PREDICTIONS, VARIANCES

EPS = 2.0**-52
T = 20
SCHEDULE = NoiseSchedule.linear(T, 1e-3, 0.3)


def case(diffusion, shape=(T, 2, 6), dtype=torch.float64, seed=0):
    """(out, x_start on the grid, x_t, every t, noise)."""
    generator = torch.Generator().manual_seed(seed)
    top = diffusion.levels - 1
    x_start = (torch.randint(0, top + 1, shape, generator=generator).double() / top * 2 - 1).to(dtype)
    t, noise = torch.arange(shape[0]) % len(diffusion), torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    channels = shape[1] * (2 if diffusion.learns_variance else 1)
    out = torch.randn(shape[0], channels, *shape[2:], generator=generator, dtype=torch.float64).to(dtype)
    return out, x_start, diffusion.q_sample(x_start, t, noise), t, noise


def column(values):
    return values.view(-1, 1, 1)


# Reading the model.


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_fixed_variances_are_those_of_the_paper(variance):
    diffusion = GaussianDiffusion(SCHEDULE, "epsilon", variance)
    out, _, x_t, t, _ = case(diffusion)
    exact = SCHEDULE.posterior_variance.clone() if variance == "fixed_small" else SCHEDULE.betas.clone()
    exact[0] = SCHEDULE.posterior_variance[1]
    assert_close_to_exact(diffusion.p_mean_variance(out, x_t, t).variance, column(exact).expand_as(x_t), rtol=8 * EPS)


# -1 and 1 are the ends, 0 the middle; 3 and -2 lie beyond them: the interpolation has no bounds.
@pytest.mark.parametrize("raw", [-1.0, 0.0, 1.0, 3.0, -2.0])
def test_learned_range_interpolates_between_the_logarithms(raw):
    # Nichol & Dhariwal, eq. 15: Σ = exp(v log β + (1-v) log β̃), with v = (raw + 1) / 2 and β̃ clipped at t = 0.
    diffusion = GaussianDiffusion(SCHEDULE, "epsilon", "learned_range")
    out, _, x_t, t, _ = case(diffusion)
    out[:, 2:] = raw
    v = (raw + 1) / 2
    exact = v * SCHEDULE.betas.log() + (1 - v) * torch.cat([SCHEDULE.posterior_variance[1:2], SCHEDULE.posterior_variance[1:]]).log()
    p = diffusion.p_mean_variance(out, x_t, t)
    assert_close_to_exact(p.log_variance, column(exact).expand_as(x_t), atol=64 * EPS)
    assert_close_to_exact(p.variance, column(exact).exp().expand_as(x_t), rtol=64 * EPS)


def test_learned_variance_is_the_raw_half():
    diffusion = GaussianDiffusion(SCHEDULE, "epsilon", "learned")
    out, _, x_t, t, _ = case(diffusion)
    p = diffusion.p_mean_variance(out, x_t, t)
    assert_bits_equal(p.log_variance, out[:, 2:])
    fixed = GaussianDiffusion(SCHEDULE, "epsilon", "fixed_small").p_mean_variance(out[:, :2], x_t, t)
    assert_bits_equal(p.mean, fixed.mean)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x_start_is_recovered_from_a_perfect_output(prediction):
    diffusion = GaussianDiffusion(SCHEDULE, prediction)
    _, x_start, x_t, t, noise = case(diffusion)
    got = diffusion.predict_x_start(diffusion.target(x_start, t, noise), x_t, t)
    assert_close_to_exact(got, x_start, atol=1e-12)  # 4 roundings of numbers up to 5/√ᾱ_T = 50, and up to 1/c1 of the mean


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_states_are_read_in_fp32(dtype):
    diffusion = GaussianDiffusion(SCHEDULE)
    out, x_start, x_t, t, noise = case(diffusion, dtype=dtype)
    p = diffusion.p_mean_variance(out, x_t, t)
    assert p.mean.dtype == p.variance.dtype == p.log_variance.dtype == p.x_start.dtype == torch.float32
    assert x_t.dtype == dtype and diffusion.p_step(x_t, out, t, noise).dtype == dtype
    exact = diffusion.p_mean_variance(out.double(), x_t.double(), t).mean
    assert_close_to_exact(p.mean, exact, atol=1e-5)  # fp32: terms of order 10 · 2^-24, divided by √ᾱ_T = 0.15
    assert diffusion.simple_loss(out, x_start, t, noise).dtype == diffusion.vlb_terms(out, x_start, x_t, t).dtype == torch.float32


# Losses.


def test_hybrid_loss_is_simple_plus_the_scaled_bound_for_the_variance_alone():
    diffusion = GaussianDiffusion(SCHEDULE, "epsilon", "learned_range")
    out, x_start, x_t, t, noise = case(diffusion)
    out.requires_grad_()
    hybrid = diffusion.loss(out, x_start, x_t, t, noise, kind="hybrid")
    simple, bound = diffusion.simple_loss(out, x_start, t, noise), diffusion.vlb_terms(out, x_start, x_t, t)
    assert_close_to_exact(hybrid, (simple + T / 1000 * bound).detach(), rtol=4 * EPS)
    grads = [torch.autograd.grad(loss.sum(), out, retain_graph=True)[0] for loss in (hybrid, simple, bound)]
    # The prediction learns from the simple loss alone, the variance from the bound alone.
    assert_close_to_exact(grads[0][:, :2], grads[1][:, :2], rtol=4 * EPS)
    # At t = 0 it is the difference of two densities: what cancels there multiplies the roundings.
    assert_close_to_exact(grads[0][:, 2:], T / 1000 * grads[2][:, 2:], rtol=1e-12)
    assert (grads[1][:, 2:] == 0).all() and (grads[2][:, :2] != 0).any()


def test_vlb_loss_over_uniform_t_is_the_bound_without_its_prior():
    diffusion = GaussianDiffusion(SCHEDULE, "epsilon", "learned_range")
    out, x_start, x_t, t, noise = case(diffusion)
    loss = diffusion.loss(out, x_start, x_t, t, noise, kind="vlb")
    terms = diffusion.vlb_terms(out, x_start, x_t, t)
    assert_close_to_exact(loss, T * terms, rtol=2 * EPS)
    assert_close_to_exact(loss.mean(), terms.sum(), rtol=32 * EPS)


@pytest.mark.parametrize("weight", ["uniform", "min_snr", "p2", "vlb"])
def test_loss_kind_simple_takes_weights(weight):
    diffusion = GaussianDiffusion(SCHEDULE, "v")
    out, x_start, x_t, t, noise = case(diffusion)
    assert_bits_equal(
        diffusion.loss(out, x_start, x_t, t, noise, weight=weight), diffusion.simple_loss(out, x_start, t, noise, weight=weight)
    )


def test_weight_parameter_is_part_of_the_cached_table():
    diffusion = GaussianDiffusion(SCHEDULE, "x_start")
    out, x_start, _, t, noise = case(diffusion)
    five, one = (diffusion.simple_loss(out, x_start, t, noise, weight="min_snr", gamma=gamma) for gamma in (5.0, 1.0))
    assert_bits_equal(diffusion.simple_loss(out, x_start, t, noise, weight="min_snr"), five)
    assert five[0] == pytest.approx(5 * one[0].item(), rel=1e-12) and five[-1] == one[-1]  # SNR above 5 at first, below 1 in the end


# The bound.


def toy_model(x_t, t):
    return 2.0 * x_t


def test_bits_per_dim_is_the_prior_and_the_terms():
    diffusion = GaussianDiffusion(SCHEDULE, levels=17)
    _, x_start, _, _, _ = case(diffusion, shape=(3, 2, 6), dtype=torch.float32)
    noise = Noise(8)
    bound, total = diffusion.bound_terms(toy_model, x_start, noise=noise), diffusion.bits_per_dim(toy_model, x_start, noise=noise)
    assert total.shape == bound.prior.shape == (3,) and bound.terms.shape == bound.mse.shape == (3, T)
    assert_close_to_exact(total, bound.prior.double() + bound.terms.double().sum(1), ulps=T)
    assert_bits_equal(bound.prior, diffusion.prior_bpd(x_start))
    for step in (0, 1, T - 1):  # step t draws from stream t; evaluation clips x̂0
        t = torch.full((3,), step)
        x_t = diffusion.q_sample(x_start, t, noise.at(stream=step))
        assert_bits_equal(bound.terms[:, step], diffusion.vlb_terms(toy_model(x_t, t), x_start, x_t, t, clip=True))
        error = diffusion.p_mean_variance(toy_model(x_t, t), x_t, t, clip=True).x_start - x_start
        assert_close_to_exact(bound.mse[:, step], error.double().square().flatten(1).mean(1), ulps=16)


def test_evaluation_clips_and_the_loss_does_not():
    diffusion = GaussianDiffusion(SCHEDULE, levels=17)
    out, x_start, x_t, t, noise = case(diffusion)
    assert (diffusion.predict_x_start(out, x_t, t).abs() > 1).any()
    clipped, free = (diffusion.vlb_terms(out, x_start, x_t, t, clip=clip) for clip in (True, False))
    assert (clipped != free).any()
    assert_bits_equal(diffusion.vlb_terms(out, x_start, x_t, t), free)
    assert_close_to_exact(diffusion.loss(out, x_start, x_t, t, noise, kind="vlb"), T * free, rtol=2 * EPS)


def test_clip_is_on_by_default_where_nothing_is_trained():
    defaults = {
        name: parameters["clip"].default
        for name, method in vars(GaussianDiffusion).items()
        if callable(method) and "clip" in (parameters := inspect.signature(method).parameters) and not name.startswith("_")
    }
    assert len(defaults) == 6 and [name for name, clips in defaults.items() if not clips] == ["vlb_terms"]


def test_model_time_is_of_the_chain_that_the_model_knows():
    part = GaussianDiffusion(SCHEDULE.respace([0, 2, T - 1]))
    assert part.model_time(torch.tensor([2, 0, 1, 1])).tolist() == [T - 1, 0, 2, 2]
    for t, error in (
        (torch.tensor([0, 3]), r"t must lie in 0..2, got t\[1\] = 3"),
        (torch.tensor([-1]), r"t must lie in 0..2, got t\[0\] = -1"),
    ):
        with pytest.raises(ValueError, match=error):
            part.model_time(t)
    for t, error in (
        (torch.tensor(1), r"t must have shape \(N,\), got \(\)"),
        (torch.zeros(2, 2, dtype=torch.int64), r"t must have shape \(N,\), got \(2, 2\)"),
    ):
        with pytest.raises(ValueError, match=error):
            part.model_time(t)
    with pytest.raises(TypeError, match="t must be int64, got torch.float32"):
        part.model_time(torch.zeros(2))


def test_bound_of_a_sample_does_not_depend_on_its_batch():
    diffusion = GaussianDiffusion(SCHEDULE, levels=17)
    _, x_start, _, _, _ = case(diffusion, shape=(5, 2, 6), dtype=torch.float32)
    together = diffusion.bound_terms(toy_model, x_start, noise=Noise(8))
    apart = diffusion.bound_terms(toy_model, x_start[3:], noise=Noise(8, first_sample=3))
    assert_close_to_exact(apart.terms, together.terms[3:].double(), ulps=16, atol=1e-6)


def test_bound_is_in_bits_and_a_mean_over_dimensions():
    # Repeating every pixel leaves bits per dimension as they are; nats are ln 2 times as many.
    diffusion = GaussianDiffusion(SCHEDULE, "x_start", levels=17)
    out, x_start, x_t, t, _ = case(diffusion)
    once, twice = (diffusion.vlb_terms(*(x.repeat(1, 1, n) for x in (out, x_start, x_t)), t) for n in (1, 2))
    assert_close_to_exact(twice, once, rtol=16 * EPS)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(diffusion.q_posterior(x_start, x_t, t)[0], column(SCHEDULE.posterior_variance).clamp_min(1e-30).sqrt()),
        torch.distributions.Normal(diffusion.p_mean_variance(out, x_t, t, clip=False).mean, column(SCHEDULE.betas).sqrt()),
    )
    assert_close_to_exact(once[1:] * math.log(2), kl.flatten(1).mean(1)[1:], rtol=1e-10)


# Tables.


def test_tables_are_made_once_and_not_copied():
    diffusion = GaussianDiffusion(SCHEDULE)
    x = torch.zeros(1, 1)
    first = diffusion.table("sqrt_alphas_bar", x)
    assert diffusion.table("sqrt_alphas_bar", torch.zeros(9, 9).bfloat16()) is first  # half precision reads fp32 tables too
    assert first.dtype == torch.float32 and diffusion.table("sqrt_alphas_bar", x.double()).dtype == torch.float64
    assert_bits_equal(first, SCHEDULE.sqrt_alphas_bar.float())

    out, x_start, x_t, t, noise = case(diffusion, dtype=torch.float32)
    calls = (
        lambda: diffusion.q_sample(x_start, t, noise),
        lambda: diffusion.q_step(x_start, t, noise),
        lambda: diffusion.q_posterior(x_start, x_t, t),
        lambda: diffusion.p_step(x_t, out, t, noise),
        lambda: diffusion.simple_loss(out, x_start, t, noise, weight="p2"),
        lambda: diffusion.vlb_terms(out, x_start, x_t, t),
    )
    for call in calls:
        call()
    kept = dict(diffusion._tables)
    for call in calls:
        call()
    assert diffusion._tables.keys() == kept.keys()
    assert all(diffusion._tables[key] is table for key, table in kept.items())


def test_global_random_state_is_not_touched():
    diffusion = GaussianDiffusion(SCHEDULE, levels=17)
    _, x_start, _, t, _ = case(diffusion, dtype=torch.float32)
    before = torch.get_rng_state()
    x_t = diffusion.q_sample(x_start, t, Noise(1))
    diffusion.p_step(x_t, x_t, t, Noise(2))
    diffusion.loss(x_t, x_start, x_t, t, Noise(1))
    diffusion.bits_per_dim(toy_model, x_start)
    assert_bits_equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_training_and_sampling_step_compile_without_graph_breaks():
    # The tables are made inside the compiled function: nothing has called this diffusion before.
    compiled, eager = (GaussianDiffusion(SCHEDULE, "epsilon", "learned_range") for _ in range(2))
    _, x_start, _, _, _ = case(eager, shape=(2, 2, 6), dtype=torch.float32)
    t, weight = torch.tensor([0, T - 1]), torch.ones(4, 2)

    def step(diffusion, weight):
        x_t = diffusion.q_sample(x_start, t, Noise(1, stream=2))
        out = torch.einsum("oc,ncx->nox", weight, x_t)
        loss = diffusion.loss(out, x_start, x_t, t, Noise(1, stream=2), kind="hybrid").mean()
        return loss, diffusion.p_step(x_t, out.detach(), t, Noise(3))

    leaves = [weight.clone().requires_grad_() for _ in range(2)]
    results = [
        torch.compile(lambda w: step(compiled, w), fullgraph=True, backend="aot_eager")(leaves[0]),
        step(eager, leaves[1]),
    ]
    for result in results:
        result[0].backward()
    # The same operators in the same order, up to the compiler's freedom to fuse a multiplication into an addition.
    assert_close_to_exact(results[0][0].detach(), results[1][0].detach().double(), ulps=32)
    assert_close_to_exact(results[0][1], results[1][1].double(), atol=1e-5)
    assert_close_to_exact(leaves[0].grad, leaves[1].grad.double(), rtol=1e-5, atol=1e-5)


# What is refused.


# √ᾱ_T is 0 in fp32 here. v and x_0 need no signal to be solved; ε and the mean divide by it.
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_zero_terminal_signal(prediction):
    schedule = NoiseSchedule.constant(1000, 0.9)
    assert schedule.sqrt_alphas_bar[-1].float() == 0
    if prediction in ("epsilon", "mean"):
        with pytest.raises(ValueError, match=f"prediction '{prediction}' needs signal at every step, but alphas_bar ends at"):
            GaussianDiffusion(schedule, prediction)
    else:
        diffusion = GaussianDiffusion(schedule, prediction)
        t = torch.tensor([0, 999])
        x_start = torch.tensor([[0.5], [-0.25]])
        x_t = diffusion.q_sample(x_start, t, Noise(0))
        out = diffusion.target(x_start, t, Noise(0))
        assert_close_to_exact(diffusion.predict_x_start(out, x_t, t), x_start.double(), ulps=8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((SCHEDULE, "noise"), ValueError, "prediction must be one of epsilon, x_start, v, mean, got 'noise'"),
        (
            (SCHEDULE, "epsilon", "small"),
            ValueError,
            "variance must be one of fixed_small, fixed_large, learned, learned_range, got 'small'",
        ),
        ((SCHEDULE, "epsilon", "learned", 1), ValueError, "levels must be an integer in 2..2000, got 1"),
        ((SCHEDULE, "epsilon", "learned", 256.0), ValueError, "levels must be an integer in 2..2000, got 256.0"),
        (([0.1, 0.2],), TypeError, "schedule must be a NoiseSchedule, got list"),
    ],
)
def test_constructor_names_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        GaussianDiffusion(*arguments)


def test_unknown_cdf_is_refused():
    with pytest.raises(ValueError, match="cdf must be one of tanh, erf, got 'gelu'"):
        GaussianDiffusion(SCHEDULE, cdf="gelu")


X = torch.zeros(2, 3, 4)
T0 = torch.tensor([0, 1])
LATE, SHORT = torch.tensor([0, T]), torch.tensor([0])
CALLS = {
    "q_sample": lambda d, x, t: d.q_sample(x, t, Noise(0)),
    "q_step": lambda d, x, t: d.q_step(x, t, Noise(0)),
    "q_mean_variance": lambda d, x, t: d.q_mean_variance(x, t),
    "q_posterior": lambda d, x, t: d.q_posterior(x, x, t),
    "p_mean_variance": lambda d, x, t: d.p_mean_variance(x, x, t),
    "p_step": lambda d, x, t: d.p_step(x, x, t, Noise(0)),
    "simple_loss": lambda d, x, t: d.simple_loss(x, x, t, Noise(0)),
    "vlb_terms": lambda d, x, t: d.vlb_terms(x, x, x, t),
    "loss": lambda d, x, t: d.loss(x, x, x, t, Noise(0)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_method_checks_its_input(call):
    diffusion = GaussianDiffusion(SCHEDULE)
    call(diffusion, X, T0)
    with pytest.raises(ValueError, match=r"t must lie in 0..19, got t\[1\] = 20"):
        call(diffusion, X, LATE)
    with pytest.raises(ValueError, match=r"t must have shape \(2,\), got \(1,\)"):
        call(diffusion, X, SHORT)
    with pytest.raises(TypeError, match=r"t must be int64, got torch\.int32"):
        call(diffusion, X, T0.int())
    with pytest.raises(TypeError, match=r"must be float32, bfloat16, float16 or float64, got torch\.int64"):
        call(diffusion, X.long(), T0)


@pytest.mark.parametrize("variance", VARIANCES)
def test_output_of_the_wrong_width_is_refused(variance):
    diffusion = GaussianDiffusion(SCHEDULE, "epsilon", variance)
    out = X if diffusion.learns_variance else torch.zeros(2, 5, 4)
    for call in (
        lambda: diffusion.p_mean_variance(out, X, T0),
        lambda: diffusion.p_step(X, out, T0, Noise(0)),
        lambda: diffusion.vlb_terms(out, X, X, T0),
    ):
        with pytest.raises(ValueError, match="the model output must have shape"):
            call()


def test_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="kind must be one of simple, vlb, hybrid, got 'l1'"):
        GaussianDiffusion(SCHEDULE).loss(X, X, X, T0, Noise(0), kind="l1")


def test_hybrid_loss_needs_a_learned_variance():
    with pytest.raises(ValueError, match="the hybrid loss trains a learned variance, but this diffusion's is 'fixed_large'"):
        GaussianDiffusion(SCHEDULE).loss(X, X, X, T0, Noise(0), kind="hybrid")


def test_tables_made_in_inference_mode_serve_gradients():
    diffusion = GaussianDiffusion(NoiseSchedule.linear(10, 1e-3, 0.3))
    t = torch.tensor([3])
    with torch.inference_mode():
        diffusion.q_sample(torch.zeros(1, 2), t, Noise(0))
    x = torch.zeros(1, 2, requires_grad=True)
    diffusion.q_sample(x, t, Noise(0)).sum().backward()
    assert_close_to_exact(x.grad, diffusion.schedule.sqrt_alphas_bar[3].expand(1, 2), rtol=1e-6, atol=0.0)


def test_steps_into_given_tensors_are_the_same_and_errors_say_the_arguments_name():
    diffusion = GaussianDiffusion(NoiseSchedule.linear(10, 1e-3, 0.3))
    x, out, t = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.tensor([0, 9])
    for call, name in (
        (lambda **o: diffusion.q_sample(x, t, Noise(0), **o), "out"),
        (lambda **o: diffusion.p_step(x, out, t, Noise(0), **o), "x_next"),
    ):
        target = torch.empty_like(x)
        assert call(**{name: target}) is target
        assert torch.equal(target, call())
        with pytest.raises(ValueError, match=rf"^{name} must have the shape"):
            call(**{name: torch.empty(2, 3, 5)})
