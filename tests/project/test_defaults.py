"""PyTorch's default device and dtype are the caller's: the library names the device of every tensor that it makes."""

import ast
import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import assert_bits_equal
from torch.utils._device import _device_constructors

import ddpm_fast as df
from ddpm_fast.data.images import ImageData
from ddpm_fast.diffusion.samplers import make_table
from ddpm_fast.diffusion.schedules import SCHEDULES
from ddpm_fast.evaluation import evaluate_bound, rate_distortion
from ddpm_fast.evaluation.features import digits_classifier
from ddpm_fast.training.config import TrainConfig
from ddpm_fast.training.trainer import Trainer

PACKAGE = Path(df.__file__).parent
# What torch.device(...) as a context changes, of torch's own functions (torch/utils/_device.py).
FACTORIES = {function.__name__ for function in _device_constructors()}


def schedules():
    for name in SCHEDULES:
        schedule = df.NoiseSchedule.from_name(name, 30)
        yield from (schedule.snr, schedule.respace([0, 4, 29]).betas, schedule.respace(np.array([2, 3])).posterior_log_variance)
    yield df.NoiseSchedule([0.1, 0.2]).alphas_bar


torch.manual_seed(0)
NETWORK = df.UNet.from_preset("digits", learned_variance=True, attention_resolutions=(4,))
for parameter in NETWORK.parameters():  # the last layer starts at zero
    parameter.data.add_(0.01)


X = torch.linspace(-1, 1, 128).mul(8).round().div(8).view(2, 1, 8, 8)
T = torch.tensor([3, 0])


def diffusion():
    return df.GaussianDiffusion(df.NoiseSchedule.linear(6, 1e-3, 0.5), "epsilon", "learned_range", levels=17)


def losses_and_gradients():
    chain, network = diffusion(), copy.deepcopy(NETWORK)
    x_t = chain.q_sample(X, T, df.Noise(0))
    out = network(x_t, T, dropout=df.Noise(1))
    for kind in ("simple", "hybrid", "vlb"):
        loss = chain.loss(out, X, x_t, T, df.Noise(0), kind=kind)
        yield loss
    loss.sum().backward()
    yield from (parameter.grad for parameter in network.parameters())
    yield from (chain.q_step(X, T, df.Noise(2)), *chain.q_mean_variance(X, T), *chain.q_posterior(X, x_t, T), chain.prior_bpd(X))
    yield from (*chain.p_mean_variance(out, x_t, T), chain.p_step(x_t, out.detach(), T, df.Noise(2)), chain.x_start_mse(out, X, x_t, T))
    yield from (df.Noise(5).integers(4, 9), df.Noise(5).uniform(4), df.Noise(5).materialize((2, 3)))
    yield df.gaussian_kl(X, X, X * 0.5, X * 0.25)


def samples():
    chain, network = diffusion(), copy.deepcopy(NETWORK).eval()
    known = X, torch.arange(8, device="cpu") < 4
    for options in (
        dict(),
        dict(sampler="ddim", steps=3, eta=0.5),
        dict(sampler="dpmpp_2m", steps=4, spacing="logsnr", threshold=0.9),
        dict(steps=[0, 2, 5]),
    ):
        yield df.sample(network, chain, (2, 1, 8, 8), 3, **options)
        yield make_table(chain, **{name: value for name, value in options.items() if name != "threshold"}).table
    yield df.sample(network, chain, (2, 1, 8, 8), 3, known=known)
    yield df.sample(network, chain, (2, 1, 8, 8), 3, callback=lambda t, x, x_start: None)
    yield df.Sampler(network, chain).interpolate(X, -X, [0.25, 0.5], t=3)


def bounds():
    chain, network = diffusion(), copy.deepcopy(NETWORK).eval()
    yield from vars(chain.bound_terms(network, X)).values()
    yield chain.bits_per_dim(network, X)
    for terms in (None, 3):
        bound = evaluate_bound(network, chain, X, terms_per_image=terms)
        yield from (bound.terms, bound.prior, bound.counts, *vars(rate_distortion(bound)).values())
    yield rate_distortion(evaluate_bound(lambda x, t: torch.cat([x, x], 1), chain, X[:1])).rate


def training():
    config = TrainConfig(
        data="digits", steps=3, batch=4, timesteps=8, variance="learned_range", loss="hybrid", timestep_sampler="loss_aware",
        preset="digits", device="cpu", network=dict(base_channels=32),
    )  # fmt: skip
    images = torch.arange(6 * 64, device="cpu").remainder(17).to(torch.uint8).view(6, 1, 8, 8)
    trainer = Trainer(config, ImageData("digits", images, images[:2], 17))
    for _ in range(2):
        yield from trainer.train_step()
    yield from (parameter.detach() for parameter in trainer.model.parameters())
    with trainer.ema.applied(trainer.model):
        yield from (parameter.detach().clone() for parameter in trainer.model.parameters())


def features():
    train = digits_classifier if torch.get_default_device().type == "cpu" else digits_classifier.__wrapped__  # the other one is kept
    yield train()(X)


PARTS = dict(
    schedules=schedules, losses_and_gradients=losses_and_gradients, samples=samples, bounds=bounds, training=training, features=features
)


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_default_device_changes_nothing(part):
    expected = list(part())
    with torch.device("meta"):
        found = list(part())
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.device.type == "cpu"
        assert_bits_equal(a.detach(), b.detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("part", [schedules, losses_and_gradients, samples, bounds])
def test_a_default_dtype_changes_nothing(part, dtype):
    expected = list(part())
    try:
        torch.set_default_dtype(dtype)
        found = list(part())
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(found, expected, strict=True):
        assert_bits_equal(a.detach(), b.detach())


def test_every_tensor_of_the_package_is_made_on_a_named_device():
    # Parameters and buffers of networks are the exception: they belong where the caller builds the network.
    unnamed = []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        modules = (
            [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
            if "nn.Module" in path.read_text("utf-8")
            else []
        )
        exempt = {id(call) for init in modules for call in ast.walk(init)}
        for node in ast.walk(tree):
            if not (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "torch"
            ):
                continue
            if node.func.attr in FACTORIES and not any(keyword.arg == "device" for keyword in node.keywords) and id(node) not in exempt:
                unnamed.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: torch.{node.func.attr}")
    # Inside `with torch.device("cpu")`.
    assert [place for place in unnamed if not place.startswith("evaluation/features.py")] == []
