"""The one comparison of the suite: every test that looks at numbers ends in one of these functions.

An ulp of a dtype at a value x is eps·max(|x|, smallest normal number): one to two times the spacing of the numbers there.

Where another kernel's error is no measure, because its algorithm differs from processor to processor, the limit is derived: the
formula is computed with :class:`Rounded` numbers, which carry a bound on what rounding may do to them.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

_INTEGER_VIEW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_as_accurate(actual: Tensor, baseline: Tensor, exact: Tensor, *, factor: float = 2.0, floor: float = 1.0, what: str = "") -> None:
    """``actual`` errs at most ``factor`` times as much as ``baseline`` anywhere does, plus ``floor`` ulps of the value.

    Args:
        actual: what is tested, of any dtype.
        baseline: the reference twin's result, of the same dtype.
        exact: the truth in float64.
        factor: how many times the baseline's largest error is allowed.
        floor: what is allowed beside it, in ulps of actual's dtype at each element: the last rounding may fall the
            other way where the baseline happens to be exact.
        what: said first in the message.

    Raises:
        AssertionError: with the place, both values and both errors; also for another shape or dtype, and where one is
            NaN or infinite and the truth, rounded to the dtype, is not the same.
    """
    _same_kind(actual, baseline, what)
    _exact_kind(actual, exact, what)
    _same_nonfinite(baseline, exact, f"{what} (the baseline itself)")
    finite = _same_nonfinite(actual, exact, what)
    baseline_error = _error(baseline, exact, finite)
    largest = float(baseline_error.max()) if baseline_error.numel() else 0.0
    allowed = factor * largest + floor * _ulp(exact, actual.dtype)
    _within(actual, exact, finite, allowed, f"{factor:g} x the baseline's {largest:.3e} + {floor:g} ulp", what, baseline)


def assert_close_to_exact(
    actual: Tensor, exact: Tensor, *, ulps: float = 0.0, rtol: float = 0.0, atol: float = 0.0, what: str = ""
) -> None:
    """|actual - exact| <= ulps·ulp(exact) + rtol·|exact| + atol at every element; ``exact`` is float64. Strict on NaN and inf."""
    _exact_kind(actual, exact, what)
    finite = _same_nonfinite(actual, exact, what)
    allowed = ulps * _ulp(exact, actual.dtype) + rtol * exact.abs() + atol
    _within(actual, exact, finite, allowed, f"{ulps:g} ulp + {rtol:g} relative + {atol:g}", what)


class Rounded:
    """What fp32 arithmetic may make of a float64 value: running error analysis (Wilkinson; Higham 2002, section 3.3).

    Each operation adds its own rounding, half an ulp of its exact result, to the errors that its operands bring along. For sums in an
    unknown order over n terms the bound is the smaller of (n - 1) and 6 √n halves of an ulp of the sum of magnitudes: roundings
    without a bias stay below the second with probability 1 - 3e-8 (Higham & Mary 2019, theorem 2.4).
    """

    def __init__(self, value: Tensor, error: Tensor | float = 0.0):
        self.value, self.error = value.double(), torch.as_tensor(error, dtype=torch.float64).expand(value.shape)

    def __add__(self, other: Rounded) -> Rounded:
        return Rounded(self.value + other.value, self.error + other.error).stored()

    def __sub__(self, other: Rounded) -> Rounded:
        return self + Rounded(-other.value, other.error)

    def __mul__(self, other: Rounded) -> Rounded:
        crossed = self.error * other.value.abs() + self.value.abs() * other.error
        return Rounded(self.value * other.value, crossed + self.error * other.error).stored()

    def __matmul__(self, other: Rounded) -> Rounded:
        """Products, and their sums in any order."""
        a, b = self.value.abs(), other.value.abs()
        crossed = self.error @ b + (a + self.error) @ other.error
        return Rounded(self.value @ other.value, crossed + (_growth(a.shape[-1]) + 1) * UNIT * (a @ b)).stored()

    def __getitem__(self, index) -> Rounded:
        return Rounded(self.value[index], self.error[index])

    @property
    def mT(self) -> Rounded:
        return Rounded(self.value.mT, self.error.mT)

    def stored(self, dtype: torch.dtype = torch.float32) -> Rounded:
        """Rounded to a dtype once more."""
        unit = torch.finfo(dtype).eps / 2
        return Rounded(self.value, self.error + unit * (self.value.abs() + self.error).clamp_min(torch.finfo(dtype).tiny))

    def sum(self, dim: int) -> Rounded:
        """In any order; the dimension is kept."""
        total = lambda x: x.sum(dim, keepdim=True)  # noqa: E731
        return Rounded(total(self.value), total(self.error) + _growth(self.value.shape[dim]) * UNIT * total(self.value.abs() + self.error))

    def sum_in_order(self, dim: int) -> Rounded:
        """One after the other: each partial sum is rounded once. The dimension is dropped."""
        partial, error = self.value.cumsum(dim), self.error.sum(dim)
        return Rounded(partial.select(dim, -1), error + UNIT * (partial.abs().sum(dim) + self.value.shape[dim] * error))

    def exp(self, ulps: float = 2.0) -> Rounded:
        """By a function that errs by so many ulps."""
        value = self.value.exp()
        return Rounded(value, value * (self.error.expm1() + 2 * ulps * UNIT * self.error.exp()))

    def reciprocal(self) -> Rounded:
        value = 1 / self.value
        return Rounded(value, value.abs() * self.error / (self.value.abs() - self.error)).stored()


UNIT = torch.finfo(torch.float32).eps / 2


def _growth(n: int) -> float:
    return min(n - 1, 6 * math.sqrt(n))


def networks_rounding(network, call, upstream: Tensor | None = None, draws: int = 4) -> dict[str, tuple[Tensor, float]]:
    """Results of ``call(network)`` in float64, and how far fp32 arithmetic may be from each.

    A layer whose sums have n terms gives the exact result for weights that differ by 6 √n halves of an ulp at most (Higham & Mary
    2019, as above), by a sixth of it as a rule. Such weights are drawn, and the largest change is taken four times: what no draw
    shows, and the roundings of what has no weights. The same on every processor, since nothing of it is computed in fp32. Where
    ``call(network, upstream)`` gives gradients, ``upstream`` (N, C, H, W) is drawn likewise: they are sums of N H W terms of it.
    """
    wide = copy.deepcopy(network).double()
    given = () if upstream is None else (upstream.double(),)
    exact, changes = call(wide, *given), {}
    generator = torch.Generator().manual_seed(0)
    for _ in range(draws):
        near = lambda x, terms: x * (1 + UNIT * math.sqrt(terms) * torch.randn(x.shape, generator=generator, dtype=x.dtype))  # noqa: E731
        other = copy.deepcopy(wide)
        with torch.no_grad():
            for p in other.parameters():
                p.copy_(near(p, p[0].numel()))
        for name, x in call(other, *(near(x, x[:, 0].numel()) for x in given)).items():
            changes[name] = max(changes.get(name, 0.0), float((x - exact[name]).abs().max()))
    return {name: (x.detach(), 4 * changes[name]) for name, x in exact.items()}


def assert_within_rounding(actual: Tensor, derived: Rounded, what: str = "") -> None:
    """``actual`` lies within the derived bound of the exact value, and half an ulp of its own dtype where that is less than fp32."""
    if actual.dtype != torch.float32:
        derived = derived.stored(actual.dtype)
    _exact_kind(actual, derived.value, what)
    finite = _same_nonfinite(actual, derived.value, what)
    _within(actual, derived.value, finite, derived.error, "derived from the roundings of the formula", what)


def assert_bits_equal(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """The same shape, dtype and bits: -0 is not 0, and a NaN equals itself alone."""
    _same_kind(actual, expected, what)
    a, b = (
        x.detach().cpu().contiguous().view(_INTEGER_VIEW[x.element_size()]) if x.dtype != torch.bool else x.cpu()
        for x in (actual, expected)
    )
    different = a != b
    count = int(different.sum())
    if count:
        at = _index(different.flatten().int().argmax(), actual.shape)
        bits = "" if a.dtype == torch.bool else f" (bits {_hex(a[at])} and {_hex(b[at])})"
        _fail(
            what,
            f"{count} of {a.numel()} elements differ, the first at {at}: got {_show(actual[at])}, expected {_show(expected[at])}{bits}",
        )


def _within(actual, exact, finite, allowed, rule, what, baseline=None):
    error = _error(actual, exact, finite)
    excess = torch.where(finite, error - allowed, torch.full_like(error, -torch.inf))
    if excess.numel() and float(excess.max()) > 0:
        at = _index(excess.flatten().argmax(), actual.shape)
        count = int((excess > 0).sum())
        other = "" if baseline is None else f", baseline {_show(baseline[at])}"
        _fail(
            what,
            f"{count} of {error.numel()} elements are too far off, the worst at {at}: "
            f"got {_show(actual[at])}, exact {_show(exact[at])}{other}; "
            f"error {float(error[at]):.3e}, allowed {float(allowed[at]):.3e} ({rule})",
        )


def _same_nonfinite(x: Tensor, exact: Tensor, what: str) -> Tensor:
    """Fails unless x has NaN and infinities just where the truth, rounded to x's dtype, has them. Returns where it is finite."""
    x, rounded = x.detach().cpu(), exact.detach().cpu().to(x.dtype)
    wrong = (x.isnan() != rounded.isnan()) | ((x.isinf() | rounded.isinf()) & (x != rounded) & ~(x.isnan() & rounded.isnan()))
    if wrong.any():
        at = _index(wrong.flatten().int().argmax(), x.shape)
        _fail(what, f"NaN or infinity at {at} ({int(wrong.sum())} such): got {_show(x[at])}, exact {_show(exact[at])}")
    return x.isfinite()


def _same_kind(actual: Tensor, expected: Tensor, what: str) -> None:
    for name in ("shape", "dtype"):
        if getattr(actual, name) != getattr(expected, name):
            _fail(what, f"{name} is {getattr(actual, name)}, expected {getattr(expected, name)}")


def _exact_kind(actual: Tensor, exact: Tensor, what: str) -> None:
    if exact.dtype != torch.float64:
        raise TypeError(f"exact must be float64, got {exact.dtype}")
    if actual.shape != exact.shape:
        _fail(what, f"shape is {actual.shape}, expected {exact.shape}")


def _error(x: Tensor, exact: Tensor, finite: Tensor) -> Tensor:
    error = (x.detach().cpu().double() - exact.detach().cpu()).abs()
    return torch.where(finite, error, torch.zeros_like(error))


def _ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    return info.eps * exact.detach().cpu().abs().clamp_min(info.tiny)


def _index(flat: Tensor, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(flat, shape)) if len(shape) else ()


def _hex(x: Tensor) -> str:
    width = 2 * x.element_size()
    return f"{int(x) & (1 << 4 * width) - 1:0{width}x}"


def _show(x: Tensor) -> str:
    return f"{x.item()!r}"


def _fail(what: str, message: str) -> None:
    raise AssertionError(f"{what}: {message}" if what else message)
