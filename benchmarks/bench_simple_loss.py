"""simple_loss, forward and backward to the output, beside ε drawn, mse and backward as people write them.

Ours draws ε twice, once in each direction, and stores none of it; "ours, tensor" is given it as a tensor, as the eager side
of a training step that has kept the ε it noised with.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from harness import COMPILED, COPY, EAGER, OURS, SHAPES, STEPS, Case, compiled, main, shape_name, timesteps
from numerics import assert_as_accurate

from ddpm_fast import Noise
from ddpm_fast.ops import simple_loss

TENSOR, EAGER_TENSOR = "ours, tensor", "eager, tensor"


def eager(out, noise=None):
    noise = torch.randn_like(out) if noise is None else noise
    return F.mse_loss(out, noise)


class SimpleLossCase(Case):
    op = "simple_loss"

    def __init__(self, shape):
        super().__init__(f"{shape_name(shape)}, forward + backward")
        self.out = torch.randn(shape).requires_grad_()
        self.x_start, self.t = torch.rand(shape) * 2 - 1, timesteps(shape[0])
        self.tables = torch.ones(STEPS), torch.zeros(STEPS), torch.ones(STEPS)
        self.noise = Noise(0)
        self.epsilon = self.noise.materialize(shape)
        self.needed_bytes = 3 * 4 * self.out.numel()  # out read in each direction, its gradient written
        self.sides = {
            OURS: self.ours,
            TENSOR: lambda: lambda: self.gradient(self.loss(self.epsilon)),
            EAGER: lambda: lambda: self.gradient(eager(self.out)),
            EAGER_TENSOR: lambda: lambda: self.gradient(eager(self.out, self.epsilon)),
            COMPILED: self.compiled,
        }

    def loss(self, noise):
        return simple_loss(self.out, self.x_start, self.t, *self.tables, noise).mean()

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.out)[0]

    def ours(self):
        steps = itertools.count()
        return lambda: self.gradient(self.loss(Noise(seed=0, stream=next(steps) & 0xFFFFFFFF)))

    def compiled(self):
        function = compiled(eager)
        return lambda *noise: self.gradient(function(self.out, *noise))

    def check(self, name):
        wide = self.out.detach().double().requires_grad_()
        exact = torch.autograd.grad(eager(wide, self.epsilon.double()), wide)[0]
        baseline = self.gradient(eager(self.out, self.epsilon))
        got = self.sides[COMPILED]()(self.epsilon) if name == COMPILED else baseline if name == EAGER else self.sides[name]()()
        assert_as_accurate(got, baseline, exact, what=name)


@pytest.mark.parametrize("side", [OURS, TENSOR, EAGER, EAGER_TENSOR, COMPILED, COPY])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
@pytest.mark.benchmark(group="simple_loss", min_rounds=20, max_time=0.5)
def test_simple_loss(timed, shape, side):
    timed(SimpleLossCase(shape), side)


if __name__ == "__main__":
    main(lambda shape=shape: SimpleLossCase(shape) for shape in SHAPES)
