"""vlb_terms: the bound's terms against an independent float64 version; the decoder; what must not leak; gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_as_accurate, assert_bits_equal, assert_close_to_exact
from op_inputs import VLB_TERMS_STEPS as STEPS
from op_inputs import vlb_terms_inputs as case

from ddpm_fast import GaussianDiffusion, NoiseSchedule
from ddpm_fast.diffusion.parameterisation import PREDICTIONS, VARIANCES, bound_table
from ddpm_fast.ops import discretized_gaussian_log_likelihood, vlb_terms
from ddpm_fast.ops._vlb_terms import vlb_terms_reference

LN2 = math.log(2)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One element; one short of a block; a prime number of them; a colour image.
SHAPES = [(1, 1), (2, 1023), (2, 3, 43), (2, 3, 8, 8)]


def normal_cdf(z, cdf):
    if cdf == "erf":
        return 0.5 * math.erfc(-z / math.sqrt(2))
    return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def straightforward_term(diffusion, out, x_start, x_t, t, clip=False):
    """L_t of one sample in bits per dimension, pixel by pixel, from the betas alone; float64."""
    betas = diffusion.schedule.betas.tolist()
    bar, before = math.prod(1 - b for b in betas[: t + 1]), math.prod(1 - b for b in betas[:t])
    beta, alpha = betas[t], 1 - betas[t]
    small = beta * (1 - before) / (1 - bar)
    if t == 0:  # the pinned variance: that of the second step
        both = bar * (1 - betas[1])
        pinned = betas[1] * (1 - bar) / (1 - both)
    floored = small if t else pinned
    channels = x_start.shape[0]
    total = 0.0
    for i, (x0, x) in enumerate(zip(x_start.flatten().tolist(), x_t.flatten().tolist(), strict=True)):
        value = out[:channels].flatten()[i].item()
        a, s = math.sqrt(bar), math.sqrt(1 - bar)
        guess = {"epsilon": (x - s * value) / a, "x_start": value, "v": a * x - s * value}.get(diffusion.prediction)
        c1, c2 = math.sqrt(before) * beta / (1 - bar), math.sqrt(alpha) * (1 - before) / (1 - bar)
        true_mean = c1 * x0 + c2 * x
        # Where the mean itself is predicted, no clipping of x̂0 changes it.
        mean = value if guess is None else c1 * (min(max(guess, -1.0), 1.0) if clip else guess) + c2 * x
        if diffusion.variance == "learned":
            log_variance = out[channels:].flatten()[i].item()
        elif diffusion.variance == "learned_range":
            fraction = (out[channels:].flatten()[i].item() + 1) / 2
            log_variance = fraction * math.log(beta) + (1 - fraction) * math.log(floored)
        else:
            log_variance = math.log(beta if diffusion.variance == "fixed_large" and t else floored)
        if t > 0:
            total += 0.5 * (
                log_variance
                - math.log(small)
                - 1
                + math.exp(math.log(small) - log_variance)
                + (true_mean - mean) ** 2 / math.exp(log_variance)
            )
        else:
            scale, half = math.exp(log_variance / 2), 1 / (diffusion.levels - 1)
            above = 1.0 if x0 > 0.999 else normal_cdf((x0 + half - mean) / scale, diffusion.cdf)
            below = 0.0 if x0 < -0.999 else normal_cdf((x0 - half - mean) / scale, diffusion.cdf)
            total -= math.log(max(above - below, 1e-12))
    return total / x_start.numel() / LN2


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [False, True])
def test_terms_agree_with_a_straightforward_version(prediction, variance, clip):
    diffusion = GaussianDiffusion(NoiseSchedule.linear(STEPS, 1e-3, 0.3), prediction, variance)
    out, x_start, x_t, t = case((4, 2, 5), diffusion, t=[0, 1, 17, STEPS - 1])
    exact = [straightforward_term(diffusion, out[n], x_start[n], x_t[n], int(t[n]), clip) for n in range(4)]
    got = diffusion.vlb_terms(out, x_start, x_t, t, clip=clip)
    # The textbook KL here cancels numbers of order 1; in the decoder 1 - 1e-16 is the finest probability.
    assert_close_to_exact(got, torch.tensor(exact, dtype=torch.float64), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("cdf", ["tanh", "erf"])
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_decoder_term_agrees_with_a_straightforward_version(levels, cdf):
    diffusion = GaussianDiffusion(NoiseSchedule.linear(STEPS, 1e-3, 0.3), "x_start", "learned", levels, cdf=cdf)
    out, x_start, x_t, t = case((3, 2, 20), diffusion, t=[0, 0, 0])
    exact = [straightforward_term(diffusion, out[n], x_start[n], x_t[n], 0) for n in range(3)]
    assert_close_to_exact(diffusion.vlb_terms(out, x_start, x_t, t), torch.tensor(exact, dtype=torch.float64), rtol=1e-11)


def op_arguments(backend, shape, dtype, prediction, variance):
    diffusion = GaussianDiffusion(NoiseSchedule.linear(STEPS, 1e-3, 0.3), prediction, variance)
    out, x_start, x_t, t = case(shape, diffusion, dtype, backend.device)
    table = bound_table(diffusion.schedule, prediction, variance).float().to(backend.device)
    return (out, x_start, x_t, t, table), diffusion.variance_kind


def in_float64(out, x_start, x_t, t, table):
    return out.cpu().double(), x_start.cpu().double(), x_t.cpu().double(), t.cpu(), table.cpu().double()


@pytest.mark.backends("vlb_terms")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variance", ["fixed_large", "learned", "learned_range"])
def test_every_backend_and_dtype_is_accurate(backend, variance, shape, dtype):
    arguments, kind = op_arguments(backend, shape, dtype, "epsilon", variance)
    for clip, levels, cdf in ((False, 256, "tanh"), (True, 17, "erf")):
        got = vlb_terms(*arguments, variance=kind, clip=clip, levels=levels, cdf=cdf, backend=backend.name)
        assert got.dtype == torch.float32 and got.shape == shape[:1]
        baseline = vlb_terms_reference(*arguments, kind, clip, levels, cdf, False)
        exact = vlb_terms_reference(*in_float64(*arguments), kind, clip, levels, cdf, False)
        assert_as_accurate(got, baseline, exact, floor=8.0)


@pytest.mark.backends("vlb_terms")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("variance", "detach_mean"),
    [("fixed_small", False), ("learned", False), ("learned", True), ("learned_range", False), ("learned_range", True)],
)
def test_gradient_is_that_of_float64(backend, variance, detach_mean, shape, dtype):
    arguments, kind = op_arguments(backend, shape, dtype, "epsilon", variance)
    upstream = torch.linspace(0.5, 2.0, shape[0], device=backend.device)

    def gradient(function, arguments, weight):
        out = arguments[0].detach().requires_grad_()
        return torch.autograd.grad((function(out, *arguments[1:]) * weight).sum(), out)[0]

    options = (kind, False, 256, "tanh", detach_mean)
    got = gradient(lambda *a: vlb_terms(*a, variance=kind, detach_mean=detach_mean, backend=backend.name), arguments, upstream)
    baseline = gradient(lambda *a: vlb_terms_reference(*a, *options), arguments, upstream)
    exact = gradient(lambda *a: vlb_terms_reference(*a, *options), in_float64(*arguments), upstream.cpu().double())
    assert got.dtype == dtype
    assert_as_accurate(got, baseline, exact, floor=4.0)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("t", [0, 1, STEPS - 1])
def test_gradcheck(variance, t):
    # 17 levels: bins wide enough for finite differences. At t = 0 a learned variance starts near the bins' width.
    diffusion = GaussianDiffusion(NoiseSchedule.linear(STEPS, 1e-2, 0.3), "x_start", variance, levels=17)
    out, x_start, x_t, t = case((2, 2, 3), diffusion, t=[t, t])
    assert torch.autograd.gradcheck(lambda y: diffusion.vlb_terms(y, x_start, x_t, t), out.requires_grad_())


@pytest.mark.backends("vlb_terms")
@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_detached_mean_leaves_the_value_and_the_variance_gradient(backend, variance):
    (out, *rest), kind = op_arguments(backend, (3, 2, 43), torch.float32, "epsilon", variance)
    values, grads = [], []
    for detach_mean in (False, True):
        leaf = out.detach().requires_grad_()
        value = vlb_terms(leaf, *rest, variance=kind, detach_mean=detach_mean, backend=backend.name)
        values.append(value.detach())
        grads.append(torch.autograd.grad(value.sum(), leaf)[0])
    assert_bits_equal(values[0], values[1])
    assert (grads[1][:, :2] == 0).all() and (grads[0][:, :2] != 0).any()
    assert_bits_equal(grads[0][:, 2:], grads[1][:, 2:])
    assert (grads[1][:, 2:] != 0).any()


# The decoder.


@settings(derandomize=True, deadline=None, max_examples=60)
@given(mean=st.floats(-3, 3), log_scale=st.floats(-12, 4), levels=st.sampled_from([2, 17, 256]), cdf=st.sampled_from(["tanh", "erf"]))
def test_probabilities_of_all_levels_sum_to_one(mean, log_scale, levels, cdf):
    x = torch.linspace(-1, 1, levels, dtype=torch.float64)
    log_p = discretized_gaussian_log_likelihood(
        x, torch.tensor(mean, dtype=torch.float64), torch.tensor(log_scale, dtype=torch.float64), levels, cdf
    )
    # The sum telescopes: Φ at a shared edge cancels if both bins compute the same edge. A rounding of the edge, 2^-53, is worth
    # that over the scale times the density; the floor adds at most 1e-12 a level.
    rounding = levels * (2.0**-52 + 2.0**-53 * 4 * math.exp(-log_scale) * 0.4)
    assert abs(log_p.exp().sum().item() - 1) <= levels * 1e-12 + rounding


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_bins_are_two_over_levels_less_one_wide_and_open_at_the_ends(levels):
    x = torch.linspace(-1, 1, levels, dtype=torch.float64)
    half, mean, scale = 1 / (levels - 1), 0.1, 0.7
    log_p = discretized_gaussian_log_likelihood(x, torch.tensor(mean), torch.tensor(math.log(scale), dtype=torch.float64), levels, "erf")
    normal = torch.distributions.Normal(torch.tensor(0.1, dtype=torch.float64), scale)
    edges = torch.cat([torch.tensor([-math.inf]).double(), (x[:-1] + half), torch.tensor([math.inf]).double()])
    exact = torch.diff(torch.where(edges.isinf(), edges.sign().clamp_min(0), normal.cdf(edges.nan_to_num())))
    # mean is an fp32 0.1: 1.5e-9 off.
    assert_close_to_exact(log_p.exp(), exact, atol=2e-9)


def test_far_means_fall_into_the_open_bins():
    x = torch.tensor([-1.0, 1.0])
    inside = discretized_gaussian_log_likelihood(x, torch.tensor([-50.0, 50.0]), torch.tensor(0.0), 256)
    assert_bits_equal(inside, torch.zeros(2))
    outside = discretized_gaussian_log_likelihood(x, torch.tensor([50.0, -50.0]), torch.tensor(0.0), 256)
    assert_close_to_exact(outside, torch.full((2,), math.log(1e-12), dtype=torch.float64), ulps=2)


def test_missed_bin_is_floored_and_has_no_gradient():
    mean = torch.tensor([0.5], requires_grad=True)
    log_p = discretized_gaussian_log_likelihood(torch.tensor([1 / 255]), mean, torch.tensor([-8.0]), 256)
    assert log_p.item() == pytest.approx(math.log(1e-12), rel=1e-6)
    assert torch.autograd.grad(log_p.sum(), mean)[0].item() == 0


@pytest.mark.backends("vlb_terms")
@pytest.mark.parametrize("cdf", ["tanh", "erf"])
def test_missed_bins_have_no_gradient(backend, cdf):
    """Of the mean nor of the variance: the floor is a constant."""
    table = bound_table(NoiseSchedule.linear(STEPS, 1e-3, 0.3), "x_start", "learned").float()
    x_start, t = torch.full((1, 1, 4), 1 / 255), torch.zeros(1, dtype=torch.int64)
    out = torch.tensor([[0.5, 0.25, -0.5, -1.0], [-8.0] * 4])[None]
    out, x_start, t, table = (x.to(backend.device) for x in (out, x_start, t, table))
    value = vlb_terms(out.requires_grad_(), x_start, x_start, t, table, variance="learned", cdf=cdf, backend=backend.name)
    assert value.item() == pytest.approx(-math.log2(1e-12), rel=1e-6)
    assert (torch.autograd.grad(value.sum(), out)[0] == 0).all()


@pytest.mark.backends("vlb_terms", without=("reference",))
@pytest.mark.parametrize("cdf", ["tanh", "erf"])
def test_kernels_keep_the_precision_of_narrow_bins(backend, cdf):
    """Deviations from 1 to 1000 times a bin's half-width: the difference of two CDFs in fp32 loses up to four digits there."""
    diffusion = GaussianDiffusion(NoiseSchedule.linear(STEPS, 1e-3, 0.3), "x_start", "learned")
    table = bound_table(diffusion.schedule, "x_start", "learned")
    x_start = torch.randint(1, 255, (4096, 1, 1)) / 127.5 - 1
    log_variance = torch.rand(4096, 1, 1) * 13.8 - 11.0
    deviation = torch.exp(0.5 * log_variance)
    out = torch.cat([x_start + (torch.rand(4096, 1, 1) * 6 - 3) * deviation, log_variance], 1)
    t = torch.zeros(4096, dtype=torch.int64)

    def value_and_gradient(function, out):
        out = out.detach().requires_grad_()
        value = function(out)
        grad = torch.autograd.grad(value.sum(), out)[0].cpu()
        return value.detach().cpu(), grad * torch.cat([deviation, torch.ones_like(deviation)], 1)  # of the mean in deviations

    got = value_and_gradient(
        lambda out: vlb_terms(
            *(x.to(backend.device) for x in (out, x_start, x_start, t, table.float())), variance="learned", cdf=cdf, backend=backend.name
        ),
        out,
    )
    options = ("learned", False, 256, cdf, False)
    exact = value_and_gradient(lambda out: vlb_terms_reference(out, x_start.double(), x_start.double(), t, table, *options), out.double())
    plain = value_and_gradient(lambda out: vlb_terms_reference(out, x_start, x_start, t, table.float(), *options), out)
    for name, a, e, p in zip(("value", "gradient"), got, exact, plain, strict=True):
        error, plain_error = (float((x.double() - e).abs().max()) for x in (a, p))
        assert error < 5e-6, f"{name}: {error:.2e}"  # a few ulps of numbers up to 15
        assert plain_error > 5e-4, f"{name}: the plain formula is as good, {plain_error:.2e}"


def test_tanh_cdf_is_close_to_the_exact_one():
    # Its error in Φ has a maximum of about 2e-4; a bin has two edges.
    z = torch.linspace(-6, 6, 10001, dtype=torch.float64)
    largest = (0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) - torch.special.ndtr(z)).abs().max()
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)
    tanh, erf = (
        discretized_gaussian_log_likelihood(x, x + 0.01, torch.tensor(-3.0, dtype=torch.float64), 256, cdf).exp() for cdf in ("tanh", "erf")
    )
    assert 0 < (tanh - erf).abs().max() <= 2 * largest < 5e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("raw", [-1000.0, -178.0, -100.0, -40.0, 40.0, 100.0, 1000.0])
def test_extreme_log_variances_give_no_nan(raw, dtype):
    diffusion = GaussianDiffusion(NoiseSchedule.linear(1000), "x_start", "learned")
    x_start = torch.tensor([-1.0, 1.0, 1 / 255, 1 / 255, 101 / 255], dtype=dtype).expand(2, 1, 5)
    out = torch.cat([x_start, torch.full_like(x_start, raw)], 1)
    out[:, 0, 3] += 0.3  # a bin that is missed
    out.requires_grad_()
    value = diffusion.vlb_terms(out, x_start, x_start, torch.tensor([0, 500]))
    assert value[0].isfinite()
    grad = torch.autograd.grad(value.sum(), out)[0]
    assert grad[0].isfinite().all()
    if abs(raw) < 176 or dtype == torch.float64:  # beyond it the inverse deviation e^88 overflows fp32, and with it the KL
        assert not value.isnan().any() and not grad.isnan().any()
    if raw <= -40:  # all mass in the right bin but for the missed one, which costs the floor
        assert value[0].item() == pytest.approx(-math.log2(1e-12) / 5, rel=1e-5)


def test_decoder_variance_at_zero_and_what_the_other_rule_costs():
    # A guess one grey level off. With the variance of t = 1, as pinned, this is an ordinary miss; with log 1e-20 it is the floor:
    # 39.86 bits for the dimension.
    schedule = NoiseSchedule.linear(1000)
    diffusion = GaussianDiffusion(schedule, "x_start", "fixed_small", cdf="erf")
    x_start = torch.full((1, 1, 1), 1 / 255, dtype=torch.float64)
    t = torch.zeros(1, dtype=torch.int64)
    pinned = diffusion.vlb_terms(x_start + 2 / 255, x_start, x_start, t)
    sigma = math.sqrt(schedule.posterior_variance[1].item())
    bin_mass = normal_cdf(-1 / 255 / sigma, "erf") - normal_cdf(-3 / 255 / sigma, "erf")
    assert pinned.item() == pytest.approx(-math.log2(bin_mass), rel=1e-9)
    other = (
        -discretized_gaussian_log_likelihood(
            x_start, x_start + 2 / 255, torch.tensor(0.5 * math.log(1e-20), dtype=torch.float64), 256, "erf"
        )
        / LN2
    )
    assert other.item() == pytest.approx(39.863, abs=1e-3)
    assert other.item() - pinned.item() > 35
    large = GaussianDiffusion(schedule, "x_start", "fixed_large", cdf="erf").vlb_terms(x_start + 2 / 255, x_start, x_start, t)
    assert_bits_equal(large, pinned)


# t = 0 is selected, never multiplied.


@pytest.mark.backends("vlb_terms")
def test_infinity_in_the_branch_not_taken_does_not_leak(backend):
    # Sample 0 is decoded, sample 1 has a KL. For sample 0 the KL would be infinite (variance e^-1000); for sample 1 the decoder would
    # be given x_start far off its grid. Neither may be seen, nor its gradient.
    table = bound_table(NoiseSchedule.linear(STEPS), "x_start", "learned").float().to(backend.device)
    x_start = torch.zeros(2, 1, 4, device=backend.device)
    x_start[1] = 1e30
    x_t = x_start.clone()
    out = torch.cat([x_start, torch.zeros_like(x_start)], 1)
    out[0, 1] = -1000.0
    out.requires_grad_()
    t = torch.tensor([0, 5], device=backend.device)
    value = vlb_terms(out, x_start, x_t, t, table, variance="learned", backend=backend.name)
    assert value.isfinite().all()
    assert torch.autograd.grad(value.sum(), out)[0].isfinite().all()


@pytest.mark.backends("vlb_terms")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("row", [0, 1])
def test_a_broken_sample_does_not_touch_the_others(backend, row, bad):
    arguments, kind = op_arguments(backend, (3, 2, 13), torch.float32, "epsilon", "learned_range")
    clean = arguments[0].detach().requires_grad_()
    broken = arguments[0].clone()
    broken[row] = bad
    broken.requires_grad_()
    values = [vlb_terms(out, *arguments[1:], variance=kind, backend=backend.name) for out in (clean, broken)]
    grads = [torch.autograd.grad(value.sum(), out)[0] for value, out in zip(values, (clean, broken), strict=True)]
    others = [n for n in range(3) if n != row]
    assert_bits_equal(values[1][others], values[0][others])
    assert_bits_equal(grads[1][others], grads[0][others])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"levels": 1}, ValueError, "levels must lie in 2..2000, got 1"),
        ({"cdf": "gelu"}, ValueError, "cdf must be one of tanh, erf, got 'gelu'"),
        ({"variance": "large"}, ValueError, "variance must be one of fixed, learned, learned_range, got 'large'"),
        ({"variance": "learned"}, ValueError, r"the model output must have shape \(2, 6\) for a learned variance, got \(2, 3\)"),
        ({"x_start": torch.zeros(2, 4)}, ValueError, r"x_start must have the shape of x_t, \(2, 3\), got \(2, 4\)"),
        ({"x_start": torch.zeros(2, 3).half()}, TypeError, "x_start must have the dtype of x_t, torch.float32, got torch.float16"),
        ({"t": torch.tensor([0, -1])}, ValueError, r"t must lie in 0..3, got t\[1\] = -1"),
        ({"table": torch.zeros(4, 3)}, ValueError, r"table must have shape \(4, 8\), got \(4, 3\)"),
        ({"backend": "tpu"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {
        "model_output": torch.zeros(2, 3),
        "x_start": torch.zeros(2, 3),
        "x_t": torch.zeros(2, 3),
        "t": torch.tensor([0, 1]),
        "table": torch.zeros(4, 8),
    }
    with pytest.raises(error, match=message):
        vlb_terms(**(arguments | change))
