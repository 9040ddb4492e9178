"""From the public functions to CUDA's driver: what group_norm and attention hand the bindings, up to the launch that fails without a GPU.

The tensors are the CPU's; the order and the types of the bindings' arguments are what is tested. Where there is a GPU the other tests
see the results.
"""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from ddpm_fast import Noise, attention, group_norm
from ddpm_fast.backends import missing, native, native_missing
from ddpm_fast.ops import _attention, _group_norm


@pytest.fixture(autouse=True)
def on_cuda():
    """CPU tensors pass for CUDA's, as far as Python looks."""
    if native is None or not hasattr(native, "cuda_group_norm"):
        pytest.skip(native_missing or "ddpm_fast._C was built without CUDA")
    if not missing("cuda"):
        pytest.skip("there is a GPU, which must not be given addresses of the CPU's")
    with (
        mock.patch("ddpm_fast.backends.missing", lambda *_: ""),
        mock.patch.dict("ddpm_fast.backends.TAKES", cuda=("cpu",)),
        mock.patch("torch.cuda.get_device_properties", lambda _: SimpleNamespace(multi_processor_count=108)),
        mock.patch.object(_group_norm, "stream_of", lambda _: dict(device=0, stream=0)),
        mock.patch.object(_attention, "stream_of", lambda _: dict(device=0, stream=0)),
    ):
        yield


SIZES = "2 samples of 8 channels of 15 pixels in 4 groups: "


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("everything", [False, True])
def test_group_norm(everything, layout):
    x = torch.randn(2, 8, 5, 3).contiguous(memory_format=layout).requires_grad_()
    rows = {name: torch.randn(2, 8, requires_grad=True) for name in ("pre_bias", "scale", "shift")} if everything else {}
    parameters = [torch.ones(8, requires_grad=True), torch.ones(8, requires_grad=True)] if everything else []
    options = dict(activation="silu", dropout=(0.1, Noise(2**64 - 1, 2**32 - 1, 2**64 - 1))) if everything else {}
    with pytest.raises(RuntimeError, match=f"group_norm: CUDA launch failed for {SIZES}."):
        group_norm(x, 4, *parameters, **rows, **options, backend="cuda")
    module = _group_norm
    with (
        mock.patch.dict(module.backends.implementations, cuda=module._forward_cpu),
        mock.patch.dict(module._op.gradients.kernels, {module._forward_cpu: module._backward_cuda}),
    ):
        y = group_norm(x, 4, *parameters, **rows, **options, backend="cuda")
        with pytest.raises(RuntimeError, match=f"group_norm_backward: CUDA launch failed for {SIZES}."):
            y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention(dtype):
    qkv = torch.randn(2, 5, 3, 2, 8).to(dtype).requires_grad_()
    with pytest.raises(RuntimeError, match="attention: CUDA launch failed for 2 samples of 5 tokens, 2 heads of 8 channels: ."):
        attention(qkv, backend="cuda")
    module = _attention
    with (
        mock.patch.dict(module.backends.implementations, cuda=module._forward_cpu),
        mock.patch.dict(module._op.gradients.kernels, {module._forward_cpu: module._backward_cuda}),
    ):
        out = attention(qkv, backend="cuda")
        with pytest.raises(
            RuntimeError, match="attention_backward: CUDA launch failed for 2 samples of 5 tokens, 2 heads of 8 channels: ."
        ):
            out.sum().backward()
