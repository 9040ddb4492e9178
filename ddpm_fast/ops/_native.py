"""Functions that calls of native kernels use. The kernels take tensors by the names in csrc/common/arguments.h."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ddpm_fast._pytorch import in_functorch


def contiguous(x: Any) -> Any:
    """x made contiguous if it is a tensor; anything else, such as None or a Noise, as it is."""
    return x.contiguous() if isinstance(x, Tensor) else x


def new_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last where x is dense in it, else contiguous; contiguous where it is both."""
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if x.ndim == 5 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


def laid_out_as(y: Tensor, x: Tensor) -> Tensor:
    """y in the memory format of x; under torch.func, which has no layouts to ask for, as it is."""
    return y if in_functorch() else y.contiguous(memory_format=memory_format(x))


@lru_cache(maxsize=4096)
def workspace_floats(plan: Callable[..., dict[str, int]], *sizes: int, **options: int) -> int:
    """Number of floats in the workspace that a launch plan of csrc/cuda asks for.

    Args:
        plan: the plan's function, called with the other arguments.
    """
    return plan(*sizes, **options)["workspace"]


def stream_of(x: Tensor) -> dict[str, int]:
    """Arguments that tell a CUDA launcher where to run: x's device, and the stream that is current there."""
    return dict(device=x.device.index, stream=torch.cuda.current_stream(x.device).cuda_stream)
