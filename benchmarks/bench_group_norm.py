"""group_norm with SiLU, forward and with backward, beside PyTorch's two operators, in both layouts and dtypes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import COPY, EAGER, OURS, Case, main, shape_name
from numerics import assert_as_accurate

from ddpm_fast import group_norm

SHAPES = [(16, 128, 32, 32), (4, 256, 16, 16), (64, 32, 8, 8)]  # Ho's UNet at its ends, and the digits'
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PASSES = ("forward", "forward and backward")
GROUPS, EPS = 32, 1e-6


class GroupNormCase(Case):
    op = "group_norm"

    def __init__(self, shape, layout, dtype, what):
        super().__init__(f"{shape_name(shape)}, {layout}, {dtype}, {what}")
        self.what = what
        self.x, self.grad_y = (torch.randn(shape).to(DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))
        self.weight, self.bias = (torch.randn(shape[1]).to(DTYPES[dtype]) for _ in range(2))
        self.needed_bytes = self.x.element_size() * self.x.numel() * (2 if what == PASSES[0] else 5)  # x, y; then x, grad_y, grad_x
        self.sides = {
            OURS: lambda: self.call(lambda x, w, b: group_norm(x, GROUPS, w, b, eps=EPS, activation="silu")),
            EAGER: lambda: self.call(lambda x, w, b: F.silu(F.group_norm(x, GROUPS, w, b, EPS))),
        }

    def call(self, function):
        tensors = [self.x, self.weight, self.bias]
        if self.what == PASSES[0]:
            return lambda: [function(*tensors)]
        leaves = [x.detach().requires_grad_() for x in tensors]
        return lambda: torch.autograd.grad(function(*leaves), leaves, self.grad_y)

    def check(self, name):
        wide = GroupNormCase.__new__(GroupNormCase)
        wide.what, wide.x, wide.weight, wide.bias, wide.grad_y = (
            self.what,
            *(x.double() for x in (self.x, self.weight, self.bias, self.grad_y)),
        )
        formula = lambda x, w, b: F.silu(F.group_norm(x, GROUPS, w, b, EPS))  # noqa: E731
        for actual, baseline, exact in zip(self.sides[name]()(), self.call(formula)(), wide.call(formula)(), strict=True):
            assert_as_accurate(actual, baseline, exact, factor=3.0, floor=4.0, what=name)


@pytest.mark.parametrize("side", [OURS, EAGER, COPY])
@pytest.mark.parametrize("what", PASSES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
@pytest.mark.benchmark(group="group_norm", min_rounds=20, max_time=0.25)
def test_group_norm(timed, shape, layout, dtype, what, side):
    timed(GroupNormCase(shape, layout, dtype, what), side)


if __name__ == "__main__":
    main(
        lambda shape=shape, layout=layout, dtype=dtype, what=what: GroupNormCase(shape, layout, dtype, what)
        for shape in SHAPES for layout in LAYOUTS for dtype in DTYPES for what in PASSES
    )  # fmt: skip
