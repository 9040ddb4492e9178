"""Checks of tensors' memory: is it there, may it be written into, does it overlap another tensor's."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast._pytorch import goes_through_dispatcher, holds_values, in_functorch


def check_memory(x: Tensor) -> None:
    """Raises ValueError for a tensor that has elements but no memory. The native kernels raise the same error for their arguments."""
    if not x.data_ptr() and x.numel():
        raise ValueError("a tensor has no memory to read: its storage was freed, or it stands for values without holding them")


def resolved(x: Tensor) -> Tensor:
    """x, whose memory holds its values: a view that negates what it reads (as ``z.conj().imag``) is copied, anything else is returned."""
    return x.resolve_neg() if x.is_neg() else x


def was_written(*targets: Tensor | None) -> None:
    """Tells autograd what a kernel has written to: a backward that saved one of them must fail, not go wrong in silence."""
    torch.autograd.graph.increment_version([x for x in targets if x is not None])


def check_target(name: str, target: Tensor) -> bool:
    """Checks that a result can be written into ``target``.

    Returns:
        True where the target has an address, and so can be compared with other tensors' memory. A tensor that is traced or transformed
        has none.

    Raises:
        ValueError: the target is not contiguous, or a view that negates what it reads.
        RuntimeError: it needs a gradient.
    """
    if not target.is_contiguous():
        raise ValueError(f"{name} must be contiguous")
    if target.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{name} requires a gradient and cannot be written into")
    if goes_through_dispatcher() or in_functorch() or (type(target) is not Tensor and not holds_values(target)):
        return False
    if target.is_neg():
        raise ValueError(f"{name} must not be a view that negates what it reads")
    return True


def overlap(target: Tensor, *others: object) -> bool:
    """Answer whether a contiguous tensor may share memory with one of the others.

    Addresses are compared, so two tensors made on the same memory from different storages are found too. An argument that is not a
    tensor is passed over.
    """
    first = target.data_ptr()
    last = first + target.nbytes
    for other in others:
        if isinstance(other, Tensor):
            start = other.data_ptr()
            if start < last and first < start + (other.nbytes if other.is_contiguous() else _extent(other)):
                return True
    return False


def _extent(x: Tensor) -> int:
    """Bytes from the first element to the end of the last, of any strides."""
    return (sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1) * x.element_size() if x.numel() else 0
