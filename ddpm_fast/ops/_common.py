"""Functions that all ops use: input checks, the gather of table rows, a noise as a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast._memory import check_target, overlap, resolved
from ddpm_fast._pytorch import below_functorch, draw, goes_through_dispatcher, holds_values, in_functorch, transforms_active, unwrapped
from ddpm_fast.backends import FLOATING, native
from ddpm_fast.noise import MAX_ELEMENTS_PER_SAMPLE, Noise


def check_data(name: str, x: Tensor) -> None:
    """Checks that x is a floating-point batch, (N, ...). N may be 0, the other sizes may not.

    Raises:
        TypeError, ValueError: what was expected and what came. So do all checks here.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.ndim == 0 or (x.numel() == 0 and 0 in x.shape[1:]):
        raise ValueError(f"{name} must have shape (N, ...) with at least one element a sample, got {tuple(x.shape)}")


def check_unit_range(name: str, x: Tensor) -> None:
    """Checks that data are finite and lie in [-1, 1]. It reads the values and waits for the device: for evaluation, not for an op."""
    if not x.numel():
        raise ValueError(f"{name} must have at least one sample, got shape {tuple(x.shape)}")
    largest = float(x.abs().amax())
    if not largest <= 1.001:  # NaN is not <= either
        raise ValueError(f"{name} must be finite and lie in [-1, 1], got a largest magnitude of {largest:g}")


def check_like(name: str, x: Tensor, other_name: str, other: Tensor, *, same_dtype: bool = True) -> None:
    """Checks that x has the shape and the device of another tensor, and unless told otherwise the dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.shape != other.shape:
        raise ValueError(f"{name} must have the shape of {other_name}, {tuple(other.shape)}, got {tuple(x.shape)}")
    check_device(name, x, other_name, other)
    if same_dtype and x.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {x.dtype}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")


def check_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if not (x.is_cpu and other.is_cpu) and x.device != other.device:  # the common case is asked first, as it is the cheapest
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {x.device}")


def check_t(t: Tensor, x_name: str, x: Tensor, steps: int) -> None:
    """Checks that t is int64 of shape (N,), on x's device, with values in 0..steps-1.

    The values are read on the CPU only: to read them on another device, the call would have to wait for it. While a compiler traces, or
    inside torch.func, t may have no values yet: the operator checks them when it is called.
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"t must be a tensor, got {type(t).__name__}")
    if t.dtype != torch.int64:
        raise TypeError(f"t must be int64, got {t.dtype}")
    if t.ndim != 1 or t.shape[0] != x.shape[0]:
        raise ValueError(f"t must have shape ({x.shape[0]},), got {tuple(t.shape)}")
    check_device("t", t, x_name, x)
    if torch.compiler.is_compiling():
        return
    if transforms_active():
        with below_functorch():
            check_t_values(unwrapped(t)[0], steps)
    else:
        check_t_values(t, steps)


def check_t_values(t: Tensor, steps: int) -> None:
    """Checks that the values of t, of any shape, lie in 0..steps-1, where t is on the CPU and has values."""
    count = t.numel()
    if not count or not t.is_cpu or (type(t) is not Tensor and not holds_values(t)):
        return
    if native is not None:
        try:
            t = (resolved(t) if t.is_neg() else t).contiguous()
        except (RuntimeError, NotImplementedError):
            raise TypeError(f"t must be a dense tensor, got {t.layout}") from None
        first = native.first_out_of_range(t, steps)
    else:
        outside = ((t < 0) | (t >= steps)).flatten()
        first = int(outside.nonzero()[0]) if outside.any() else -1
    if first >= 0:
        raise ValueError(f"t must lie in 0..{steps - 1}, got {f't[{first}] = ' if t.ndim == 1 else ''}{int(t.flatten()[first])}")


def check_table(
    name: str, table: Tensor, x_name: str, x: Tensor, shape: tuple[int, ...] | None = None, *, columns: int | None = None
) -> None:
    """Checks a table: contiguous, float32 (float64 for float64 data), on x's device, of shape (T,), (T, columns) or ``shape``."""
    if not isinstance(table, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(table).__name__}")
    if columns is not None:
        shape = (table.shape[0], columns) if table.ndim else (0, columns)
    expected = table_dtype(x.dtype)
    if table.dtype != expected:
        raise TypeError(f"{name} must be {expected} for {x.dtype} data, got {table.dtype}")
    if table.ndim != 1 if shape is None else table.shape != shape:
        raise ValueError(f"{name} must have shape {shape or '(T,)'}, got {tuple(table.shape)}")
    try:
        contiguous = table.is_contiguous()
    except RuntimeError:  # a table without strides
        contiguous = False
    if not contiguous and not in_functorch():
        raise ValueError(f"{name} must be contiguous")
    check_device(name, table, x_name, x)


def check_noise(noise: Noise | Tensor, x_name: str, x: Tensor) -> None:
    """Checks that a noise is a :class:`Noise`, or a tensor like x."""
    if isinstance(noise, Noise):
        if x.numel() > MAX_ELEMENTS_PER_SAMPLE and x.numel() // x.shape[0] > MAX_ELEMENTS_PER_SAMPLE:
            raise ValueError(f"a sample may have at most 2^34 elements with Noise, got {x.numel() // x.shape[0]}")
    elif isinstance(noise, Tensor):
        check_like("noise", noise, x_name, x)
    else:
        raise TypeError(f"noise must be a Noise or a tensor, got {type(noise).__name__}")


def table_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the tables and of the arithmetic for data of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def take(table: Tensor, t: Tensor) -> Tensor:
    """table[t]. A t outside the table gives NaN where :func:`check_t` could not read its value."""
    if t.is_cpu and not goes_through_dispatcher():
        return table[t]
    steps = table.shape[0]
    inside = ((t >= 0) & (t < steps)).view(-1, *[1] * (table.ndim - 1))
    return torch.where(inside, table[t.clamp(0, steps - 1)], torch.nan)


def gather(table: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """table[t], shaped to broadcast over x (N, ...)."""
    return take(table, t).view(-1, *[1] * (x.ndim - 1))


def gather_columns(table: Tensor, t: Tensor, x: Tensor) -> list[Tensor]:
    """The columns of table[t], each shaped to broadcast over x (N, ...)."""
    return [column.view(-1, *[1] * (x.ndim - 1)) for column in take(table, t).unbind(1)]


def check_destination(name: str, target: Tensor, x_name: str, x: Tensor, *others: Tensor | Noise | None, in_place: bool = True) -> None:
    """Checks that a result can be written into ``target``: contiguous, like x, and not in the memory of an input.

    Args:
        name, target: the tensor to write into.
        x_name, x: the input that it must be like.
        others: the other inputs.
        in_place: allow x itself as the target.
    """
    check_like(name, target, x_name, x)
    if not check_target(name, target):  # it has no address to compare; the result is computed elsewhere and copied into it
        return
    if not in_place or target.data_ptr() != x.data_ptr():
        others = (x, *others)
    elif not x.is_contiguous():
        raise ValueError(f"{name} may be {x_name} itself only where that is contiguous")
    if overlap(target, *others):
        raise ValueError(f"{name} must not share memory with another input")


def resolve_noise(noise: Noise | Tensor, x: Tensor) -> Tensor:
    """ε as a tensor in the dtype that the reference computes x's formula in."""
    if isinstance(noise, Noise):
        return draw(lambda count: noise.materialize((count, *x.shape[1:]), x.device, table_dtype(x.dtype)), x.shape[0], x)
    return noise.to(table_dtype(x.dtype))
