"""The range check of t: whatever carries it, and wherever the op runs, a t outside the tables raises or gives NaN.

Never memory beside them.
"""

import pytest
import torch
from numerics import assert_bits_equal
from op_cases import TABLES, make
from torch.fx.experimental.proxy_tensor import make_fx

from ddpm_fast import GaussianDiffusion, NoiseSchedule
from ddpm_fast.backends import native
from ddpm_fast.ops import _common

SHAPE = (4, 2, 5)
NAMES = ["q_sample", "simple_loss", "p_step", "vlb_terms"]


class Subclass(torch.Tensor):
    """As a user may make one: with memory, without operators of its own."""


CARRIERS = {
    "plain": lambda t: t,
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
    "buffer": lambda t: torch.nn.Buffer(t),
    "subclass": lambda t: t.as_subclass(Subclass),
    "expanded": lambda t: t[3].expand(4),
    "strided": lambda t: torch.stack([torch.zeros_like(t), t], 1)[:, 1],
    "negating": lambda t: torch._neg_view(-t),
    "shared with NumPy": lambda t: torch.from_numpy(t.numpy()),
}


def case_and_steps(name):
    case = make(name, "tensor" if name in ("q_sample", "simple_loss", "p_step") else None, SHAPE)
    return case, next(len(x) for part, x in case.arguments.items() if part in TABLES)


@pytest.mark.parametrize("without_native", [False, True], ids=["", "without the native module"])
@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_t_outside_raises_in_whatever_it_comes(name, carrier, without_native, monkeypatch):
    case, steps = case_and_steps(name)
    if without_native:
        monkeypatch.setattr(_common, "native", None)
    for outside in (-1, steps, 5000, 10**6, -(2**62)):
        t = CARRIERS[carrier](torch.tensor([0, 1, steps - 1, outside]))
        with pytest.raises(ValueError, match=rf"t must lie in 0..{steps - 1}, got t\[\d\] = {outside}"):
            case(t=t)
    assert native is not None
    inside = torch.tensor([0, 1, steps - 1, 2])
    want = torch.full((4,), 2) if carrier == "expanded" else inside
    for x, y in zip(case(t=CARRIERS[carrier](inside)), case(t=want), strict=True):
        assert_bits_equal(torch.Tensor(x) if type(x) is Subclass else x, y)


@pytest.mark.parametrize("name", NAMES)
def test_a_t_outside_raises_under_torch_func(name):
    case, steps = case_and_steps(name)
    first = case.leaves[0]
    x = case.arguments[first]
    each = lambda t: case.map(lambda part, y: y if part in TABLES else y[:1])(t=t[None])[0]  # noqa: E731
    for outside in (-1, steps, 10**6):
        t = torch.tensor([0, 1, steps - 1, outside])
        with pytest.raises(ValueError, match=f"t must lie in 0..{steps - 1}, got {outside}"):
            torch.func.vmap(each)(t)
        with pytest.raises(ValueError, match=f"t must lie in 0..{steps - 1}, got {outside}"):
            torch.func.vmap(torch.func.vmap(each))(torch.stack([t.clamp(0, 1), t]).T)
        with pytest.raises(ValueError, match="t must lie in"):
            torch.func.grad(lambda x: case(t=t, **{first: x})[0].sum())(x)  # noqa: B023 - called here
        with pytest.raises(ValueError, match="t must lie in"):
            torch.func.vmap(
                torch.func.grad(
                    lambda x, t: case.map(lambda part, y: y if part in TABLES else y[:1])(t=t[None], **{first: x[None]})[0].sum()
                )
            )(x, t)
    inside = torch.tensor([0, 1, steps - 1, 2])
    got, want = torch.func.vmap(each)(inside), torch.stack([each(t) for t in inside])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_traced_graph_gives_nan_where_it_cannot_raise(name):
    """The graph of a transform has no operator to look at t; a value outside the tables must not wrap around in it."""
    case, steps = case_and_steps(name)
    x, first = case.arguments[case.leaves[0]], case.leaves[0]
    one = case.map(lambda part, y: y if part in TABLES else y[:1])
    call = torch.func.vmap(lambda x, t: one(t=t[None], **{first: x[None]})[0])
    graph = make_fx(call)(x, torch.tensor([0, 1, 2, 1]))
    got = graph(x, torch.tensor([0, 1, -1, steps]))
    assert got[:2].isfinite().all() and got[2:].isnan().all()


def test_the_diffusions_own_formulas_check_t():
    diffusion = GaussianDiffusion(NoiseSchedule.linear(10, 1e-3, 0.3))
    x = torch.randn(SHAPE)
    for t in (torch.nn.Parameter(torch.tensor([0, 1, 2, -1]), requires_grad=False), torch.tensor([0, 1, 2, 10]).as_subclass(Subclass)):
        for call in (
            lambda t: diffusion.q_mean_variance(x, t),
            lambda t: diffusion.q_posterior(x, x, t),
            lambda t: diffusion.p_mean_variance(x, x, t),
        ):
            with pytest.raises(ValueError, match=r"t must lie in 0..9, got t\[3\]"):
                call(t)
