"""What the tests of sampling share: models, and a step that is recorded by tracing, in place of a CUDA graph.

There is no device here: a step's operations are traced on fixed tensors, which like a capture fails on whatever the host would have to
read, and keeps whatever Python knew while recording.
"""

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ddpm_fast import GaussianDiffusion, NoiseSchedule, Sampler, UNet

T = 20
DIFFUSION = GaussianDiffusion(NoiseSchedule.linear(T, 1e-3, 0.3))
SAMPLERS = ["ddpm", "ddim", "dpmpp_2m"]
SHAPE = (3, 2, 5)
LABELS = torch.tensor([0, 3, 1])


def model(x, t, labels=None):
    """Elementwise; label 4 stands for no class."""
    shift = 0.0 if labels is None else 0.1 * labels.view(-1, 1, 1)
    return torch.tanh(x) * (0.5 + 0.02 * t.view(-1, 1, 1)) + shift


def network(**overrides):
    """A small UNet, with noise where a new one has zeros that would hide its inputs."""
    torch.manual_seed(0)
    net = UNet.from_preset("digits", **overrides).eval()
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return net


def traced(body, device):
    body()  # as the warm-up: kernels are chosen
    nothing = torch.zeros(())
    module = make_fx(lambda _: body())(nothing)
    return lambda: module(nothing)


def captured(*arguments, **options):
    found = Sampler(*arguments, graph=True, **options)
    found._capture = traced
    return found
