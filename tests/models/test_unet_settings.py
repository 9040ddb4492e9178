"""The UNet beside what surrounds it: weights of another dtype than the data's, NumPy's numbers, PyTorch's default device, other layouts."""

import copy
import json

import numpy as np
import pytest
import torch
from numerics import assert_bits_equal
from tiny_unet import TINY, batch, tiny
from torch.testing import assert_close

from ddpm_fast import EMA, GaussianDiffusion, Noise, NoiseSchedule, Sampler, UNet
from ddpm_fast.backends import native_missing
from ddpm_fast.models.cpu_plan import UNetPlan

DIFFUSION = GaussianDiffusion(NoiseSchedule.linear(20, 1e-3, 0.3))


@pytest.mark.parametrize("data", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weights", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_classes", [None, 3])
def test_data_of_any_dtype(weights, data, num_classes):
    model, (x, t) = tiny(weights, num_classes=num_classes), batch()
    x = x.to(data).requires_grad_()
    out = model(x, t)
    assert out.dtype == data
    assert_bits_equal(out, model(x.to(weights), t).to(data))
    out.sum().backward()
    assert x.grad.dtype == data and all(p.grad.dtype == weights for p in model.parameters() if p.grad is not None)


def test_autocast_decides_where_it_is_on():
    model, (x, t) = tiny(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x, t).dtype == model(x.bfloat16(), t).dtype == torch.bfloat16
        assert model(x.double(), t).dtype == torch.float64  # which autocast leaves alone
        assert tiny(torch.float64)(x, t).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_sampler_of_a_network_in_another_dtype(dtype):
    model = tiny(dtype)
    options = dict(sampler="ddim", steps=3)
    got = Sampler(model, DIFFUSION, **options)((2, 2, 8, 8))
    assert got.dtype == torch.float32
    assert_bits_equal(got, Sampler(lambda x, t: model(x.to(dtype), t).float(), DIFFUSION, **options)((2, 2, 8, 8)))


def test_numbers_of_numpy():
    numbers = dict(
        in_channels=np.int64(2), out_channels=np.uint8(3), base_channels=np.int32(8), channel_mult=np.array([1, 2]), num_blocks=np.int64(1),
        attention_resolutions=(np.int16(4),), image_size=np.array(8), num_heads=np.int64(2), dropout=np.float32(0.25),
        num_classes=np.int64(3), norm_groups=np.int64(4), norm_eps=np.float64(1e-5),
    )  # fmt: skip
    model = UNet(**numbers)
    assert json.loads(json.dumps(model.config)) == model.config == UNet(**model.config).config
    assert model.config["out_channels"] == 3 and model.config["channel_mult"] == [1, 2] and model.config["dropout"] == 0.25
    assert type(model.num_classes) is int and model(*batch()).shape == (3, 3, 8, 8)


@pytest.mark.parametrize("value", [np.float64(8), np.array([8, 8]), "8", 8.0, None, np.bool_(True)])
def test_what_is_no_integer(value):
    with pytest.raises(TypeError, match=f"base_channels must be an int, got {type(value).__name__}"):
        UNet(**{**TINY, "base_channels": value})


@pytest.mark.parametrize("name", ["channel_mult", "attention_resolutions"])
@pytest.mark.parametrize("value", [None, 2, "12", b"12", np.array(2), {1, 2}.__iter__()], ids=lambda value: type(value).__name__)
def test_what_is_no_list(name, value):
    with pytest.raises(TypeError, match=f"{name} must be a list of integers, got {type(value).__name__}"):
        UNet(**{**TINY, name: value})


@pytest.mark.parametrize("value", [3, [0.5], np.zeros((2, 2, 8, 8), np.float32), "x"], ids=str)
def test_what_is_no_tensor(value):
    model, x, t = tiny(num_classes=3), torch.zeros(2, 2, 8, 8), torch.zeros(2, dtype=torch.int64)
    for name, call in dict(x_t=(value, t), t=(x, value), labels=(x, t, value)).items():
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got {type(value).__name__}"):
            model(*call)
    with pytest.raises(TypeError, match=f"dropout must be a Noise, got {type(value).__name__}"):
        model(x, t, dropout=value)


@pytest.mark.skipif(bool(native_missing), reason=f"plans call the CPU kernels: {native_missing}")
@pytest.mark.parametrize("default", ["set_default_device", "with"])
def test_the_default_device_is_for_new_networks_alone(default):
    model, (x, t) = tiny(num_classes=3, dropout=0.5), batch()
    y, steps, noise = torch.tensor([0, 1, 3]), torch.tensor([0, 999]), Noise(1)

    def everything():
        model.train()(x, t, y, dropout=noise).square().mean().backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        ema = EMA(copy.deepcopy(model), decay=0.5)
        ema.update(model)
        with ema.applied(model), torch.no_grad():
            return [model.eval()(x, t), UNetPlan(model, x.shape, steps, y)(x, 1), *gradients]

    expected = everything()
    if default == "with":
        with torch.device("meta"):
            drawn, made = everything(), UNet(**TINY)
    else:
        torch.set_default_device("meta")
        try:
            drawn, made = everything(), UNet(**TINY)
        finally:
            torch.set_default_device(None)
    for ours, theirs in zip(drawn, expected, strict=True):
        assert_bits_equal(ours, theirs)
    assert all(p.is_meta for p in made.parameters())


def test_contiguous_weights_compute_the_same():
    model, (x, t) = tiny(), batch()
    other = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    assert all(p.is_contiguous() for p in other.parameters()) and not all(p.is_contiguous() for p in model.parameters())
    for m in (model, other):
        m(x, t).square().mean().backward()
    assert_close([p.grad for p in other.parameters()], [p.grad for p in model.parameters()])
    assert_bits_equal(Sampler(other, DIFFUSION, steps=3)((2, 2, 8, 8)), Sampler(model, DIFFUSION, steps=3)((2, 2, 8, 8)))
