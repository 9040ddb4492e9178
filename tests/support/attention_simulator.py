"""csrc/cuda/attention*.cu in the simulator: compiled once an architecture, launched under the plans that the launchers use."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from machine import nvcc_missing
from ptxsim import Device, Module
from ptxsim.nvcc import compile_ptx
from torch import Tensor

from ddpm_fast.backends import native, native_missing

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
FLAGS = ["-std=c++17"]
TAGS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # of csrc/common/dtype.h


class Result(NamedTuple):
    out: Tensor
    logsumexp: Tensor
    grad_qkv: Tensor | None
    reports: dict  # kernel's name -> report


class Sources(NamedTuple):
    """What is compiled, and which architecture for."""

    arch: str
    forward: str = str(CUDA / "attention.cu")
    backward: str = str(CUDA / "attention_backward.cu")


@functools.cache
def ptx(source: str, arch: str) -> str:
    return compile_ptx(source, arch, [str(CUDA)], FLAGS)


@functools.cache
def module(source: str, arch: str) -> Module:
    return Module.from_ptx(ptx(source, arch))


def plan(shape: tuple[int, ...], dtype: torch.dtype, backward: bool = False) -> dict:
    """The launch plan for a shape (samples, tokens, heads, channels)."""
    if native is None or not hasattr(native, "cuda_attention_plan"):
        pytest.skip(f"the launch plan is not there: {native_missing or 'ddpm_fast._C was built without CUDA'}")
    return (native.cuda_attention_backward_plan if backward else native.cuda_attention_plan)(*shape, TAGS[dtype])


def raw(x: Tensor) -> np.ndarray:
    x = x.detach().contiguous()
    return x.numpy() if x.dtype == torch.float32 else x.view(torch.int16).numpy().view(np.uint16)


def tensor(values: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(values if dtype == torch.float32 else values.view(np.int16)).view(dtype)


def simulate(
    sources: Sources, qkv: Tensor, scale: float, grad_out: Tensor | None = None, *, logsumexp: bool = True, first_block: bool = False
) -> Result:
    """Forward, and backward where there is a grad_out. Results that no kernel wrote stop the simulator when they are read.

    With first_block only the first block of every kernel but delta's runs: results past its rows are PyTorch's, and 0 for gradients.
    """
    if nvcc_missing():
        pytest.skip(nvcc_missing())
    samples, tokens, _, heads, channels = qkv.shape
    shape, dtype, device = (samples, tokens, heads, channels), qkv.dtype, Device()
    of_data = np.float32 if dtype == torch.float32 else np.uint16
    qkv_, out, sums = device.array(raw(qkv)), device.empty(shape, of_data), device.empty((samples, heads, tokens), np.float32)
    if first_block:
        exact_out, exact_logsumexp = attention_formula(qkv.double(), scale)
        out, sums = device.array(raw(exact_out.to(dtype))), device.array(raw(exact_logsumexp.float()))
    reports = {}

    def launch(source: str, launch: dict, arguments: list) -> None:
        grid = 1 if first_block and "delta" not in launch["kernel"] else launch["grid"]
        reports[launch["kernel"]] = module(source, sources.arch).launch(
            launch["kernel"], grid, launch["block"], arguments, shared_bytes=launch["shared_bytes"]
        )

    launches: Iterator[dict] = iter(plan(shape, dtype)["launches"])
    launch(sources.forward, next(launches), [qkv_, out, sums if logsumexp else 0, tokens, heads, channels, scale])
    grad_qkv = None
    if grad_out is not None:
        backward = plan(shape, dtype, backward=True)
        grad, written = (
            device.array(raw(grad_out)),
            device.array(raw(torch.zeros_like(qkv))) if first_block else device.empty(qkv.shape, of_data),
        )
        delta = device.empty((backward["workspace"],), np.float32)
        first, *rest = backward["launches"]
        launch(sources.backward, first, [out, grad, delta, samples * tokens * heads, tokens, heads, channels])
        for one in rest:
            launch(sources.backward, one, [qkv_, grad, sums, delta, written, tokens, heads, channels, scale])
        grad_qkv = tensor(written.numpy(), dtype)
    return Result(tensor(out.numpy(), dtype), torch.from_numpy(sums.numpy()) if logsumexp else torch.empty(0), grad_qkv, reports)


def attention_formula(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ scale) v and the logsumexp of the logits, in qkv's dtype."""
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    logits = q @ k.transpose(-1, -2) * scale
    return (logits.softmax(-1) @ v).transpose(1, 2), logits.logsumexp(-1)


def with_gradient(qkv: Tensor, scale: float, grad_out: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    qkv = qkv.clone().requires_grad_(grad_out is not None)
    out, logsumexp = attention_formula(qkv, scale)
    if grad_out is not None:
        out.backward(grad_out.to(out.dtype))
    return out.detach(), logsumexp.detach(), qkv.grad
