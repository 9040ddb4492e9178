"""Inputs of attention for its simulated kernels, and how near their results must come."""

import torch
from attention_simulator import with_gradient
from numerics import assert_as_accurate, assert_close_to_exact

CUTS = 4  # a tensor core cuts an fp32 accumulator off, toward zero, after each four of the sixteen products that it takes (mma.cuh)


def inputs(shape, dtype, spread=1.0):
    samples, tokens, heads, channels = shape
    generator = torch.Generator().manual_seed(tokens * channels)
    qkv = torch.randn(samples, tokens, 3, heads, channels, generator=generator)
    qkv[:, :, :2] *= spread**0.5
    return qkv.to(dtype), torch.randn(samples, tokens, heads, channels, generator=generator).to(dtype), channels**-0.5


def sizes(qkv, scale, grad_out):
    """The sums that out, grad_q, grad_k and grad_v are, of the absolute values of their terms: the largest of each."""
    q, k, v = (x.transpose(1, 2) for x in qkv.double().unbind(2))
    g = grad_out.double().transpose(1, 2)
    p = (q @ k.mT * scale).softmax(-1)
    grad_logits = (p * (g @ v.mT - (g * (p @ v)).sum(-1, keepdim=True))).abs() * abs(scale)
    return [float(x.max()) for x in (p @ v.abs(), grad_logits @ k.abs(), grad_logits.mT @ q.abs(), p.mT @ g.abs())]


def assert_as_accurate_as_plain(actual, plain, exact, size, what):
    """Twice the error of PyTorch's fp32 formula; in fp32 also an ulp of a sum's size for each time that it is cut off."""
    if actual.dtype != torch.float32:
        return assert_as_accurate(actual, plain, exact, what=what)
    allowed = 2 * float((plain.double() - exact).abs().max()) + CUTS * 2.0**-23 * size
    assert_close_to_exact(actual, exact, ulps=1, atol=allowed, what=what)


def logsumexp_floor(dtype, channels):
    """In ulps of fp32: two, and one for each time that a logit is cut off: 16-bit types are after each eight of all channels."""
    return 2 + (CUTS if dtype == torch.float32 else channels // 8)


def check(result, qkv, scale, grad_out=None):
    """Forward against fp32 arithmetic rounded once; gradients, whose operands are rounded too, against the formula in the dtype."""
    out, logsumexp, _ = with_gradient(qkv.float(), scale, None)
    exact_out, exact_logsumexp, exact_grad = with_gradient(qkv.double(), scale, grad_out)
    size = sizes(qkv, scale, result.out if grad_out is None else grad_out)
    assert_as_accurate_as_plain(result.out, out.to(qkv.dtype), exact_out, size[0], "out")
    floor = logsumexp_floor(qkv.dtype, qkv.shape[-1])
    assert_as_accurate(result.logsumexp, logsumexp, exact_logsumexp, floor=floor, what="logsumexp")
    if grad_out is not None:
        _, _, grad = with_gradient(qkv, scale, grad_out)
        if qkv.shape[1] == 1:  # P is 1 and the formula's grad_q and grad_k are exactly 0; here two sums of grad_out v are subtracted
            assert_close_to_exact(result.grad_qkv[:, :, :2], exact_grad[:, :, :2], atol=qkv.shape[-1] * 2.0**-22)
            assert_close_to_exact(result.grad_qkv[:, :, 2], exact_grad[:, :, 2], ulps=2)
            return
        for i, name in enumerate(("grad_q", "grad_k", "grad_v")):
            assert_as_accurate_as_plain(result.grad_qkv[:, :, i], grad[:, :, i], exact_grad[:, :, i], size[1 + i], name)
