"""The sum of the programs' sums, for samples of more tiles than the other tests have: beyond 1024 it goes round again."""

import pytest
import torch
from interpreter import INTERPRETED
from numerics import assert_close_to_exact

pytest.importorskip("triton", reason="Triton is not installed, so its kernels cannot be compiled")
if INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled in this process", allow_module_level=True)

from simulator import simulated

from ddpm_fast.ops.triton._reduce import finish


@pytest.mark.parametrize("count", [2, 3, 1023, 1024, 1025, 2048, 2049])
def test_every_tile_is_added_once(count):
    sums, result = torch.rand(3, count) + 0.5, torch.empty(3)  # any of them missed is more than the limit
    with simulated(80):
        finish(sums, result)
    # An element takes part in three sums of a lane and ten of pairs at most, each rounded by half an ulp of no more than Σ|x|.
    exact = sums.double().sum(1)
    assert_close_to_exact(result, exact, atol=float(13 * 2.0**-24 * sums.double().abs().sum(1).max()))
