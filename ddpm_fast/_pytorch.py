"""Private hooks of PyTorch, all that are used: of torch.func, of the dispatcher, of tensors that wrap others.

Each function says which public behaviour it stands for; tests/project/test_pytorch_hooks.py holds it to that,
so that a PyTorch that changes a hook is noticed.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_all_functorch_interpreters, retrieve_current_functorch_interpreter
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable[..., Any])
_FRONT = torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode

transforms_active = torch._C._are_functorch_transforms_active  # inside torch.func's transforms, also where `below_functorch` steps out


def in_functorch() -> bool:
    """True inside torch.func.grad, vmap and the like: their tensors have no address, so the reference serves them."""
    if not torch._C._are_functorch_transforms_active():
        return False
    return torch.compiler.is_compiling() or not torch._C._dispatch_tls_is_dispatch_key_excluded(_FRONT)


def in_forward_mode() -> bool:
    """True inside torch.autograd.forward_ad.dual_level, where tensors may have tangents, for which no kernel has a rule."""
    return forward_ad._current_level >= 0


def below_functorch() -> contextlib.AbstractContextManager[Any]:
    """Context in which operations run as they would outside torch.func's transforms, on what `unwrapped` gives. Elsewhere, nothing."""
    return torch._C._DisableFuncTorch() if in_functorch() else contextlib.nullcontext()


def goes_through_dispatcher() -> bool:
    """True where every call must be visible to PyTorch as an operator: while compiling or tracing.

    A plain eager call goes straight to the kernel instead: the dispatcher's Python entries cost ten times as much as
    the whole call at small sizes.
    """
    # The dispatch stack is that of make_fx, FlopCounterMode and the like.
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or bool(torch._C._len_torch_dispatch_stack())


def constant_while_compiling(function: F) -> F:
    """Marks a function of constants, such as a device, that a compiler calls and does not trace: it may ask the machine.

    As torch.compiler.assume_constant_result, which imports the compiler.
    """
    setattr(function, "_dynamo_marked_constant", True)  # noqa: B010  a checker knows no such attribute
    return function


def holds_values(x: Tensor) -> bool:
    """True where x itself has memory: not a tensor around others, fake or functional, whose operators see what is inside."""
    return type(x) is Tensor or not torch._C._dispatch_keys(x).has(torch._C.DispatchKey.Python)


def in_batches(grads: Sequence[Tensor | None]) -> bool:
    """True where backward runs under vmap, torch.func's or that of torch.autograd.grad(is_grads_batched=True): no address to read."""
    # A list: it is faster than a generator.
    return in_functorch() or any([grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads])


def unwrapped(x: Tensor) -> tuple[Tensor, set[int]]:
    """Values under all of torch.func's wrappers, and the levels of vmap that x is batched at."""
    levels = set()
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x):
            levels.add(_functorch.maybe_get_level(x))
        x = _functorch.get_unwrapped(x)
    return x, levels


def draw(make: Callable[[int], Tensor], count: int, like: Tensor | None = None) -> Tensor:
    """make(count): something drawn for ``count`` samples, its first dimension, in the way that vmap's ``randomness`` asks for.

    With "different", call b of a vmap gets samples b · count and on: what a batch of all of them would get. With "same", every call
    gets the same. With "error", vmap's default, this raises where ``like``, whose noise it is, is batched, or where nothing is said
    of it; in jacfwd and hessian, which run a function under vmap with one x for all directions, there is nothing to tell apart.

    Raises:
        RuntimeError: as said, or for "different" with a chunk_size, since a chunk does not know where it begins.
    """
    if not in_functorch():
        return make(count)
    if torch.compiler.is_compiling():  # which can be asked for the innermost transform alone
        innermost = retrieve_current_functorch_interpreter()
        if innermost.level() == 1 and innermost.key() != _functorch.TransformType.Vmap:
            return make(count)
        torch._dynamo.graph_break("a Noise under vmap: a compiler cannot ask how it is to be drawn")
    uncompiled = torch._dynamo.disable(_draw_under_vmap) if "torch._dynamo" in sys.modules else _draw_under_vmap
    return uncompiled(make, count, like)


def _draw_under_vmap(make: Callable[[int], Tensor], count: int, like: Tensor | None) -> Tensor:
    vmaps = [level for level in retrieve_all_functorch_interpreters() if isinstance(level, VmapInterpreter)]
    batched = {level.level() for level in vmaps} if like is None else unwrapped(like)[1]
    if any(level.randomness() == "error" and level.level() in batched for level in vmaps):
        raise RuntimeError(
            "vmap: a Noise would give every call the same values; pass randomness='different' to vmap for values by the batch index, "
            "or randomness='same'"
        )
    different = [level for level in vmaps if level.randomness() == "different"]
    if different and _in_chunks():
        raise RuntimeError("vmap: with chunk_size a Noise cannot tell the chunks apart; leave chunk_size out, or use randomness='same'")
    sizes = [level.batch_size() for level in different]
    with torch._C._DisableFuncTorch():
        drawn = make(math.prod(sizes) * count)
        drawn = drawn.view(*sizes, count, *drawn.shape[1:])
    for level in different:
        drawn = _functorch._add_batch_dim(drawn, 0, level.level())
    return drawn


def _in_chunks() -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_name != "_chunked_vmap":
        frame = frame.f_back
    return frame is not None


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Context for tensors that outlive a call: without torch.func's wrappers, which die with it, and without inference mode.

    A compiler cannot trace this.
    """
    with torch.inference_mode(False), torch._C._DisableFuncTorch():
        yield


def channels_last(x: Tensor) -> Tensor:
    """x in channels_last; under torch.func, which has no layouts to ask for, as it is."""
    return x if in_functorch() else x.contiguous(memory_format=torch.channels_last)
