"""gaussian_kl with the mean over each sample, forward and backward to all four, beside the formula as people write it."""

from __future__ import annotations

import pytest
import torch
from harness import COMPILED, COPY, EAGER, OURS, SHAPES, Case, compiled, main, shape_name
from numerics import assert_as_accurate

from ddpm_fast.ops import gaussian_kl
from ddpm_fast.ops._gaussian_kl import gaussian_kl_reference

REFERENCE = "reference"


def eager(mean1, logvar1, mean2, logvar2):
    """normal_kl of the published codes, and its mean over each sample."""
    kl = 0.5 * (-1.0 + logvar2 - logvar1 + torch.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * torch.exp(-logvar2))
    return kl.flatten(1).mean(1)


def ours(*inputs):
    return gaussian_kl(*inputs, reduction="mean_per_sample")


def reference(*inputs):
    return gaussian_kl_reference(*inputs, "mean_per_sample")


class GaussianKLCase(Case):
    op = "gaussian_kl"

    def __init__(self, shape, backward):
        super().__init__(f"{shape_name(shape)}, mean per sample, {'forward + backward' if backward else 'forward'}")
        self.inputs = [torch.randn(shape).requires_grad_(backward) for _ in range(4)]
        self.upstream = torch.ones(shape[0])
        self.backward = backward
        self.needed_bytes = 4 * self.inputs[0].numel() * (12 if backward else 4)  # four read in each direction, four written
        functions = {OURS: ours, EAGER: eager, REFERENCE: reference}
        self.sides = {name: lambda f=function: self.run(f) for name, function in functions.items()}
        self.sides[COMPILED] = lambda: self.run(compiled(eager))

    def run(self, function):
        if self.backward:
            return lambda: torch.autograd.grad(function(*self.inputs), self.inputs, self.upstream)
        return lambda: [function(*self.inputs)]

    def check(self, name):
        wide = GaussianKLCase((1, 1), self.backward)
        wide.inputs, wide.upstream = [x.detach().double().requires_grad_(self.backward) for x in self.inputs], self.upstream.double()
        for got, baseline, exact in zip(self.sides[name]()(), self.run(eager)(), wide.run(eager)(), strict=True):
            assert_as_accurate(got.detach(), baseline.detach(), exact.detach(), floor=4.0, what=name)


@pytest.mark.parametrize("side", [OURS, EAGER, REFERENCE, COMPILED, COPY])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
@pytest.mark.benchmark(group="gaussian_kl", min_rounds=20, max_time=0.5)
def test_gaussian_kl(timed, shape, backward, side):
    timed(GaussianKLCase(shape, backward), side)


if __name__ == "__main__":
    main(lambda shape=shape, backward=backward: GaussianKLCase(shape, backward) for backward in (False, True) for shape in SHAPES)
