"""The UNet against published figures, formulas written out, and itself under other layouts, dtypes and compilers."""

import inspect
import json
import math

import pytest
import torch
from tiny_unet import TINY, batch, randomised, tiny
from torch.testing import assert_close

from ddpm_fast.models import PRESETS, UNet
from ddpm_fast.models.layers import (
    Downsample,
    GroupNormAct,
    ResidualBlock,
    SelfAttention,
    TimeEmbedding,
    Upsample,
    init_fan_avg_uniform_,
    timestep_embedding,
)

# Architecture


@pytest.mark.parametrize(
    ("preset", "overrides", "expected"),
    [
        ("cifar10", {}, 35_746_307),  # Ho et al. (2020): "35.7 million parameters"
        ("cifar10", {"learned_variance": True}, 35_749_766),  # 6 output channels
        ("digits", {"num_classes": 10}, 651_041 + 11 * 128),  # ten classes and the null class
        ("photos32", {}, 2_736_099),
        ("digits", {}, 651_041),
    ],
)
def test_parameter_count(preset, overrides, expected):
    model = UNet.from_preset(preset, **overrides)
    assert sum(p.numel() for p in model.parameters()) == expected


@torch.no_grad()
@pytest.mark.parametrize(
    ("preset", "n", "overrides", "channels"),
    [
        ("cifar10", 1, {}, 3),
        ("photos32", 3, {"learned_variance": True}, 6),  # odd batch
        ("digits", 1, {"out_channels": 5}, 5),
        ("digits", 7, {"num_classes": 10}, 1),  # a prime
    ],
)
def test_shape_layout_and_zero_output_at_the_start(preset, n, overrides, channels):
    model = UNet.from_preset(preset, **overrides)
    size = model.config["image_size"]
    out = model(torch.randn(n, model.in_channels, size, size), torch.arange(n))
    assert out.shape == (n, channels, size, size)
    assert out.is_contiguous() and out.dtype == torch.float32
    assert torch.count_nonzero(out) == 0


def test_default_arguments_are_the_cifar10_preset():
    arguments = inspect.signature(UNet).parameters
    assert {name: arguments[name].default for name in PRESETS["cifar10"]} == PRESETS["cifar10"]


def test_other_sizes_than_image_size():
    assert tiny()(torch.randn(1, 2, 6, 10), torch.tensor([3])).shape == (1, 2, 6, 10)


def test_initial_weights():
    torch.manual_seed(0)
    model = UNet(**TINY)
    for name, p in model.named_parameters():
        if name.endswith(("bias", "conv2.weight", "proj_out.weight", "conv_out.weight")):
            assert torch.count_nonzero(p) == 0, name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            # A packed qkv counts as three maps C -> C.
            fan_out = p.shape[0] // 3 if "qkv" in name else p.shape[0]
            bound = math.sqrt(6.0 / ((p.shape[1] + fan_out) * math.prod(p.shape[2:])))
            assert 0.9 * bound < p.abs().max() <= bound, name


def test_state_dict_names_are_stable():
    names = set(UNet(**TINY, num_classes=2).state_dict())
    assert names >= {
        "conv_in.weight", "time_embedding.linear1.weight", "time_embedding.linear2.bias", "label_embedding.weight",
        "down.0.blocks.0.norm1.weight", "down.0.blocks.0.conv1.weight", "down.0.blocks.0.time_projection.weight",
        "down.0.downsample.conv.weight", "down.1.blocks.0.shortcut.weight", "down.1.attentions.0.norm.weight",
        "mid.block1.conv2.bias", "mid.attention.qkv.weight", "mid.attention.proj_out.weight",
        "up.0.blocks.1.norm2.weight", "up.0.attentions.1.qkv.bias", "up.0.upsample.conv.weight",
        "up.1.blocks.1.conv2.weight", "norm_out.weight", "conv_out.weight", "conv_out.bias",
    }  # fmt: skip
    assert len(names) == 129


@pytest.mark.parametrize("kwargs", [TINY, {**TINY, "num_classes": 3, "head_channels": 8, "learned_variance": True}])
def test_config_round_trip(kwargs):
    model = randomised(UNet(**kwargs)).eval()
    config = json.loads(json.dumps(model.config))
    assert config == model.config
    rebuilt = UNet(**config).eval()
    rebuilt.load_state_dict(model.state_dict())
    x, t = batch()
    assert torch.equal(model(x, t), rebuilt(x, t))
    model.config["channel_mult"].append(9)
    assert model.config == config  # what is handed out is a copy


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_can_be_overridden(preset):
    model = UNet.from_preset(preset, base_channels=32, num_blocks=1, dropout=0.25)
    assert (model.config["base_channels"], model.config["dropout"]) == (32, 0.25)


# Layers against their formulas


def test_timestep_embedding_against_the_formula():
    t, channels = [0, 1, 500, 999], 12
    half = channels // 2
    expected = [[f(s * math.exp(-math.log(10000.0) * k / (half - 1))) for f in (math.sin, math.cos) for k in range(half)] for s in t]
    expected = torch.tensor(expected, dtype=torch.float64)
    assert_close(timestep_embedding(torch.tensor(t), channels, torch.float64), expected, rtol=0, atol=1e-12)
    # An angle of up to 999 has an error of up to 999 * 2^-24 in fp32.
    assert_close(timestep_embedding(torch.tensor(t), channels).double(), expected, rtol=0, atol=2e-4)
    assert torch.equal(timestep_embedding(torch.tensor(t).float(), channels), timestep_embedding(torch.tensor(t), channels))


def test_time_embedding_in_bf16_still_tells_neighbouring_steps_apart():
    torch.manual_seed(0)
    layer = TimeEmbedding(32)
    t = torch.arange(996, 1000)
    exact, low = layer(t), layer.bfloat16()(t)
    assert low.dtype == torch.bfloat16
    assert (exact - low.float()).abs().max() < 0.3 * (exact[1:] - exact[:-1]).abs().amax(1).min()


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("with_bias", [True, False])
def test_group_norm_act_against_the_formula(activation, with_bias):
    torch.manual_seed(0)
    layer = randomised(GroupNormAct(3, 6, 1e-6, activation=activation).double())
    x, pre_bias = torch.randn(2, 6, 4, 5, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    h = (x + pre_bias[:, :, None, None] if with_bias else x).reshape(2, 3, -1)
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    h = h.reshape(x.shape) * layer.weight[:, None, None] + layer.bias[:, None, None]
    expected = h / (1 + torch.exp(-h)) if activation else h
    assert_close(layer(x, pre_bias if with_bias else None), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_self_attention_against_the_formula(heads):
    torch.manual_seed(0)
    n, c, height, width = 2, 8, 3, 5
    d = c // heads
    layer = randomised(SelfAttention(c, heads, norm_groups=4, norm_eps=1e-6).double())
    x = torch.randn(n, c, height, width, dtype=torch.float64)
    weight, bias = layer.qkv.weight.reshape(3, heads, d, c), layer.qkv.bias.reshape(3, heads, d)
    q, k, v = (torch.einsum("hdc,ncp->nhpd", w, layer.norm(x).flatten(2)) + b[:, None] for w, b in zip(weight, bias, strict=True))
    scores = torch.softmax(torch.einsum("nhpd,nhqd->nhpq", q, k) / math.sqrt(d), dim=-1)
    mixed = torch.einsum("nhpq,nhqd->nhdp", scores, v).reshape(n, c, height, width)
    expected = x + torch.einsum("oc,nchw->nohw", layer.proj_out.weight[:, :, 0, 0], mixed) + layer.proj_out.bias[:, None, None]
    assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


def test_residual_block_against_its_parts():
    torch.manual_seed(0)
    block = randomised(ResidualBlock(4, 8, 16, dropout=0.0, norm_groups=2, norm_eps=1e-6).double())
    x, embedding = torch.randn(2, 4, 5, 5, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)
    h = block.conv1(block.norm1(x)) + block.time_projection(embedding)[:, :, None, None]
    assert_close(block(x, embedding), block.shortcut(x) + block.conv2(block.norm2(h)))


def test_dropout_is_after_the_second_norm_only():
    model = UNet(**TINY, dropout=0.5)
    rates = {name: m.dropout for name, m in model.named_modules() if isinstance(m, GroupNormAct)}
    assert {name for name, p in rates.items() if p} == {name for name in rates if name.endswith("norm2")}
    layer = GroupNormAct(1, 4, dropout=0.25).train()
    x = torch.randn(1, 4, 64, 64)
    dropped, kept = layer(x), layer.eval()(x)
    zeros = dropped == 0
    assert abs(zeros.double().mean() - 0.25) < 0.02  # 5 sigma of 16384 draws
    assert_close(dropped[~zeros], kept[~zeros] / 0.75)


def test_downsample_pads_below_and_to_the_right():
    layer = Downsample(1)
    x = torch.arange(1.0, 17.0).reshape(1, 1, 4, 4)
    for tap, expected in (((0, 0), [[1, 3], [9, 11]]), ((2, 2), [[11, 0], [0, 0]])):
        with torch.no_grad():
            layer.conv.weight.zero_()[0, 0][tap] = 1.0
        assert layer(x)[0, 0].tolist() == expected


def test_upsample_repeats_pixels():
    layer = Upsample(1)
    with torch.no_grad():
        layer.conv.weight.zero_()[0, 0, 1, 1] = 1.0
    assert layer(torch.tensor([[[[1.0, 2.0]]]]))[0, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]


# The network as a function


def test_gradients_reach_every_parameter():
    model = tiny(num_classes=3, dropout=0.1).train()
    x, t = batch()
    model(x, t, torch.tensor([0, 1, 2])).square().mean().backward()
    model(x, t).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and torch.count_nonzero(p.grad) > 0, name
    assert (model.label_embedding.weight.grad.abs().sum(1) > 0).all()


def test_gradient_against_finite_differences():
    model = tiny(torch.float64)
    x, t = batch(2, torch.float64)
    x.requires_grad_(True)
    leaves = [x, *model.parameters()]
    loss = model(x, t).sin().sum()
    grads = torch.autograd.grad(loss, leaves)
    torch.manual_seed(3)
    directions = [torch.randn_like(p) for p in leaves]
    predicted = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    step, values = 1e-6, []
    with torch.no_grad():
        for shift in (step, -2 * step):  # at +step, then at -step
            for p, d in zip(leaves, directions, strict=True):
                p.add_(d, alpha=shift)
            values.append(model(x, t).sin().sum())
    assert_close((values[0] - values[1]) / (2 * step), predicted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2])  # one channel: the layout is ambiguous
def test_layout_of_the_input_does_not_matter(channels):
    model = tiny(in_channels=channels)
    x, t = batch()
    x = x[:, :channels]
    expected = model(x.contiguous(), t)
    assert_close(model(x.contiguous(memory_format=torch.channels_last), t), expected)
    strided = torch.stack([x, -x], dim=-1)[..., 0]
    assert_close(model(strided, t), expected)


@pytest.mark.parametrize("in_channels", [1, 3])
def test_activations_are_channels_last_throughout(in_channels):
    model, seen = tiny(in_channels=in_channels), []
    for module in model.modules():
        if isinstance(module, (ResidualBlock, SelfAttention, GroupNormAct, Upsample, Downsample)):
            module.register_forward_hook(lambda m, args, out: seen.append(out.is_contiguous(memory_format=torch.channels_last)))
    model(torch.randn(2, in_channels, 8, 8), torch.tensor([0, 1]))
    assert seen and all(seen)


def test_samples_do_not_see_each_other():
    model = tiny(torch.float64)
    x, t = batch(3, torch.float64)
    expected = model(x, t)
    others = x.clone()
    others[0], others[2] = 5.0, -x[2]
    assert_close(model(others, torch.tensor([3, 999, 8]))[1], expected[1], rtol=0, atol=1e-12)
    assert_close(model(x[1:2], t[1:2])[0], expected[1], rtol=0, atol=1e-12)


def test_output_depends_on_t_and_takes_float_t():
    model = tiny()
    x, t = batch()
    assert (model(x, t) - model(x, t.flip(0))).abs().amax(dim=(1, 2, 3))[0] > 1e-3
    assert torch.equal(model(x, t.float()), model(x, t))


def test_float64_agrees_with_float32():
    x, t = batch()
    expected = tiny(torch.float64)(x.double(), t)
    assert expected.dtype == torch.float64
    assert_close(tiny()(x, t).double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_bf16(way):
    x, t = batch()
    expected = tiny()(x, t)
    if way == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = tiny()(x, t)
    else:
        out = tiny(torch.bfloat16)(x.bfloat16(), t)
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).norm() < 0.05 * expected.norm()


def test_class_conditioning():
    model = tiny(num_classes=3)
    x, t = batch()
    x, t = x[:1].expand(4, -1, -1, -1), t[:1].expand(4)
    out = model(x, t, torch.tensor([0, 1, 2, 3]))
    assert all((out[i] - out[j]).abs().max() > 1e-3 for i in range(4) for j in range(i))
    assert_close(model(x, t), out[3:].expand(4, -1, -1, -1))  # None is the null class, number K
    with pytest.raises(IndexError):
        model(x, t, torch.tensor([0, 1, 2, 4]))


@pytest.mark.parametrize(("backend", "num_classes"), [("aot_eager", None), ("eager", 3)])
def test_compiles_to_one_graph(backend, num_classes):
    model = tiny(num_classes=num_classes, attention_resolutions=())  # fewer layers to trace, the same kinds
    x, t = batch()
    y = None if num_classes is None else torch.tensor([0, 1, 3])
    torch._dynamo.reset()
    with torch.no_grad():
        assert_close(torch.compile(model, backend=backend, fullgraph=True)(x, t, y), model(x, t, y))


# Errors


@pytest.mark.parametrize(
    ("x_shape", "t", "labels", "error", "message"),
    [
        ((3, 2, 8), torch.zeros(3).long(), None, ValueError, r"x_t must have shape \(N, 2, H, W\), got \(3, 2, 8\)"),
        ((3, 4, 8, 8), torch.zeros(3).long(), None, ValueError, r"x_t must have shape \(N, 2, H, W\), got \(3, 4, 8, 8\)"),
        ((3, 2, 8, 7), torch.zeros(3).long(), None, ValueError, "divisible by 2, got 8 x 7"),
        ((3, 2, 8, 8), torch.zeros(2).long(), None, ValueError, r"t must have shape \(3,\), got \(2,\)"),
        ((3, 2, 8, 8), torch.zeros(3, 1).long(), None, ValueError, r"t must have shape \(3,\), got \(3, 1\)"),
        ((3, 2, 8, 8), torch.tensor(0), None, ValueError, r"t must have shape \(3,\), got \(\)"),
        ((3, 2, 8, 8), torch.zeros(3).int(), None, TypeError, "t must have dtype torch.int64 .* got torch.int32"),
        ((3, 2, 8, 8), torch.zeros(3).long(), torch.zeros(2).long(), ValueError, r"labels must have shape \(3,\), got \(2,\)"),
        ((3, 2, 8, 8), torch.zeros(3).long(), torch.zeros(3), TypeError, "labels must have dtype torch.int64, got torch.float32"),
    ],
)
def test_forward_errors(x_shape, t, labels, error, message):
    with pytest.raises(error, match=message):
        UNet(**TINY, num_classes=3)(torch.zeros(x_shape), t, labels=labels)


def test_forward_errors_of_dtype_and_of_labels_without_classes():
    model, t = UNet(**TINY), torch.zeros(3).long()
    with pytest.raises(TypeError, match=r"x_t must have a floating-point dtype, got torch\.uint8"):
        model(torch.zeros(3, 2, 8, 8, dtype=torch.uint8), t)
    with pytest.raises(ValueError, match="labels must be None for a model without classes"):
        model(torch.zeros(3, 2, 8, 8), t, t)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"channel_mult": ()}, ValueError, "channel_mult must have at least one level"),
        ({"channel_mult": (1, 0)}, ValueError, "each entry of channel_mult must be at least 1, got 0"),
        ({"channel_mult": (1, 1.5)}, TypeError, "each entry of channel_mult must be an int, got float"),
        ({"channel_mult": (1, 2, 2, 2, 2)}, ValueError, r"image_size must be divisible by 2\*\*\(levels - 1\) = 16, got 8"),
        ({"base_channels": 9, "norm_groups": 3}, ValueError, "base_channels must be even and at least 4"),
        ({"base_channels": True}, TypeError, "base_channels must be an int, got bool"),
        ({"norm_groups": 3}, ValueError, "norm_groups must divide the channels of every level, got 3 and 8"),
        ({"norm_eps": 0.0}, ValueError, "norm_eps must be positive"),
        ({"attention_resolutions": (5,)}, ValueError, r"attention_resolutions must be among \[8, 4\], got \[5\]"),
        ({"num_heads": 3}, ValueError, "num_heads must divide the channels of every level with attention, got 3 and 16"),
        ({"head_channels": 5}, ValueError, "head_channels must divide .* got 5 and 16"),
        ({"head_channels": 4, "num_heads": 2}, ValueError, "give num_heads or head_channels, not both"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": "0"}, TypeError, "dropout must be a number, got str"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"learned_variance": 1}, TypeError, "learned_variance must be a bool, got int"),
    ],
)
def test_config_errors(overrides, error, message):
    with pytest.raises(error, match=message):
        UNet(**{**TINY, **overrides})


def test_layer_and_preset_errors():
    with pytest.raises(ValueError, match="preset must be one of cifar10, digits, photos32, got 'cifar'"):
        UNet.from_preset("cifar")
    with pytest.raises(ValueError, match="channels must be even and at least 4, got 5"):
        timestep_embedding(torch.tensor([0]), 5)
    with pytest.raises(ValueError, match="groups must divide channels, got groups=3, channels=8"):
        GroupNormAct(3, 8)
    with pytest.raises(ValueError, match="activation must be 'silu' or None, got 'relu'"):
        GroupNormAct(4, 8, activation="relu")
    with pytest.raises(ValueError, match="heads must divide channels, got heads=3, channels=8"):
        SelfAttention(8, 3, 4, 1e-6)
    with pytest.raises(ValueError, match="scale must be >= 0, got -1"):
        init_fan_avg_uniform_(torch.zeros(2, 2), -1.0)
