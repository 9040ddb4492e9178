"""How group_norm's CUDA launchers cut the work: every element in one tile, blocks that the hardware takes, and enough of them."""

import itertools
import math

import pytest
import torch
from group_norm_simulated import TAGS, Case

from ddpm_fast.backends import native, native_missing

MOST_THREADS = {False: 512, True: 256}
SHAPES = [
    *itertools.product((1, 3), (32, 96, 320, 1280), (1, 49, 64, 1024, 4096, 9217), (1, 8, 32)),
    (1, 128, 256 * 256, 32), (4, 128, 1024, 32), (128, 256, 256, 32), (2, 7, 5, 1), (5, 33, 17, 3), (2, 514, 9, 2), (1, 8200, 1, 1),
    (70_000, 32, 1, 32), (1, 64, 2**27, 32), (1, 1, 2**30, 1), (2**20, 4, 4, 4),
]  # fmt: skip


@pytest.fixture(autouse=True)
def planned():
    if native is None or not hasattr(native, "cuda_group_norm_plan"):
        pytest.skip(f"the launch plan is not there: {native_missing or 'ddpm_fast._C was built without CUDA'}")


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", TAGS, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
def test_tiles_cover_all_slabs_and_fit_their_blocks(channels_last, dtype, backward):
    for shape, aligned in itertools.product(SHAPES, (True, False)):
        case = Case(*shape, channels_last, dtype, aligned=aligned)
        plan = case.plan(native, backward)
        vector, items = plan["vector"], plan["items"]
        contiguous = case.channels if channels_last else case.pixels
        assert vector == (16 // dtype.itemsize if aligned and contiguous % (16 // dtype.itemsize) == 0 else 1), case
        for launch in plan["launches"]:
            if "_finish_" in launch["kernel"] or "_parameters_" in launch["kernel"]:
                continue
            (x, y), (across, along) = launch["block"], launch["tiles"]
            positions = case.pixels if channels_last else case.pixels // vector
            channels = launch["groups"] * case.channels // case.groups
            assert case.groups % launch["groups"] == 0, case
            assert 32 <= x * y <= MOST_THREADS[backward], case
            shuffled = not channels_last or (x < 32 and x & (x - 1) == 0)
            assert x * y % 32 == 0 or not shuffled, case  # shuffles take whole warps
            assert (across - 1) * launch["channels"] < channels <= across * launch["channels"], case
            assert (along - 1) * launch["positions"] < positions <= along * launch["positions"], case
            # Every element has a register: a thread takes one vector of channels, or one channel's vector, of each position it walks to.
            walked, fixed = (y, x * vector) if channels_last else (x, y)
            assert launch["positions"] <= items * walked and launch["channels"] <= fixed, case
            assert launch["channels"] % vector == 0 or not channels_last, case
            assert math.prod(launch["grid"][1:]) >= case.samples and launch["grid"][1] <= 65535 and launch["grid"][2] <= 65535, case
            assert launch["grid"][0] == case.groups // launch["groups"] * across * along < 2**31, case
            assert launch["shared"] <= 48 * 1024, case  # what a kernel has without asking for more
            assert launch["phase"] != "whole" or across * along == 1, case
        phases = [launch["phase"] for launch in plan["launches"] if "parameters" not in launch["kernel"]]
        assert phases in (["whole"], ["sums", "sums", "results"] if backward else ["sums", "results"]), case


@pytest.mark.parametrize("sms", [108, 132])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
def test_one_large_image_fills_the_chip(channels_last, backward, sms):
    for dtype, channels in itertools.product(TAGS, (32, 128)):
        launches = Case(1, channels, 256 * 256, 32, channels_last, dtype, sms=sms).plan(native, backward)["launches"]
        assert launches[0]["phase"] == "sums"
        assert math.prod(launches[0]["grid"]) >= sms


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("channels, pixels", [(128, 1024), (256, 1024), (256, 256), (512, 64), (256, 16)])
def test_layers_of_the_cifar_network_are_one_launch(channels, pixels, channels_last):
    for dtype, samples, backward in itertools.product(TAGS, (1, 4, 128), (False, True)):
        launches = Case(samples, channels, pixels, 32, channels_last, dtype).plan(native, backward)["launches"]
        assert launches[0]["phase"] == "whole"


def test_slabs_of_channels_last_are_whole_sectors():
    def groups(channels, groups, dtype):
        return Case(2, channels, 64, groups, True, dtype).plan(native)["launches"][0]["groups"]

    assert groups(128, 32, torch.float32) == 2  # four channels each: 32 bytes are two groups
    assert groups(128, 32, torch.bfloat16) == 4
    assert groups(32, 32, torch.bfloat16) == 16
    assert groups(320, 32, torch.float32) == 4
    assert groups(512, 32, torch.float32) == 1
    many = Case(128, 256, 16, 32, True, torch.bfloat16).plan(native)["launches"][0]
    assert many["groups"] == 8  # small slabs of a large batch are 128 bytes wide
    assert groups(12, 4, torch.float32) == 4  # 48 bytes a pixel: sectors lie across pixels, so a slab is as wide as can be


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
def test_workspace_has_room_for_either_alignment(channels_last):
    case = Case(1, 32, 256 * 256, 32, channels_last)
    for backward in (False, True):
        assert case.plan(native, backward)["workspace"] == case.but(aligned=False).plan(native, backward)["workspace"] > 0
    assert Case(4, 128, 1024, 32, channels_last).plan(native)["workspace"] == 0
