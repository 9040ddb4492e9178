"""attention: softmax(q kᵀ / √d) v over all tokens, from queries, keys and values packed in one tensor.

``qkv`` is what a 1x1 convolution leaves in channels_last, (N, tokens, 3, heads, d), read where it lies; the result is what the next
convolution takes. Vaswani et al. 2017; Ho et al. 2020 use one head over all channels. The reference twin is here. On CPU PyTorch's
flash attention runs on views; csrc/cuda/attention*.cu are the kernels for CUDA, memory linear in the tokens, backward deterministic.
Where PyTorch's own is faster on the device at hand, a plain call there takes that one: see ddpm_fast/autotune.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_fast import autotune, checks
from ddpm_fast._pytorch import constant_while_compiling, goes_through_dispatcher, in_functorch
from ddpm_fast.backends import NATIVE_DTYPES, missing, native
from ddpm_fast.ops._common import check_data, table_dtype
from ddpm_fast.ops._native import stream_of, workspace_floats
from ddpm_fast.ops._op import Op
from ddpm_fast.types import Backend

# Compute capabilities of GPUs whose tensor cores have eight times the products of TF32 that the GPU has of fp32: A100, H100, B200, B300.
# Of the other GPUs that have TF32 (RTX 30 to 50, A10, L4, L40) both rates are equal, by NVIDIA's architecture papers.
_FAST_TF32 = {(8, 0), (9, 0), (10, 0), (10, 3)}
LARGEST_HEAD = 256  # channels of a head that the CUDA kernels take, in multiples of 8


def attention_reference(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The formula in plain PyTorch.

    Returns:
        The result, (N, tokens, heads d), and the log of the softmax's sum for each query, (N, heads, tokens).
    """
    query, key, value = _heads(qkv.to(table_dtype(qkv.dtype)))
    with torch.autocast(qkv.device.type, enabled=False):
        logits = query @ key.transpose(-1, -2) * scale
        out = torch.softmax(logits, -1) @ value
    return _joined(out).to(qkv.dtype), torch.logsumexp(logits, -1).detach()


def _heads(qkv: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values as a tuple of views, each (N, heads, tokens, d)."""
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def _joined(out: Tensor) -> Tensor:
    return out.transpose(1, 2).flatten(2)


def _sdpa(qkv: Tensor, scale: float) -> Tensor:
    query, key, value = _heads(qkv)
    with torch.autocast(qkv.device.type, enabled=False):  # the result has the data's dtype, whichever kernel is chosen
        return _joined(F.scaled_dot_product_attention(query, key, value, scale=scale))


def _with_whole_heads(qkv: Tensor) -> Tensor:
    """qkv in the form that PyTorch's CPU kernel reads: any strides, but the channels of a head next to each other."""
    return qkv if qkv.stride(4) == 1 else qkv.contiguous()


def _forward_cpu(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    qkv = _with_whole_heads(qkv)
    out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*_heads(qkv), 0.0, False, scale=scale)
    samples, _, tokens, _ = out.shape
    joined = torch.ops.aten._unsafe_view(out.transpose(1, 2).contiguous(), (samples, tokens, -1))  # not a view: it may be changed in place
    return joined, logsumexp.contiguous()


def attention_cpu(qkv: Tensor) -> Tensor:
    """Attention on the CPU without checks and without a gradient, for data that the kernel can read as they are.

    Args:
        qkv: (N, tokens, 3, heads, d).

    Returns:
        (N, tokens, heads d), contiguous.
    """
    return _forward_cpu(qkv, qkv.shape[-1] ** -0.5)[0]


def _backward_cpu(arguments: Any, needs: Any, grads: Any, results: Any) -> dict[str, Tensor | None]:
    qkv, scale = arguments
    qkv = _with_whole_heads(qkv)
    out, logsumexp = results
    as_heads = lambda x: x.unflatten(2, qkv.shape[3:]).transpose(1, 2)  # noqa: E731
    parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        as_heads(grads[0].contiguous()), *_heads(qkv), as_heads(out), logsumexp, 0.0, False, scale=scale
    )
    grad = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    for target, part in zip(_heads(grad), parts, strict=True):
        target.copy_(part)
    return {"qkv": grad}


def _aligned(x: Tensor) -> Tensor:
    """x in the form that the CUDA kernels read: contiguous, at an address that is a multiple of 16 bytes."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _sizes(qkv: Tensor) -> dict[str, int]:
    samples, tokens, _, heads, channels = qkv.shape
    return dict(samples=samples, tokens=tokens, heads=heads, head_channels=channels)


def _forward_cuda(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    qkv = _aligned(qkv)
    out, logsumexp = _fake(qkv, scale)
    native.cuda_attention(**_sizes(qkv), scale=scale, qkv=qkv, out=out, logsumexp=logsumexp, **stream_of(qkv))
    return out, logsumexp


def _backward_cuda(arguments: Any, needs: Any, grads: Any, results: Any) -> dict[str, Tensor | None]:
    qkv, scale = arguments
    qkv, grad_out, out = _aligned(qkv), _aligned(grads[0]), _aligned(results[0])
    grad_qkv, sizes = torch.empty_like(qkv), _sizes(qkv)
    floats = workspace_floats(native.cuda_attention_backward_plan, *sizes.values(), NATIVE_DTYPES[qkv.dtype])
    workspace = qkv.new_empty((floats,), dtype=torch.float32)  # dropped after the call: on the stream its memory is used again in order
    native.cuda_attention_backward(
        **sizes,
        scale=scale,
        qkv=qkv,
        out=out,
        logsumexp=results[1],
        grad_out=grad_out,
        grad_qkv=grad_qkv,
        workspace=workspace,
        **stream_of(qkv),
    )
    return {"qkv": grad_qkv}


def _check(qkv: Tensor, scale: float) -> None:
    check_data("qkv", qkv)
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must have shape (N, tokens, 3, heads, d), got {tuple(qkv.shape)}")
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite, got {scale}")


def _fake(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    samples, tokens, _, heads, channels = qkv.shape
    return qkv.new_empty((samples, tokens, heads * channels)), qkv.new_empty((samples, heads, tokens), dtype=table_dtype(qkv.dtype))


_op = Op(
    "attention",
    "Tensor qkv, float scale",
    "(Tensor, Tensor)",
    check=_check,
    fake=_fake,
    reference=attention_reference,
    differentiable=("qkv",),
    backward_reads_results=(0, 1),
    cpu=_forward_cpu,
    cuda=_forward_cuda,
    backward=dict(cpu=_backward_cpu, cuda=_backward_cuda),
)
backends = _op.backends


def attention(qkv: Tensor, heads: int | None = None, *, scale: float | None = None, backend: Backend | None = None) -> Tensor:
    """softmax(scale · q kᵀ) v, each token of a sample attending to all of its tokens, for each head.

    Args:
        qkv: (N, tokens, 3, heads, d), queries, keys and values; or (N, tokens, 3 heads d) with ``heads`` given. A channels_last
            (N, 3C, H, W) tensor becomes that as ``x.permute(0, 2, 3, 1).flatten(1, 2)``, without a copy. Any other strides are read
            as they are on CPU and made contiguous on CUDA.
        heads: number of heads; of a packed tensor of three dimensions 1 by default.
        scale: of the logits, 1/√d by default.
        backend: force "reference", "cpu" or "cuda". "cuda" takes d in multiples of 8 up to 256. Without it CUDA tensors go to the
            kernel or to PyTorch's scaled_dot_product_attention, whichever a measurement found faster (ddpm_fast.autotune); in a
            compiled graph to the kernel.

    Returns:
        (N, tokens, heads d), contiguous. Differentiable. float32 data are multiplied with about float32's precision (on CUDA as
        three TF32 products of split operands).

    Raises:
        TypeError, ValueError: what was expected and what came.
        RuntimeError: for a forced backend that is not available here.
    """
    heads = heads if heads is None else checks.index("heads", heads)
    if isinstance(qkv, Tensor) and qkv.ndim == 3:
        heads = 1 if heads is None else heads
        if heads < 1 or qkv.shape[2] % (3 * heads):
            raise ValueError(f"the last size of qkv must be a multiple of 3 heads = {3 * heads}, got {qkv.shape[2]}")
        qkv = qkv.unflatten(2, (3, heads, qkv.shape[2] // (3 * heads)))
    scale = None if scale is None else checks.real("scale", scale)
    _check(qkv, 1.0 if scale is None else scale)
    if heads is not None and heads != qkv.shape[3]:
        raise ValueError(f"qkv must have {heads} heads, got shape {tuple(qkv.shape)}")
    scale = qkv.shape[4] ** -0.5 if scale is None else float(scale)
    if backend == "cuda" and not _kernel_takes(qkv):
        raise ValueError(f"backend 'cuda' of attention takes heads of a multiple of 8 channels, at most {LARGEST_HEAD}, got {qkv.shape[4]}")
    if backend is None and not qkv.is_cpu and _choice(qkv, scale) == "pytorch":
        return _sdpa(qkv, scale)
    return _op((qkv, scale), qkv, qkv.dtype, backend)[0]


def _kernel_takes(qkv: Tensor) -> bool:
    return qkv.shape[4] % 8 == 0 and qkv.shape[4] <= LARGEST_HEAD


def _choice(qkv: Tensor, scale: float) -> str:
    """Name of the implementation for a tensor that is not on the CPU: "ddpm_fast" or "pytorch"."""
    if qkv.dtype not in NATIVE_DTYPES or in_functorch() or 0 in qkv.shape:
        return "ddpm_fast"  # the op then calls the reference
    if qkv.device.type != "cuda" or not _kernel_takes(qkv):
        return "pytorch"
    first = _unmeasured(qkv.device, qkv.dtype)
    if goes_through_dispatcher() or type(qkv) is not Tensor:
        return first
    if missing("cuda", qkv.device):
        return "pytorch"
    needs_grad = torch.is_grad_enabled() and qkv.requires_grad
    key = (qkv.shape, str(qkv.dtype), "with gradient" if needs_grad else "forward")
    return autotune.choose("attention", key, candidates(qkv, scale, needs_grad), first, device=qkv.device)


@constant_while_compiling
def _unmeasured(device: torch.device, dtype: torch.dtype) -> str:
    """Name of the implementation on a GPU where nothing is timed: in a compiled graph, under deterministic algorithms.

    PyTorch's kernels are tuned for 16 bits. Ours takes fp32 apart into TF32 products, which pays where the tensor cores have more of
    those than the GPU has of fp32's.
    """
    fast = dtype == torch.float32 and not missing("cuda", device) and torch.cuda.get_device_capability(device) in _FAST_TF32
    return "ddpm_fast" if fast else "pytorch"


def candidates(qkv: Tensor, scale: float, needs_grad: bool) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Calls for the autotuner to time, by name: each computes attention, and its gradient where one is needed."""

    def timed(call: Callable[[Tensor], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            if not needs_grad:
                return (call(qkv),)
            with torch.enable_grad():
                leaf = qkv.detach().requires_grad_()
                out = call(leaf)
                return out.detach(), torch.autograd.grad(out, leaf, torch.ones_like(out))[0]

        return run

    return {"ddpm_fast": timed(lambda x: _op((x, scale), x, x.dtype, "cuda")[0]), "pytorch": timed(lambda x: _sdpa(x, scale))}
