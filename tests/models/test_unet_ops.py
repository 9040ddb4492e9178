"""The UNet on group_norm and attention: the numbers of their reference twins, its dropout's noise, and what it keeps for backward."""

from __future__ import annotations

from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from compiling import count_compilations
from numerics import assert_bits_equal, assert_close_to_exact, networks_rounding
from torch import nn

from ddpm_fast import Noise, UNet
from ddpm_fast.models import layers
from ddpm_fast.ops import attention, group_norm

KEY = Noise(seed=5, stream=3, first_sample=10)


def network(**overrides):
    """A small one with everything in it, whose output is not zero."""
    torch.manual_seed(0)
    options = dict(in_channels=3, base_channels=8, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(4,), image_size=8, num_heads=2,
                   dropout=0.2, num_classes=3, norm_groups=4)  # fmt: skip
    model = UNet(**(options | overrides))
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 8, 8, generator=generator).to(dtype), torch.tensor([0, 5, 77, 999]), torch.tensor([0, 1, 2, 3])


UPSTREAM = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def everything(model, dtype=torch.float32, upstream=UPSTREAM, **options):
    x_t, t, y = inputs(dtype)
    out = model(x_t, t, y, **options)
    grads = torch.autograd.grad(out, list(model.parameters()), upstream.to(out))
    return {"out": out.detach()} | {name: grad for (name, _), grad in zip(model.named_parameters(), grads, strict=True)}


def on_references():
    return mock.patch.multiple(
        layers, group_norm=partial(group_norm, backend="reference"), attention=partial(attention, backend="reference")
    )


def test_output_and_every_gradient_are_those_of_the_reference_twins():
    model = network()
    got = everything(model, dropout=KEY)
    with on_references():
        expected = networks_rounding(model, lambda wide, upstream: everything(wide, torch.float64, upstream, dropout=KEY), UPSTREAM)
    for name, x in got.items():
        exact, rounding = expected[name]
        assert_close_to_exact(x, exact, atol=rounding, what=name)


def test_the_limit_notices_wrong_weights():
    exact, rounding = networks_rounding(network(), lambda wide: everything(wide, torch.float64, dropout=KEY))["out"]
    faults = [
        lambda net: net.conv_in.weight.copy_(net.conv_in.weight.bfloat16()),
        lambda net: net.mid.block1.conv1.weight[0, 0, 0, 0].zero_(),  # one tap of one channel
        lambda net: net.mid.attention.qkv.weight.mul_(1.001),
    ]
    for change in faults:
        wrong = network().double()
        with torch.no_grad():
            change(wrong)
        with pytest.raises(AssertionError, match="too far off"):
            assert_close_to_exact(everything(wrong, torch.float64, dropout=KEY)["out"], exact, atol=rounding)


def test_operators_are_those_of_plain_pytorch():
    """The twins themselves, in float64, against the layers written out with PyTorch's own functions."""

    def norm(x, groups, weight, bias, *, eps, activation, pre_bias, dropout):
        x = x if pre_bias is None else x + pre_bias[:, :, None, None]
        x = F.group_norm(x, groups, weight, bias, eps)
        return F.silu(x) if activation == "silu" else x

    def attend(qkv):
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)

    model = network(dropout=0.0).double()
    got = everything(model, torch.float64)
    with mock.patch.multiple(layers, group_norm=norm, attention=attend):
        expected = everything(model, torch.float64)
    for name, x in got.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-9, atol=1e-10, msg=name)


# The dropout's noise.


def test_masks_depend_on_the_noise_alone():
    model, (x_t, t, y) = network(), inputs()
    whole = model(x_t, t, y, dropout=KEY)
    assert_bits_equal(model(x_t, t, y, dropout=KEY), whole)
    assert not torch.equal(model(x_t, t, y, dropout=KEY.at(stream=4)), whole)
    parts = [model(x_t[a:b], t[a:b], y[a:b], dropout=KEY.at(first_sample=KEY.first_sample + a)) for a, b in ((0, 1), (1, 4))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)  # a convolution may add up in another order


def test_every_block_has_a_mask_of_its_own():
    seen = []
    with mock.patch.object(
        layers, "group_norm", lambda *a, dropout=None, **k: seen.append(dropout) or group_norm(*a, dropout=dropout, **k)
    ):
        network()(*inputs(), dropout=KEY)
    given = [dropout for dropout in seen if dropout is not None]
    assert len(given) == len({noise for _, noise in given}) == 8  # residual blocks
    assert {p for p, _ in given} == {0.2} and {(noise.seed, noise.stream) for _, noise in given} == {(KEY.seed, KEY.stream)}
    first = sorted(noise.first_sample for _, noise in given)
    assert first == [KEY.first_sample + k * 2**48 for k in range(8)]


def test_no_dropout_in_evaluation_and_pytorchs_generator_without_noise():
    model, arguments = network(), inputs()
    torch.manual_seed(3)
    first = model(*arguments)
    torch.manual_seed(3)
    assert_bits_equal(model(*arguments), first)
    assert not torch.equal(model(*arguments), first)
    model.eval()
    assert_bits_equal(model(*arguments, dropout=KEY), model(*arguments))


@pytest.mark.parametrize("dropout", [3, KEY.at(first_sample=2**48 - 3)], ids=str)
def test_wrong_noise(dropout):
    with pytest.raises((TypeError, ValueError), match="dropout must be a Noise(, got int| whose samples are below 2\\^48, got)"):
        network()(*inputs(), dropout=dropout)


@pytest.mark.slow
def test_compiles_whole_with_a_stream_for_each_step():
    torch._dynamo.reset()
    compiler, graphs = count_compilations("aot_eager")
    model, arguments = network(), inputs()
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for step in range(5):
        assert_bits_equal(compiled(*arguments, dropout=KEY.at(stream=step)), model(*arguments, dropout=KEY.at(stream=step)))
    assert len(graphs) <= 3, f"{len(graphs)} graphs for five steps"


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_keeps_less_for_backward_than_separate_operators(precision):
    """Of a residual block the two convolutions' inputs and the two norms' inputs: at most 0.6 of what the operators one by one keep."""
    torch.manual_seed(0)
    block = layers.ResidualBlock(64, 64, 32, dropout=0.1, norm_groups=32, norm_eps=1e-6)
    block = block.to(precision, memory_format=torch.channels_last)
    own = {x.untyped_storage().data_ptr() for x in block.parameters()}

    def kept():
        sizes = {}
        x = torch.randn(4, 64, 16, 16, dtype=precision).contiguous(memory_format=torch.channels_last).requires_grad_()
        pack = lambda y: sizes.update({y.untyped_storage().data_ptr(): y.untyped_storage().nbytes()}) or y  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
            out = block(x, torch.randn(4, 32, dtype=precision), KEY)
        assert out.shape == x.shape
        return sum(size for place, size in sizes.items() if place not in own)

    def one_by_one(x, groups, weight, bias, *, eps, activation, pre_bias, dropout):
        x = x if pre_bias is None else x + pre_bias[:, :, None, None]
        x = F.silu(F.group_norm(x, groups, weight, bias, eps))
        return x if dropout is None else F.dropout(x, dropout[0])

    ours = kept()
    with mock.patch.object(layers, "group_norm", one_by_one):
        assert ours <= 0.6 * kept()
