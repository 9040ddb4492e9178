"""Division of the work into programs, and the start of a kernel.

A program has a tile of ROWS samples by COLUMNS elements, 1024 in all for 128 threads: two 16-byte accesses a thread to each
fp32 tensor, one to each 16-bit one. The division depends only on the size of a sample, so sums have the same bits in any batch. A
kernel's constants take few values whatever the sizes are, so few variants are compiled: COLUMNS is a power of two, VECTOR says
only how many elements may be accessed at once, and kernels are never specialised on sizes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_fast.noise import Noise

TILE = 1024  # elements of a program
LARGEST_GRID_Y = 65535  # the hardware's limit
WARPS = 4
# Without contraction to fused multiply-adds: the bits are those of the CPU kernels. Without overflow checks, which
# TRITON_DEBUG=1 would turn on: Philox wraps on purpose.
OPTIONS = dict(num_warps=WARPS, num_stages=1, enable_fp_fusion=False, sanitize_overflow=False)
NO_NOISE, GIVEN, DRAWN = 0, 1, 2  # a kernel's NOISE
SIZES = ("samples", "vectors", "steps", "seed", "noise_stream", "first_sample")  # what kernels are not specialised on


class Plan(NamedTuple):
    """A pure function of the sizes: see :func:`plan`."""

    rows: int
    columns: int
    tiles: int  # along a sample
    grid: tuple[int, int, int]


def plan(samples: int, elements: int) -> Plan:
    """The tiles of (samples, elements): large samples are split over programs, small ones share a program."""
    columns = min(max(1 << (elements - 1).bit_length(), 8), TILE)
    rows, tiles = TILE // columns, -(-elements // columns)
    row_tiles = -(-samples // rows)
    layers = -(-row_tiles // LARGEST_GRID_Y)
    return Plan(rows, columns, tiles, (tiles, -(-row_tiles // layers), layers))


class Tiles:
    """The tiles of one call, and the sizes that each of its launches needs.

    Args:
        shape: (N, ...) of the data whose samples the programs work on.
        tensors: the tensors that are accessed in vectors; None is left out. Their samples may be further apart in memory than those of
            the data. Kernels start on the device of the first one.
    """

    def __init__(self, shape: torch.Size, *tensors: Tensor | None) -> None:
        present = [x for x in tensors if x is not None]
        self.device = present[0].device
        self.samples, self.elements = shape[0], math.prod(shape[1:])
        self.plan = plan(self.samples, self.elements)
        narrowest = min([x.element_size() for x in present])
        # The most elements that a 16-byte access holds, or fewer where rows do not stay aligned to them.
        self.vector = math.gcd(self.elements, 16 // narrowest)
        self.wide = narrowest == 2

    def launch(
        self, kernel: Any, reads: dict[str, Any], writes: dict[str, Any], numbers: dict[str, Any], constants: dict[str, Any]
    ) -> None:
        """Starts a kernel on all tiles, on the current stream; the sizes of the tiles are added to its arguments.

        Args:
            reads, writes: tensors by the kernel's names, None where one is absent.
            numbers: integers and floats.
            constants: what the kernel is compiled for.
        """
        numbers = dict(samples=self.samples, vectors=self.elements // self.vector) | numbers
        constants = dict(VECTOR=self.vector, ROWS=self.plan.rows, COLUMNS=self.plan.columns) | constants
        start(self.device, kernel, self.plan.grid, reads, writes, numbers, constants)


def noise_arguments(noise: Noise | Tensor | None) -> tuple[dict[str, Any], dict[str, int], dict[str, int]]:
    """Arguments of a kernel for a noise, a tensor or None: (reads, numbers, constants)."""
    if isinstance(noise, Noise):
        return dict(noise_ptr=None), dict(seed=noise.seed, noise_stream=noise.stream, first_sample=noise.first_sample), dict(NOISE=DRAWN)
    return dict(noise_ptr=noise), dict(seed=0, noise_stream=0, first_sample=0), dict(NOISE=NO_NOISE if noise is None else GIVEN)


def start_here(
    device: torch.device,
    kernel: Any,
    grid: tuple[int, int, int],
    reads: dict[str, Any],
    writes: dict[str, Any],
    numbers: dict[str, Any],
    constants: dict[str, Any],
) -> None:
    """Starts a kernel on a device.

    It runs in Triton's interpreter if TRITON_INTERPRET=1 was set before Triton was imported.
    """
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](**reads, **writes, **numbers, **constants, **OPTIONS)
    else:
        kernel[grid](**reads, **writes, **numbers, **constants, **OPTIONS)


start = start_here  # tests put the simulator here
