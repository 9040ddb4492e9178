"""torch.func over every op and the UNet: vmap over any dimension, gradients of each sample, second derivatives, ensembles, in any layout.

And what a Noise means under vmap. The formulas' derivatives themselves are tested in test_ops_gradients.py.
"""

import pytest
import torch
from numerics import assert_bits_equal
from op_cases import KEY, TABLES, TAKE_NOISE, make, upstreams
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

from ddpm_fast import GaussianDiffusion, Noise, NoiseSchedule, UNet
from ddpm_fast.ops import attention, group_norm

SHAPE = (4, 2, 3, 3)
DIFFUSION_OPS = {
    name: (lambda name=name: make(name, "tensor" if name.startswith(TAKE_NOISE) else None, SHAPE))
    for name in (
        "q_sample",
        "simple_loss",
        "p_step learned, multistep and guided",
        "gaussian_kl",
        "gaussian_kl mean",
        "vlb_terms learned, clipped, erf",
    )
}
every_op = pytest.mark.parametrize("name", [*DIFFUSION_OPS, "group_norm", "attention"])
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])


def function_and_x(name):
    """A function of a batch (N, ...), and of the noise and rows that go with it, that maps samples to samples; and its first argument."""
    if name == "group_norm":
        weight = torch.randn(2)
        return (
            lambda x, row: group_norm(x, 1, weight, weight, activation="silu", pre_bias=row, scale=row),
            torch.randn(SHAPE),
            (torch.randn(4, 2),),
        )
    if name == "attention":
        return lambda x: attention(x.flatten(2).transpose(1, 2).repeat(1, 1, 3)), torch.randn(SHAPE), ()
    case = DIFFUSION_OPS[name]()
    first = case.leaves[0]
    parts = [part for part, x in case.arguments.items() if isinstance(x, torch.Tensor) and part not in TABLES and part != first]
    others = tuple(case.arguments[part] for part in parts)
    return lambda x, *rest: case(**{first: x}, **dict(zip(parts, rest, strict=True)))[0], case.arguments[first], others


@LAYOUTS
@every_op
def test_vmap_over_samples_is_the_batch(name, layout):
    call, x, others = function_and_x(name)
    x = x.to(memory_format=layout)
    batch = call(x, *others)
    each = vmap(lambda x, *rest: call(x[None], *[y[None] for y in rest])[0])(x, *others)
    torch.testing.assert_close(each, batch, rtol=1e-5, atol=1e-5)
    last = [y.movedim(0, -1) for y in (x, *others)]  # samples run along another dimension, in memory too
    each = vmap(lambda x, *rest: call(x[None], *[y[None] for y in rest])[0], in_dims=-1)(*last)
    torch.testing.assert_close(each, batch, rtol=1e-5, atol=1e-5)
    many = torch.stack([x, 2 * x], 1)  # in_dims=1: a batch in every call
    each = vmap(lambda x: call(x, *others), in_dims=1)(many)
    torch.testing.assert_close(each, torch.stack([call(x, *others), call(2 * x, *others)]), rtol=1e-5, atol=1e-5)


@LAYOUTS
@every_op
def test_gradient_of_each_sample(name, layout):
    call, x, others = function_and_x(name)
    x = x.to(memory_format=layout)
    weights = upstreams((call(x, *others),))[0]
    got = vmap(grad(lambda x, w, *rest: (call(x[None], *[y[None] for y in rest])[0] * w).sum()))(x, weights, *others)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(call(leaf, *others), leaf, weights)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@LAYOUTS
@every_op
def test_second_derivatives_and_directions(name, layout):
    call, x, others = function_and_x(name)
    x, others = x[:1].to(memory_format=layout), [y[:1] for y in others]
    x, others = x.double(), [y.double() if y.is_floating_point() else y for y in others]
    if name not in ("group_norm", "attention"):
        case = DIFFUSION_OPS[name]().in_float64()
        first = case.leaves[0]
        parts = [part for part, y in case.arguments.items() if isinstance(y, torch.Tensor) and part not in TABLES and part != first]
        call = lambda x, *rest: case(**{first: x}, **dict(zip(parts, rest, strict=True)))[0]  # noqa: E731
    value = lambda x: call(x, *others).square().sum()  # noqa: E731
    forward, backward = jacfwd(lambda x: call(x, *others))(x), jacrev(lambda x: call(x, *others))(x)
    torch.testing.assert_close(forward, backward, rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(x)
    _, tangent = jvp(lambda x: call(x, *others), (x,), (direction,))
    torch.testing.assert_close(tangent, torch.tensordot(backward, direction, x.ndim), rtol=1e-9, atol=1e-9)
    second = torch.tensordot(hessian(value)(x), direction, x.ndim)
    step = 1e-5
    ahead, behind = grad(value)(x + step * direction), grad(value)(x - step * direction)
    torch.testing.assert_close(second, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-5 * float(second.abs().max()) + 1e-9)


# The UNet.


def network(**options):
    model = UNet(
        3,
        base_channels=8,
        channel_mult=(1, 2),
        num_blocks=1,
        attention_resolutions=(4,),
        image_size=8,
        norm_groups=4,
        **{"dropout": 0.0} | options,
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


DIFFUSION = GaussianDiffusion(NoiseSchedule.linear(10, 1e-3, 0.3))
X, T = torch.randn(4, 3, 8, 8), torch.tensor([0, 3, 5, 9])


def loss(model, noise):
    def of_one(parameters, x, t):
        out = functional_call(model, parameters, (DIFFUSION.q_sample(x[None], t[None], noise), t[None]))
        return DIFFUSION.simple_loss(out, x[None], t[None], noise)[0]

    return of_one


@LAYOUTS
def test_per_sample_gradients_of_the_network_draw_the_batchs_noise(layout):
    model = network()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    got = vmap(grad(loss(model, KEY)), in_dims=(None, 0, 0), randomness="different")(parameters, X.to(memory_format=layout), T)
    noise = KEY.materialize(X.shape)
    for n in range(len(X)):
        of_one = loss(model, noise[n : n + 1])(dict(model.named_parameters()), X[n], T[n])
        for (name, g), expected in zip(got.items(), torch.autograd.grad(of_one, list(model.parameters())), strict=True):
            torch.testing.assert_close(
                g[n], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()) + 1e-7, msg=lambda m, name=name: f"{name}: {m}"
            )


def test_an_ensemble_of_networks():
    models = [network() for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    got = vmap(lambda p, b, x: functional_call(models[0], (p, b), (x, T)), in_dims=(0, 0, None))(parameters, buffers, X)
    torch.testing.assert_close(got, torch.stack([model(X, T) for model in models]), rtol=1e-4, atol=1e-5)


@LAYOUTS
def test_derivatives_of_the_network_by_its_input(layout):
    model = network().double()
    x, t = torch.randn(1, 3, 4, 4, dtype=torch.float64).to(memory_format=layout), T[:1]
    call = lambda x: model(x, t)  # noqa: E731
    backward = jacrev(call)(x)
    torch.testing.assert_close(jacfwd(call)(x), backward, rtol=1e-7, atol=1e-8)
    direction = torch.randn_like(x)
    torch.testing.assert_close(jvp(call, (x,), (direction,))[1], torch.tensordot(backward, direction, 4), rtol=1e-7, atol=1e-8)
    second = hessian(lambda x: call(x).square().sum())(x)
    torch.testing.assert_close(second, second.permute(4, 5, 6, 7, 0, 1, 2, 3), rtol=1e-7, atol=1e-7)


# A Noise under vmap.

REFUSED = pytest.mark.parametrize("draw", [
    lambda x, t: DIFFUSION.q_sample(x[None], t[None], KEY)[0],
    lambda x, t: DIFFUSION.simple_loss(x[None], x[None], t[None], KEY)[0],
    lambda x, t: DIFFUSION.p_step(x[None], x[None], t[None], KEY)[0],
    lambda x, t: group_norm(x[None], 1, dropout=(0.5, KEY))[0],
    lambda x, t: x + KEY.materialize((1, 3, 8, 8))[0],
    lambda x, t: x + KEY.uniform(1)[0],
    lambda x, t: t + KEY.integers(1, 100)[0],
], ids=["q_sample", "simple_loss", "p_step", "dropout", "materialize", "uniform", "integers"])  # fmt: skip


@REFUSED
def test_a_noise_is_drawn_as_randomness_says(draw):
    with pytest.raises(RuntimeError, match="vmap: a Noise would give every call the same values; pass randomness='different'"):
        vmap(draw)(X, T)
    at = lambda n: lambda x, t: draw_from(draw, KEY.at(first_sample=KEY.first_sample + n), x, t)  # noqa: E731
    assert_bits_equal(
        vmap(draw, randomness="different")(X, T),
        torch.stack([vmap(at(n), randomness="same")(X[n : n + 1], T[n : n + 1])[0] for n in range(4)]),
    )
    assert_bits_equal(
        vmap(draw, randomness="same")(X, T), torch.stack([vmap(draw, randomness="same")(X[n : n + 1], T[n : n + 1])[0] for n in range(4)])
    )
    with pytest.raises(RuntimeError, match="with chunk_size a Noise cannot tell the chunks apart"):
        vmap(draw, randomness="different", chunk_size=2)(X, T)


def draw_from(draw, noise, x, t):
    """``draw`` with another noise in place of KEY."""
    before, draw.__globals__["KEY"] = draw.__globals__["KEY"], noise
    try:
        return draw(x, t)
    finally:
        draw.__globals__["KEY"] = before


def test_vmaps_in_vmaps_draw_by_both_indices():
    x = torch.zeros(2, 3, 1, 5)  # (outer, inner, N, ...)
    table, zero = torch.ones(1), torch.zeros(1)
    from ddpm_fast.ops import q_sample

    call = lambda x: q_sample(x, torch.zeros(1, dtype=torch.int64), zero, table, KEY)  # noqa: E731
    every = KEY.materialize((6, 5)).view(2, 3, 1, 5)
    assert_bits_equal(vmap(vmap(call, randomness="different"), randomness="different")(x), every)
    inner_alone = vmap(vmap(call, randomness="different"), randomness="same")(x)
    assert_bits_equal(inner_alone, every[:1].expand_as(every))
    batch = vmap(lambda x: q_sample(x, torch.zeros(3, dtype=torch.int64), zero, table, KEY), randomness="different")(x[:, :, 0])
    assert_bits_equal(batch, every[:, :, 0])


def test_one_x_for_all_directions_has_one_noise():
    """jacfwd and hessian run a function under a vmap of its directions, with nothing to tell apart."""
    x, t = X[:1, :, :1, :2], T[1:2]
    signal = DIFFUSION.schedule.sqrt_alphas_bar[3].float()
    got = jacfwd(lambda x: DIFFUSION.q_sample(x, t, KEY))(x)
    torch.testing.assert_close(got.view(6, 6), torch.eye(6) * signal)
    second = hessian(lambda x: DIFFUSION.simple_loss(x, torch.zeros_like(x), t, KEY)[0])(x)
    torch.testing.assert_close(second.view(6, 6), torch.eye(6) * (2 / 6))


def test_masks_of_the_network_under_vmap_are_the_batchs():
    model = network(dropout=0.5)
    call = lambda x, t: model(x[None], t[None], dropout=Noise(5))[0]  # noqa: E731
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="a Noise would give every call the same values"):
            vmap(call)(X, T)
        torch.testing.assert_close(vmap(call, randomness="different")(X, T), model(X, T, dropout=Noise(5)), rtol=1e-4, atol=1e-5)


def test_backward_of_a_plain_graph_under_vmap_draws_what_forward_drew():
    """A vmap over upstreams, of a graph that was made outside: its randomness does not concern the forward's noise."""
    x = X.clone().requires_grad_()
    for y in (DIFFUSION.simple_loss(x, X, T, KEY), group_norm(x, 1, dropout=(0.5, KEY)), DIFFUSION.q_sample(x, T, KEY)):
        upstreams = torch.randn(3, *y.shape)
        each = torch.stack([torch.autograd.grad(y, x, u, retain_graph=True)[0] for u in upstreams])
        for randomness in ("error", "same", "different"):
            got = vmap(lambda u: torch.autograd.grad(y, x, u, retain_graph=True)[0], randomness=randomness)(upstreams)  # noqa: B023
            torch.testing.assert_close(got, each, rtol=1e-4, atol=1e-5)


def test_tables_made_inside_a_transform_serve_outside():
    """A diffusion keeps its tables; what torch.func wraps dies with the transform."""
    fresh = GaussianDiffusion(NoiseSchedule.linear(100).respace([0, 10, 50, 99]))
    expected = fresh.q_sample(X, torch.arange(4), KEY), fresh.model_time(torch.arange(4))
    first = GaussianDiffusion(NoiseSchedule.linear(100).respace([0, 10, 50, 99]))
    grad(lambda x: (first.q_sample(x, torch.arange(4), KEY) * first.model_time(torch.arange(4)).view(4, 1, 1, 1)).sum())(X)
    assert_bits_equal(first.q_sample(X, torch.arange(4), KEY), expected[0])
    assert first.model_time(torch.arange(4)).equal(expected[1])


def test_a_compiled_vmap_draws_as_an_eager_one():
    """A compiler cannot ask how vmap wants a Noise drawn, and leaves that to Python."""
    torch._dynamo.reset()
    call = torch.compile(lambda x: vmap(lambda x: x + KEY.materialize((1, 3))[0], randomness="different")(x), backend="eager")
    assert_bits_equal(call(torch.zeros(4, 3)), KEY.materialize((4, 3)))
