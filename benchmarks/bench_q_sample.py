"""q_sample beside eager PyTorch, torch.compile, diffusers and a memory copy of the same bytes. Everyone draws their own noise.

`pytest benchmarks/bench_q_sample.py` records; `python benchmarks/bench_q_sample.py` alternates the sides and prints ratios,
which are the figures to trust on a machine that is not alone.
"""

from __future__ import annotations

import itertools

import peers
import pytest
import torch
from harness import COMPILED, COPY, EAGER, OURS, SHAPES, STEPS, Case, compiled, main, need, shape_name, timesteps
from numerics import assert_as_accurate, assert_close_to_exact

from ddpm_fast import Noise, NoiseSchedule
from ddpm_fast.ops import q_sample

INTO, DIFFUSERS = "ours, out=", "diffusers"


def eager(x, t, signal, sigma, noise=None):
    """What is written without a library."""
    noise = torch.randn_like(x) if noise is None else noise
    return signal[t].view(-1, 1, 1, 1) * x + sigma[t].view(-1, 1, 1, 1) * noise


class QSampleCase(Case):
    op = "q_sample"

    def __init__(self, shape):
        super().__init__(shape_name(shape))
        self.betas = NoiseSchedule.linear(STEPS).betas
        alphas_bar = torch.cumprod(1 - self.betas, 0)
        self.exact_tables = alphas_bar.sqrt(), (1 - alphas_bar).sqrt()
        self.x, self.t = torch.rand(shape) * 2 - 1, timesteps(shape[0])
        self.arguments = self.x, self.t, *(table.float() for table in self.exact_tables)
        self.needed_bytes = 2 * self.x.numel() * self.x.element_size()  # x_start in, x_t out
        self.sides = {
            OURS: self.ours,
            INTO: lambda: self.ours(out=torch.empty_like(self.x)),
            EAGER: lambda: lambda: eager(*self.arguments),
            COMPILED: lambda: self.bound(compiled(eager)),
            DIFFUSERS: self.diffusers,
        }

    def bound(self, function):
        return lambda *noise: function(*self.arguments, *noise)

    def ours(self, **options):
        steps = itertools.count()
        return lambda: q_sample(*self.arguments, Noise(seed=0, stream=next(steps) & 0xFFFFFFFF), **options)

    def diffusers(self):
        need("diffusers")
        add_noise = peers.diffusers_scheduler(self.betas).add_noise
        return lambda: add_noise(self.x, torch.randn_like(self.x), self.t)

    def check(self, name):
        """A side's formula on one given noise, against float64."""
        key = Noise(seed=0)
        noise = key.materialize(self.x.shape)
        exact = eager(self.x.double(), self.t, *self.exact_tables, noise.double())
        baseline = eager(*self.arguments, noise)
        if name in (OURS, INTO):
            assert_as_accurate(self.sides[name]()(), baseline, exact, what=name)
        elif name == COMPILED:
            assert_as_accurate(self.sides[name]()(noise), baseline, exact, what=name)
        elif name == DIFFUSERS:
            # It subtracts ᾱ from 1 in fp32: at t = 0 half an ulp of 1 in 1e-4, halved by the root.
            allowed = 2.0**-24 / (2 * 1e-2)
            assert_close_to_exact(
                peers.diffusers_scheduler(self.betas).add_noise(self.x, noise, self.t), exact, rtol=1e-5, atol=6 * allowed, what=name
            )


@pytest.mark.parametrize("side", [OURS, INTO, EAGER, COMPILED, DIFFUSERS, COPY])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
@pytest.mark.benchmark(group="q_sample", min_rounds=20, max_time=0.5)
def test_q_sample(timed, shape, side):
    timed(QSampleCase(shape), side)


if __name__ == "__main__":
    main(lambda shape=shape: QSampleCase(shape) for shape in SHAPES)
