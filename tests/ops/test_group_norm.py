"""group_norm: every backend against float64, both layouts, what is optional, the mask, exactness and errors.

The CUDA kernels are proved in the simulator by test_group_norm_cuda.py and its neighbours.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from group_norm_inputs import PARAMETERS, ROWS, every_layout, make, stored
from numerics import assert_as_accurate, assert_bits_equal, assert_close_to_exact
from op_cases import KEY, thread_count
from torch.utils.checkpoint import checkpoint

from ddpm_fast import group_norm
from ddpm_fast.noise.philox import dropout_mask_reference, philox4x32_10

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (shape, groups)
SIZES = [
    ((1, 1, 1), 1),  # the smallest: a group of one element
    ((2, 10, 1, 1), 5),  # one pixel, where the layouts are one
    ((3, 6, 5, 7), 2),  # nothing fills a register
    ((2, 40, 7, 7), 4),  # ten channels a group, 49 pixels
    ((2, 130, 9, 7), 13),  # channels that end within a register, 63 pixels
    ((3, 64, 8, 8), 64),  # one channel a group: several groups share a slab in NCHW
    ((2, 32, 40, 40), 8),  # several pieces in NCHW, and in channels_last several segments
    ((2, 48, 3, 5, 4), 16),  # three dimensions of space
    ((5, 36), 12),  # none
]
every_size = pytest.mark.parametrize("shape, groups", SIZES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def run(tensors, groups, backend=None, *, grad_y=None, **options):
    """y and the gradient of each tensor, by name."""
    leaves = {name: x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for name, x in tensors.items()}
    x, *others = leaves.values()
    y = group_norm(x, groups, backend=backend, **dict(zip(list(leaves)[1:], others, strict=True)), **options)
    if grad_y is None:
        grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    grads = torch.autograd.grad(y, list(leaves.values()), grad_y.to(y))
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


def compare(tensors, groups, backend, floor=4.0, **options):
    """Against float64; the gradients of parameters are sums that may cancel, so their error is held to the sum's largest value."""
    got, baseline = run(tensors, groups, backend, **options), run(tensors, groups, "reference", **options)
    exact = run({name: x.double() for name, x in tensors.items()}, groups, "reference", **options)
    for name, x in got.items():
        assert x.dtype == baseline[name].dtype and x.stride() == (tensors["x"] if name == "y" else tensors[name]).stride(), name
        if name == "y":
            assert_as_accurate(x, baseline[name], exact[name], floor=floor, what=name)
        else:  # a difference of sums that are alike may be exact in the baseline by luck
            alike = 2.0**-20 * math.sqrt(tensors["x"].shape[0]) * float(exact[name].abs().max().clamp_min(1.0))
            error = 2 * float((baseline[name].double() - exact[name]).abs().max())
            assert_close_to_exact(x, exact[name], ulps=4.0, atol=alike + error, what=name)


@pytest.mark.backends("group_norm", without=("reference",))
@every_layout
@every_dtype
@every_size
def test_against_float64(shape, groups, dtype, layout, backend):
    tensors = {name: x.to(backend.device) for name, x in make(shape, dtype, layout=layout).items()}
    compare(tensors, groups, backend.name, activation="silu", dropout=(0.3, KEY))


@pytest.mark.backends("group_norm", without=("reference",))
@pytest.mark.parametrize("silu, drops", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("given", [(), ("weight", "bias"), ("bias", "scale"), ("pre_bias",), ("weight", "shift")], ids=str)
def test_each_part_is_optional(given, silu, drops, backend):
    tensors = {name: x.to(backend.device) for name, x in make((2, 12, 5, 4), given=given, layout="channels_last").items()}
    compare(tensors, 4, backend.name, activation="silu" if silu else None, dropout=(0.5, KEY) if drops else None, eps=1e-3)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.backends("group_norm", without=("reference",))
def test_small_tensors_in_float32_beside_16_bit_data(dtype, backend):
    tensors = {name: x.to(backend.device) for name, x in make((2, 12, 5, 4), dtype, small=torch.float32).items()}
    compare(tensors, 4, backend.name, activation="silu")


def test_small_tensors_of_different_dtypes():
    tensors = make((2, 12, 5, 4), torch.bfloat16)
    mixed = tensors | {"weight": tensors["weight"].float(), "scale": tensors["scale"].float()}
    got, expected = run(mixed, 4, activation="silu"), run(tensors, 4, activation="silu")
    for name, x in got.items():
        assert x.dtype == mixed.get(name, x).dtype
        assert_close_to_exact(x, expected[name].double(), rtol=0.01, atol=1e-3, what=name)


def test_reference_is_pytorchs():
    """Against F.group_norm, F.silu and the formula of FiLM, in float64."""
    tensors = {name: x.double() for name, x in make((3, 12, 5, 7)).items()}
    x, weight, bias, pre_bias, scale, shift = (y.requires_grad_() for y in tensors.values())
    y = F.group_norm(x + pre_bias[..., None, None], 4, weight, bias, 1e-5) * (1 + scale[..., None, None]) + shift[..., None, None]
    expected = F.silu(y)
    grads = torch.autograd.grad(expected, list(tensors.values()), torch.ones_like(expected) * 0.3)
    got = run(tensors, 4, grad_y=torch.ones_like(expected) * 0.3, activation="silu")
    assert_close_to_exact(got["y"], expected.detach(), rtol=1e-12, atol=1e-13)
    for (name, x), g in zip(list(got.items())[1:], grads, strict=True):
        assert_close_to_exact(x, g, rtol=1e-10, atol=1e-11, what=name)


def test_gradcheck_twice():
    tensors = [x.double().requires_grad_() for x in make((2, 4, 3, 2)).values()]
    call = lambda x, w, b, p, s, h: group_norm(x, 2, w, b, pre_bias=p, scale=s, shift=h, activation="silu", dropout=(0.4, KEY))  # noqa: E731
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


@every_layout
def test_second_derivative_of_the_kernels(layout):
    """A gradient's gradient goes through the reference."""

    def second(tensors):
        x = tensors["x"].detach().requires_grad_()
        y = group_norm(x, 2, activation="silu")
        (g,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
        return torch.autograd.grad((g * g).sum(), x)[0]

    tensors = make((2, 8, 5, 3), layout=layout, given=())
    assert_close_to_exact(second(tensors), second({"x": tensors["x"].double()}), rtol=1e-3, atol=1e-2)


@pytest.mark.backends("group_norm")
@every_layout
@pytest.mark.parametrize("shape", [(2, 8, 12, 12), (1, 32, 64, 64)], ids=str)
def test_mean_ten_thousand_deviations_away(shape, layout, backend):
    """Within twice the error of PyTorch's own float32 norm, which subtracts after it has multiplied; with a bias before it too."""
    x = stored(torch.randn(shape) + 1e4, layout).to(backend.device)
    pre_bias = torch.randn(shape[:2], device=backend.device)
    for bias in (None, pre_bias):
        wide = x.double() if bias is None else x.double() + bias.double()[:, :, None, None]
        plain = x if bias is None else x + bias[:, :, None, None]
        y, exact = group_norm(x, 4, pre_bias=bias, backend=backend.name), F.group_norm(wide, 4)
        assert_as_accurate(y, F.group_norm(plain, 4), exact)
        assert float((y.double() - exact).abs().max()) < 2e-3


@pytest.mark.backends("group_norm", without=("reference",))
@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("shape", [(2, 8192), (1, 2**20), (1, 2**16, 2, 2)], ids=str)
def test_very_wide_groups(shape, mean, backend):
    """Sums over a million channels lose nothing."""
    tensors = {"x": (torch.randn(shape) + mean).to(backend.device)}
    got, baseline, exact = (
        run({"x": x}, 1, b) for x, b in ((tensors["x"], backend.name), (tensors["x"], "reference"), (tensors["x"].double(), "reference"))
    )
    for name, x in got.items():
        assert_as_accurate(x, baseline[name], exact[name], factor=3.0, floor=8.0, what=name)


@pytest.mark.backends("group_norm", without=("reference",))
@every_layout
def test_values_that_change_their_kind_on_the_way(layout, backend):
    """The first eighth a million times as large, or far off: what distances are taken from is a bad guess, and no harm is done."""
    for change in (lambda x: x * 1e6, lambda x: x + 1e4):
        x = torch.randn(2, 16, 48, 48)
        x[:, :, :6] = change(x[:, :, :6])
        x = stored(x, layout).to(backend.device)
        exact = F.group_norm(x.double(), 4)
        error = (group_norm(x, 4, backend=backend.name).double() - exact).abs()
        assert float((error / exact.abs().clamp_min(1e-3)).max()) < 1e-3
        assert float(error.max()) < 4e-6 * float(exact.abs().max()) + 1e-6


@pytest.mark.backends("group_norm", without=("reference",))
@every_dtype
def test_large_arguments_of_silu(dtype, backend):
    """Saturated on both sides, never NaN."""
    x = torch.tensor([[[-1.0, 1.0] * 8]], device=backend.device).to(dtype)
    for slope in (1.0, 20.0, 88.0, 127.0, 1e4):
        weight = torch.full((1,), slope, device=backend.device)
        y = group_norm(x, 1, weight, activation="silu", eps=0.0, backend=backend.name)
        exact = F.silu(x.double() * slope)
        assert_close_to_exact(y, exact, ulps=4, atol=1e-30)
    for offset in (-1e30, -3e38, 3e4):
        bias = torch.full((1,), offset, device=backend.device)
        y = group_norm(x, 1, torch.zeros_like(bias), bias, activation="silu", backend=backend.name)
        assert_close_to_exact(y, torch.full_like(y, max(offset, 0.0)).double(), ulps=1, atol=1e-30)


@pytest.mark.backends("group_norm", without=("reference",))
@every_layout
def test_constant_groups(layout, backend):
    """No variance: what is left is eps, and nothing is NaN; a bias alike for all changes nothing."""
    x = stored(torch.full((2, 8, 3, 3), 7.0), layout).to(backend.device)
    for bias in (None, 1.3, 1e4):
        pre_bias = None if bias is None else torch.full((2, 8), bias, device=backend.device)
        assert_bits_equal(group_norm(x, 2, pre_bias=pre_bias, backend=backend.name).abs(), torch.zeros_like(x))


@pytest.mark.backends("group_norm")
@every_layout
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_group(bad, layout, backend):
    tensors = {name: x.to(backend.device) for name, x in make((3, 24, 9, 5), layout=layout).items()}
    whole = run(tensors, 6, backend.name, activation="silu")
    broken = tensors | {"x": tensors["x"].clone()}
    broken["x"][1, 4, 2, 3] = bad  # of the second group
    hurt = run(broken, 6, backend.name, activation="silu")
    assert hurt["y"][1, 4:8].isnan().all() and hurt["x"][1, 4:8].isnan().all()
    for name in ("y", "x", *ROWS):
        keep = torch.ones_like(whole[name], dtype=torch.bool)
        keep[1, 4:8] = False
        assert_bits_equal(hurt[name][keep], whole[name][keep], name)


# The mask.


def test_mask_is_philoxs_words_in_channels_last_order():
    """By the contract, element by element."""
    shape, p = (2, 3, 5, 2), 0.3
    kept = dropout_mask_reference(shape, p, KEY.seed, KEY.stream, KEY.first_sample, torch.device("cpu"))
    for n, c, i, k in itertools.product(*map(range, shape)):
        index, sample = (i * shape[3] + k) * shape[1] + c, KEY.first_sample + n
        words = philox4x32_10(index // 4, KEY.stream, sample & 0xFFFFFFFF, sample >> 32, KEY.seed & 0xFFFFFFFF, KEY.seed >> 32)
        assert bool(kept[n, c, i, k]) == (words[index % 4] >= int(p * 2**32))


@pytest.mark.backends("group_norm")
@every_layout
@every_size
def test_mask_is_the_references(shape, groups, layout, backend):
    x = stored(torch.randn(shape), layout).to(backend.device)
    shift = torch.full(shape[:2], 100.0, device=backend.device)  # nothing is 0 by itself
    y = group_norm(x, groups, shift=shift, dropout=(0.4, KEY), backend=backend.name)
    plain = group_norm(x, groups, shift=shift, backend=backend.name)
    kept = dropout_mask_reference(shape, 0.4, KEY.seed, KEY.stream, KEY.first_sample, x.device)
    assert_bits_equal(y != 0, kept)
    assert_close_to_exact(y, torch.where(kept, plain.double() / 0.6, 0.0), ulps=2)


def test_mask_does_not_depend_on_batch_and_keeps_the_share():
    x = torch.randn(6, 32, 16, 16)
    whole = group_norm(x, 4, dropout=(0.1, KEY))
    parts = [group_norm(x[a:b], 4, dropout=(0.1, KEY.at(first_sample=KEY.first_sample + a))) for a, b in ((0, 1), (1, 6))]
    assert_bits_equal(torch.cat(parts), whole)
    share = float((whole != 0).double().mean())
    assert abs(share - 0.9) < 5 * math.sqrt(0.09 / whole.numel())
    assert_bits_equal(group_norm(x, 4, dropout=(0.0, KEY)), group_norm(x, 4))


# Exactness and surroundings.


@every_layout
@every_dtype
@pytest.mark.parametrize("shape, groups", [((1, 64, 48, 48), 8), ((3, 40, 17, 9), 4), ((16, 8, 8, 8), 8)], ids=str)
def test_threads_do_not_change_a_bit(shape, groups, dtype, layout, isa):
    tensors = make(shape, dtype, layout=layout)
    with thread_count(1):
        alone = run(tensors, groups, activation="silu", dropout=(0.2, KEY))
    for count in (2, 3):
        with thread_count(count):
            for name, x in run(tensors, groups, activation="silu", dropout=(0.2, KEY)).items():
                assert_bits_equal(x, alone[name], f"{name} with {count} threads")


@every_layout
def test_a_sample_does_not_depend_on_its_batch(layout, isa):
    tensors, grad_y = make((5, 24, 17, 9), layout=layout), torch.randn(5, 24, 17, 9)
    whole = run(tensors, 4, grad_y=grad_y, activation="silu")
    for n in range(5):
        part = {name: x if name in PARAMETERS else x[n : n + 1] for name, x in tensors.items()}
        one = run(part, 4, grad_y=grad_y[n : n + 1], activation="silu")
        for name in ("y", "x", *ROWS):
            assert_bits_equal(one[name].contiguous(), whole[name][n : n + 1].contiguous(), name)


@every_layout
def test_deterministic(layout):
    tensors = make((4, 64, 32, 32), layout=layout)
    first, second = (run(tensors, 8, activation="silu", dropout=(0.1, KEY)) for _ in range(2))
    for name, x in first.items():
        assert_bits_equal(x, second[name], name)


@every_layout
def test_each_gradient_alone(layout):
    tensors = make((3, 12, 5, 6), layout=layout)
    together, grad_y = run(tensors, 3, activation="silu"), torch.randn(3, 12, 5, 6, generator=torch.Generator().manual_seed(9))
    for leaf in tensors:
        arguments = {name: x.detach().requires_grad_(name == leaf) for name, x in tensors.items()}
        x, *others = arguments.values()
        y = group_norm(x, 3, **dict(zip(list(arguments)[1:], others, strict=True)), activation="silu")
        assert_bits_equal(torch.autograd.grad(y, arguments[leaf], grad_y)[0], together[leaf], leaf)


def test_strided_expanded_and_unaligned_tensors():
    tensors = make((4, 12, 5, 6))
    wide = torch.randn(4, 24)
    tensors |= {"scale": wide[:, :12], "shift": wide[:, 12:], "pre_bias": tensors["pre_bias"][:1].expand(4, -1)}
    expected = run({name: x.contiguous() for name, x in tensors.items()}, 3, activation="silu")
    turned = tensors["x"].transpose(2, 3).contiguous().transpose(2, 3)
    unaligned = torch.empty(tensors["x"].numel() + 1)[1:].view(4, 12, 5, 6).copy_(tensors["x"])
    for x in (tensors["x"], turned, unaligned):
        leaves = {name: y.detach().requires_grad_() for name, y in (tensors | {"x": x}).items()}
        y = group_norm(leaves["x"], 3, **{name: y for name, y in leaves.items() if name != "x"}, activation="silu")
        assert_bits_equal(y.detach(), expected["y"])
        grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).transpose(2, 3).contiguous().transpose(2, 3)
        for name, g in zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad_y), strict=True):
            assert_bits_equal(g.contiguous(), expected[name], name)


def test_saves_x_and_the_statistics_only():
    tensors = {name: x.requires_grad_() for name, x in make((4, 32, 16, 16), layout="channels_last").items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        group_norm(tensors["x"], 8, **{k: x for k, x in tensors.items() if k != "x"}, activation="silu", dropout=(0.1, KEY))
    large = [x for x in saved if x.numel() >= tensors["x"].numel()]
    assert [x.data_ptr() for x in large] == [tensors["x"].data_ptr()]
    assert sum(x.numel() for x in saved) == sum(x.numel() for x in tensors.values()) + 2 * 4 * 8


def test_leaves_global_random_state_alone_and_recomputes_alike():
    tensors = make((2, 8, 4, 4))
    before = torch.get_rng_state()
    expected = run(tensors, 2, dropout=(0.3, KEY))
    assert_bits_equal(torch.get_rng_state(), before)
    x = tensors["x"].detach().requires_grad_()
    y = checkpoint(lambda x: group_norm(x, 2, **{k: v for k, v in tensors.items() if k != "x"}, dropout=(0.3, KEY)), x, use_reentrant=False)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    assert_bits_equal(torch.autograd.grad(y, x, grad_y)[0], expected["x"])
