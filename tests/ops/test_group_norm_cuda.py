"""csrc/cuda/group_norm.cu, proved without a GPU: its compiled PTX runs in the simulator, under the plan that the launcher uses.

The simulator stops at accesses out of bounds or misaligned, at reads of what was never written (the workspace and shared memory
begin so) and at races in shared memory. Backward and wrong kernels: test_group_norm_backward_cuda.py, test_group_norm_wrong_cuda.py.
"""

import re
import shutil

import pytest
import torch
from group_norm_inputs import CUT, FLAGS, SHAPES
from group_norm_simulated import KEY, OPTIONAL, TAGS, Case, backward_on_device, forward, forward_on_device
from machine import SIMULATED_ARCHS, nvcc_missing
from numerics import assert_as_accurate, assert_bits_equal, assert_close_to_exact
from ptxsim import Module
from ptxsim.nvcc import assemble, compile_ptx

from ddpm_fast.backends import missing, native, native_missing

MANY = [  # one launch of sixteen vectors a thread, where there are slabs enough for the chip: (shape, channels_last, dtype)
    ((1, 16, 6000, 4), False, torch.float32),
    ((1, 16, 12000, 4), False, torch.bfloat16),
    ((1, 16, 2500, 4), True, torch.float32),
    ((1, 16, 4096, 4), True, torch.bfloat16),  # 128 KiB, the largest
]


@pytest.fixture(scope="module")
def sources(csrc):
    if nvcc_missing():
        pytest.skip(nvcc_missing())
    if native is None or not hasattr(native, "cuda_group_norm_plan"):
        pytest.skip(f"the launch plan is not there: {native_missing or 'ddpm_fast._C was built without CUDA'}")
    return csrc / "cuda"


@pytest.fixture(scope="module", params=SIMULATED_ARCHS)
def module(request, sources):
    return Module.from_ptx(compile_ptx(sources / "group_norm.cu", request.param, [], FLAGS))


def run(module, case, tensors=None, **make):
    tensors = case.make(**make) if tensors is None else tensors
    results, reports = forward(module, case.plan(native), case, tensors)
    assert all(report.local_requests == 0 for report in reports)
    return tensors, results, reports


def check(module, case, tensors=None, **make):
    tensors, results, reports = run(module, case, tensors, **make)
    assert_as_accurate(results["y"], case.expected(tensors, torch.float32)["y"], case.expected(tensors, torch.float64)["y"], what=str(case))
    mean, rstd = case.statistics(tensors, torch.float64)
    assert_close_to_exact(results["mean"], mean, ulps=1, atol=2e-7 * float((1 / rstd).max()), what=f"{case}: mean")
    assert_as_accurate(results["rstd"], case.statistics(tensors, torch.float32)[1], rstd, floor=8, what=f"{case}: rstd")
    return results, reports


@pytest.mark.parametrize("dtype", TAGS, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_parts_in_one_launch(shape, channels_last, dtype, module):
    case = Case(*shape, channels_last, dtype, dropout=0.3)
    assert [launch["phase"] for launch in case.plan(native)["launches"]] == ["whole"]
    check(module, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape, channels_last", CUT, ids=str)
def test_all_parts_where_slabs_are_cut(shape, channels_last, dtype, module):
    case = Case(*shape, channels_last, dtype, dropout=0.3 if shape[2] < 100 else 0.0)
    assert [launch["phase"] for launch in case.plan(native)["launches"]] == ["sums", "results"]
    check(module, case)


@pytest.mark.parametrize("shape, channels_last, dtype", MANY, ids=str)
def test_slabs_of_up_to_128_kib_are_one_launch(shape, channels_last, dtype, module):
    case = Case(*shape, channels_last, dtype, dropout=0.3, sms=1)
    plan = case.plan(native)
    assert [launch["phase"] for launch in plan["launches"]] == ["whole"] and plan["items"] == 16 and plan["vector"] > 1
    check(module, case)


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("given", [(), *((name,) for name in OPTIONAL), ("scale", "shift"), ("weight", "bias", "pre_bias")], ids=str)
def test_each_part_is_optional(given, channels_last, module):
    case = Case(2, 12, 20, 4, channels_last, given=given, silu=False)
    check(module, case)
    check(module, case.but(silu=True, dtype=torch.float16, small=torch.float32))


@pytest.mark.parametrize("dtype, small", [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
def test_small_tensors_in_fp32(channels_last, dtype, small, module):
    check(module, Case(2, 32, 64, 4, channels_last, dtype, small))


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
def test_tensors_that_do_not_start_at_16_bytes_are_read_by_element(channels_last, module):
    case = Case(2, 16, 64, 4, channels_last, torch.bfloat16, aligned=False)
    assert case.plan(native)["vector"] == 1
    check(module, case)


@pytest.mark.parametrize("pixels", [1024, 9000], ids=["one launch", "cut"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
def test_a_mean_of_ten_thousand_deviations(channels_last, pixels, module):
    """The baseline is PyTorch's own group_norm in fp32."""
    check(module, Case(2, 16, pixels, 4, channels_last, given=(), silu=False), mean=1e4, std=1.0)
    check(module, Case(1, 16, pixels, 4, channels_last, given=("pre_bias",)), mean=-1e4, std=1.0)


@pytest.mark.parametrize("pixels", [1024, 9000], ids=["one launch", "cut"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
def test_the_mean_of_equal_values_is_their_value(channels_last, pixels, module):
    """Sums of them are rounded, and rounded the same way in all tiles; the second pass takes just that out again."""
    case = Case(1, 16, pixels, 8, channels_last, given=(), silu=False)
    values = torch.tensor([1 / 3, 0.7, 1e4 / 3, -2 / 3, 5 / 7, -1e-3 / 3, 11 / 9, -13.7])
    x = values.repeat_interleave(2)[None, :, None].expand(case.shape).contiguous()
    _, results, _ = run(module, case, {"x": x})
    assert_bits_equal(results["mean"], values[None])
    assert (results["y"] == 0).all()


@pytest.mark.parametrize("pixels", [64, 9000], ids=["one launch", "cut"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_stay_in_their_group(value, channels_last, pixels, module):
    case = Case(1, 16, pixels, 4, channels_last)
    tensors = case.make()
    _, clean, _ = run(module, case, tensors)
    tensors["x"] = tensors["x"].clone()
    tensors["x"][0, 6, pixels // 2] = value  # of group 1
    _, spoilt, _ = run(module, case, tensors)
    group = torch.arange(16) // 4 == 1
    assert spoilt["y"][:, group].isnan().all() and spoilt["rstd"][0, 1].isnan()
    assert_bits_equal(spoilt["y"][:, ~group], clean["y"][:, ~group])


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
def test_silu_is_accurate_and_finite_everywhere(channels_last, module):
    """Of a constant x nothing is left but the shift, so that z is known exactly."""
    z = torch.cat([torch.linspace(-8, 8, 500), torch.tensor([-0.0, 1e-30, 40.0, -80.0, 87.5, -89.0, -126.0, 1e4, -1e4, 3e38, -3e38, 0.0])])
    case = Case(1, 512, 4, 32, channels_last, given=("shift",))
    _, results, _ = run(module, case, {"x": torch.full(case.shape, 3.0), "shift": z[None]})
    y, exact = results["y"][0, :, 0], z.double() * torch.sigmoid(z.double())
    near = z.abs() <= 8
    assert_close_to_exact(y[near], exact[near], ulps=8)
    assert_close_to_exact(y[~near], exact[~near], rtol=1e-5, atol=1e-35)
    assert y[507] == 1e4
    assert_bits_equal(y[508:509], torch.tensor([-0.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 16, 64, 4), (2, 7, 5, 1), (2, 12, 9, 3), (2, 6, 8, 2)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
def test_mask_is_philoxs(channels_last, shape, dtype, module):
    case = Case(*shape, channels_last, dtype, given=("shift",), silu=False, dropout=0.25)
    tensors = {"x": torch.full(case.shape, 2.0).to(dtype), "shift": torch.full(case.shape[:2], 0.75).to(dtype)}
    _, results, _ = run(module, case, tensors)
    assert KEY.first_sample + 1 == 2**32
    assert_bits_equal(results["y"], torch.where(case.keep(), 1.0, 0.0).to(dtype).contiguous())


def test_samples_beyond_the_grids_second_dimension(module):
    case = Case(3, 16, 36, 4, True, dropout=0.3)
    tensors, plan = case.make(), case.plan(native)
    expected, _ = forward(module, plan, case, tensors)
    plan["launches"] = [launch | {"grid": (launch["grid"][0], 2, 2)} for launch in plan["launches"]]  # the fourth sample is not there
    results, _ = forward(module, plan, case, tensors)
    for name, x in results.items():
        assert_bits_equal(x, expected[name], name)


def test_the_order_of_blocks_changes_no_bit(module):
    for case in (Case(2, 16, 200, 4, True), Case(1, 16, 9000, 4, True)):
        tensors, results, _ = run(module, case)
        repeated, _ = forward(module, case.plan(native), case, tensors, batch_threads=256)
        for name, x in results.items():
            assert_bits_equal(x, repeated[name], name)


@pytest.mark.parametrize("dtype", TAGS, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
def test_traffic(channels_last, dtype, module):
    """A layer of 32 × 32 pixels and 128 channels, with SiLU: one launch, x read once and y written once, in full sectors."""
    case = Case(4, 128, 1024, 32, channels_last, dtype, given=("weight", "bias"))
    _, _, (report,) = run(module, case)
    elements = 4 * 128 * 1024
    ideal = 2 * elements * dtype.itemsize
    loads, stores = report.global_load, report.global_store
    assert loads.unique_bytes + stores.unique_bytes <= 1.005 * ideal
    assert loads.bytes_moved + stores.bytes_moved <= 1.02 * ideal
    assert loads.bytes_by_width[16] == stores.bytes_by_width[16] == ideal // 2
    assert report.total_thread_instructions <= (30 if dtype == torch.float32 else 35) * elements
    assert report.shared_load.conflict_degree == report.shared_store.conflict_degree == 1.0


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
def test_traffic_where_slabs_are_cut(channels_last, module):
    """x is read twice; what the tiles leave for each other is little beside it."""
    case = Case(1, 32, 128 * 128, 8, channels_last, given=("weight", "bias"))
    _, _, reports = run(module, case)
    moved = sum(r.global_load.bytes_moved + r.global_store.bytes_moved for r in reports)
    assert moved <= 1.1 * 3 * 4 * 32 * 128 * 128


@pytest.mark.parametrize("arch", SIMULATED_ARCHS)
@pytest.mark.parametrize("name", ["group_norm", "group_norm_backward"])
def test_no_atomics_no_spills_and_registers_for_all_threads(name, arch, sources):
    ptx = compile_ptx(sources / f"{name}.cu", arch, [], FLAGS)
    assert not re.search(r"^\s*(@\S+\s+)?(atom|red)\.", ptx, re.M)
    if shutil.which("ptxas") is None:
        pytest.skip("ptxas is not on PATH")
    _, said = assemble(ptx, arch)
    entries = re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", said, re.S)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(entries) == len(spills) == 18 + 2 * (name == "group_norm_backward"), said
    assert set(spills) == {("0", "0", "0")}
    for entry, registers in entries:  # two blocks of 256 threads or one of 512; backward with sixteen vectors one of 256
        alone = name == "group_norm_backward" and re.search(r"Li[48]ELi16E", entry)
        assert int(registers) <= (255 if alone else 128), entry


@pytest.mark.parametrize("dtype", TAGS, ids=str)
@pytest.mark.parametrize("shape, channels_last", [*((shape, layout) for shape in SHAPES for layout in (False, True)), *CUT], ids=str)
def test_on_the_device(shape, channels_last, dtype):
    if missing("cuda"):
        pytest.skip(f"backend cuda: {missing('cuda')}")
    case = Case(*shape, channels_last, dtype, dropout=0.3)
    tensors = case.make()
    results = forward_on_device(native, case, tensors)
    assert_as_accurate(results["y"], case.expected(tensors, torch.float32)["y"], case.expected(tensors, torch.float64)["y"])


def test_a_failed_launch_names_op_and_shape():
    if native is None or not hasattr(native, "cuda_group_norm"):
        pytest.skip(f"the binding is not there: {native_missing or 'ddpm_fast._C was built without CUDA'}")
    if not missing("cuda"):
        pytest.skip("there is a CUDA device, so the launch would not fail")
    case = Case(2, 12, 49, 4)
    with pytest.raises(RuntimeError, match="group_norm: CUDA launch failed for 2 samples of 12 channels of 49 pixels in 4 groups: "):
        forward_on_device(native, case, case.make(), device="cpu")
    with pytest.raises(RuntimeError, match="group_norm_backward: CUDA launch failed for 2 samples"):
        backward_on_device(native, case, case.make(), device="cpu")
