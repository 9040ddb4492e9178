"""Planned passes of the UNet: what UNet.forward gives, for every architecture, and when there is no plan."""

import copy
import io

import pytest
import torch
from numerics import assert_bits_equal, assert_close_to_exact, networks_rounding
from torch import nn
from weight_changes import CHANGES

from ddpm_fast import GaussianDiffusion, NoiseSchedule, Sampler, UNet, sample
from ddpm_fast.backends import native_missing
from ddpm_fast.diffusion.samplers import make_table
from ddpm_fast.models.cpu_plan import UNetPlan, plan_obstacle
from ddpm_fast.sampling.step import ReverseStep

pytestmark = pytest.mark.skipif(bool(native_missing), reason=f"plans call the CPU kernels: {native_missing}")
STEPS = torch.tensor([0, 500, 999])
SMALL = dict(in_channels=2, base_channels=8, norm_groups=4, image_size=8)
ARCHITECTURES = [
    dict(channel_mult=(1,), num_blocks=1, attention_resolutions=()),  # one level: nothing is resampled
    dict(channel_mult=(1, 2, 3), num_blocks=2, attention_resolutions=(4, 8), num_heads=2),
    dict(
        channel_mult=(2, 2), num_blocks=1, attention_resolutions=(4,), head_channels=4, learned_variance=True
    ),  # shortcuts that are the input
    dict(channel_mult=(1, 2), num_blocks=1, attention_resolutions=(), num_classes=3, dropout=0.5),
]


def network(**arguments):
    """Noise where a new network has zeros, which would hide its inputs."""
    torch.manual_seed(0)
    net = UNet(**{**SMALL, **arguments}).eval()
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return net


def images(n, size=(8, 8)):
    return torch.randn(n, 2, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("n, size", [(1, (8, 8)), (3, (8, 8)), (2, (4, 12))], ids=str)
@pytest.mark.parametrize("arguments", ARCHITECTURES, ids=str)
@torch.no_grad()
def test_a_planned_pass_is_the_pass(arguments, n, size):
    net, x = network(**arguments), images(n, size)
    labels = [None, torch.arange(n)] if net.num_classes else [None]
    for y in labels:
        plan = UNetPlan(net, x.shape, STEPS, y)
        for row in (2, 0, 1, 0):  # in any order: nothing is left over from the pass before
            got = plan(x, row)
            assert got.is_contiguous()
            t = torch.full((n,), int(STEPS[row]))
            exact, rounding = networks_rounding(net, lambda wide: {"out": wide(x.double(), t, y)})["out"]  # noqa: B023
            assert_close_to_exact(got, exact, atol=rounding)


@torch.no_grad()
def test_a_plan_leaves_its_input_and_serves_other_layouts():
    net, x = network(**ARCHITECTURES[1]), images(2)
    plan, before = UNetPlan(net, x.shape, STEPS, None), x.clone()
    expected = plan(x, 1).clone()
    assert_bits_equal(x, before)
    assert_bits_equal(plan(x.contiguous(memory_format=torch.channels_last), 1), expected)


@torch.no_grad()
def test_memory_is_used_again():
    net = network(channel_mult=(1, 1), num_blocks=6, attention_resolutions=())
    taken = []

    class Counted(UNetPlan):
        def _take(self, *shape):
            before = sum(map(len, self._free.values()))
            taken.append(before > 0 and bool(self._free.get(shape)))
            return super()._take(*shape)

    Counted(net, (2, 2, 8, 8), STEPS, None)
    assert sum(taken) > 0.6 * len(taken)  # the others are the skips and the first of their shape


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
@pytest.mark.parametrize("guided", [False, True])
def test_sampling_by_a_plan_is_sampling(sampler, guided):
    net = network(**ARCHITECTURES[3])
    diffusion = GaussianDiffusion(NoiseSchedule.linear(20, 1e-3, 0.3))
    options = dict(sampler=sampler, steps=5, guidance=3.0 if guided else 1.0, null_label=3)
    labels = torch.tensor([0, 2, 1]) if guided else None
    got = sample(net, diffusion, (3, 2, 8, 8), 4, labels=labels, **options)

    def chain(wide):  # the network in float64; each step rounds its output to fp32
        call = lambda x, t, y=None: wide(x.double(), t, y).float()  # noqa: E731 - not a UNet: it has no plan
        return {"x": sample(call, diffusion, (3, 2, 8, 8), 4, labels=labels, **options).double()}

    exact, rounding = networks_rounding(net, chain)["x"]
    assert_close_to_exact(got, exact, atol=rounding)
    alone = sample(net, diffusion, (1, 2, 8, 8), 4, labels=None if labels is None else labels[1:2], first_sample=1, **options)
    assert_close_to_exact(alone, exact[1:2], atol=rounding)


# A network that changes.


def sampler_of(net):
    return Sampler(net, GaussianDiffusion(NoiseSchedule.linear(20, 1e-3, 0.3)), "ddim", steps=3)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("arguments", [ARCHITECTURES[1], ARCHITECTURES[3]], ids=["attention and resampling", "classes"])
def test_a_call_samples_from_the_weights_of_its_start(arguments, name):
    net, shape = network(**arguments), (2, 2, 8, 8)
    draw = sampler_of(net)
    before = draw(shape)
    during = draw(shape, callback=lambda t, *_: t == draw.table.timesteps[-1] and CHANGES[name](net))  # after the first step
    assert_bits_equal(during, before)
    after = draw(shape)
    assert not torch.equal(after, before)
    assert_bits_equal(after, sampler_of(copy.deepcopy(net))(shape))


def test_training_and_sampling_take_turns():
    net = network(**ARCHITECTURES[1])
    x, t = images(4), torch.tensor([0, 5, 11, 19])
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, fused=True)
    drawn = []
    for _ in range(3):
        optimizer.zero_grad()
        net.train()(x, t).square().mean().backward()
        optimizer.step()
        drawn.append(sampler_of(net.eval())((2, 2, 8, 8)))
        assert_bits_equal(drawn[-1], sampler_of(copy.deepcopy(net))((2, 2, 8, 8)))
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.train(),
        lambda net: net.conv_in.register_forward_hook(lambda *_: torch.zeros(2, 8, 8, 8)),
        lambda net: setattr(net, "conv_out", nn.Conv2d(8, 2, 3)),
        lambda net: setattr(net.mid.block1.norm1, "eps", 1.0),
        lambda net: net.double(),
    ],
    ids=["mode", "hook", "module", "eps", "dtype"],
)
def test_what_a_callback_does_to_the_network_is_for_the_next_call(change):
    net = network(**ARCHITECTURES[0], dropout=0.5)
    expected = sampler_of(net)((2, 2, 8, 8))
    assert_bits_equal(sampler_of(net)((2, 2, 8, 8), callback=lambda t, *_: change(net)), expected)


def test_sampling_leaves_nothing_on_the_parameters():
    net = network(**ARCHITECTURES[1])
    sampler_of(net)((2, 2, 8, 8))
    assert not any(vars(parameter) for parameter in net.parameters())
    file = io.BytesIO()
    torch.save(list(net.parameters()), file)
    file.seek(0)
    for loaded, parameter in zip(torch.load(file, weights_only=True), net.parameters(), strict=True):
        assert_bits_equal(loaded, parameter)


def test_pytorchs_defaults_change_nothing():
    net, diffusion = network(**ARCHITECTURES[3]), GaussianDiffusion(NoiseSchedule.linear(20, 1e-3, 0.3))
    expected = sample(net, diffusion, (2, 2, 8, 8), steps=3)
    torch.set_default_dtype(torch.float64)
    try:
        assert_bits_equal(sample(net, diffusion, (2, 2, 8, 8), steps=3), expected)
    finally:
        torch.set_default_dtype(torch.float32)


class Inherited(UNet):
    pass


class Subclass(torch.Tensor):
    pass


def plain_weight(net):
    weight = net.conv_in.weight.detach()
    del net.conv_in.weight
    net.conv_in.weight = weight.bfloat16()


def with_weight(make):
    net = network(**ARCHITECTURES[0])
    net.conv_in.weight = nn.Parameter(make(net.conv_in.weight.detach()))
    return net


def changed(net, change):
    change(net)
    return net


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: network(**ARCHITECTURES[0]).train(), "training"),
        (lambda: network(**ARCHITECTURES[0]).double(), "not plain float32"),
        (lambda: changed(network(**ARCHITECTURES[0]), lambda m: m.conv_in.register_forward_hook(lambda *_: None)), "hooks"),
        (lambda: changed(network(**ARCHITECTURES[0]), lambda m: setattr(m, "conv_out", nn.Sequential(m.conv_out))), "changed: Sequential"),
        (lambda: changed(network(**ARCHITECTURES[0]), lambda m: setattr(m.conv_in, "forward", lambda x: x)), "changed: Conv3x3"),
        (lambda: changed(network(**ARCHITECTURES[0]), lambda m: m.compile()), "something else"),
        (lambda: changed(network(**ARCHITECTURES[0]), plain_weight), "changed: Conv3x3"),
        (lambda: with_weight(lambda w: w.as_subclass(Subclass)), "not plain"),
        (lambda: with_weight(lambda w: w.transpose(2, 3)), "not plain"),
        (lambda: with_weight(torch._neg_view), "not plain"),
    ],
)
def test_what_is_not_planned(make, reason):
    assert reason in plan_obstacle(make(), images(2))


def test_other_data_and_autocast_are_not_planned():
    net = network(**ARCHITECTURES[0])
    assert plan_obstacle(net, images(2)) == ""
    assert plan_obstacle(net, images(2).double()) and plan_obstacle(net, images(2).to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert plan_obstacle(net, images(2))
    table = make_table(GaussianDiffusion(NoiseSchedule.linear(20)), steps=2)
    assert ReverseStep(net, table, images(2)).plan is not None and ReverseStep(net, table, images(2), planned=False).plan is None


@pytest.mark.parametrize(
    "make",
    [lambda net: lambda x, t: net(x, t), lambda net: Inherited(**net.config).eval(), torch.compile],
    ids=["a function", "a subclass", "compiled"],
)
def test_the_library_plans_for_its_own_network_alone(make):
    table = make_table(GaussianDiffusion(NoiseSchedule.linear(20)), steps=2)
    assert ReverseStep(make(network(**ARCHITECTURES[0])), table, images(2)).plan is None


def test_bad_inputs_are_named_as_by_the_network():
    with pytest.raises(ValueError, match=r"x_t must have shape \(N, 2, H, W\), got \(2, 3, 8, 8\)"):
        sample(network(**ARCHITECTURES[0]), GaussianDiffusion(NoiseSchedule.linear(20)), (2, 3, 8, 8))
