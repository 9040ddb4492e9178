"""randn beside torch.randn and a memory copy. `python benchmarks/bench_randn.py` alternates the sides and prints ratios."""

from __future__ import annotations

import itertools

import pytest
import torch
from harness import COPY, EAGER, OURS, SHAPES, Case, main, shape_name
from numerics import assert_bits_equal

from ddpm_fast import Noise
from ddpm_fast.ops import randn

INTO = "ours, out="


class RandnCase(Case):
    op = "randn"

    def __init__(self, shape):
        super().__init__(shape_name(shape))
        self.shape = shape
        self.needed_bytes = 4 * torch.Size(shape).numel()
        self.sides = {OURS: self.ours, INTO: self.into, EAGER: lambda: lambda: torch.randn(shape)}

    def ours(self, **options):
        steps = itertools.count()
        return lambda: randn(self.shape, Noise(seed=0, stream=next(steps) & 0xFFFFFFFF), **options)

    def into(self):
        return self.ours(out=torch.empty(self.shape))

    def check(self, name):
        if name in (OURS, INTO):
            assert_bits_equal(self.sides[name]()(), randn(self.shape, Noise(0), backend="reference"), what=name)


@pytest.mark.parametrize("side", [OURS, INTO, EAGER, COPY])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
@pytest.mark.benchmark(group="randn", min_rounds=20, max_time=0.5)
def test_randn(timed, shape, side):
    timed(RandnCase(shape), side)


if __name__ == "__main__":
    main(lambda shape=shape: RandnCase(shape) for shape in SHAPES)
