"""gaussian_kl: against torch.distributions, numerical integration and float64; near equality, at extremes, its gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_as_accurate, assert_bits_equal, assert_close_to_exact
from op_inputs import gaussian_kl_inputs as case

from ddpm_fast import gaussian_kl
from ddpm_fast.ops._gaussian_kl import exp_minus_one_minus, gaussian_kl_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One element; one short of a block; a prime number; a batch of small images.
SHAPES = [(1, 1), (1, 1023), (3, 7, 19), (4, 3, 16, 16)]


def exact_kl(mean1, logvar1, mean2, logvar2):
    """½ (l2 - l1 - 1 + e^(l1-l2) + (m1-m2)² e^-l2) in float64; loses digits near equality, which these cases are not."""
    m1, l1, m2, l2 = (x.detach().cpu().double() for x in (mean1, logvar1, mean2, logvar2))
    return 0.5 * (l2 - l1 - 1 + (l1 - l2).exp() + (m1 - m2) ** 2 * (-l2).exp())


@pytest.mark.backends("gaussian_kl")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_backend_and_dtype_is_accurate(backend, shape, dtype):
    inputs = case(shape, dtype, backend.device)
    kl = gaussian_kl(*inputs, backend=backend.name)
    assert kl.dtype == dtype and kl.shape == shape
    assert_as_accurate(kl, gaussian_kl_reference(*inputs), exact_kl(*inputs), floor=2.0)


def test_agrees_with_torch_distributions():
    mean1, logvar1, mean2, logvar2 = case((4, 50))
    p, q = (torch.distributions.Normal(m, (log_var / 2).exp()) for m, log_var in ((mean1, logvar1), (mean2, logvar2)))
    exact = torch.distributions.kl_divergence(p, q)
    # Terms up to e^8 · 50 cancel in neither form by more than a factor of 100 of their sum.
    assert_close_to_exact(gaussian_kl(mean1, logvar1, mean2, logvar2), exact, rtol=1e-12, atol=1e-13)


# Narrower, wider, shifted by several deviations.
@pytest.mark.parametrize("parameters", [(0.0, 0.0, 0.0, 0.0), (0.3, -1.0, -0.2, 0.5), (1.0, 1.2, 0.0, 0.0), (-2.0, 0.0, 2.0, -0.5)])
def test_agrees_with_numerical_integration(parameters):
    # ∫ p log(p/q): the trapezoid rule is exact to rounding for Gaussians, here over ±12 deviations.
    m1, l1, m2, l2 = parameters
    x = torch.linspace(m1 - 12 * math.exp(l1 / 2), m1 + 12 * math.exp(l1 / 2), 2001, dtype=torch.float64)
    p, q = (
        torch.distributions.Normal(*torch.tensor([m, math.exp(log_var / 2)], dtype=torch.float64)) for m, log_var in ((m1, l1), (m2, l2))
    )
    integral = torch.trapezoid(p.log_prob(x).exp() * (p.log_prob(x) - q.log_prob(x)), x)
    got = gaussian_kl(*(torch.tensor([v], dtype=torch.float64) for v in parameters))
    assert_close_to_exact(got, integral[None], rtol=1e-12, atol=1e-13)


@pytest.mark.backends("gaussian_kl")
def test_near_equality_is_exact_and_never_negative(backend):
    # d spans sixteen decades. The textbook form in fp32 returns rounding noise for d below 1e-3.
    d = torch.logspace(-15, 0.5, 4001)
    d = torch.cat([d, -d]).to(backend.device)
    zero = torch.zeros_like(d)
    kl = gaussian_kl(zero, d, zero, zero, backend=backend.name)
    assert (kl > 0).all()
    x = d.double().cpu()
    # Taylor's series of ½(e^d - 1 - d) in float64, 20 terms: relative error below 1e-15 for |d| <= 1; expm1 beyond.
    series = sum(x**k / math.factorial(k) for k in range(20, 1, -1))
    exact = 0.5 * torch.where(x.abs() < 1, series, torch.expm1(x) - x)
    assert_close_to_exact(kl, exact, ulps=6)
    textbook = 0.5 * (d.exp() - 1 - d).double().cpu()
    assert ((textbook - exact).abs() > exact).any()  # what this form is for: the textbook's is wrong by more than all


def test_equal_gaussians_are_at_distance_zero():
    mean, logvar, _, _ = case((2, 100), torch.float32)
    assert_bits_equal(gaussian_kl(mean, logvar, mean, logvar), torch.zeros(2, 100))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.floats(-30, 30, width=32), min_size=4, max_size=4), st.sampled_from([torch.float32, torch.float64]))
def test_is_never_negative_and_matches_float64(values, dtype):
    inputs = [torch.tensor([v], dtype=dtype) for v in values]
    kl = gaussian_kl(*inputs)
    assert kl >= 0
    m1, l1, m2, l2 = values
    d = l1 - l2
    series = sum(d**k / math.factorial(k) for k in range(30, 1, -1))
    exact = 0.5 * (series if abs(d) < 1 else math.expm1(d) - d) + 0.5 * (m1 - m2) ** 2 * math.exp(-l2)
    # exp of an argument up to 60 that is itself rounded multiplies the rounding by 60; so does that of l2.
    assert_close_to_exact(kl, torch.tensor([exact], dtype=torch.float64), ulps=80)


# fp32's exponential overflows beyond ±88; as a learned log-variance such values do occur in training.
@pytest.mark.parametrize("logvar", [-170.0, -100.0, -88.0, 88.0, 1000.0])
def test_equal_extreme_log_variances_give_zero(logvar):
    mean, lv = torch.zeros(2, 3, requires_grad=True), torch.full((2, 3), logvar, requires_grad=True)
    kl = gaussian_kl(mean, lv, torch.zeros(2, 3), torch.full((2, 3), logvar))
    assert_bits_equal(kl, torch.zeros(2, 3))
    for grad in torch.autograd.grad(kl.sum(), (mean, lv)):
        assert (grad == 0).all()


@pytest.mark.parametrize(
    ("logvar1", "logvar2", "expected"),
    [(-1000.0, 0.0, 499.5), (0.0, 1000.0, 499.5), (80.0, 0.0, 0.5 * math.exp(80)), (200.0, 0.0, math.inf)],
)
def test_extreme_differences_of_log_variance(logvar1, logvar2, expected):
    zero = torch.zeros(1)
    kl = gaussian_kl(zero, torch.tensor([logvar1]), zero, torch.tensor([logvar2]))
    assert_close_to_exact(kl, torch.tensor([expected], dtype=torch.float64), ulps=2)


@pytest.mark.backends("gaussian_kl")
def test_gradients_are_those_of_float64(backend):
    inputs = [x.requires_grad_() for x in case((3, 7, 19), torch.float32, backend.device)]
    grads = torch.autograd.grad(gaussian_kl(*inputs, backend=backend.name).sum(), inputs)
    baseline = torch.autograd.grad(gaussian_kl_reference(*inputs).sum(), inputs)
    m1, l1, m2, l2 = (x.detach().cpu().double() for x in inputs)
    distance, d = m1 - m2, l1 - l2
    exact = (
        distance * (-l2).exp(),
        0.5 * torch.expm1(d),
        -distance * (-l2).exp(),
        -0.5 * (torch.expm1(d) + distance**2 * (-l2).exp()),
    )
    for grad, base, truth in zip(grads, baseline, exact, strict=True):
        assert_as_accurate(grad, base, truth, floor=2.0)


def test_gradcheck():
    # d crosses both edges of the series (±0.3) and 0, where the form changes.
    logvar1 = torch.tensor([[-2.0, -0.31, -0.29, 0.0], [1e-9, 0.29, 0.31, 3.0]], dtype=torch.float64)
    mean1, _, mean2, _ = case((2, 4))
    inputs = [x.requires_grad_() for x in (mean1, logvar1, mean2, torch.zeros(2, 4, dtype=torch.float64))]
    assert torch.autograd.gradcheck(gaussian_kl, inputs)
    assert torch.autograd.gradgradcheck(gaussian_kl, inputs)


# d where expm1 is large but finite, where it overflows in fp32 on the branch not taken, and at 0.
@pytest.mark.parametrize("d", [-200.0, -60.0, 0.0, 1e-20, 60.0])
def test_gradient_is_finite_for_large_differences(d):
    logvar = torch.full((1, 1), d, requires_grad=True)
    zero = torch.zeros(1, 1)
    (grad,) = torch.autograd.grad(gaussian_kl(zero, logvar, zero, zero).sum(), logvar)
    assert_close_to_exact(grad, 0.5 * torch.expm1(logvar.detach().double()), ulps=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_series_meets_expm1_without_a_step(dtype):
    edge = torch.tensor([0.3, -0.3], dtype=dtype)
    for x in (edge, torch.nextafter(edge, torch.zeros_like(edge)), edge * 0.99, edge * 1.01):
        exact = sum(x.double() ** k / float(math.factorial(k)) for k in range(25, 1, -1))
        # expm1(d) - d cancels the leading d: its rounding is worth 2/0.3 ulps of the result, and as much again for d.
        assert_close_to_exact(exp_minus_one_minus(x), exact, ulps=14)


def test_shapes_broadcast():
    mean1, logvar1, _, _ = case((2, 3, 4))
    zero = torch.zeros(1, 1, 1, dtype=torch.float64)
    full = gaussian_kl(mean1, logvar1, zero.expand(2, 3, 4), zero.expand(2, 3, 4))
    assert_bits_equal(gaussian_kl(mean1, logvar1, zero, zero), full)
    assert_bits_equal(
        gaussian_kl(mean1, logvar1[:, :1, :1], zero, zero), gaussian_kl(mean1, logvar1[:, :1, :1].expand(2, 3, 4).contiguous(), zero, zero)
    )


def test_gradient_of_a_broadcast_argument_is_summed():
    mean1, logvar1, _, _ = case((2, 3))
    mean2 = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(gaussian_kl(mean1, logvar1, mean2, torch.zeros(2, 1, dtype=torch.float64)).sum(), mean2)
    assert_close_to_exact(grad, -mean1.sum(0, keepdim=True), rtol=1e-14)


def test_reduction_is_the_mean_over_a_sample():
    inputs = case((4, 3, 5, 5))
    reduced = gaussian_kl(*inputs, reduction="mean_per_sample")
    assert reduced.shape == (4,)
    assert_close_to_exact(reduced, gaussian_kl(*inputs).flatten(1).mean(1), rtol=1e-14)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: {"mean2": x[2].float()}, TypeError, "mean2 must have the dtype of mean1, torch.float64, got torch.float32"),
        (lambda x: {"logvar1": x[1][:, :2]}, ValueError, "shapes must broadcast against each other, got "),
        (lambda x: {"logvar2": 0.0}, TypeError, "logvar2 must be a tensor, got float"),
        (lambda x: {"mean1": x[0].long()}, TypeError, "mean1 must be float32, bfloat16, float16 or float64, got torch.int64"),
        (lambda x: {"mean1": x[0][:, :0]}, ValueError, "mean1 must have shape .* with at least one element a sample"),
        (lambda x: {"reduction": "sum"}, ValueError, "reduction must be None or 'mean_per_sample', got 'sum'"),
        (lambda x: {"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    inputs = case((2, 3))
    arguments = dict(zip(("mean1", "logvar1", "mean2", "logvar2"), inputs, strict=True)) | change(inputs)
    with pytest.raises(error, match=message):
        gaussian_kl(**arguments)
