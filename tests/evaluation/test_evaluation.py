"""The bound on a data set: full and estimated, and the measures of samples."""

import math
from functools import partial

import pytest
import torch
from numerics import assert_bits_equal
from played_ranks import play

import ddpm_fast as df
from ddpm_fast.data.images import load_data
from ddpm_fast.evaluation import class_counts, evaluate_bound, neighbour_distance_ratio
from ddpm_fast.evaluation.bound import intervals
from ddpm_fast.io.parts import Parts
from ddpm_fast.io.ranks import Ranks

T = 30
DIFFUSION = df.GaussianDiffusion(df.NoiseSchedule.linear(T, 1e-3, 0.3), levels=17)


def grid_images(n):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 17, (n, 1, 4, 4), generator=generator) / 8 - 1.0


def model(x, t):
    return 0.3 * x * (1 + t.view(-1, 1, 1, 1) / T)


def test_full_bound_agrees_with_bits_per_dim():
    x = grid_images(5)
    bound = evaluate_bound(model, DIFFUSION, x, seed=3)
    key = df.Noise(3).fold_in(df.noise.FOLD_EVAL_NOISE)
    expected = DIFFUSION.bound_terms(model, x, noise=key)
    torch.testing.assert_close(bound.per_image, DIFFUSION.bits_per_dim(model, x, noise=key).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(bound.terms, expected.terms.double(), rtol=0, atol=0)
    torch.testing.assert_close(bound.mse, expected.mse.double(), rtol=0, atol=0)
    assert bound.total == pytest.approx(bound.decoder + bound.divergence + float(bound.prior.mean()))


@pytest.mark.parametrize("terms", [None, 6])
@pytest.mark.parametrize("threads", [1, 2])
def test_only_the_network_rounds_differently_in_another_batch(terms, threads):
    # This model is elementwise: everything else is the same bits, noise, t, terms and errors.
    x, before = grid_images(7), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole, *others = (evaluate_bound(model, DIFFUSION, x, terms_per_image=terms, batch=batch) for batch in (7, 1, 3))
    finally:
        torch.set_num_threads(before)
    for other in others:
        for name in ("prior", "terms", "mse", "per_image"):
            assert_bits_equal(getattr(other, name), getattr(whole, name), name)


@pytest.fixture(scope="module")
def unet():
    """A small network of the real kind; noise on its weights, as a new one returns zeros."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = df.UNet(
            in_channels=1, base_channels=16, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(4,), image_size=8, norm_groups=4
        )
        with torch.no_grad():
            for weights in network.parameters():
                weights += 0.05 * torch.randn_like(weights)
    return network.eval()


@pytest.mark.slow
@pytest.mark.parametrize("terms", [None, 5])
def test_batches_and_ranks_change_a_networks_bound_by_rounding_only(unet, terms, tmp_path):
    x = torch.randint(0, 17, (11, 1, 8, 8)) / 8 - 1.0
    diffusion = df.GaussianDiffusion(df.NoiseSchedule.linear(12, 1e-3, 0.3), levels=17)
    whole = evaluate_bound(unet, diffusion, x, terms_per_image=terms)
    others = [evaluate_bound(unet, diffusion, x, terms_per_image=terms, batch=batch) for batch in (1, 4)]
    for size, batch in ((2, 4), (3, 256)):
        parts = Parts(tmp_path / str(size), {})
        evaluate = partial(evaluate_bound, unet, diffusion, x, terms_per_image=terms, batch=batch, parts=parts)
        assert play(size, lambda ranks, evaluate=evaluate: others.append(evaluate(ranks=ranks))) == [None] * size
        assert len(parts.present()) == 3  # 11 images in parts of 4, and of a third where one batch would hold them all
    assert len(others) == 2 + 2 + 3
    for other in others:
        for name in ("prior", "terms", "mse", "per_image"):
            torch.testing.assert_close(getattr(other, name), getattr(whole, name), rtol=2e-5, atol=1e-7)
        assert other.total == pytest.approx(whole.total, rel=1e-6) and other.standard_error == pytest.approx(whole.standard_error, rel=1e-5)


@pytest.mark.parametrize("terms", [None, 6])
def test_an_interrupted_evaluation_goes_on_to_the_same_bits(terms, tmp_path):
    x, calls = grid_images(10), []

    def interrupted(x, t):
        calls.append(len(x))
        if len(calls) == 2 * (terms or T) + 3:
            raise KeyboardInterrupt
        return model(x, t)

    whole = evaluate_bound(model, DIFFUSION, x, terms_per_image=terms, batch=3)
    parts = Parts(tmp_path / "parts", dict(seed=0))
    with pytest.raises(KeyboardInterrupt):
        evaluate_bound(interrupted, DIFFUSION, x, terms_per_image=terms, batch=3, parts=parts)
    assert parts.missing(10, 3) == [range(6, 9), range(9, 10)]
    seen = []
    report = lambda done, of: seen.append((done, of))  # noqa: E731
    resumed = evaluate_bound(model, DIFFUSION, x, terms_per_image=terms, batch=3, parts=parts, report=report)
    assert seen[-1] == (2 * (terms or T),) * 2  # of what was left
    for name in ("prior", "terms", "mse", "first", "counts"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name))
    with pytest.raises(ValueError, match="another run"):
        evaluate_bound(model, DIFFUSION, x, terms_per_image=terms, seed=1, parts=Parts(tmp_path / "parts", dict(seed=1)))


def test_parts_are_the_means_and_errors_of_their_images():
    bound = evaluate_bound(model, DIFFUSION, grid_images(9), terms_per_image=6)
    parts = bound.summary()
    assert parts["bits_per_dim"] == pytest.approx(parts["decoder"] + parts["divergence"] + parts["prior"])
    weighted = bound.terms * bound.counts
    divergence = weighted[:, 1:].sum(1)
    for name, values in (("decoder_", weighted[:, 0]), ("divergence_", divergence), ("prior_", bound.prior), ("", bound.per_image)):
        assert parts[f"{name}standard_error"] == pytest.approx(float(values.std()) / 3)
    assert math.isnan(evaluate_bound(model, DIFFUSION, grid_images(1)).standard_error)


def test_estimate_is_unbiased():
    # The same image many times: the spread of the estimates is that of their noise and t, so four standard errors of the
    # difference bound it.
    x = grid_images(1).expand(400, -1, -1, -1).contiguous()
    full = evaluate_bound(model, DIFFUSION, x, seed=1)
    estimate = evaluate_bound(model, DIFFUSION, x, terms_per_image=6, seed=2)
    assert estimate.terms.shape == (400, 6) and full.terms.shape == (400, T)
    assert abs(estimate.total - full.total) < 4 * math.hypot(estimate.standard_error, full.standard_error)
    assert estimate.standard_error > full.standard_error


@pytest.mark.parametrize("count", [2, 3, 7, 24, 999, 1000, None])
@pytest.mark.parametrize("length", [2, 5, 1000])
def test_intervals_cover_each_t_once(length, count):
    first, counts = intervals(length, count)
    covered = [t for a, n in zip(first.tolist(), counts.tolist(), strict=True) for t in range(a, a + n)]
    assert covered == list(range(length))
    assert first[0] == 0 and counts[0] == 1 and len(first) <= (count or length)


def test_images_by_function_and_progress():
    x, seen = grid_images(5), []
    by_function = evaluate_bound(model, DIFFUSION, lambda part: x[part], 5, batch=2, report=lambda done, of: seen.append((done, of)))
    assert torch.equal(by_function.per_image, evaluate_bound(model, DIFFUSION, x, batch=2).per_image)
    assert seen[-1] == (3 * T, 3 * T) and len(seen) == 3 * T


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(x_start=grid_images(2)[:0]), "at least one image, got none"),
        (dict(x_start=grid_images(2), batch=0), "batch must be an integer of at least 1, got 0"),
        (dict(x_start=grid_images(2), terms_per_image=1), "terms per image must be at least 2.*got 1"),
        (dict(x_start=grid_images(2), ranks=Ranks(0, 2)), "2 ranks share their work through parts, but there are none"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate_bound(model, DIFFUSION, **arguments)


def test_output_that_is_not_finite_is_named():
    def broken(x, t):
        return torch.where(t.view(-1, 1, 1, 1) == 4, float("nan"), 0.0) * x

    with pytest.raises(ValueError, match="not finite at t = 4"):
        evaluate_bound(broken, DIFFUSION, grid_images(2))


def test_measures_of_samples_on_real_digits():
    data = load_data("digits")
    test, labels = data.batch("test", slice(None))
    assert neighbour_distance_ratio(test, data) == pytest.approx(1.0)
    assert neighbour_distance_ratio(data.batch("train", slice(0, 50))[0], data) == pytest.approx(0.0, abs=1e-3)
    assert neighbour_distance_ratio(torch.randn(50, 1, 8, 8), data) > 2.0
    counts = class_counts(test, data)
    wrong = sum(abs(a - b) for a, b in zip(counts, labels.bincount().tolist(), strict=True))
    assert sum(counts) == 360 and wrong <= 14  # such a classifier errs on about 1% of the digits


@pytest.mark.parametrize("bad, got", [(float("nan"), "nan"), (200.0, "200")])
def test_bad_data_are_named_before_the_model_runs(bad, got):
    def never(x, t):
        raise AssertionError("the model ran")

    x = grid_images(3)
    x[1, 0, 2, 2] = bad
    for run in (lambda: evaluate_bound(never, DIFFUSION, x), lambda: DIFFUSION.bits_per_dim(never, x)):
        with pytest.raises(ValueError, match=rf"x_start must be finite and lie in \[-1, 1\], got a largest magnitude of {got}"):
            run()


def test_noise_tensor_for_the_whole_bound():
    x = grid_images(2)
    with pytest.raises(TypeError, match="noise must be a Noise"):
        DIFFUSION.bits_per_dim(model, x, noise=torch.randn_like(x))
