"""What the ops share: input checks, the gather of table rows, the registration with torch.library."""
from __future__ import annotations

import math

import torch
from torch import Tensor

from ddpm_fast.backends import native
from ddpm_fast.noise import MAX_ELEMENTS_PER_SAMPLE, Noise

library = torch.library.Library("ddpm_fast", "DEF")
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def goes_through_dispatcher(*tensors: Tensor | None) -> bool:
    """Whether a call must be visible to PyTorch as an operator: while compiling or tracing, and for tensor subclasses.

    A plain eager call goes straight to the kernel instead: the dispatcher's Python entries cost ten times as much as
    the whole call at small sizes.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    if torch._C._len_torch_dispatch_stack():  # make_fx, FlopCounterMode
        return True
    return any(x is not None and type(x) is not Tensor and type(x) is not torch.nn.Parameter for x in tensors)


def in_functorch() -> bool:
    """Inside torch.func.grad, vmap and the like: their tensors have no address, so the reference serves them."""
    return torch._C._are_functorch_transforms_active()


def check_data(name: str, x: Tensor) -> None:
    """A non-empty floating-point batch, (N, ...)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(f"{name} must have shape (N, ...) with at least one sample and one element, got {tuple(x.shape)}")


def check_unit_range(name: str, x: Tensor) -> None:
    """Finite data in [-1, 1]. Reads the values, and so waits for the device: for evaluation, not for an op."""
    largest = float(x.abs().amax())
    if not largest <= 1.001:  # NaN is not <= either
        raise ValueError(f"{name} must be finite and lie in [-1, 1], got a largest magnitude of {largest:g}")


def check_like(name: str, x: Tensor, other_name: str, other: Tensor, *, same_dtype: bool = True) -> None:
    """Same shape and device as another tensor, and the same dtype unless told otherwise."""
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
    if x.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {x.device}")


def check_t(t: Tensor, x_name: str, x: Tensor, steps: int) -> None:
    """int64 of shape (N,) on x's device, each in 0..steps-1.

    The values are looked at on CPU only: on another device that would wait for it to finish.
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"t must be a tensor, got {type(t).__name__}")
    if t.dtype != torch.int64:
        raise TypeError(f"t must be int64, got {t.dtype}")
    if t.shape != x.shape[:1]:
        raise ValueError(f"t must have shape ({x.shape[0]},), got {tuple(t.shape)}")
    check_device("t", t, x_name, x)
    if not torch.compiler.is_compiling() and type(t) is Tensor and not in_functorch():
        check_t_values(t, steps)


def check_t_values(t: Tensor, steps: int) -> None:
    if t.device.type != "cpu":
        return
    if native is not None:
        t = t.contiguous()
        first = native.first_out_of_range(t.data_ptr(), t.numel(), steps)
    else:
        outside = (t < 0) | (t >= steps)
        first = int(outside.nonzero()[0]) if outside.any() else -1
    if first >= 0:
        raise ValueError(f"t must lie in 0..{steps - 1}, got t[{first}] = {int(t[first])}")


def check_table(name: str, table: Tensor, x_name: str, x: Tensor, shape: tuple[int, ...] | None = None, *, columns: int | None = None) -> None:
    """A contiguous table of fp32 (float64 for float64 data), (T,), (T, columns) or the shape given, on x's device."""
    if not isinstance(table, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(table).__name__}")
    if columns is not None:
        shape = (len(table), columns) if table.ndim else (0, columns)
    expected = table_dtype(x.dtype)
    if table.dtype != expected:
        raise TypeError(f"{name} must be {expected} for {x.dtype} data, got {table.dtype}")
    if table.ndim != 1 if shape is None else table.shape != shape:
        raise ValueError(f"{name} must have shape {shape or '(T,)'}, got {tuple(table.shape)}")
    if not table.is_contiguous():
        raise ValueError(f"{name} must be contiguous")
    check_device(name, table, x_name, x)


def check_noise(noise: Noise | Tensor, x_name: str, x: Tensor) -> None:
    """A :class:`Noise`, or a tensor like x."""
    if isinstance(noise, Noise):
        if x.numel() // x.shape[0] > MAX_ELEMENTS_PER_SAMPLE:
            raise ValueError(f"a sample may have at most 2^34 elements with Noise, got {x.numel() // x.shape[0]}")
    elif isinstance(noise, Tensor):
        check_like("noise", noise, x_name, x)
    else:
        raise TypeError(f"noise must be a Noise or a tensor, got {type(noise).__name__}")


def noise_arguments(noise: Noise | Tensor) -> tuple[Tensor | None, int, int, int]:
    """A noise as an operator's arguments: tensor or None, then seed, stream and first_sample in int64's range."""
    if isinstance(noise, Noise):
        return None, signed64(noise.seed), noise.stream, signed64(noise.first_sample)
    return noise, 0, 0, 0


def signed64(x: int) -> int:
    """The int64 of the same 64 bits: operators have no unsigned integers."""
    return x - 2**64 if x >= 2**63 else x


def unsigned64(x: int) -> int:
    return x + 2**64 if x < 0 else x


def table_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the tables, and the arithmetic, are in: float64 for float64 data, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gather(table: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """table[t], shaped to broadcast over x (N, ...)."""
    return table[t].view(-1, *[1] * (x.ndim - 1))


def sample_sizes(x: Tensor) -> tuple[int, int]:
    """(samples, elements of each)."""
    return x.shape[0], math.prod(x.shape[1:])


def resolve_noise(noise: Noise | Tensor, x: Tensor) -> Tensor:
    """ε as a tensor in the dtype that the reference computes x's formula in."""
    if isinstance(noise, Noise):
        return noise.materialize(x.shape, x.device, table_dtype(x.dtype))
    return noise.to(table_dtype(x.dtype))
