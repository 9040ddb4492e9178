"""Gradients of q_sample: signal[t]·g to x_start and sigma[t]·g to a noise tensor, from every path there is to them."""

import pytest
import torch
from numerics import assert_as_accurate, assert_bits_equal, assert_close_to_exact
from op_cases import KEY
from op_inputs import Q_SAMPLE_SHAPES as SHAPES
from op_inputs import exact_q_sample as exact
from op_inputs import q_sample_inputs as case

from ddpm_fast.ops import q_sample
from ddpm_fast.ops._q_sample import q_sample_reference, scale_rows, scale_rows_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def leaves(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


@pytest.mark.backends("q_sample")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_formula_in_float64(shape, dtype, backend):
    x, t, signal, sigma = case(shape, dtype, backend.device)
    x, noise = leaves(x, torch.randn_like(x))
    weight = torch.randn_like(x)
    q_sample(x, t, signal, sigma, noise, backend=backend.name).backward(weight)

    baseline_x, baseline_noise = leaves(x, noise)
    q_sample_reference(baseline_x, t, signal, sigma, baseline_noise).backward(weight)
    zero = torch.zeros_like(x)
    for actual, baseline, truth in (
        (x.grad, baseline_x.grad, exact(weight, t, signal, sigma, zero)),
        (noise.grad, baseline_noise.grad, exact(zero, t, signal, sigma, weight)),
    ):
        assert_as_accurate(actual.cpu(), baseline.cpu(), truth.cpu())


@pytest.mark.backends("q_sample")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_of_the_references_gradient_with_generated_noise(shape, backend):
    x, t, signal, sigma = case(shape, torch.float32, backend.device)
    actual, baseline = leaves(x, x)
    weight = torch.randn_like(x)
    q_sample(actual, t, signal, sigma, KEY, backend=backend.name).backward(weight)
    q_sample_reference(baseline, t, signal, sigma, KEY).backward(weight)
    assert_bits_equal(actual.grad, baseline.grad)


@pytest.mark.parametrize("given", ["generated", "tensor"])
def test_gradcheck_in_float64(given):
    x, t, signal, sigma = case((3, 2, 5), torch.float64)
    if given == "generated":
        inputs, call = leaves(x), lambda x: q_sample(x, t, signal, sigma, KEY)
    else:
        inputs, call = leaves(x, torch.randn_like(x)), lambda x, noise: q_sample(x, t, signal, sigma, noise)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def second_derivatives(x, t, signal, sigma, noise, backend):
    """Of L = Σ x_t³/6: gradients of Σ (dL/dx)² + Σ (dL/dε)²."""
    x, noise = leaves(x, noise)
    x_t = q_sample(x, t, signal, sigma, noise, backend=backend)
    first = torch.autograd.grad((x_t**3).sum() / 6, (x, noise), create_graph=True)
    return torch.autograd.grad(sum((grad**2).sum() for grad in first), (x, noise))


@pytest.mark.backends("q_sample")
def test_second_derivatives(backend):
    x, t, signal, sigma = case((4, 300), torch.float32, backend.device)
    noise = torch.randn_like(x)
    a, b = signal.double()[t][:, None], sigma.double()[t][:, None]
    common = (a**2 + b**2) * exact(x, t, signal, sigma, noise) ** 3  # dL/dx = a x_t²/2, dL/dε = b x_t²/2
    actual = second_derivatives(x, t, signal, sigma, noise, backend.name)
    baseline = second_derivatives(x, t, signal, sigma, noise, "reference")
    for value, base, truth in zip(actual, baseline, (common * a, common * b), strict=True):
        assert_as_accurate(value.cpu(), base.cpu(), truth.cpu())
    in_float64 = second_derivatives(
        *(value.double() if value.is_floating_point() else value for value in (x, t, signal, sigma, noise)), None
    )
    for value, truth in zip(in_float64, (common * a, common * b), strict=True):
        assert_close_to_exact(value, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.backends("q_sample")
def test_only_what_is_asked_for(backend):
    x, t, signal, sigma = case((3, 1030), torch.float32, backend.device)
    noise, weight = torch.randn_like(x), torch.randn_like(x)
    call = lambda x, noise: q_sample(x, t, signal, sigma, noise, backend=backend.name)  # noqa: E731
    assert not call(x, noise).requires_grad

    both = leaves(x, noise)
    call(*both).backward(weight)
    x_alone, noise_alone = leaves(x, noise)
    call(x_alone, noise).backward(weight)
    call(x, noise_alone).backward(weight)
    assert x.grad is None and noise.grad is None
    assert_bits_equal(x_alone.grad, both[0].grad)
    assert_bits_equal(noise_alone.grad, both[1].grad)

    with torch.no_grad():
        assert not call(*both).requires_grad
    with torch.inference_mode():
        assert_bits_equal(call(x, noise), call(x, noise))


@pytest.mark.backends("q_sample")
def test_one_tensor_as_data_and_noise(backend):
    x, t, signal, sigma = case((3, 77), torch.float32, backend.device)
    (both,) = leaves(x)
    weight = torch.randn_like(x)
    q_sample(both, t, signal, sigma, both, backend=backend.name).backward(weight)
    x, noise = leaves(both, both)
    q_sample(x, t, signal, sigma, noise, backend=backend.name).backward(weight)
    assert_bits_equal(both.grad, x.grad + noise.grad)


@pytest.mark.backends("q_sample")
def test_tables_get_no_gradient(backend):
    x, t, signal, sigma = case((3, 7), torch.float32, backend.device)
    (x,) = leaves(x)
    q_sample(x, t, signal, sigma, KEY, backend=backend.name).sum().backward()
    assert not signal.requires_grad and signal.grad is None and sigma.grad is None


@pytest.mark.backends("q_sample")
def test_layouts_of_inputs_and_of_the_gradient(backend):
    x, t, signal, sigma = case((4, 3, 8, 6), torch.float32, backend.device)
    weight = torch.randn_like(x)
    (dense,) = leaves(x)
    q_sample(dense, t, signal, sigma, KEY, backend=backend.name).backward(weight)
    (last,) = leaves(x.to(memory_format=torch.channels_last))
    q_sample(last, t, signal, sigma, KEY, backend=backend.name).backward(weight.to(memory_format=torch.channels_last))
    assert_bits_equal(last.grad.contiguous(), dense.grad)
    (summed,) = leaves(x)
    q_sample(summed, t, signal, sigma, KEY, backend=backend.name).sum().backward()  # a gradient with strides of zero
    assert_bits_equal(summed.grad, signal[t].view(-1, 1, 1, 1).expand_as(x).contiguous())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_rows_is_its_reference_to_the_bit(dtype, isa):
    x, t, signal, _ = case((3, 1025), dtype)
    assert_bits_equal(scale_rows(x, t, signal), scale_rows_reference(x, t, signal))


def test_saves_no_activation():
    """What a training step holds for backward: t and two tables, whatever the image's size."""
    x, t, signal, sigma = case((2, 3, 64, 64), torch.float32)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor.numel()) or tensor, lambda tensor: tensor):
        q_sample(*leaves(x), t, signal, sigma, KEY)
    assert sorted(held) == [2, 1000, 1000]
