"""group_norm as an operator: registration, torch.compile, forward mode, torch.func; and the messages of its errors."""

from __future__ import annotations

import math

import pytest
import torch
from group_norm_inputs import every_layout, make, stored
from numerics import assert_bits_equal, assert_close_to_exact
from op_cases import KEY

from ddpm_fast import Noise, group_norm


@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(dtype, layout):
    tensors = [x.requires_grad_() for x in make((3, 8, 5, 2), dtype, layout=layout).values()]
    arguments = (tensors[0], 2, *tensors[1:], 1e-5, True, 0.25, None, 7, 3, 5)
    torch.library.opcheck(torch.ops.ddpm_fast.group_norm.default, arguments)


@every_layout
def test_compiles_whole_for_any_key_and_batch(layout):
    torch._dynamo.reset()

    def call(x, noise):
        return group_norm(x * 1.0, 4, activation="silu", dropout=(0.3, noise)) * 1.0

    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(call, fullgraph=True, backend=count)
    for step in range(5):
        x = stored(torch.randn(3 + step, 8, 5, 3), layout)
        key = Noise(step, step, step)
        assert_bits_equal(compiled(x, key), call(x, key))
    assert len(graphs) <= 3, f"{len(graphs)} graphs for five keys and batches"
    torch._dynamo.reset()
    x = stored(torch.randn(3, 8, 5, 3), layout)
    for way in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaf = x.detach().requires_grad_()
        y = way(leaf, KEY)
        (grad,) = torch.autograd.grad((y * y).sum(), leaf)
        if way is call:
            expected = y, grad
        assert_bits_equal(y, expected[0])
        assert_bits_equal(grad, expected[1])
        assert grad.stride() == x.stride()


def test_compiles_with_sizes_and_numbers_that_vary():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, eps: group_norm(x, 2, eps=eps, activation="silu"), fullgraph=True, dynamic=True, backend="aot_eager")
    for n, eps in ((2, 1e-5), (3, 1e-6), (4, 1e-3)):
        x = torch.randn(n, 4, 6)
        assert_bits_equal(compiled(x, eps), group_norm(x, 2, eps=eps, activation="silu"))


def test_forward_mode():
    """The tangent of a dual tensor is not lost, whichever tensor has it."""
    x, weight, tangent = torch.randn(2, 4, 6, dtype=torch.float64), torch.rand(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(weight.to(dtype), tangent.to(dtype))
            y = torch.autograd.forward_ad.unpack_dual(group_norm(x.to(dtype), 2, dual)).tangent
        assert_close_to_exact(y, group_norm(x, 2, tangent), atol=1e-5)


def test_in_functorch():
    x = torch.randn(3, 8, 4)
    grad = torch.func.vmap(torch.func.grad(lambda s: group_norm(s[None], 2, activation="silu").square().sum()))(x)
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(group_norm(leaf, 2, activation="silu").square().sum(), leaf)[0]
    assert_close_to_exact(grad, expected.double(), rtol=1e-4, atol=1e-4)


X = torch.zeros(2, 6, 3)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=[1.0]), TypeError, "x must be a tensor, got list"),
        (dict(x=X.int()), TypeError, "x must be float32, bfloat16, float16 or float64, got torch.int32"),
        (dict(x=X[0, 0]), ValueError, r"x must have shape \(N, C, ...\), got \(3,\)"),
        (dict(x=X[..., :0]), ValueError, r"at least one element a sample, got \(2, 6, 0\)"),
        (dict(groups=2.0), TypeError, "groups must be an integer, got float"),
        (dict(groups=True), TypeError, "groups must be an integer, got bool"),
        (dict(groups=4), ValueError, "groups must divide the channels of x, 6, got 4"),
        (dict(groups=0), ValueError, "groups must divide the channels of x, 6, got 0"),
        (dict(weight=torch.ones(5)), ValueError, r"weight must have shape \(6,\), got \(5,\)"),
        (dict(bias=torch.ones(6).half()), TypeError, "bias must have the dtype of x, torch.float32, or float32, got torch.float16"),
        (dict(pre_bias=torch.ones(6)), ValueError, r"pre_bias must have shape \(2, 6\), got \(6,\)"),
        (dict(scale=1.0), TypeError, "scale must be a tensor, got float"),
        (dict(shift=torch.ones(2, 6, device="meta")), ValueError, "shift must be on the device of x, cpu, got meta"),
        (dict(eps=-1e-6), ValueError, "eps must be finite and at least 0, got -1e-06"),
        (dict(eps=math.nan), ValueError, "eps must be finite and at least 0, got nan"),
        (dict(activation="relu"), ValueError, "activation must be 'silu' or None, got 'relu'"),
        (dict(dropout=(1.0, KEY)), ValueError, r"the probability of dropout must lie in \[0, 1\), got 1.0"),
        (dict(dropout=(0.5, None)), TypeError, "dropout takes its mask from a Noise, got NoneType"),
        (dict(backend="triton"), ValueError, "group_norm has no triton backend"),
    ],
)
def test_errors(change, error, message):
    arguments = dict(x=X, groups=3) | change
    with pytest.raises(error, match=message):
        group_norm(arguments.pop("x"), arguments.pop("groups"), **arguments)
