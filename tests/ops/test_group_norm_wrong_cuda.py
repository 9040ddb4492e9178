"""What the tests of group_norm's CUDA kernels are worth: each fault made here on purpose must be found by them."""

import pytest
import torch
from group_norm_simulated import Case, backward, forward
from machine import nvcc_missing
from numerics import assert_as_accurate
from ptxsim import MemoryFault, Module, RaceError, UninitialisedRead

from ddpm_fast.backends import native, native_missing

PARAMETERS = "const ddpm_fast::GroupNormArguments, const ddpm_fast::cuda::GroupNormTile"


def compile_with(csrc, header, good, bad, plan):
    """One kernel of ``plan`` with its edit, wherever in its headers that is."""
    if nvcc_missing():
        pytest.skip(nvcc_missing())
    tile, kernel = ((csrc / "cuda" / name).read_text() for name in ("group_norm_tile.cuh", header))
    text = kernel.replace('#include "group_norm_tile.cuh"', tile).replace("#pragma once\n", "")
    assert text.count(good) == 1, f"{text.count(good)} places for the edit"
    name = next(launch["kernel"] for launch in plan["launches"])
    text = text.replace(good, bad) + f"\ntemplate __global__ void ddpm_fast::cuda::{name}({PARAMETERS});\n"
    return Module.from_cuda(text, "sm_80", [str(csrc / "cuda")], ["-std=c++17"])


@pytest.fixture
def planned():
    if native is None or not hasattr(native, "cuda_group_norm_plan"):
        pytest.skip(f"the launch plan is not there: {native_missing or 'ddpm_fast._C was built without CUDA'}")


SMALL, LAST, CUT = Case(2, 12, 20, 4), Case(2, 16, 36, 4, True, dropout=0.3), Case(1, 16, 9000, 4, True)
FORWARD = {
    "no tail guard": (
        "items = inside ? (place.end - first + step - 1) / step : 0;",
        "items = inside ? (place.end - first) / step + 1 : 0;",
        Case(2, 16, 600, 4, True),
        MemoryFault,
    ),
    "idle threads write sums": (
        "if (!writes || entry >= width) return;",
        "if (!writes) return;",
        SMALL,
        (RaceError, MemoryFault, AssertionError),
    ),
    "no barrier behind the tables": (
        "group_norm_fill_tables(a, place, table);\n  __syncthreads();",
        "group_norm_fill_tables(a, place, table);",
        SMALL,
        (RaceError, UninitialisedRead),
    ),
    "no barrier behind the first sums": (
        "tile, table.partial);\n  __syncthreads();\n  group_norm_each_group(tile, place, [&](int64_t, int32_t low",
        "tile, table.partial);\n  group_norm_each_group(tile, place, [&](int64_t, int32_t low",
        Case(2, 16, 1024, 4, True),
        (RaceError, UninitialisedRead),
    ),
    "no barrier of the warp between reading the centre and writing it": (
        "__syncwarp();  // all lanes have read the centre",
        "// all lanes have read the centre",
        SMALL,
        RaceError,
    ),
    "moments of pixels, not of elements": (
        "count = high > low ? float(high - low) * float(pixels)",
        "count = high > low ? float(pixels)",
        SMALL,
        AssertionError,
    ),
    "tiles count alike": ("sum += m.count *", "sum += moments[0].count *", Case(1, 12, 5003, 3, True), AssertionError),
    "deviations between tiles forgotten": ("squares += m.squares + m.count * d * d;", "squares += m.squares;", CUT, AssertionError),
    "a variance that is not divided": ("origin + offset, corrected / count", "origin + offset, corrected", SMALL, AssertionError),
    "groups taken together": ("place.group_channels % vector == 0 ? vector", "true ? vector", Case(2, 8, 64, 8, True), AssertionError),
    "mask in the order of NCHW": (
        "(channels_last ? position : position * vector + e) * a.channels + place.channel + thread.entry(e)",
        "(place.channel + thread.entry(e)) * a.pixels + (channels_last ? position : position * vector + e)",
        LAST,
        AssertionError,
    ),
    "mask of the batch's index": ("a.dropout.key.first_sample + uint64_t(place.sample)", "uint64_t(place.sample)", LAST, AssertionError),
    "kept elements not scaled": ("? z * kept_scale : 0.0f", "? z : 0.0f", LAST, AssertionError),
    "stride of rows": ("place.sample * a.shift.stride", "place.sample * a.channels", SMALL, AssertionError),
}
BACKWARD = {
    "no barrier before the sums": (
        "group_norm_collect<false>(sums, threadIdx.y, tile.channels, tile.slots, table.partial);\n    __syncthreads();",
        "group_norm_collect<false>(sums, threadIdx.y, tile.channels, tile.slots, table.partial);",
        Case(2, 16, 400, 4),
        (RaceError, UninitialisedRead),
    ),
    "no barrier behind the totals": (
        "if (tile.phase == GroupNormPhase::sums) return;\n    __syncthreads();",
        "if (tile.phase == GroupNormPhase::sums) return;",
        Case(2, 256, 64, 4, True),
        (RaceError, UninitialisedRead),
    ),
    "means of pixels, not of elements": ("float(place.group_channels) * float(a.pixels)", "float(a.pixels)", SMALL, AssertionError),
    "only the first slot": ("slot < tile.slots", "slot < 1", Case(2, 16, 400, 4, True), AssertionError),
    "a slope of SiLU that forgets z": ("silu_slope(z, fast_sigmoid(z))", "fast_sigmoid(z)", SMALL, AssertionError),
    "mask not applied": ("& 1 ? values[j] : 0.0f", "& 1 ? values[j] : values[j]", LAST, AssertionError),
    "factor of the scale forgotten": ("share[1] = factor * sums.upstream", "share[1] = sums.upstream", SMALL, AssertionError),
    "tiles write over each other": (
        "place.sample * tile.position_tiles + place.position_part",
        "place.sample * tile.position_tiles",
        CUT,
        RaceError,
    ),
    "grad_pre_bias without the mean": ("float(a.pixels) * constant + sums", "sums", SMALL, AssertionError),
}


@pytest.mark.parametrize("good, bad, case, fault", FORWARD.values(), ids=FORWARD)
def test_wrong_forward_kernels_are_caught(good, bad, case, fault, csrc, planned):
    plan = case.plan(native)
    module = compile_with(csrc, "group_norm.cuh", good, bad, plan)
    tensors = case.make()
    with pytest.raises(fault):
        results, _ = forward(module, plan, case, tensors)
        assert_as_accurate(results["y"], case.expected(tensors, torch.float32)["y"], case.expected(tensors, torch.float64)["y"])


@pytest.mark.parametrize("good, bad, case, fault", BACKWARD.values(), ids=BACKWARD)
def test_wrong_backward_kernels_are_caught(good, bad, case, fault, csrc, planned):
    plan = case.plan(native, backward=True)
    module = compile_with(csrc, "group_norm_backward.cuh", good, bad, plan)
    tensors = case.make()
    with pytest.raises(fault):
        results, _ = backward(module, plan, case, tensors)
        baseline, exact = (case.expected(tensors, arithmetic, gradients=True) for arithmetic in (torch.float32, torch.float64))
        for name, x in results.items():
            assert_as_accurate(x, baseline[name], exact[name], floor=1 if name == "grad_x" else 4)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_kernels_compiled_so_are_right_without_an_edit(direction, csrc, planned):
    case = Case(2, 12, 20, 4)
    plan, tensors = case.plan(native, direction == "backward"), case.make()
    header = "group_norm.cuh" if direction == "forward" else "group_norm_backward.cuh"
    module = compile_with(csrc, header, "extern __shared__", "extern __shared__", plan)
    name, run = ("y", forward) if direction == "forward" else ("grad_x", backward)
    results, _ = run(module, plan, case, tensors)
    expected = [
        case.expected(tensors, arithmetic, gradients=direction == "backward")[name] for arithmetic in (torch.float32, torch.float64)
    ]
    assert_as_accurate(results[name], *expected)
