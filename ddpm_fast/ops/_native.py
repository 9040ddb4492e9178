"""What the calls of native kernels share. The kernels take tensors by the names of csrc/common/arguments.h."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def contiguous(x: Any) -> Any:
    """A tensor, contiguous; what is none, as None or a Noise, as it is."""
    return x.contiguous() if isinstance(x, Tensor) else x


def new_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@lru_cache(maxsize=4096)
def workspace_floats(plan: Callable[..., dict[str, int]], *sizes: int, **options: int) -> int:
    """What a launch plan of csrc/cuda asks for; the rest of it is for its launcher and the tests."""
    return plan(*sizes, **options)["workspace"]


def stream_of(x: Tensor) -> dict[str, int]:
    """Where a launcher of CUDA is to run for x: on its device, in the stream that is current there."""
    return dict(device=x.device.index, stream=torch.cuda.current_stream(x.device).cuda_stream)
