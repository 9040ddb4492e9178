"""vlb_terms, forward alone and with backward to the output, beside its reference twin in eager PyTorch and compiled."""

from __future__ import annotations

import pytest
import torch
from harness import COMPILED, COPY, EAGER, OURS, SHAPES, Case, compiled, diffusion, main, shape_name, timesteps
from numerics import assert_as_accurate

from ddpm_fast import Noise
from ddpm_fast.diffusion.parameterisation import bound_table
from ddpm_fast.ops import vlb_terms
from ddpm_fast.ops._vlb_terms import vlb_terms_reference

KIND = "learned_range"


def eager(*arguments):
    return vlb_terms_reference(*arguments, KIND, False, 256, "tanh", False)


class VlbTermsCase(Case):
    op = "vlb_terms"

    def __init__(self, shape, backward):
        super().__init__(f"{shape_name(shape)}, {KIND}, {'forward + backward' if backward else 'forward'}")
        method, noise, t = diffusion(KIND), Noise(0), timesteps(shape[0])
        x_start = torch.randint(256, shape) / 127.5 - 1
        x_t = method.q_sample(x_start, t, noise)
        out = noise.materialize(shape) + 0.1 * torch.randn(shape)
        self.out = torch.cat([out, torch.randn(shape)], 1).requires_grad_(backward)
        self.exact_table = bound_table(method.schedule, method.prediction, KIND)
        self.others = x_start, x_t, t, self.exact_table.float()
        self.upstream = torch.ones(shape[0])
        self.backward = backward
        self.needed_bytes = 4 * x_t.numel() * (10 if backward else 4)  # both halves of out, x_start and x_t, and both gradients
        self.sides = {
            OURS: lambda: self.run(lambda *a: vlb_terms(*a, variance=KIND)),
            EAGER: lambda: self.run(eager),
            COMPILED: lambda: self.run(compiled(eager)),
        }

    def run(self, function):
        if self.backward:
            return lambda: torch.autograd.grad(function(self.out, *self.others), self.out, self.upstream)[0]
        return lambda: function(self.out, *self.others)

    def check(self, name):
        wide = self.out.detach().double().requires_grad_(self.backward)
        exact = eager(wide, *(x.double() for x in self.others[:2]), self.others[2], self.exact_table)
        if self.backward:
            exact = torch.autograd.grad(exact, wide, self.upstream.double())[0]
        assert_as_accurate(self.sides[name]()(), self.run(eager)(), exact, floor=8.0, what=name)


@pytest.mark.parametrize("side", [OURS, EAGER, COMPILED, COPY])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
@pytest.mark.benchmark(group="vlb_terms", min_rounds=20, max_time=0.5)
def test_vlb_terms(timed, shape, backward, side):
    timed(VlbTermsCase(shape, backward), side)


if __name__ == "__main__":
    main(lambda shape=shape, backward=backward: VlbTermsCase(shape, backward) for backward in (False, True) for shape in SHAPES)
