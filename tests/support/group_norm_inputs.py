"""Inputs of group_norm, and the shapes that its CUDA kernels are simulated with."""

import pytest
import torch

ROWS = ("pre_bias", "scale", "shift")
PARAMETERS = ("weight", "bias")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last, "channels_last_3d": torch.channels_last_3d}
every_layout = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])

FLAGS = ["-std=c++17"]  # of nvcc
SHAPES = [
    (2, 6, 1, 2),  # one pixel; three channels a group
    (2, 12, 49, 4),  # 7 × 7: no vectors of pixels, and in channels_last vectors of channels that lie in two groups
    (1, 30, 63, 3),  # ten channels a group and no vectors at all
    (3, 32, 64, 8),  # a vector of channels is a group
    (2, 8, 64, 8),  # a group is a channel, and eight of them a slab of channels_last
    (2, 40, 144, 4),  # ten channels a group in vectors; a warp ends within a row of them
]
CUT = [
    ((1, 16, 9000, 4), False),  # slabs larger than a block holds
    ((1, 16, 9000, 4), True),
    ((1, 12, 5003, 3), False),  # the same without vectors, and a prime: the last tile is not full
    ((1, 12, 5003, 3), True),
    ((2, 1040, 3, 2), False),  # more channels a group than a block has
    ((2, 1040, 3, 2), True),
    ((1, 2056, 2, 8), True),  # tiles that end in the middle of a group
]


def stored(x, layout):
    if layout == "channels_last":
        layout = {4: "channels_last", 5: "channels_last_3d"}.get(x.ndim, "contiguous")
    return x.contiguous(memory_format=LAYOUTS[layout])


def make(shape, dtype=torch.float32, *, given=(*PARAMETERS, *ROWS), small=None, layout="contiguous", seed=0):
    """The tensors of a call; ``small`` is the dtype of all but x."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(size, generator=generator)  # noqa: E731
    n, c, *_ = shape
    tensors = {"x": stored((draw(*shape) + 0.5).to(dtype), layout)}
    for name in given:
        tensors[name] = draw(*((c,) if name in PARAMETERS else (n, c))).to(small or dtype)
    return tensors
