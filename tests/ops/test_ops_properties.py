"""Properties over shapes, dtypes, t and tables: kernels against float64 beside their reference twins, with hypothesis.

Where a tolerance has a floor, it is in ulps of each element (tests/support/numerics.py). What hypothesis draws small sizes of, the other
test files have in large.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numerics import Rounded, assert_as_accurate, assert_bits_equal, assert_close_to_exact, assert_within_rounding
from op_cases import TABLES, every_case, everything, make

from ddpm_fast import Noise
from ddpm_fast.backends import native_missing
from ddpm_fast.ops import gaussian_kl, p_step, simple_loss, vlb_terms
from ddpm_fast.ops._gaussian_kl import gaussian_kl_reference
from ddpm_fast.ops._p_step import COLUMNS, p_step_reference
from ddpm_fast.ops._simple_loss import simple_loss_reference
from ddpm_fast.ops._vlb_terms import CDFS, vlb_terms_reference

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


@given(
    shape=shapes,
    dtype=dtypes,
    out_dtype=dtypes,
    doubled=st.booleans(),
    key=keys,
    coefficients=st.tuples(st.floats(-2, 2), st.floats(-2, 2)),
    seed=seeds,
)
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
    arguments = [
        x_t,
        out,
        timesteps(shape[0], seed),
        table,
        noise,
        kind,
        clip,
        previous if multistep else None,
        without if guided else None,
        1.5,
    ]
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
    upstream = numbers(shape, seed + 1).to(dtype)
    exact = value_and_gradients(lambda *a: p_step_reference(*a)[0], in_float64(*arguments), leaves, upstream.double())
    magnitudes = value_and_gradients(without_cancelling, magnitudes_of_p_step(arguments), leaves, upstream.double().abs())
    units = roundings_of_p_step(max(abs(log_variance) + 1, float(out[:, shape[1] :].abs().max())))
    for i, (got, e, magnitude) in enumerate(zip(value_and_gradients(ours, arguments, leaves, upstream), exact, magnitudes, strict=True)):
        assert_within_rounding(got, Rounded(e, units * magnitude.abs()), what="the value" if i == 0 else f"gradient {i - 1}")


def roundings_of_p_step(log_variance):
    """Largest error of p_step and its gradients, in sums of magnitudes, for log-variances of so much at most.

    Each term of a sum passes through at most 16 roundings, each by half an ulp of no more than the sum of all magnitudes. The deviation
    is e^(½ log-variance), whose exponent errs by four halves of an ulp of its own size.
    """
    return (16 + 2 * log_variance) * 2.0**-24


def magnitudes_of_p_step(arguments):
    """What p_step is called with, in float64, with the magnitude of all that is multiplied or added: of all but log-variances."""
    x_t, out, t, table, noise, kind, _, previous, without, scale = in_float64(*arguments)
    noise = noise.materialize(x_t.shape, dtype=torch.float64) if isinstance(noise, Noise) else noise
    halves = [None if x is None else torch.cat([x[:, : x_t.shape[1]].abs(), x[:, x_t.shape[1] :]], 1) for x in (out, without)]
    kept = {COLUMNS.index("log_variance_low"), COLUMNS.index("log_variance_high")}
    table = torch.stack([column if i in kept else column.abs() for i, column in enumerate(table.unbind(1))], 1)
    previous = None if previous is None else previous.abs()
    return [x_t.abs(), halves[0], t, table, noise.abs(), kind, False, previous, halves[1], scale]


def without_cancelling(x_t, out, t, table, noise, kind, clip, previous, without, scale):
    """p_step of magnitudes: no number on the way is larger, and by autograd none on the way of a gradient."""
    if without is not None:
        channels = x_t.shape[1]
        prediction = without[:, :channels] + scale * (out[:, :channels] + without[:, :channels])
        out = torch.cat([prediction, out[:, channels:] + 0 * without[:, channels:]], 1)  # the other half has no part in it
    return p_step_reference(x_t, out, t, table, noise, kind, clip, previous)[0]


@given(
    shape=shapes, dtype=dtypes, out_dtype=dtypes, kind=kinds, clip=st.booleans(), levels=st.integers(2, 256), cdf=st.sampled_from(CDFS),
    detach_mean=st.booleans(), seed=seeds,
)  # fmt: skip
@every
def test_vlb_terms(shape, dtype, out_dtype, kind, clip, levels, cdf, detach_mean, seed):
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
    # As in p_step: at the clip's edge the gradient is all or nothing.
    t = timesteps(shape[0], seed)
    row = table.double()[t].view(shape[0], 1, 1, -1)
    guess = row[..., 0] * x_t.double() + row[..., 1] * out.double()[:, : shape[1]]
    assume(not clip or bool(((guess.abs() - 1).abs() > 1e-6).all()))
    options = (kind, clip, levels, cdf, detach_mean)
    compare(
        lambda *a: vlb_terms(*a, variance=kind, clip=clip, levels=levels, cdf=cdf, detach_mean=detach_mean),
        lambda *a: vlb_terms_reference(*a, *options),
        (out, x_start, x_t, t, table), [0], seed, floor=16.0,
    )  # fmt: skip


@given(
    shape=shapes,
    dtype=dtypes,
    spread=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=4, max_size=4),
    mean=st.booleans(),
    seed=seeds,
)
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
    magnitudes = [
        terms[0].flatten(1).mean(1) if mean else terms[0],
        *(x.abs().sum_to_size(g.shape) for x, g in zip(terms[1:], got[1:], strict=True)),
    ]
    for i, (g, e, magnitude) in enumerate(zip(got, exact, magnitudes, strict=True)):
        allowed = 10 * 2.0**-23 * magnitude + 0.5 * torch.finfo(dtype).eps * e.sum_to_size(g.shape).abs()
        error = (g.double() - e.sum_to_size(g.shape)).abs()
        assert (error <= allowed + torch.finfo(dtype).tiny).all(), (
            f"output {i}: {float((error - allowed).max()):.2e} beyond what is allowed"
        )


@given(mean=st.floats(-1e3, 1e3), logvar=st.floats(-80, 80), d=st.floats(-80, 80), step=st.floats(0, 1), dtype=dtypes)
@every
def test_gaussian_kl_is_never_negative_and_zero_at_equality(mean, logvar, d, step, dtype):
    m, l1 = (torch.tensor([[x]]).to(dtype) for x in (mean, logvar))
    assert_bits_equal(gaussian_kl(m, l1, m, l1), torch.zeros(1, 1, dtype=dtype))
    value = gaussian_kl(m, l1, m + step, l1 + d)
    assert value.isnan().item() is False and value.item() >= 0


@given(
    raw=st.one_of(st.floats(-100, 100), st.floats(-1e30, 1e30)),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    key=keys,
)
@every
def test_p_step_of_any_variance(raw, kind, dtype, key):
    """Log-variances of ±100, and a learned one beyond: past e^±88 the deviation may be infinite or 0, but nothing is NaN, and the
    last row, which takes no noise, is finite."""
    x_t, t = numbers((2, 1, 5), 1, dtype=dtype), torch.tensor([0, ROWS - 1])
    table = numbers((ROWS, len(COLUMNS)), 2)
    fixed = max(-100.0, min(100.0, raw))
    table[:, 5:] = torch.tensor([fixed, fixed, 1.0]) if kind == "fixed" else torch.tensor([-20.0, 0.0, 1.0])
    table[0, COLUMNS.index("noise")] = 0.0
    out = torch.cat([numbers((2, 1, 5), 3), torch.full((2, 1, 5), raw)], 1)
    arguments = [x_t, out, t, table, key, kind, True, None, None, 1.0]
    got, exact = p_step(x_t, out, t, table, key, variance=kind), p_step_reference(*in_float64(*arguments))
    assert got[0][0].isfinite().all() and not got[0].isnan().any()
    if (kind == "learned_range" and abs(raw) > 4) or (kind == "learned" and abs(raw) > 88):
        return
    for x, e, magnitude in zip(got, exact, p_step_reference(*magnitudes_of_p_step(arguments)), strict=True):
        assert_within_rounding(x, Rounded(e, roundings_of_p_step(100) * magnitude))


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


@given(levels=st.integers(2, 256), cdf=st.sampled_from(CDFS), clip=st.booleans(), data=st.data())
@every
def test_decoder_at_the_ends_and_off_by_far(levels, cdf, clip, data):
    """Saturated pixels lie in open bins: a mean beyond them costs nothing. A bin that is missed costs the floor and has no gradient."""
    far = data.draw(st.floats(0.5, 50.0))
    table = torch.tensor([[0.0, 1.0, 1.0, 0.0, -20.0, -20.0, -20.0, 0.0]])  # a deviation of e^-10, far below a bin
    x_start = torch.tensor([[[-1.0, 1.0]]])
    beyond = vlb_terms(x_start * (1 + far), x_start, x_start, torch.tensor([0]), table, clip=clip, levels=levels, cdf=cdf)
    assert_bits_equal(beyond.abs(), torch.zeros(1))
    out = (x_start * (1 - far - 2 / (levels - 1))).requires_grad_()
    missed = vlb_terms(out, x_start, x_start, torch.tensor([0]), table, clip=clip, levels=levels, cdf=cdf)
    assert_close_to_exact(missed, torch.full((1,), -math.log2(1e-12), dtype=torch.float64), ulps=4)
    assert (torch.autograd.grad(missed.sum(), out)[0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@every_case
def test_what_is_not_finite_stays_in_its_sample(name, given, bad, dtype, isa):
    """Of results and gradients, whichever input it comes from."""
    case = make(name, given, (3, 2, 700), dtype)
    whole = everything(case)
    for part in [
        part for part, x in case.arguments.items() if isinstance(x, torch.Tensor) and x.is_floating_point() and part not in TABLES
    ]:
        broken = case.arguments[part].clone()
        broken.flatten(1)[1, 0] = bad
        hurt = everything(case.given(**{part: broken}))
        assert any(not x[1].isfinite().all() for x in hurt.values()) or case.arguments.get("clip"), part  # a clip may hide an infinity
        for which, x in hurt.items():
            assert_bits_equal(x[[0, 2]], whole[which][[0, 2]], f"{which}, {bad} in {part}")
