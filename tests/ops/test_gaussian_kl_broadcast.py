"""gaussian_kl of operands that are broadcast, or expanded before: the gradient is autograd's of the formula, in every pattern."""

import itertools

import pytest
import torch

from ddpm_fast import gaussian_kl
from ddpm_fast.ops._gaussian_kl import gaussian_kl_reference

# Sizes that equal each other are meant: what has N values must not be taken for one value a sample.
SHAPES = [(3,), (1, 1), (3, 3), (3, 1), (1, 3, 1, 1), (2, 3, 2), (3, 3, 3), (2, 2500)]  # the last of several blocks a sample
OPERANDS = ("mean1", "logvar1", "mean2", "logvar2")


def patterns(shape):
    """Tensors that broadcast to shape, by what they are: as few values as can be, at every number of dimensions, expanded to every size."""
    kept = {}
    for sizes in itertools.product(*[{1, size} for size in shape]):  # that hold values of their own
        for dims in range(1, len(shape) + 1):
            if any(size > 1 for size in sizes[: len(shape) - dims]):
                continue
            base = sizes[len(shape) - dims :]
            for spread in itertools.product(*[{a, b} for a, b in zip(base, shape[len(shape) - dims :], strict=True)]):
                kept[base, spread] = lambda base=base, spread=spread: torch.randn(base).expand(spread)
    return kept


@pytest.mark.backends("gaussian_kl", without=("reference",))
@pytest.mark.parametrize("reduction", [None, "mean_per_sample"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_pattern_has_the_formulas_gradient(shape, reduction, backend):
    if backend.isa not in (None, "portable"):
        pytest.skip("the sums are shared by all instruction sets; test_ops_system.py compares them")
    found = patterns(shape)
    full = [torch.randn(shape) for _ in OPERANDS]
    for i, (pattern, make) in enumerate(found.items()):
        partner = list(found.values())[(7 * i + 3) % len(found)]  # another pattern beside it
        for k in range(4):
            inputs = list(full)
            inputs[k], inputs[(k + 1) % 4] = make(), partner()
            compare(inputs, reduction, backend, f"{OPERANDS[k]} of {pattern[0]} expanded to {pattern[1]}")


def compare(inputs, reduction, backend, what):
    shape = torch.broadcast_shapes(*(x.shape for x in inputs))
    leaves = [x.detach().to(backend.device).requires_grad_() for x in inputs]  # which keep strides of 0
    kl = gaussian_kl(*leaves, reduction=reduction, backend=backend.name)
    upstream = torch.linspace(-1.0, 2.0, kl.numel()).view(kl.shape)
    got = torch.autograd.grad(kl, leaves, upstream.to(kl))
    # A gradient for each element of each operand, in float64, whose sums the operands' gradients are.
    spread = [x.double().expand(shape).contiguous().requires_grad_() for x in inputs]
    each = torch.autograd.grad(gaussian_kl_reference(*spread, reduction), spread, upstream.double())
    if reduction:
        upstream = upstream.view(-1, *[1] * (len(shape) - 1)).expand(shape) / (spread[0].numel() // len(kl))
    for name, grad, terms, x in zip(OPERANDS, got, each, inputs, strict=True):
        assert grad.shape == x.shape
        # A term is a sum of parts no larger than itself and its upstream, each of a few operations within some ulps.
        allowed = 32 * torch.finfo(torch.float32).eps * (terms.abs() + upstream.abs()).sum_to_size(x.shape)
        error = (grad.cpu().double() - terms.sum_to_size(x.shape)).abs()
        assert (error <= allowed).all(), f"{name} for {what}: {float((error / allowed).max())} times what is allowed"


def test_one_parameter_for_all_channels():
    """p.expand(1, 3, 1, 1) of a single p, as a learned log-variance may be: the sum over its columns is p's gradient."""
    p = torch.zeros(1, requires_grad=True)
    x, zero = torch.randn(4, 3, 2, 2), torch.zeros(4, 3, 2, 2)
    spread = p.expand(1, 3, 1, 1)
    by_spread, by_p = torch.autograd.grad(gaussian_kl(x, zero, zero, spread).sum(), (spread, p))
    exact = (0.5 * (0 - x.double() ** 2)).sum((0, 2, 3), keepdim=True)  # ½ (1 - e^0 - distance²)
    assert by_spread.shape == (1, 3, 1, 1)
    torch.testing.assert_close(by_spread.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(by_p.double(), exact.sum().view(1), rtol=1e-6, atol=1e-6)


def test_as_many_columns_as_samples():
    """(N,) expanded from one value against (N, N): a gradient for each column, which has as many values as one for each sample."""
    p = torch.zeros(1).expand(3).detach().requires_grad_()
    assert p.stride() == (0,)
    x, zero = torch.randn(3, 3), torch.zeros(3, 3)
    (grad,) = torch.autograd.grad(gaussian_kl(x, zero, p, zero).sum(), p)
    torch.testing.assert_close(grad, -x.sum(0))
