"""p_step, the ancestral step with its noise, beside diffusers' DDPMScheduler.step and a memory copy of the same bytes.

"ours, in place" writes x' over x_t and gives no x̂0, as a sampling loop does; diffusers gives both.
"""

from __future__ import annotations

import itertools

import peers
import pytest
import torch
from harness import COPY, EAGER, OURS, SHAPES, STEPS, Case, diffusion, main, need, shape_name
from numerics import assert_as_accurate, assert_close_to_exact

from ddpm_fast import Noise
from ddpm_fast.diffusion.samplers import make_table
from ddpm_fast.ops import p_step
from ddpm_fast.ops._p_step import p_step_reference

IN_PLACE, DIFFUSERS = "ours, in place", "diffusers"
STEP = STEPS // 2  # one t for the whole batch, as in sampling
VARIANCES = {"fixed": "fixed_small", "learned_range": "learned_range"}


class PStepCase(Case):
    op = "p_step"

    def __init__(self, shape, kind):
        super().__init__(f"{shape_name(shape)}, {kind}")
        self.kind, self.diffusion = kind, diffusion(VARIANCES[kind])
        channels = shape[1] * (1 if kind == "fixed" else 2)
        self.x_t, self.out = torch.randn(shape), torch.randn(shape[0], channels, *shape[2:]).mul(0.5)
        self.t = torch.full(shape[:1], STEP)
        self.table = make_table(self.diffusion).table.float()
        self.needed_bytes = 4 * (2 * self.x_t.numel() + self.out.numel())  # x_t and out in, x' out
        self.sides = {OURS: self.ours, IN_PLACE: self.in_place, EAGER: self.eager, DIFFUSERS: self.diffusers}

    def step(self, noise, **options):
        return p_step(self.x_t, self.out, self.t, self.table, noise, variance=self.kind, **options)

    def ours(self):
        steps = itertools.count()
        return lambda: self.step(Noise(seed=0, stream=next(steps) & 0xFFFFFFFF))

    def in_place(self):
        steps, x_t = itertools.count(), self.x_t.clone()
        return lambda: p_step(
            x_t, self.out, self.t, self.table, Noise(seed=0, stream=next(steps) & 0xFFFFFFFF), variance=self.kind, x_next=x_t, x_start=False
        )

    def eager(self):
        return lambda: p_step_reference(self.x_t, self.out, self.t, self.table, torch.randn_like(self.x_t), self.kind, True)

    def diffusers(self):
        need("diffusers")
        scheduler = peers.diffusers_scheduler(self.diffusion.schedule.betas, "fixed_small" if self.kind == "fixed" else "learned_range")
        return lambda: scheduler.step(self.out, STEP, self.x_t)

    def check(self, name):
        """Against float64 on one given noise; diffusers, whose noise cannot be given, by its x̂0."""
        key = Noise(0)
        wide = [x.double() for x in (self.x_t, self.out)]
        table = make_table(self.diffusion).table
        exact = p_step_reference(wide[0], wide[1], self.t, table, key, self.kind, True)
        baseline = p_step_reference(self.x_t, self.out, self.t, self.table, key, self.kind, True)
        if name == DIFFUSERS:
            # It takes the roots of fp32 products: a few ulps of values of order 1, over √ᾱ.
            assert_close_to_exact(self.diffusers()().pred_original_sample, exact[1], atol=64 * 2.0**-24, what=name)
        elif name != EAGER:
            assert_as_accurate(self.sides[name]()()[0], baseline[0], exact[0], floor=2.0, what=name)


@pytest.mark.parametrize("side", [OURS, IN_PLACE, EAGER, DIFFUSERS, COPY])
@pytest.mark.parametrize("kind", VARIANCES)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
@pytest.mark.benchmark(group="p_step", min_rounds=20, max_time=0.5)
def test_p_step(timed, shape, kind, side):
    timed(PStepCase(shape, kind), side)


if __name__ == "__main__":
    main(lambda shape=shape, kind=kind: PStepCase(shape, kind) for kind in VARIANCES for shape in SHAPES)
