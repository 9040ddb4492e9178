"""conv3x3: the CPU kernel against float64, its bits, weights that change, what is left to PyTorch, errors."""

from __future__ import annotations

import functools
import io
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from numerics import Rounded, assert_bits_equal, assert_close_to_exact, assert_within_rounding, networks_rounding
from op_cases import thread_count
from torch import nn
from weight_changes import CHANGES

from ddpm_fast import UNet
from ddpm_fast.backends import native
from ddpm_fast.models import layers
from ddpm_fast.ops import conv3x3

# (N, H, W, C, K)
SIZES = [
    (1, 1, 1, 1, 1),  # the smallest: a quarter of a tile
    (1, 2, 2, 16, 32),  # one tile, a chunk of input channels, a panel of output channels
    (2, 5, 7, 3, 5),  # tiles that stick out on both sides, nothing that fills a register
    (3, 1, 9, 17, 33),  # one row; a channel more than a chunk and a panel
    (13, 3, 3, 20, 47),  # 52 tiles: groups that are not full, primes
    (4, 8, 8, 1, 32),  # the digits' conv_in
    (4, 8, 8, 32, 1),  # and conv_out
    (4, 4, 4, 192, 64),  # their widest
    (1, 32, 32, 3, 128),  # Ho's conv_in
    (2, 16, 16, 256, 64),  # several blocks
    (1, 4, 4, 512, 256),  # a weight larger than the second-level cache
]
ENOUGH = (11, 6, 4, 16, 32)  # 66 tiles, for the kernel to be the default
every_size = pytest.mark.parametrize("size", SIZES, ids=str)
needs_kernel = pytest.mark.skipif(native is None, reason="ddpm_fast._C was not built")


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def make(size, *, seed=0):
    """x, weight, bias, residual: weights as large as keeps the variance."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    n, h, w, c, k = size
    x, weight = draw(n, c, h, w), draw(k, c, 3, 3) / (3 * math.sqrt(c))
    return channels_last(x), channels_last(weight), draw(k), channels_last(draw(n, k, h, w))


def plain(x, weight, bias=None, residual=None):
    """The formula, as PyTorch's users write it."""
    y = F.conv2d(x, weight, bias, padding=1)
    return y if residual is None else residual + y


def wide(*tensors):
    return [None if x is None else x.double() for x in tensors]


def winograd(x, weight):
    """Every step of F(2×2, 3×3) in the order of csrc/cpu/conv3x3.cpp, in float64, with a bound on each one's rounding.

    The weight's transform is rounded once; tiles of x, products and results as they come. Without contraction a product is rounded
    before it is added, with it only the sum: the bound holds for both.
    """
    (n, c, h, w), k = x.shape, weight.shape[0]
    rows, columns = (h + 1) // 2, (w + 1) // 2
    tiles = F.pad(x.double(), (1, 2 * columns - w + 1, 1, 2 * rows - h + 1)).unfold(2, 4, 2).unfold(3, 4, 2)
    d = Rounded(tiles.permute(4, 5, 0, 2, 3, 1).reshape(4, 4, -1, c))  # (4, 4, tiles, channels)
    g = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    u = Rounded(torch.einsum("ia,jb,kcab->ijck", g, g, weight.double())).stored()

    enter = lambda a: [a[0] - a[2], a[1] + a[2], a[2] - a[1], a[1] - a[3]]  # noqa: E731
    leave = lambda a: [a[0] + a[1] + a[2], a[1] - a[2] - a[3]]  # noqa: E731
    down_columns = [enter([d[i, j] for i in range(4)]) for j in range(4)]
    v = [enter([down_columns[j][i] for j in range(4)]) for i in range(4)]
    m = [[(v[i][j][:, :, None] * u[i, j]).sum_in_order(1) for j in range(4)] for i in range(4)]
    across = [leave([m[i][j] for i in range(4)]) for j in range(4)]
    y = [leave([across[j][i] for j in range(4)]) for i in range(2)]

    def image(part):
        of = torch.stack([torch.stack([part(z) for z in line]) for line in y])  # (2, 2, tiles, K)
        return of.view(2, 2, n, rows, columns, k).permute(2, 5, 3, 0, 4, 1).reshape(n, k, 2 * rows, 2 * columns)[:, :, :h, :w]

    return Rounded(image(lambda z: z.value), image(lambda z: z.error))


def with_bias(y, bias):
    return y + Rounded(bias[:, None, None].expand(y.value.shape))


@pytest.mark.backends("conv3x3", without=("reference",))
@every_size
def test_against_float64(size, backend):
    _, _, bias, residual = make(size)
    exact = derived(size)
    for given, expected in {2: exact, 3: with_bias(exact, bias), 4: with_bias(exact, bias) + Rounded(residual)}.items():
        tensors = [*make(size)[:given], *[None] * (4 - given)]  # without a bias and a residual, with the one, with both
        y = conv3x3(*tensors[:3], residual=tensors[3], backend=backend.name)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert_close_to_exact(expected.value, plain(*wide(*tensors)), rtol=1e-13, atol=1e-13)  # the steps are the convolution's
        assert_within_rounding(y, expected, f"{given} tensors")


@functools.cache
def derived(size):
    return winograd(*make(size)[:2])


FAULTS = {
    "a channel is dropped": lambda x, w: (x, torch.cat([w[:, :-1], 0 * w[:, -1:]], 1)),
    "a tap is missing": lambda x, w: (x, w * torch.ones(3, 3).index_put_((torch.tensor(2), torch.tensor(0)), torch.tensor(0.0))),
    "x in bfloat16": lambda x, w: (x.bfloat16().float(), w),
    "the weight in TF32": lambda x, w: (x, (w.view(torch.int32) & -0x2000).view(torch.float32)),
    "a pixel is its neighbour": lambda x, w: (x.roll(1, 3), w),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("size", [(2, 5, 7, 3, 5), (1, 4, 4, 512, 256)], ids=str)
def test_the_limit_notices(size, fault):
    """Faults in float64, where rounding hides nothing."""
    x, weight, bias, _ = make(size)
    wrong = plain(*wide(*FAULTS[fault](x, weight), bias)).float()
    with pytest.raises(AssertionError, match="too far off"):
        assert_within_rounding(wrong, with_bias(derived(size), bias))


@needs_kernel
def test_weights_of_one_place_are_exact(isa):
    """Integers below 2^20 and one tap: every sum is exact, so that each place of the weight and of the tile shows."""
    x = channels_last(torch.randint(-1000, 1000, (2, 5, 7, 6)).float())
    for i in range(3):
        for j in range(3):
            weight = torch.zeros(4, 5, 3, 3)
            weight[:, :, i, j] = 4 * torch.randint(-8, 8, (4, 5))
            exact = F.conv2d(x.double(), weight.double(), padding=1).float()
            assert_bits_equal(conv3x3(x, weight, backend="cpu") + 0.0, exact + 0.0, f"tap {i}, {j}")


@needs_kernel
@pytest.mark.parametrize(
    "make_other", [torch.Tensor.contiguous, lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)], ids=["NCHW", "strided"]
)
def test_forced_on_other_layouts(make_other):
    x, weight, bias, residual = make((2, 6, 4, 5, 7))
    expected = conv3x3(x, weight, bias, residual=residual, backend="cpu")
    assert_bits_equal(conv3x3(make_other(x), make_other(weight), bias, residual=make_other(residual), backend="cpu"), expected)


@needs_kernel
@pytest.mark.parametrize("place", range(4))
def test_tensors_that_are_negated_when_read(place):
    tensors = list(make(ENOUGH))
    expected = conv3x3(*tensors[:3], residual=tensors[3], backend="cpu")
    tensors[place] = torch._neg_view(-tensors[place])
    assert_bits_equal(conv3x3(*tensors[:3], residual=tensors[3], backend="cpu"), expected)
    assert_bits_equal(conv3x3(*tensors[:3], residual=tensors[3]), plain(*tensors))


@pytest.mark.backends("conv3x3")
def test_empty_batch(backend):
    x, weight, bias, _ = make((3, 4, 4, 5, 7))
    assert conv3x3(x[:0], weight, bias, backend=backend.name).shape == (0, 7, 4, 4)


# Bits.


@every_size
def test_threads_do_not_change_a_bit(size, isa):
    x, weight, bias, residual = make((max(40, size[0]), *size[1:]) if size[3] * size[1] < 300 else size)
    with thread_count(1):
        alone = conv3x3(x, weight, bias, residual=residual, backend="cpu")
    for count in (2, 3):
        with thread_count(count):
            assert_bits_equal(conv3x3(x, weight, bias, residual=residual, backend="cpu"), alone, f"{count} threads")


@pytest.mark.parametrize("size", [(5, 7, 5, 24, 40), (60, 8, 8, 64, 64), (9, 4, 4, 192, 64), (3, 16, 16, 256, 64)], ids=str)
def test_an_image_does_not_depend_on_its_batch(size, isa):
    x, weight, bias, residual = make(size)
    whole = conv3x3(x, weight, bias, residual=residual, backend="cpu")
    for first in range(size[0]):
        for last in {first + 1, min(first + 4, size[0])}:
            part = conv3x3(x[first:last], weight, bias, residual=residual[first:last], backend="cpu")
            assert_bits_equal(part, whole[first:last], f"{first}:{last}")


@needs_kernel
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_reaches_two_pixels(bad, isa):
    x, weight, bias, _ = make((3, 9, 10, 20, 5))
    whole = conv3x3(x, weight, bias, backend="cpu")
    row, column = 4, 7
    x[1, 3, row, column] = bad
    hurt = conv3x3(x, weight, bias, backend="cpu")
    assert not hurt[1, :, row - 1 : row + 2, column - 1 : column + 2].isfinite().any()
    keep = torch.ones_like(whole, dtype=torch.bool)
    keep[1, :, row - 2 : row + 3, column - 2 : column + 3] = False
    assert_bits_equal(hurt[keep], whole[keep])


# Weights that change.


@needs_kernel
@pytest.mark.parametrize("name", CHANGES)
def test_the_weight_is_that_of_now(name):
    torch.manual_seed(1)
    layer = layers.Conv3x3(16, 12).to(memory_format=torch.channels_last)
    x = channels_last(torch.randn(8, 16, 6, 6))
    assert native_calls(lambda: layer(x)) == 1
    with torch.no_grad():
        before = layer(x)
        CHANGES[name](layer)
        after, expected = layer(x), conv3x3(x, layer.weight.detach().clone(), layer.bias.detach().clone(), backend="cpu")
    assert not torch.equal(after, before)
    assert_bits_equal(after, expected)


def native_calls(function):
    """How often it calls the kernel, without gradients."""
    with torch.no_grad(), mock.patch.object(native, "cpu_conv3x3", mock.Mock(side_effect=native.cpu_conv3x3)) as calls:
        function()
    return calls.call_count


@needs_kernel
@torch.no_grad()
def test_nothing_is_left_on_the_weight():
    layer, x = layers.Conv3x3(16, 4), channels_last(torch.randn(1, 16, 16, 16))
    assert native_calls(lambda: layer(x)) == 1
    assert not vars(layer.weight) and not vars(layer.bias)
    file = io.BytesIO()
    torch.save(list(layer.parameters()), file)
    file.seek(0)
    for loaded, parameter in zip(torch.load(file, weights_only=True), layer.parameters(), strict=True):
        assert_bits_equal(loaded, parameter)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@torch.no_grad()
def test_pytorchs_defaults_change_nothing(dtype):
    x, weight, bias, residual = make(ENOUGH)
    expected = conv3x3(x, weight, bias, residual=residual)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            assert_bits_equal(conv3x3(x, weight.clone(memory_format=torch.preserve_format), bias, residual=residual), expected)
    finally:
        torch.set_default_dtype(before)


# What PyTorch's convolution does.


class Subclass(torch.Tensor):
    pass


def refusals():
    """name -> a call that the kernel does not serve, and PyTorch's answer."""
    x, weight, bias, residual = make(ENOUGH)
    leaf = lambda y: y.clone().requires_grad_()  # noqa: E731
    half = [y.bfloat16() for y in (x, weight, bias, residual)]

    def autocast(function):
        with torch.autocast("cpu", torch.bfloat16):
            return function(x, weight, bias, residual=residual)

    def compiled(function):
        return torch.compile(lambda *a: function(*a, residual=residual), backend="eager", fullgraph=True)(x, weight, bias)

    return {
        "gradient of x": lambda f: f(leaf(x), weight, bias, residual=residual),
        "gradient of the weight": lambda f: f(x, leaf(weight), bias, residual=residual),
        "gradient of the bias": lambda f: f(x, weight, leaf(bias), residual=residual),
        "gradient of the residual": lambda f: f(x, weight, bias, residual=leaf(residual)),
        "bfloat16": lambda f: f(*half[:3], residual=half[3]),
        "float64": lambda f: f(x.double(), weight.double(), bias.double(), residual=residual.double()),
        "NCHW": lambda f: f(x.contiguous(), weight, bias, residual=residual),
        "NCHW residual": lambda f: f(x, weight, bias, residual=residual.contiguous()),
        "weight with gaps": lambda f: f(x, torch.cat([weight] * 2, 1)[:, :16], bias, residual=residual),
        "subclass": lambda f: f(x.as_subclass(Subclass), weight, bias, residual=residual),
        "autocast": autocast,
        "fewer tiles": lambda f: f(x[:10], weight, bias, residual=residual[:10]),
        "fewer channels": lambda f: f(channels_last(x[:, :15]), channels_last(weight[:, :15]), bias, residual=residual),
        "compiled": compiled,
        "vmap": lambda f: torch.func.vmap(lambda y: f(y[None], weight, bias))(x),
        "jvp": lambda f: torch.func.jvp(lambda y: f(y, weight, bias), (x,), (x,))[1],
    }


@pytest.mark.parametrize("name", refusals())
def test_left_to_pytorch(name):
    call = refusals()[name]
    got, expected = call(conv3x3), call(plain)
    assert got.requires_grad == expected.requires_grad
    assert_bits_equal(got.detach(), expected.detach())


@needs_kernel
def test_the_kernel_is_the_default_without_a_gradient():
    x, weight, bias, residual = make(ENOUGH)
    expected = conv3x3(x, weight, bias, residual=residual, backend="cpu")
    assert not torch.equal(expected, plain(x, weight, bias, residual))  # what the test above can tell
    assert_bits_equal(conv3x3(x, weight, bias, residual=residual), expected)
    with torch.inference_mode():
        assert_bits_equal(conv3x3(x.clone(), weight, bias, residual=residual), expected)
        made_there = weight.clone()
    assert_bits_equal(conv3x3(x, made_there, bias, residual=residual), expected)
    parameter = nn.Parameter(weight.contiguous())
    with torch.no_grad():
        assert_bits_equal(conv3x3(x, parameter, bias, residual=residual), expected)


def test_gradient():
    tensors = [y.double().requires_grad_() for y in make((1, 2, 3, 1, 2))]
    assert torch.autograd.gradcheck(lambda x, w, b, r: conv3x3(x, w, b, residual=r), tensors)


@needs_kernel
def test_unet_in_evaluation():
    """All of its 3 × 3 convolutions, beside PyTorch's."""
    torch.manual_seed(0)
    model = UNet.from_preset("digits").eval()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    x_t, t = torch.randn(18, 1, 8, 8), torch.tensor([0, 400, 999] * 6)  # 72 tiles where there are 4 × 4 pixels
    with torch.no_grad(), mock.patch.object(layers, "conv3x3", mock.Mock(side_effect=conv3x3)) as calls:
        got = model(x_t, t)
        assert calls.call_count == 19
        assert sum(call.kwargs["residual"] is not None for call in calls.call_args_list) == 8  # one a residual block
        with mock.patch.object(layers, "conv3x3", functools.partial(conv3x3, backend="reference")):
            assert not torch.equal(got, model(x_t, t))
    exact, rounding = networks_rounding(model, lambda wide: {"out": wide(x_t.double(), t).detach()})["out"]
    assert_close_to_exact(got, exact, atol=rounding)


# Errors.


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(x=[1.0]), TypeError, "x must be a tensor, got list"),
        (dict(x=torch.zeros(2, 4, 4, 5, dtype=torch.int64)), TypeError, "x must be float32, bfloat16, float16 or float64, got torch.int64"),
        (dict(x=torch.zeros(5, 6, 4)), ValueError, "x must have shape (N, C, H, W), got (5, 6, 4)"),
        (dict(x=torch.zeros(2, 5, 0, 4)), ValueError, "x must have shape (N, C, H, W), got (2, 5, 0, 4)"),
        (dict(x=torch.zeros(2, 5, 6, 4, device="meta")), ValueError, "weight must be on the device of x, meta, got cpu"),
        (dict(weight=3), TypeError, "weight must be a tensor, got int"),
        (dict(weight=torch.zeros(7, 5, 1, 1)), ValueError, "weight must have shape (K, 5, 3, 3), got (7, 5, 1, 1)"),
        (dict(weight=torch.zeros(7, 4, 3, 3)), ValueError, "weight must have shape (K, 5, 3, 3), got (7, 4, 3, 3)"),
        (dict(weight=torch.zeros(0, 5, 3, 3)), ValueError, "weight must have shape (K, 5, 3, 3), got (0, 5, 3, 3)"),
        (dict(bias=torch.zeros(6)), ValueError, "bias must have shape (7,), got (6,)"),
        (dict(residual=torch.zeros(2, 7, 4, 6)), ValueError, "residual must have shape (2, 7, 6, 4), got (2, 7, 4, 6)"),
        (dict(backend="cuda"), ValueError, "conv3x3 has no cuda backend; it has reference, cpu"),
    ],
)
def test_wrong_input(changes, error, message):
    x, weight, bias, residual = make((2, 6, 4, 5, 7))
    with pytest.raises(error) as caught:
        conv3x3(**(dict(x=x, weight=weight, bias=bias, residual=residual) | changes))
    assert str(caught.value) == message


@needs_kernel
@pytest.mark.parametrize(
    "name, message",
    [
        ("gradient of the bias", "has no gradient; call it under torch.no_grad()"),
        ("bfloat16", "takes float32, got torch.bfloat16"),
        ("subclass", "takes plain tensors, got Subclass"),
        ("vmap", "is not for compiling, tracing or transforming: it is no operator of PyTorch"),
    ],
)
def test_forced_where_it_cannot(name, message):
    with pytest.raises(RuntimeError) as caught:
        refusals()[name](functools.partial(conv3x3, backend="cpu"))
    assert str(caught.value) == f"backend 'cpu' of conv3x3 {message}"
