"""q_sample: each backend against float64, fp32 bits against the reference, noise given and generated, and errors.

Gradients are in test_q_sample_grad.py; torch.compile, processes and threads in test_ops_compile.py and test_ops_system.py.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_as_accurate, assert_bits_equal
from op_cases import KEY
from op_inputs import Q_SAMPLE_SHAPES as SHAPES
from op_inputs import Q_SAMPLE_STEPS as STEPS
from op_inputs import exact_q_sample as exact
from op_inputs import q_sample_inputs as case

from ddpm_fast import Noise
from ddpm_fast.ops import q_sample, randn
from ddpm_fast.ops._q_sample import q_sample_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.backends("q_sample")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("given", ["generated", "tensor"])
def test_against_float64(shape, dtype, backend, given):
    x, t, signal, sigma = case(shape, dtype, backend.device)
    epsilon = randn(shape, KEY, backend="reference").to(backend.device)  # generated noise stays fp32
    noise = KEY if given == "generated" else epsilon.to(dtype)
    out = q_sample(x, t, signal, sigma, noise, backend=backend.name)
    assert out.is_contiguous()
    assert out.device == x.device
    truth = exact(x, t, signal, sigma, epsilon if given == "generated" else noise)
    assert_as_accurate(out.cpu(), q_sample_reference(x, t, signal, sigma, noise).cpu(), truth.cpu())


@pytest.mark.backends("q_sample")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_of_the_reference(shape, dtype, backend):
    """Same roundings in the same order, and noise that agrees to the last bit: nothing is left to differ."""
    x, t, signal, sigma = case(shape, dtype)
    for noise in (KEY, randn(shape, KEY, dtype=dtype)):
        there = noise if isinstance(noise, Noise) else noise.to(backend.device)
        arguments = [value.to(backend.device) for value in (x, t, signal, sigma)]
        out = q_sample(*arguments, there, backend=backend.name)
        assert_bits_equal(out.cpu(), q_sample_reference(x, t, signal, sigma, noise))


@pytest.mark.backends("q_sample")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_generated_noise_is_the_materialised_tensor(shape, backend):
    x, t, signal, sigma = case(shape, torch.float32, backend.device)
    noise = KEY.materialize(shape, backend.device)
    generated = q_sample(x, t, signal, sigma, KEY, backend=backend.name)
    assert_bits_equal(generated, q_sample(x, t, signal, sigma, noise, backend=backend.name))


@pytest.mark.parametrize("given", ["generated", "tensor"])
def test_float64_goes_to_the_reference(given):
    x, t, signal, sigma = case((3, 5, 7), torch.float64)
    noise = KEY if given == "generated" else torch.randn(3, 5, 7, dtype=torch.float64)
    epsilon = KEY.materialize((3, 5, 7)) if given == "generated" else noise
    truth = exact(x, t, signal, sigma, epsilon)
    assert_bits_equal(q_sample(x, t, signal, sigma, noise), truth)


@pytest.mark.backends("q_sample")
def test_each_sample_takes_its_own_row(backend):
    """Tables of whole numbers, so that a row taken by a neighbour cannot hide in a tolerance."""
    x = torch.ones(4, 1025, device=backend.device)
    signal, sigma = (torch.tensor(rows, device=backend.device) for rows in ([1.0, 2, 4, 8], [16.0, 32, 64, 128]))
    t = torch.tensor([3, 0, 2, 3], device=backend.device)
    out = q_sample(x, t, signal, sigma, torch.full_like(x, 256), backend=backend.name)
    assert out[:, 0].tolist() == [8 + 256 * 128, 1 + 256 * 16, 4 + 256 * 64, 8 + 256 * 128]
    assert (out == out[:, :1]).all()


@pytest.mark.backends("q_sample")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_first_and_last_step_are_what_the_paper_says(dtype, backend):
    """t = 0 is almost the data, and in bf16 still has its noise; t = T-1 is almost the noise."""
    x, _, signal, sigma = case((2, 4096), dtype, backend.device)
    t = torch.tensor([0, STEPS - 1], device=backend.device)
    out = q_sample(torch.zeros_like(x), t, signal, sigma, KEY, backend=backend.name).double()
    epsilon = randn((2, 4096), KEY).to(backend.device).double()
    assert abs(float(out[0].std() / epsilon[0].std()) - 1e-2) < 1e-4  # √β_0
    assert abs(float(out[1].std() / epsilon[1].std()) - 1) < 1e-3


@pytest.mark.backends("q_sample")
def test_input_layout_does_not_matter(backend):
    x, t, signal, sigma = case((4, 3, 8, 6), torch.float32, backend.device)
    dense = q_sample(x, t, signal, sigma, KEY, backend=backend.name)
    wide = torch.empty(4, 3, 8, 12, device=x.device)[..., ::2].copy_(x)
    turned = x.transpose(1, 3).contiguous().transpose(1, 3)
    for other in (x.to(memory_format=torch.channels_last), wide, turned):
        assert not other.is_contiguous()
        out = q_sample(other, t, signal, sigma, KEY, backend=backend.name)
        assert out.is_contiguous()
        assert_bits_equal(out, dense)
    every_other = torch.stack([t, torch.full_like(t, 999)], 1)[:, 0]
    assert not every_other.is_contiguous()
    assert_bits_equal(q_sample(x, every_other, signal, sigma, KEY, backend=backend.name), dense)
    noise = KEY.materialize(x.shape, x.device).to(memory_format=torch.channels_last)
    assert_bits_equal(q_sample(x, t, signal, sigma, noise, backend=backend.name), dense)
    one = x[:1].expand(4, -1, -1, -1)
    assert_bits_equal(q_sample(one, t, signal, sigma, KEY, backend=backend.name), q_sample(one.contiguous(), t, signal, sigma, KEY))


@pytest.mark.backends("q_sample")
def test_memory_that_is_not_aligned(backend):
    """A view that starts one element into its storage: no kernel may assume 16 bytes."""
    for dtype in DTYPES:
        x, t, signal, sigma = case((2, 1028), dtype, backend.device)
        storage = torch.empty(x.numel() + 1, dtype=dtype, device=x.device)
        shifted = storage[1:].view(x.shape).copy_(x)
        assert_bits_equal(q_sample(shifted, t, signal, sigma, KEY, backend=backend.name), q_sample(x, t, signal, sigma, KEY))


@pytest.mark.backends("q_sample")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_stay_in_their_element(value, backend):
    x, t, signal, sigma = case((2, 1030), torch.float32, backend.device)
    x[1, 1025] = value
    out = q_sample(x, t, signal, sigma, KEY, backend=backend.name)
    assert (~out.isfinite()).nonzero().tolist() == [[1, 1025]]
    assert_as_accurate(
        out.cpu(), q_sample_reference(x, t, signal, sigma, KEY).cpu(), exact(x, t, signal, sigma, randn(x.shape, KEY).to(x.device)).cpu()
    )


def test_inputs_are_not_written_to():
    x, t, signal, sigma = case((3, 1025), torch.float32)
    noise = torch.randn_like(x)
    inputs = [x, t, signal, sigma, noise]
    before = [value.clone() for value in inputs]
    q_sample(*inputs)
    for value, copy in zip(inputs, before, strict=True):
        assert_bits_equal(value, copy)


def test_two_steps_of_the_chain_have_the_closed_forms_moments():
    """Ho eq. 2 applied twice with fresh noise is eq. 4: mean √(ᾱ₁) x₀ and variance 1-ᾱ₁."""
    betas = torch.tensor([0.1, 0.3], dtype=torch.float64)
    signal, sigma = (1 - betas).sqrt().float(), betas.sqrt().float()
    x = torch.full((1, 1 << 20), 0.5)
    for step in range(2):
        x = q_sample(x, torch.tensor([step]), signal, sigma, KEY.at(stream=step))
    alpha_bar = 0.9 * 0.7
    standard_error = math.sqrt((1 - alpha_bar) / x.numel())
    assert abs(float(x.double().mean()) - 0.5 * math.sqrt(alpha_bar)) < 4 * standard_error
    assert abs(float(x.double().var()) / (1 - alpha_bar) - 1) < 4 * math.sqrt(2 / x.numel())


@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=4).filter(lambda s: math.prod(s) < 20_000),
    dtype=st.sampled_from(DTYPES),
    rows=st.lists(st.tuples(st.floats(-2, 2, width=32), st.floats(0, 2, width=32)), min_size=1, max_size=8),
    key=st.builds(Noise, st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)),
    as_tensor=st.booleans(),
    data=st.data(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_shape_table_key_and_t(shape, dtype, rows, key, as_tensor, data):
    signal, sigma = (torch.tensor(column) for column in zip(*rows, strict=True))
    t = torch.tensor(data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=shape[0], max_size=shape[0])))
    x = torch.randn(shape).to(dtype)
    noise = randn(shape, key, dtype=dtype) if as_tensor else key
    epsilon = noise if as_tensor else randn(shape, key)
    out, baseline = q_sample(x, t, signal, sigma, noise), q_sample_reference(x, t, signal, sigma, noise)
    assert_bits_equal(out, baseline)
    assert_as_accurate(out, baseline, exact(x, t, signal, sigma, epsilon))


def refused(change):
    """A good call with one argument changed."""
    x, t, signal, sigma = case((4, 6), torch.float32)
    good = dict(x_start=x, t=t, signal=signal, sigma=sigma, noise=torch.randn_like(x))
    return q_sample(**(good | change(good)))


ERRORS = [
    (lambda a: dict(x_start=[1.0]), TypeError, "x_start must be a tensor, got list"),
    (lambda a: dict(x_start=a["x_start"].int()), TypeError, r"x_start must be float32, bfloat16, float16 or float64, got torch\.int32"),
    (lambda a: dict(x_start=a["x_start"][:0]), ValueError, r"t must have shape \(0,\), got \(4,\)"),
    (lambda a: dict(x_start=a["x_start"][:, :0]), ValueError, r"at least one element a sample, got \(4, 0\)"),
    (lambda a: dict(x_start=torch.tensor(1.0)), ValueError, r"at least one element a sample, got \(\)"),
    (lambda a: dict(t=3), TypeError, "t must be a tensor, got int"),
    (lambda a: dict(t=a["t"].float()), TypeError, r"t must be int64, got torch\.float32"),
    (lambda a: dict(t=a["t"].int()), TypeError, r"t must be int64, got torch\.int32"),
    (lambda a: dict(t=a["t"][:2]), ValueError, r"t must have shape \(4,\), got \(2,\)"),
    (lambda a: dict(t=a["t"][:, None]), ValueError, r"t must have shape \(4,\), got \(4, 1\)"),
    (lambda a: dict(t=torch.tensor([0, 5, 1000, 2])), ValueError, r"t must lie in 0\.\.999, got t\[2\] = 1000"),
    (lambda a: dict(t=torch.tensor([0, -1, 3, 2])), ValueError, r"t must lie in 0\.\.999, got t\[1\] = -1"),
    (lambda a: dict(t=a["t"].to("meta")), ValueError, "t must be on the device of x_start, cpu, got meta"),
    (lambda a: dict(signal=[0.5]), TypeError, "signal must be a tensor, got list"),
    (lambda a: dict(signal=a["signal"].double()), TypeError, r"signal must be torch\.float32 for torch\.float32 data, got torch\.float64"),
    (lambda a: dict(sigma=a["sigma"].half()), TypeError, r"sigma must be torch\.float32 for torch\.float32 data, got torch\.float16"),
    (
        lambda a: dict(x_start=a["x_start"].double()),
        TypeError,
        r"signal must be torch\.float64 for torch\.float64 data, got torch\.float32",
    ),
    (lambda a: dict(signal=a["signal"][None]), ValueError, r"signal must have shape \(T,\), got \(1, 1000\)"),
    (lambda a: dict(sigma=a["sigma"][:10]), ValueError, r"sigma must have shape \(1000,\), got \(10,\)"),
    (lambda a: dict(signal=torch.ones(2000)[::2]), ValueError, "signal must be contiguous"),
    (lambda a: dict(sigma=a["sigma"].to("meta")), ValueError, "sigma must be on the device of x_start, cpu, got meta"),
    (lambda a: dict(noise=0), TypeError, "noise must be a Noise or a tensor, got int"),
    (lambda a: dict(noise=None), TypeError, "noise must be a Noise or a tensor, got NoneType"),
    (lambda a: dict(noise=a["noise"][:1]), ValueError, r"noise must have the shape of x_start, \(4, 6\), got \(1, 6\)"),
    (lambda a: dict(noise=a["noise"].half()), TypeError, r"noise must have the dtype of x_start, torch\.float32, got torch\.float16"),
    (lambda a: dict(noise=a["noise"].to("meta")), ValueError, "noise must be on the device of x_start, cpu, got meta"),
    (lambda a: dict(backend="c++"), ValueError, r"backend must be one of reference, cpu, triton, cuda, got 'c\+\+'"),
]


@pytest.mark.parametrize("change, error, message", ERRORS, ids=[message.replace("\\", "") for *_, message in ERRORS])
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        refused(change)


def test_sample_of_more_elements_than_noise_can_number():
    x = torch.empty(1, device="meta").expand(1, 2**34 + 1)
    table = torch.empty(3, device="meta")
    with pytest.raises(ValueError, match=r"a sample may have at most 2\^34 elements with Noise, got 17179869185"):
        q_sample(x, torch.zeros(1, dtype=torch.int64, device="meta"), table, table, KEY)


def test_forced_backends_that_cannot_do_it():
    x, t, signal, sigma = case((2, 6), torch.float64)
    with pytest.raises(ValueError, match=r"backend 'cpu' of q_sample takes float32, bfloat16 or float16, got torch\.float64"):
        q_sample(x, t, signal, sigma, KEY, backend="cpu")
    assert_bits_equal(q_sample(x, t, signal, sigma, KEY, backend="reference"), q_sample(x, t, signal, sigma, KEY))
