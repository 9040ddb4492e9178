"""Ancestral sampling, the whole loop, beside a plain loop over diffusers' UNet2DModel and DDPMScheduler with the same weights.

"ours, passes not planned" calls the network as a function at each step, "compiled" the network through torch.compile. The second
argument of the command line is the number of steps, by default 50 of the 1000 of the chain: a step costs the same, as long as it is not
the first.
"""

from __future__ import annotations

import sys

import peers
import pytest
import torch
from harness import OURS, STEPS, Case, compiled, diffusion, main, need, shape_name
from numerics import assert_close_to_exact

from ddpm_fast import UNet, sample

UNPLANNED, COMPILED, DIFFUSERS = "ours, passes not planned", "ours, compiled", "diffusers"
SHAPES = [(100, 1, 8, 8), (1, 1, 8, 8)]
STEPS_TIMED = int(sys.argv[2]) if __name__ == "__main__" and len(sys.argv) > 2 else 50


class SamplingCase(Case):
    op = "sampling"

    def __init__(self, shape, steps=STEPS_TIMED):
        super().__init__(f"digits, {shape_name(shape)}, {steps} steps")
        self.shape, self.steps, self.diffusion = shape, steps, diffusion()
        self.model = UNet.from_preset("digits").eval()
        for parameter in self.model.parameters():  # a new network has zeros in it, which denormals and NaN could hide behind
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        self.needed_bytes = steps * (sum(p.numel() for p in self.model.parameters()) + 2 * shape[0] * 64) * 4  # the weights once a step
        self.sides = {OURS: self.ours, UNPLANNED: self.unplanned, COMPILED: self.compiled, DIFFUSERS: self.diffusers}

    def draw(self, model):
        return lambda: sample(model, self.diffusion, self.shape, steps=None if self.steps == STEPS else self.steps)

    def ours(self):
        return self.draw(self.model)

    def unplanned(self):
        return self.draw(lambda x, t: self.model(x, t))

    def compiled(self):
        return self.draw(compiled(self.model))

    def diffusers(self):
        need("diffusers")
        model, scheduler = peers.diffusers_unet(self.model), peers.diffusers_scheduler(self.diffusion.schedule.betas)
        scheduler.set_timesteps(self.steps)

        @torch.no_grad()
        def loop():
            x = torch.randn(self.shape)
            for t in scheduler.timesteps:
                x = scheduler.step(model(x, t).sample, t, x).prev_sample
            return x

        return loop

    def check(self, name):
        """The same samples from every side of ours; of diffusers the network, as its noise cannot be given."""
        if name == DIFFUSERS:
            x, t = torch.randn(self.shape), torch.full(self.shape[:1], STEPS // 2)
            with torch.no_grad():
                assert_close_to_exact(
                    peers.diffusers_unet(self.model)(x, t).sample, self.model.double()(x.double(), t), atol=1e-5, what=name
                )
            self.model.float()
        elif name != OURS:
            # Rounding grows along a chain, and is clipped at its end: few pixels of few images.
            assert (self.sides[name]()() - self.ours()()).abs().mean() < 1e-3, name


@pytest.mark.parametrize("side", [OURS, UNPLANNED, DIFFUSERS])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
@pytest.mark.benchmark(group="sampling", min_rounds=3, max_time=0.5)
def test_sampling(timed, shape, side):
    timed(SamplingCase(shape, 10), side)


if __name__ == "__main__":
    main(lambda shape=shape: SamplingCase(shape) for shape in SHAPES)
