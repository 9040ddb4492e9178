"""simple_loss: every backend against float64, its gradient, the half it must not read, and what it refuses."""

import pytest
import torch
from numerics import assert_as_accurate, assert_bits_equal, assert_close_to_exact
from op_inputs import SIMPLE_LOSS_STEPS as T
from op_inputs import simple_loss_inputs as case

from ddpm_fast import GaussianDiffusion, Noise, NoiseSchedule
from ddpm_fast.diffusion.parameterisation import PREDICTIONS
from ddpm_fast.ops import simple_loss
from ddpm_fast.ops._simple_loss import simple_loss_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One element; one short of a block; a prime number of them; small colour images.
SHAPES = [(1, 1), (3, 1023), (2, 3, 43), (4, 3, 16, 16)]


def exact_loss(out, x_start, t, tables, noise):
    """Sample by sample, in float64."""
    losses = []
    for n in range(x_start.shape[0]):
        weight, c0, c1 = (float(table[t[n]]) for table in tables)
        target = c0 * x_start[n].double().cpu() + c1 * noise[n].double().cpu()
        losses.append(weight * ((out[n, : x_start.shape[1]].double().cpu() - target) ** 2).mean())
    return torch.stack(losses)


@pytest.mark.backends("simple_loss")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_backend_and_dtype_is_accurate(backend, shape, dtype):
    out, x_start, t, tables, noise = case(shape, dtype, backend.device)
    loss = simple_loss(out, x_start, t, *tables, noise, backend=backend.name)
    assert loss.dtype == torch.float32 and loss.shape == shape[:1]
    baseline = simple_loss_reference(out, x_start, t, *tables, noise)
    # 4 ulps: the order of the sum is free, and the reference's own may happen to be lucky.
    assert_as_accurate(loss, baseline, exact_loss(out, x_start, t, tables, noise), floor=4.0)


@pytest.mark.backends("simple_loss")
@pytest.mark.parametrize("dtype", DTYPES)
def test_generated_noise_is_the_materialised_one(backend, dtype):
    out, x_start, t, tables, _ = case((3, 2, 13), dtype, backend.device)
    noise = Noise(11, stream=4, first_sample=100)
    loss = simple_loss(out, x_start, t, *tables, noise, backend=backend.name)
    written = noise.materialize(x_start.shape, backend.device)  # fp32: the noise is not rounded to the data's dtype
    exact = exact_loss(out, x_start, t, tables, written)
    assert_as_accurate(loss, simple_loss_reference(out, x_start, t, *tables, noise), exact, floor=4.0)


@pytest.mark.backends("simple_loss")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("generated", [False, True], ids=["tensor", "Noise"])
def test_gradient_is_that_of_float64(backend, shape, dtype, generated):
    out, x_start, t, tables, noise = case(shape, dtype, backend.device)
    given = Noise(5, first_sample=3) if generated else noise
    written = given.materialize(shape, backend.device) if generated else noise
    out.requires_grad_()
    upstream = torch.linspace(0.5, 2.0, shape[0], device=backend.device)
    (grad,) = torch.autograd.grad((simple_loss(out, x_start, t, *tables, given, backend=backend.name) * upstream).sum(), out)
    (baseline,) = torch.autograd.grad((simple_loss_reference(out, x_start, t, *tables, given) * upstream).sum(), out)
    exact_out = out.detach().cpu().double().requires_grad_()
    (exact,) = torch.autograd.grad((exact_loss(exact_out, x_start, t, tables, written) * upstream.double().cpu()).sum(), exact_out)
    assert grad.dtype == dtype
    assert_as_accurate(grad, baseline, exact, floor=2.0)


@pytest.mark.backends("simple_loss")
def test_variance_half_is_not_read_and_gets_no_gradient(backend):
    out, x_start, t, tables, noise = case((3, 2, 13), torch.float32, backend.device, doubled=True)
    alone = simple_loss(out[:, :2].contiguous(), x_start, t, *tables, noise, backend=backend.name)
    out[:, 2:] = torch.nan
    out.requires_grad_()
    loss = simple_loss(out, x_start, t, *tables, noise, backend=backend.name)
    assert_close_to_exact(loss, alone.double(), ulps=2)
    (grad,) = torch.autograd.grad(loss.sum(), out)
    assert (grad[:, 2:] == 0).all() and grad[:, :2].isfinite().all() and (grad[:, :2] != 0).any()


@pytest.mark.backends("simple_loss")
@pytest.mark.parametrize(
    ("out_dtype", "data_dtype"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_output_and_data_may_differ_in_dtype(backend, out_dtype, data_dtype):
    # Autocast gives a half-precision output for fp32 data.
    out, x_start, t, tables, noise = case((3, 2, 13), data_dtype, backend.device)
    out = out.to(out_dtype).requires_grad_()
    loss = simple_loss(out, x_start, t, *tables, noise, backend=backend.name)
    assert loss.dtype == torch.float32
    assert_close_to_exact(loss, exact_loss(out.detach(), x_start, t, tables, noise), ulps=16)
    (grad,) = torch.autograd.grad(loss.sum(), out)
    assert grad.dtype == out_dtype and grad.isfinite().all()


@pytest.mark.backends("simple_loss")
def test_strided_input_gives_the_same_as_contiguous(backend):
    out, x_start, t, tables, noise = case((2, 3, 4, 6), torch.float32, backend.device)
    expected = simple_loss(out, x_start, t, *tables, noise, backend=backend.name)
    strided = [x.to(memory_format=torch.channels_last) for x in (out, x_start, noise)]
    got = simple_loss(strided[0], strided[1], t, *tables, strided[2], backend=backend.name)
    assert_close_to_exact(got, expected.double(), ulps=4)


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)
    out, x_start, noise = (torch.randn(3, 2, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    tables = [torch.rand(T, generator=generator, dtype=torch.float64) for _ in range(3)]
    t = torch.tensor([0, 3, T - 1])
    assert torch.autograd.gradcheck(lambda y: simple_loss(y, x_start, t, *tables, noise), out.requires_grad_())


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_output_has_no_loss_and_no_gradient(prediction):
    diffusion = GaussianDiffusion(NoiseSchedule.linear(20), prediction)
    x_start = torch.rand(20, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    t, noise = torch.arange(20), Noise(3)
    out = diffusion.target(x_start, t, noise).requires_grad_()
    loss = diffusion.simple_loss(out, x_start, t, noise)
    assert_bits_equal(loss, torch.zeros(20, dtype=torch.float64))
    assert (torch.autograd.grad(loss.sum(), out)[0] == 0).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_an_output_off_by_a_constant_has_its_square_as_loss(prediction):
    diffusion = GaussianDiffusion(NoiseSchedule.linear(20), prediction)
    x_start = torch.rand(20, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    t, noise = torch.arange(20), Noise(3)
    out = diffusion.target(x_start, t, noise) + 0.25
    exact = torch.full((20,), 0.0625, dtype=torch.float64)
    assert_close_to_exact(diffusion.simple_loss(out, x_start, t, noise), exact, rtol=1e-13)
    weights = torch.linspace(1, 2, 20, dtype=torch.float64)
    one, zero = torch.ones(20, dtype=torch.float64), torch.zeros(20, dtype=torch.float64)
    assert_close_to_exact(simple_loss(x_start + 0.25, x_start, t, weights, one, zero, noise), exact * weights, rtol=1e-13)


def test_global_random_state_is_not_touched():
    before = torch.get_rng_state()
    out, x_start, t, tables, _ = case((2, 3, 4))
    simple_loss(out, x_start, t, *tables, Noise(1))
    assert_bits_equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_output": torch.zeros(2, 5)}, ValueError, r"the model output must have shape \(2, 3\) or \(2, 6\), got \(2, 5\)"),
        ({"model_output": [0.0]}, TypeError, "the model output must be a tensor, got list"),
        ({"model_output": torch.zeros(2, 3).int()}, TypeError, "the model output must be float32, .* got torch.int32"),
        ({"x_start": torch.zeros(2, 3).int()}, TypeError, "x_start must be float32, .* got torch.int32"),
        (
            {"x_start": torch.zeros(2), "model_output": torch.zeros(2), "noise": torch.zeros(2)},
            ValueError,
            r"x_start must have shape \(N, C, ...\), got \(2,\)",
        ),
        ({"t": torch.tensor([0, T])}, ValueError, r"t must lie in 0..6, got t\[1\] = 7"),
        ({"t": torch.tensor([-1, 0])}, ValueError, r"t must lie in 0..6, got t\[0\] = -1"),
        ({"t": torch.tensor([0])}, ValueError, r"t must have shape \(2,\), got \(1,\)"),
        ({"t": torch.tensor([0.0, 1.0])}, TypeError, "t must be int64, got torch.float32"),
        ({"weight": torch.zeros(T).double()}, TypeError, "weight must be torch.float32 for torch.float32 data, got torch.float64"),
        ({"weight": torch.zeros(T, 2)}, ValueError, r"weight must have shape \(T,\), got \(7, 2\)"),
        ({"noise_coef": torch.zeros(T + 1)}, ValueError, r"noise_coef must have shape \(7,\), got \(8,\)"),
        ({"noise": torch.zeros(2, 4)}, ValueError, r"noise must have the shape of x_start, \(2, 3\), got \(2, 4\)"),
        ({"noise": 0}, TypeError, "noise must be a Noise or a tensor, got int"),
        ({"backend": "tpu"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    tables = {name: torch.ones(T) for name in ("weight", "x_start_coef", "noise_coef")}
    arguments = {
        "model_output": torch.zeros(2, 3),
        "x_start": torch.zeros(2, 3),
        "t": torch.tensor([0, 1]),
        **tables,
        "noise": torch.zeros(2, 3),
    }
    with pytest.raises(error, match=message):
        simple_loss(**(arguments | change))
