"""conv3x3 beside PyTorch's convolution, in channels_last and fp32, at sizes of the presets' networks.

"planned" is the kernel with its weight transformed beforehand, as the UNet's plan calls it for each step.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import COPY, EAGER, OURS, Case, main
from numerics import assert_as_accurate

from ddpm_fast.ops import conv3x3
from ddpm_fast.ops._conv3x3 import conv3x3_prepared

PLANNED = "planned"

# (N, H, W, C, K)
SIZES = [
    (1, 8, 8, 32, 32), (1, 4, 4, 64, 64), (100, 8, 8, 32, 32), (100, 8, 8, 64, 64), (100, 4, 4, 64, 64), (100, 4, 4, 128, 64),  # digits
    (1, 8, 8, 128, 128), (4, 8, 8, 128, 128), (4, 32, 32, 32, 32),  # photos32
    (1, 32, 32, 128, 128), (4, 32, 32, 128, 128), (4, 16, 16, 256, 256), (1, 4, 4, 512, 256), (4, 8, 8, 512, 256),  # cifar10
]  # fmt: skip


class Conv3x3Case(Case):
    op = "conv3x3"

    def __init__(self, size):
        n, h, w, c, k = size
        super().__init__(f"{n} images of {h}x{w}, {c} to {k} channels")
        x, weight = torch.randn(n, c, h, w), torch.randn(k, c, 3, 3) / (9 * c) ** 0.5
        self.tensors = [*(y.contiguous(memory_format=torch.channels_last) for y in (x, weight)), torch.randn(k)]
        self.needed_bytes = 4 * (x.numel() + weight.numel() + n * k * h * w)
        self.sides = {
            OURS: lambda: lambda: conv3x3(*self.tensors), PLANNED: self.planned, EAGER: lambda: lambda: F.conv2d(*self.tensors, padding=1),
        }  # fmt: skip

    def planned(self):
        x, weight, bias = self.tensors
        y = torch.empty((len(x), len(weight), *x.shape[2:]), memory_format=torch.channels_last)
        call = conv3x3_prepared(x, weight, bias, None, y)

        def run():
            call()
            return y

        return run

    def check(self, name):
        exact = F.conv2d(*(y.double() for y in self.tensors), padding=1)
        assert_as_accurate(self.sides[name]()(), F.conv2d(*self.tensors, padding=1), exact, floor=8.0, what=name)


@pytest.mark.parametrize("side", [OURS, PLANNED, EAGER, COPY])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.benchmark(group="conv3x3", min_rounds=20, max_time=0.25)
def test_conv3x3(timed, size, side):
    timed(Conv3x3Case(size), side)


if __name__ == "__main__":
    main(lambda size=size: Conv3x3Case(size) for size in SIZES)
