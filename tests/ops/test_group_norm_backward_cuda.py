"""csrc/cuda/group_norm_backward.cu in the simulator: all gradients against autograd in float64, as test_group_norm_cuda.py does forward."""

import pytest
import torch
from group_norm_inputs import CUT, FLAGS, SHAPES
from group_norm_simulated import OPTIONAL, TAGS, Case, backward, backward_on_device
from machine import SIMULATED_ARCHS, nvcc_missing
from numerics import assert_as_accurate, assert_bits_equal
from ptxsim import Module
from ptxsim.nvcc import compile_ptx

from ddpm_fast.backends import missing, native, native_missing


@pytest.fixture(scope="module", params=SIMULATED_ARCHS)
def module(request, csrc):
    if nvcc_missing():
        pytest.skip(nvcc_missing())
    if native is None or not hasattr(native, "cuda_group_norm_backward_plan"):
        pytest.skip(f"the launch plan is not there: {native_missing or 'ddpm_fast._C was built without CUDA'}")
    return Module.from_ptx(compile_ptx(csrc / "cuda" / "group_norm_backward.cu", request.param, [], FLAGS))


def kernels(case):
    return [launch["kernel"].split("<")[0].removeprefix("group_norm_backward_") for launch in case.plan(native, backward=True)["launches"]]


def check(module, case, wanted=None, **make):
    tensors = case.make(**make)
    results, reports = backward(module, case.plan(native, backward=True), case, tensors, wanted)
    baseline, exact = (case.expected(tensors, arithmetic, gradients=True) for arithmetic in (torch.float32, torch.float64))
    for name, x in results.items():  # all but grad_x are sums of terms that cancel
        assert_as_accurate(x, baseline[name], exact[name], floor=1 if name == "grad_x" else 4, what=f"{case}: {name}")
    assert all(report.local_requests == 0 for report in reports)
    return reports


@pytest.mark.parametrize("dtype", TAGS, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_gradients_where_slabs_fit(shape, channels_last, dtype, module):
    case = Case(*shape, channels_last, dtype, dropout=0.3)
    assert kernels(case) == ["kernel", "parameters_kernel"]
    check(module, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape, channels_last", CUT, ids=str)
def test_all_gradients_where_slabs_are_cut(shape, channels_last, dtype, module):
    case = Case(*shape, channels_last, dtype, dropout=0.3 if shape[2] < 100 else 0.0)
    assert kernels(case) == ["kernel", "finish_kernel", "kernel", "parameters_kernel"]
    check(module, case)


@pytest.mark.parametrize("dtype", TAGS, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
def test_slabs_of_up_to_64_kib_are_one_launch(channels_last, dtype, module):
    """Sixteen vectors a thread, of x and of grad_y."""
    case = Case(1, 16, 2048 if channels_last else 12288 // dtype.itemsize, 4, channels_last, dtype, dropout=0.3, sms=1)
    assert kernels(case) == ["kernel", "parameters_kernel"] and case.plan(native, backward=True)["items"] == 16
    check(module, case)


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("given", [(), *((name,) for name in OPTIONAL), ("scale", "shift"), ("weight", "bias", "pre_bias")], ids=str)
def test_each_part_is_optional(given, channels_last, module):
    case = Case(2, 12, 20, 4, channels_last, given=given, silu=False)
    check(module, case)
    check(module, case.but(silu=True, dtype=torch.float16, small=torch.float32))


@pytest.mark.parametrize("pixels", [36, 9000], ids=["one launch", "cut"])
@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias", "shift"), ("pre_bias",), ("x", "scale")], ids=str)
def test_only_wanted_gradients_are_written(wanted, pixels, module):
    check(module, Case(1, 16, pixels, 4, True), wanted)


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
def test_parameters_sum_over_a_large_batch(channels_last, module):
    """More samples than slices, and channels that do not fill a block of the last kernel."""
    check(module, Case(37, 36, 4, 6, channels_last, torch.bfloat16, torch.float32))


def test_a_mean_of_ten_thousand_deviations(module):
    for channels_last in (False, True):
        for pixels in (1024, 9000):
            check(module, Case(1, 16, pixels, 4, channels_last, given=("weight",)), mean=1e4, std=1.0)


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
def test_tensors_that_do_not_start_at_16_bytes_are_read_by_element(channels_last, module):
    check(module, Case(2, 16, 64, 4, channels_last, torch.bfloat16, aligned=False))


@pytest.mark.parametrize("pixels", [64, 9000], ids=["one launch", "cut"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
def test_nan_stays_in_its_group(channels_last, pixels, module):
    case = Case(1, 16, pixels, 4, channels_last)
    tensors, plan = case.make(), case.plan(native, backward=True)
    clean, _ = backward(module, plan, case, tensors)
    tensors["grad_y"] = tensors["grad_y"].clone()
    tensors["grad_y"][0, 6, pixels // 2] = torch.nan  # of group 1
    spoilt, _ = backward(module, plan, case, tensors)
    group = torch.arange(16) // 4 == 1
    assert spoilt["grad_x"][:, group].isnan().all()
    assert spoilt["grad_weight"].isnan().nonzero().tolist() == [[6]]
    assert_bits_equal(spoilt["grad_x"][:, ~group], clean["grad_x"][:, ~group])


@pytest.mark.parametrize("pixels", [36, 9000], ids=["one launch", "cut"])
def test_samples_beyond_the_grids_second_dimension(pixels, module):
    case = Case(3, 16, pixels, 4, True)
    tensors, plan = case.make(), case.plan(native, backward=True)
    expected, _ = backward(module, plan, case, tensors)
    for launch in plan["launches"][:-1]:
        launch["grid"] = (launch["grid"][0], 2, 2)  # the fourth sample is not there
    results, _ = backward(module, plan, case, tensors)
    for name, x in results.items():
        assert_bits_equal(x, expected[name], name)


def test_the_order_of_blocks_changes_no_bit(module):
    for case in (Case(3, 16, 200, 4, True), Case(2, 16, 9000, 4, False)):
        tensors, plan = case.make(), case.plan(native, backward=True)
        results, _ = backward(module, plan, case, tensors)
        repeated, _ = backward(module, plan, case, tensors, batch_threads=256)
        for name, x in results.items():
            assert_bits_equal(x, repeated[name], name)


@pytest.mark.parametrize("dtype", TAGS, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
def test_traffic(channels_last, dtype, module):
    """As forward, x and grad_y read once and grad_x written once; the second launch only adds up the parameters' gradients."""
    case = Case(4, 128, 1024, 32, channels_last, dtype, given=("weight", "bias"))
    reports = check(module, case)
    elements = 4 * 128 * 1024
    ideal = 3 * elements * dtype.itemsize
    assert sum(r.global_load.unique_bytes + r.global_store.unique_bytes for r in reports) <= 1.01 * ideal
    assert sum(r.global_load.bytes_moved + r.global_store.bytes_moved for r in reports) <= 1.03 * ideal
    assert reports[0].global_load.bytes_by_width[16] == 2 * reports[0].global_store.bytes_by_width[16] == 2 * ideal // 3
    assert sum(r.total_thread_instructions for r in reports) <= 60 * elements
    assert all(r.shared_load.conflict_degree == r.shared_store.conflict_degree == 1.0 for r in reports)


@pytest.mark.parametrize("dtype", TAGS, ids=str)
@pytest.mark.parametrize("shape, channels_last", [*((shape, layout) for shape in SHAPES for layout in (False, True)), *CUT], ids=str)
def test_on_the_device(shape, channels_last, dtype):
    if missing("cuda"):
        pytest.skip(f"backend cuda: {missing('cuda')}")
    case = Case(*shape, channels_last, dtype, dropout=0.3)
    tensors = case.make()
    results, repeated = backward_on_device(native, case, tensors), backward_on_device(native, case, tensors)
    baseline, exact = (case.expected(tensors, arithmetic, gradients=True) for arithmetic in (torch.float32, torch.float64))
    for name, x in results.items():
        assert_as_accurate(x, baseline[name], exact[name], floor=1 if name == "grad_x" else 4, what=name)
        assert_bits_equal(x, repeated[name], name)
