"""Properties over shapes, dtypes, t and tables: kernels against float64 beside their reference twins, with hypothesis.

Where a tolerance has a floor, it is in ulps of each element (tests/numerics.py). What hypothesis draws small sizes of, the other
test files have in large.
"""
from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numerics import assert_as_accurate, assert_bits_equal

from ddpm_fast import Noise
from ddpm_fast.backends import native_missing
from ddpm_fast.ops import gaussian_kl, p_step, simple_loss, vlb_terms
from ddpm_fast.ops.gaussian_kl import gaussian_kl_reference
from ddpm_fast.ops.p_step import COLUMNS, p_step_reference
from ddpm_fast.ops.simple_loss import simple_loss_reference
from ddpm_fast.ops.vlb_terms import CDFS, vlb_terms_reference

pytestmark = pytest.mark.skipif(bool(native_missing), reason=native_missing)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["fixed", "learned", "learned_range"]
ROWS = 5
every = settings(max_examples=250, deadline=None, derandomize=True)

dtypes = st.sampled_from(DTYPES)
kinds = st.sampled_from(KINDS)
# Up to 2,500 elements a sample: one element, odd numbers, more than a block of 1024.
shapes = st.tuples(st.integers(1, 5), st.integers(1, 3), st.sampled_from([1, 2, 7, 33, 341, 833]))
keys = st.builds(Noise, st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
seeds = st.integers(0, 2**31)


def numbers(shape, seed, scale=1.0, dtype=torch.float32):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def timesteps(count, seed):
    """Any rows, the first and the last among them as far as there is room."""
    t = torch.randint(ROWS, (count,), generator=torch.Generator().manual_seed(seed))
    t[0], t[-1] = 0, ROWS - 1
    return t


def in_float64(*arguments):
    return [x.detach().double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]


def value_and_gradients(function, arguments, leaves, upstream):
    arguments = list(arguments)
    for i in leaves:
        arguments[i] = arguments[i].detach().requires_grad_()
    value = function(*arguments)
    return value.detach(), *torch.autograd.grad(value, [arguments[i] for i in leaves], upstream.to(value.dtype))


def compare(ours, twin, arguments, leaves, seed, floor):
    """Value and gradients of all leaves, for an upstream of both signs."""
    with torch.no_grad():
        shape = twin(*arguments).shape
    upstream = numbers(shape, seed + 1)
    got, baseline = (value_and_gradients(f, arguments, leaves, upstream) for f in (ours, twin))
    exact = value_and_gradients(twin, in_float64(*arguments), leaves, upstream.to(got[0].dtype).double())
    for i, (g, b, e) in enumerate(zip(got, baseline, exact, strict=True)):
        assert_as_accurate(g, b, e, floor=floor, what="the value" if i == 0 else f"gradient {i - 1}")


@given(shape=shapes, dtype=dtypes, out_dtype=dtypes, doubled=st.booleans(), key=keys, coefficients=st.tuples(st.floats(-2, 2), st.floats(-2, 2)), seed=seeds)
@every
def test_simple_loss(shape, dtype, out_dtype, doubled, key, coefficients, seed):
    out = numbers((shape[0], shape[1] * (1 + doubled), shape[2]), seed, dtype=out_dtype)
    tables = [numbers((ROWS,), seed + 2).abs(), *(torch.full((ROWS,), c) for c in coefficients)]
    arguments = (out, numbers(shape, seed + 3, dtype=dtype), timesteps(shape[0], seed), *tables)
    compare(lambda *a: simple_loss(*a, key), lambda *a: simple_loss_reference(*a, key), arguments, [0], seed, floor=4.0)


@given(
    shape=shapes, dtype=dtypes, out_dtype=dtypes, kind=kinds, clip=st.booleans(), key=keys, generated=st.booleans(), guided=st.booleans(),
    multistep=st.booleans(), log_variance=st.floats(-100, 20), seed=seeds,
)  # fmt: skip
@every
def test_p_step(shape, dtype, out_dtype, kind, clip, key, generated, guided, multistep, log_variance, seed):
    """Log-variances down to e^-100, which no deviation of data in [-1, 1] comes near; no noise in the last row."""
    doubled = (shape[0], 2 * shape[1], shape[2])
    out, without = (numbers(doubled, seed + i, 0.5, out_dtype) for i in (0, 1))
    table = numbers((ROWS, len(COLUMNS)), seed + 2)
    table[:, COLUMNS.index("log_variance_low")] = log_variance
    table[:, COLUMNS.index("log_variance_high")] = log_variance + 1
    table[:, COLUMNS.index("noise")] = 1.0
    table[0, COLUMNS.index("noise")] = 0.0
    x_t, previous, z = (numbers(shape, seed + i, dtype=dtype) for i in (3, 4, 5))
    noise = key if generated else z
    arguments = [x_t, out, timesteps(shape[0], seed), table, noise, kind, clip, previous if multistep else None, without if guided else None, 1.5]
    leaves = [0, 1, *([] if generated else [4]), *([7] if multistep else []), *([8] if guided else [])]

    def ours(x_t, out, t, table, noise, kind, clip, previous, without, scale):
        guidance = None if without is None else (without, scale)
        return p_step(x_t, out, t, table, noise, variance=kind, clip=clip, x_start_previous=previous, guidance=guidance)[0]

    # Where x̂0 lies within a rounding of the clip's edge, its gradient is all or nothing.
    row = table.double()[arguments[2]].view(shape[0], 1, 1, -1)
    prediction = out.double()[:, : shape[1]]
    if guided:
        prediction = without.double()[:, : shape[1]] * -0.5 + 1.5 * prediction
    guess = row[..., 0] * x_t.double() + row[..., 1] * prediction
    assume(not clip or bool(((guess.abs() - 1).abs() > 1e-5).all()))
    compare(ours, lambda *a: p_step_reference(*a)[0], arguments, leaves, seed, floor=4.0)


@given(shape=shapes, dtype=dtypes, out_dtype=dtypes, kind=kinds, levels=st.integers(2, 256), cdf=st.sampled_from(CDFS), detach_mean=st.booleans(), seed=seeds)
@every
def test_vlb_terms(shape, dtype, out_dtype, kind, levels, cdf, detach_mean, seed):
    """Data on the grid with saturated pixels, guesses near them; a variance that a trained model may have."""
    assume(kind != "fixed" or not detach_mean)  # nothing is left to differentiate
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(-levels // 8 - 1, levels + levels // 8 + 1, shape, generator=generator).clamp(0, levels - 1)
    x_start = (pixels / (levels - 1) * 2 - 1).to(dtype)
    x_t = numbers(shape, seed + 1, dtype=dtype)
    table = torch.tensor([[0.0, 1.0, 1.0, 0.0, -4.0, -4.0, -2.0, 0.0]] + [[0.5, -0.5, 0.6, 0.4, -3.0, -3.5, -2.0, 0.0]] * (ROWS - 1))
    mean = x_start.float() + numbers(shape, seed + 2, 0.1)
    raw = numbers(shape, seed + 3) + (-3.0 if kind == "learned" else 0.0)
    out = torch.cat([mean, raw], 1).to(out_dtype)
    options = (kind, False, levels, cdf, detach_mean)
    compare(
        lambda *a: vlb_terms(*a, variance=kind, levels=levels, cdf=cdf, detach_mean=detach_mean),
        lambda *a: vlb_terms_reference(*a, *options),
        (out, x_start, x_t, timesteps(shape[0], seed), table), [0], seed, floor=16.0,
    )  # fmt: skip


@given(shape=shapes, dtype=dtypes, spread=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=4, max_size=4), mean=st.booleans(), seed=seeds)
@every
def test_gaussian_kl(shape, dtype, spread, mean, seed):
    """Each operand broadcast along any of the dimensions, its gradient summed over them.

    A sum of both signs may cancel, and one number's error may be nothing in the twin by luck: what is allowed is in ulps of
    the sum of the terms' magnitudes, 8 for the terms' own formulas, which all four gradients share, and 2 for the sum.
    """
    shapes = [[1 if broadcast else size for size, broadcast in zip(shape, along, strict=True)] for along in spread]
    inputs = [numbers(s, seed + i, dtype=dtype) for i, s in enumerate(shapes)]
    reduction = "mean_per_sample" if mean else None
    upstream = numbers(gaussian_kl(*inputs, reduction=reduction).shape, seed + 4, dtype=dtype)
    ours = lambda *a: gaussian_kl(*a, reduction=reduction)  # noqa: E731
    twin = lambda *a: gaussian_kl_reference(*a, reduction)  # noqa: E731
    got = value_and_gradients(ours, inputs, range(4), upstream)
    whole = [x.double().expand(torch.broadcast_shapes(*shapes)).contiguous() for x in inputs]  # each term by itself
    exact = value_and_gradients(twin, whole, range(4), upstream.double())
    terms = [gaussian_kl_reference(*whole), *exact[1:]]
    terms[4] = terms[2].abs() + (terms[2] + terms[4]).abs()  # ½ (e^d - 1) and ½ distance²
    magnitudes = [terms[0].flatten(1).mean(1) if mean else terms[0], *(x.abs().sum_to_size(g.shape) for x, g in zip(terms[1:], got[1:], strict=True))]
    for i, (g, e, magnitude) in enumerate(zip(got, exact, magnitudes, strict=True)):
        allowed = 10 * 2.0**-23 * magnitude + 0.5 * torch.finfo(dtype).eps * e.sum_to_size(g.shape).abs()
        error = (g.double() - e.sum_to_size(g.shape)).abs()
        assert (error <= allowed + torch.finfo(dtype).tiny).all(), f"output {i}: {float((error - allowed).max()):.2e} beyond what is allowed"


@given(mean=st.floats(-1e3, 1e3), logvar=st.floats(-80, 80), d=st.floats(-80, 80), step=st.floats(0, 1), dtype=dtypes)
@every
def test_gaussian_kl_is_never_negative_and_zero_at_equality(mean, logvar, d, step, dtype):
    m, l1 = (torch.tensor([[x]]).to(dtype) for x in (mean, logvar))
    assert_bits_equal(gaussian_kl(m, l1, m, l1), torch.zeros(1, 1, dtype=dtype))
    value = gaussian_kl(m, l1, m + step, l1 + d)
    assert value.isnan().item() is False and value.item() >= 0


@given(raw=st.floats(-1e4, 1e4), kind=st.sampled_from(["learned", "learned_range"]), missed=st.booleans())
@every
def test_decoder_of_any_variance_is_finite(raw, kind, missed):
    x_start = torch.tensor([[[-1.0, 1.0, 1 / 255, -0.2]]])
    table = torch.tensor([[0.0, 1.0, 1.0, 0.0, -8.0, -8.0, -4.0, 0.0]])
    out = torch.cat([x_start + 0.3 * missed, torch.full_like(x_start, raw)], 1).requires_grad_()
    value = vlb_terms(out, x_start, torch.zeros_like(x_start), torch.tensor([0]), table, variance=kind)
    grad = torch.autograd.grad(value.sum(), out)[0]
    assert value.isfinite().all() and grad.isfinite().all()
    assert -1e-6 <= value.item() <= -math.log2(1e-12) + 1e-4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_sample(bad, isa):
    shape = (3, 2, 700)
    data = [numbers(shape, i) for i in range(4)]
    broken = [x.clone() for x in data]
    for x in broken:
        x[1, 1, 699] = bad
    t, rows, one = torch.tensor([1, 1, 2]), numbers((ROWS, 8), 9), torch.ones(ROWS)
    calls = {
        "simple_loss": lambda a, b, c, d: simple_loss(a, b, t, one, one, one, c),
        "p_step": lambda a, b, c, d: p_step(a, b, t, rows, c)[0],
        "gaussian_kl": lambda a, b, c, d: gaussian_kl(a, b, c, d, reduction="mean_per_sample"),
        "vlb_terms": lambda a, b, c, d: vlb_terms(torch.cat([a, b], 1), c.clamp(-1, 1), d, t, rows, variance="learned"),
    }
    for name, call in calls.items():
        whole, hurt = call(*data), call(*broken)
        assert not hurt[1].isfinite().all(), name
        for n in (0, 2):
            assert_bits_equal(hurt[n], whole[n], what=name)
