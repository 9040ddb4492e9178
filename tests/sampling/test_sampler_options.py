"""What can be asked of a sampler: guidance, dynamic thresholding, inpainting, interpolation."""

import math

import pytest
import torch
from numerics import assert_bits_equal, assert_close_to_exact
from sampled import DIFFUSION, LABELS, SAMPLERS, SHAPE, T, captured, model, network

from ddpm_fast import GaussianDiffusion, Noise, NoiseSchedule, Sampler, sample
from ddpm_fast.noise import FOLD_SAMPLE_KNOWN
from ddpm_fast.sampling.step import dynamic_threshold

# Guidance.


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guided_sampling_is_sampling_of_the_guided_prediction(sampler):
    def guided(x, t):
        without = model(x, t, torch.full((3,), 4))
        return without + 2.5 * (model(x, t, LABELS) - without)

    got = sample(model, DIFFUSION, SHAPE, 4, sampler=sampler, labels=LABELS, guidance=2.5, null_label=4)
    assert_close_to_exact(got, sample(guided, DIFFUSION, SHAPE, 4, sampler=sampler).double(), atol=1e-5)


def test_guidance_of_one_asks_the_model_once_a_step():
    sizes = []

    def spy(x, t, labels):
        sizes.append(len(x))
        assert torch.equal(labels[:3], LABELS) and (labels[3:] == 4).all() and t.shape == labels.shape
        return model(x, t, labels)

    sample(spy, DIFFUSION, SHAPE, labels=LABELS)
    assert sizes == [3] * T
    sample(spy, DIFFUSION, SHAPE, labels=LABELS, guidance=0.5, null_label=4, steps=2)
    assert sizes[T:] == [6, 6]


def test_a_guided_sample_does_not_depend_on_its_batch():
    whole = sample(model, DIFFUSION, SHAPE, 4, labels=LABELS, guidance=2.0, null_label=4)
    alone = sample(model, DIFFUSION, (1, 2, 5), 4, labels=LABELS[1:2], guidance=2.0, null_label=4, first_sample=1)
    assert_close_to_exact(alone, whole[1:2].double(), atol=1e-5)


def test_the_unet_says_itself_what_no_class_is():
    net = network(num_classes=10, learned_variance=True)
    diffusion = GaussianDiffusion(NoiseSchedule.linear(T, 1e-3, 0.3), variance="learned_range")
    draw = lambda scale: sample(net, diffusion, (2, 1, 8, 8), labels=torch.tensor([1, 7]), guidance=scale, steps=3, sampler="ddim")  # noqa: E731
    assert draw(3.0).isfinite().all() and (draw(3.0) != draw(1.0)).any()
    assert_close_to_exact(draw(0.0), sample(net, diffusion, (2, 1, 8, 8), steps=3, sampler="ddim").double(), atol=1e-4)


# Dynamic thresholding.


def test_threshold_scales_what_is_loud_and_leaves_what_is_not():
    x = torch.stack([torch.linspace(-0.9, 0.5, 11), torch.linspace(-4, 4, 11)]).view(2, 1, 11)
    got = dynamic_threshold(x, 0.75)
    assert_bits_equal(got[0], x[0])
    s = x[1].abs().quantile(0.75)
    assert_close_to_exact(got[1], (x[1].clamp(-s, s) / s).double(), ulps=4)
    assert_bits_equal(dynamic_threshold(x, 1.0)[1], x[1] / 4)


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_thresholded_step_is_the_step_of_the_thresholded_guess(sampler, variance):
    # A model that predicts x̂0 thresholded already is sampled the same way. Loud, so that the threshold matters.
    schedule = NoiseSchedule.linear(T, 1e-3, 0.3)
    loud = lambda x, t: 3.0 * x + 0.1  # noqa: E731
    raw = lambda x: [] if variance == "fixed_small" else [torch.sin(x)]  # noqa: E731
    starts = []
    got = sample(
        lambda x, t: torch.cat([loud(x, t), *raw(x)], 1), GaussianDiffusion(schedule, "x_start", variance), SHAPE, 4,
        sampler=sampler, threshold=0.8, callback=lambda t, x, x_start: starts.append(x_start),
    )  # fmt: skip
    expected = sample(
        lambda x, t: torch.cat([dynamic_threshold(loud(x, t), 0.8), *raw(x)], 1),
        GaussianDiffusion(schedule, "x_start", variance),
        SHAPE,
        4,
        sampler=sampler,
    )
    assert_close_to_exact(got, expected.double(), atol=1e-5)
    assert all(s.abs().max() <= 1 for s in starts)


def test_guidance_comes_before_the_threshold():
    options = dict(labels=LABELS, guidance=6.0, null_label=4, sampler="ddim", steps=5)
    assert sample(model, DIFFUSION, SHAPE, 4, threshold=0.9, **options).abs().max() <= 1
    assert (sample(model, DIFFUSION, SHAPE, 4, threshold=0.9, **options) != sample(model, DIFFUSION, SHAPE, 4, **options)).any()


# Inpainting.


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [None, 4])
def test_the_known_part_is_kept_and_noised_on_the_way(sampler, steps):
    x_start, mask = torch.linspace(-1, 1, 10).view(1, 2, 5), torch.zeros(2, 5, dtype=torch.bool)
    mask[:, :2] = True
    seen = []

    def spy(x, t):
        seen.append((int(t[0]), x.clone()))
        return model(x, t)

    x = sample(spy, DIFFUSION, SHAPE, 4, sampler=sampler, steps=steps, known=(x_start, mask), first_sample=7)
    assert_bits_equal(x[:, :, :2], x_start.expand(SHAPE)[:, :, :2])
    assert (x[0] != x[1])[:, 2:].any()
    key = Noise(4, first_sample=7).fold_in(FOLD_SAMPLE_KNOWN)
    for t, state in seen:
        noised = DIFFUSION.q_sample(x_start.expand(SHAPE).contiguous(), torch.full((3,), t), key.at(stream=t))
        assert_bits_equal(state[:, :, :2], noised[:, :, :2])


def test_inpainting_draws_what_fits():
    # Two correlated values, of which one is known: the exact model of that Gaussian moves the other one to its side.
    rho, schedule, n = 0.95, NoiseSchedule.linear(200, 1e-3, 0.1), 2**12
    covariance = torch.tensor([[1.0, rho], [rho, 1.0]]) * 0.09

    def best(x, t):
        a = schedule.alphas_bar[t].float().view(-1, 1, 1)
        inverse = torch.linalg.inv(a * covariance + (1 - a) * torch.eye(2))
        return (x[:, None, :] @ inverse @ covariance).squeeze(1) * a.view(-1, 1).sqrt()

    known = (torch.tensor([0.5, 0.0]), torch.tensor([True, False]))
    x = sample(best, GaussianDiffusion(schedule, "x_start", "fixed_small"), (n, 2), known=known, clip=False)[:, 1]
    # Masked noising is an approximation: it pulls the rest to the right side, and not all the way (Lugmayr et al. 2022).
    assert 0.5 * rho * 0.5 < x.mean() < rho * 0.5 and x.std() < 0.3


# Interpolation.


def test_ends_of_an_interpolation_are_the_images_noised_and_sampled_back():
    a, b = torch.full(SHAPE, 0.5), torch.linspace(-1, 1, 30).view(SHAPE)
    draw = Sampler(model, DIFFUSION, "ddim", steps=[0, 4, 9, 19])
    mixed = draw.interpolate(a, b, [0.0, 0.5, 1.0], t=12, seed=3)
    assert mixed.shape == (3, *SHAPE) and mixed.isfinite().all()
    key, time = Noise(3).fold_in(FOLD_SAMPLE_KNOWN), torch.full((3,), 9)  # the last step that is not after 12
    for k, image in ((0, a), (1, b)):
        x = DIFFUSION.q_sample(image, time, key.at(stream=k))
        for t, before in ((9, 4), (4, 0), (0, None)):
            out = model(x, torch.full((3,), t))
            signal, sigma = DIFFUSION.schedule.sqrt_alphas_bar, DIFFUSION.schedule.sqrt_one_minus_alphas_bar
            guess = ((x - sigma[t] * out) / signal[t]).clamp(-1, 1)
            x = guess if before is None else signal[before] * guess + sigma[before] * (x - signal[t] * guess) / sigma[t]
        assert_close_to_exact(mixed[2 * k], x.double(), atol=1e-5)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_an_interpolation_of_a_perfect_model_ends_in_its_image(sampler, graph):
    # A solver with a history has none where an interpolation starts, in the middle of its table: that step is of first order.
    target = torch.linspace(-1, 1, 30).view(SHAPE)
    draw = (captured if graph else Sampler)(lambda x, t: target.clone(), GaussianDiffusion(DIFFUSION.schedule, "x_start"), sampler, steps=8)
    signal, sigma = DIFFUSION.schedule.sqrt_alphas_bar, DIFFUSION.schedule.sqrt_one_minus_alphas_bar
    key, t = Noise(3).fold_in(FOLD_SAMPLE_KNOWN), int(draw.table.chain_times[5])
    seen = []
    draw.model = lambda x, t: seen.append(x.clone()) or target.clone()
    mixed = draw.interpolate(target, target, [0.0], t=t, seed=3)
    assert_close_to_exact(mixed[0], target.double(), ulps=4)
    if not graph:  # on the line between the image and its noise all the way
        noise = key.at(stream=0).materialize(SHAPE)
        for x, time in zip(seen, reversed(draw.table.chain_times[:6].tolist()), strict=True):
            assert_close_to_exact(x, (signal[time] * target + sigma[time] * noise).double(), atol=1e-6)


def test_mixture_has_the_variance_of_its_noise_level():
    # Of images that are zero only the noise is left, and one step of DDIM of a model that says 0 only scales it.
    zero = torch.zeros(64, 64)
    mixed = Sampler(lambda x, t: torch.zeros_like(x), DIFFUSION, "ddim", steps=[12], clip=False).interpolate(
        zero, zero, [0.0, 0.25, 0.5, 1.0], t=12
    )
    assert (mixed.std((1, 2)) / mixed[0].std() - 1).abs().max() < 0.05


# What is refused.


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(threshold=0.0), r"threshold must lie in \(0, 1\], got 0.0"),
        (dict(guidance=math.nan, null_label=4), "guidance must be a finite number, got nan"),
        (dict(guidance=2.0, labels=LABELS), "guidance 2.0 needs to know what the model takes for no class; give null_label"),
        (dict(guidance=2.0, null_label=4), "guidance 2.0 needs labels, got none"),
        (dict(labels=LABELS[:2]), r"labels must be int64 of shape \(3,\), got torch.int64 \(2,\)"),
        (dict(labels=LABELS.float()), r"labels must be int64 of shape \(3,\), got torch.float32 \(3,\)"),
        (dict(known=(torch.zeros(7), torch.ones(7, dtype=torch.bool))), r"must broadcast to \(3, 2, 5\), got \(7,\) and \(7,\)"),
        (dict(known=(torch.full((5,), 3.0), torch.ones(5, dtype=torch.bool))), r"the known image must be finite and lie in \[-1, 1\]"),
    ],
)
def test_bad_options_are_named_before_the_model_runs(options, message):
    def never(x, t, labels=None):
        raise AssertionError("the model ran")

    with pytest.raises(ValueError, match=message):
        sample(never, DIFFUSION, SHAPE, **options)


def test_a_mask_of_numbers_is_refused():
    with pytest.raises(TypeError, match="the mask must be bool, True where the image is known, got torch.float32"):
        sample(model, DIFFUSION, SHAPE, known=(torch.zeros(5), torch.ones(5)))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(2, 3), torch.zeros(3, 3), [0.5], 5), r"a and b must have one shape \(N, C, \.\.\.\), got \(2, 3\) and \(3, 3\)"),
        ((torch.zeros(2, 3), torch.full((2, 3), 2.0), [0.5], 5), r"b must be finite and lie in \[-1, 1\]"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), [], 5), r"weights must be one or more numbers in \[0, 1\], got \[\]"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), [1.5], 5), r"weights must be one or more numbers in \[0, 1\], got \[1.5\]"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), [0.5], -1), r"t must be an integer in 0\.\.19, got -1"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), [0.5], 20), r"t must be an integer in 0\.\.19, got 20"),
        ((torch.zeros(0, 3), torch.zeros(0, 3), [0.5], 5), "a and b must have at least one image, got none"),
    ],
)
def test_bad_interpolations_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampler(model, DIFFUSION).interpolate(*arguments)
