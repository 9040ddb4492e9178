"""The binding: a kernel is called with the names of its struct's fields, and what does not fit is refused with its name."""

from __future__ import annotations

import gc
import re
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import assert_bits_equal

from ddpm_fast import Noise
from ddpm_fast.backends import native

if native is None:
    pytest.skip("ddpm_fast._C was not built", allow_module_level=True)

CSRC = Path(__file__).resolve().parents[2] / "csrc"
KERNELS = [*re.findall(r"K\((\w+), (\w+)\)", (CSRC / "cpu" / "kernels.h").read_text()), ("attention", "AttentionArguments")]


def q_sample(**changes):
    x = torch.arange(10.0).reshape(2, 5)
    arguments = dict(
        sizes=x, x_start=x, t=torch.tensor([0, 1]), signal=torch.ones(2), sigma=torch.zeros(2), noise=Noise(1), out=torch.empty(2, 5)
    )
    return {name: value for name, value in (arguments | changes).items() if value is not ...}


def conv3x3(**changes):
    x = torch.randn(1, 32, 4, 4).to(memory_format=torch.channels_last)
    channels = dict(channels_in=32, channels_out=32)
    weight = torch.zeros(native.conv3x3_floats(**channels))
    return dict(samples=1, height=4, width=4, **channels, x=x, weight=weight, y=torch.empty_like(x)) | changes


class Unlike:
    pass


@pytest.mark.parametrize("changes, error, message", [
    (dict(x_strat=torch.ones(2, 5), x_start=...), TypeError, "cpu_q_sample has no argument x_strat"),
    (dict(sigma=...), TypeError, "cpu_q_sample: sigma is missing"),
    (dict(out=...), TypeError, "cpu_q_sample: out is missing"),
    (dict(t=None), TypeError, "cpu_q_sample: t must be a tensor of torch.int64, got NoneType"),
    (dict(t=torch.zeros(2)), TypeError, "cpu_q_sample: t must be a tensor of torch.int64, got a tensor of torch.float32"),
    (dict(signal=torch.ones(2).double()), TypeError,
     "cpu_q_sample: signal must be a tensor of torch.float32, got a tensor of torch.float64"),
    (dict(x_start=3), TypeError, "cpu_q_sample: x_start must be a tensor, got int"),
    (dict(x_start=torch.ones(2, 5).long()), TypeError,
     "x_start must be a tensor of float32, bfloat16 or float16, got a tensor of torch.int64"),
    (dict(out=torch.ones(2, 5).half()), TypeError, "cpu_q_sample: out must be a tensor of torch.float32, got a tensor of torch.float16"),
    (dict(noise=torch.ones(2, 5).bfloat16()), TypeError,
     "cpu_q_sample: noise must be a tensor of torch.float32, got a tensor of torch.bfloat16"),
    (dict(noise=Unlike()), TypeError, "cpu_q_sample: noise must be a Noise, got Unlike"),
    (dict(noise=(1, 2**32, 0)), OverflowError, r"cpu_q_sample: noise must have a stream below 2\^32"),
    (dict(sizes=torch.tensor(1.0)), ValueError, r"cpu_q_sample: sizes must be \(N, \.\.\.\)"),
    (dict(out=torch.empty(5, 2).t()), ValueError, "cpu_q_sample: out must be contiguous in each sample"),
    (dict(noise=torch.empty(5, 2).t()), ValueError, "cpu_q_sample: noise must be contiguous"),
    (dict(signal=torch.ones(4)[::2]), ValueError, "cpu_q_sample: signal must be contiguous"),
    (dict(t=torch.zeros(4).long()[::2]), ValueError, "cpu_q_sample: t must be contiguous"),
    (dict(sigma=torch._efficientzerotensor(2)), ValueError,
     "^a tensor has no memory to read: its storage was freed, or it stands for values without holding them$"),
    (dict(grad_x=torch.ones(2, 5)), TypeError, "cpu_q_sample has no argument grad_x"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(changes, error, message):
    for call in (native.cpu_q_sample, native.cpu_q_sample_prepared):
        with pytest.raises(error, match=message):
            call(**q_sample(**changes))


@pytest.mark.parametrize("changes, error, message", [
    (dict(x=torch.randn(1, 32, 4, 4)), ValueError, "cpu_conv3x3: x must be contiguous in channels_last"),
    (dict(residual=torch.randn(1, 32, 4, 4)), ValueError, "cpu_conv3x3: residual must be contiguous in channels_last"),
    (dict(height=4.0), TypeError, "cpu_conv3x3: height must be an integer, got float"),
])  # fmt: skip
def test_layouts_and_numbers_are_checked(changes, error, message):
    with pytest.raises(error, match=message):
        native.cpu_conv3x3(**conv3x3(**changes))


def kl(operand, **changes):
    x = torch.zeros(2, 3)
    return (
        dict(sizes=x, mean1=(x, 3, 1), logvar1=(x, 3, 1), mean2=operand, logvar2=(x, 3, 1), reduced=False, kl=torch.empty(2, 3)) | changes
    )


@pytest.mark.parametrize("operand", [
    (torch.zeros(2, 3), 1, 1), (torch.zeros(2, 3), 3, 0), (torch.zeros(3, 2).t(), 3, 1),
    (torch.zeros(2, 6)[:, ::2], 6, 1), (torch.zeros(2, 1).expand(2, 3), 0, 0),
])  # fmt: skip
def test_an_operand_lies_as_is_said(operand):
    with pytest.raises(ValueError, match="cpu_gaussian_kl: mean2 must be strided as is said"):
        native.cpu_gaussian_kl(**kl(operand))


@pytest.mark.parametrize(
    "operand",
    [
        (torch.zeros(2, 3), 3, 1),
        (torch.zeros(2, 1).expand(2, 3), 1, 0),
        (torch.zeros(1, 3).expand(2, 3), 0, 1),
        (torch.zeros(2, 6)[:, :3], 6, 1),
    ],
)
def test_operands_that_are_broadcast_are_read_where_they_lie(operand):
    arguments = kl(operand)
    native.cpu_gaussian_kl(**arguments)
    assert_bits_equal(arguments["kl"], torch.zeros(2, 3))


def test_a_direction_takes_its_own_fields_alone():
    x = torch.zeros(1, 2, 3)
    common = dict(
        channels_last=False,
        samples=1,
        channels=2,
        pixels=3,
        groups=1,
        eps=1e-5,
        silu=False,
        dropout=None,
        x=x,
        mean=x[:, 0, :1],
        rstd=x[:, 1, :1],
    )
    with pytest.raises(TypeError, match="cpu_group_norm: y is missing"):
        native.cpu_group_norm(**common)
    with pytest.raises(TypeError, match="cpu_group_norm has no argument grad_x"):
        native.cpu_group_norm(**common, y=x, grad_x=x)
    with pytest.raises(TypeError, match="cpu_group_norm_backward: grad_y is missing"):
        native.cpu_group_norm_backward(**common)


def test_arguments_have_names_and_no_order():
    arguments = q_sample(sigma=torch.ones(2))
    native.cpu_q_sample(**arguments)
    expected = arguments["out"]
    # Names that were made at run time are other objects than the ones in a program.
    turned = {"".join(list(name)): value for name, value in reversed(arguments.items())} | dict(out=torch.empty(2, 5))
    native.cpu_q_sample(**turned)
    assert_bits_equal(turned["out"], expected)
    with pytest.raises(TypeError, match="cpu_q_sample takes its arguments by name"):
        native.cpu_q_sample(*arguments.values())


def test_a_prepared_call_keeps_its_tensors_and_reads_what_they_then_have():
    arguments = q_sample()
    x, out, watched = arguments["x_start"], arguments["out"], weakref.ref(arguments["sigma"])
    call = native.cpu_q_sample_prepared(**arguments)
    del arguments
    gc.collect()
    assert watched() is not None
    for value in (1.0, 2.0):
        x.fill_(value)
        assert call() is None
        assert_bits_equal(out, x)
    del call
    assert watched() is None


def test_a_tensor_without_elements_has_no_memory_to_miss():
    empty = torch.empty(0, 5)
    native.cpu_randn(sizes=empty, out=empty, key=(0, 0, 0))


@pytest.mark.parametrize("op", [kernel for kernel, _ in KERNELS])
def test_the_layout_is_of_numbers_that_lie_apart(op):
    size, numbers = native.layout(op)
    end = 0
    for name, offset, kind in sorted(numbers, key=lambda number: number[1]):
        width = np.dtype(kind).itemsize
        assert offset >= end and offset % width == 0, name
        end = offset + width
    assert end <= size < end + 8
    assert len({name for name, _, _ in numbers}) == len(numbers)


def test_fields_are_all_of_a_struct():
    """No member is without its line in `fields`: a kernel would find it as it was never given. And no struct is without its kernel."""
    source = re.sub(r"//.*", "", (CSRC / "common" / "arguments.h").read_text())
    structs = dict(re.findall(r"struct (\w+Arguments) \{(.*?)\};", source, re.S))
    assert structs.keys() == {struct for _, struct in KERNELS}
    for struct, members in structs.items():
        declared = {re.search(r"(\w+)(\[\d\])?$", part.strip())[1] for line in members.split(";")[:-1] for part in line.split(",")}
        (fields,) = re.findall(rf"void fields\(Visit& visit, {struct}& a\) \{{(.*?)\n\}}", source, re.S)
        assert set(re.findall(r'visit(?:\.threads)?\("\w+", a\.(\w+)', fields)) == declared, struct
