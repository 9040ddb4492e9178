"""The UNet's pass on the CPU as a list of kernel calls. Sampling makes the same pass many times, as a CUDA graph does on a GPU.

With a small network or a small batch, Python and PyTorch take most of a pass to decide what to do. A plan decides it once for one shape
of batch. A pass is then a list of kernel calls, on memory that is reserved once and used again. The projections of the time that the
residual blocks add are computed beforehand for all steps.

A plan belongs to the network as it is when the plan is made. It has copies of the weights (those of the 3 × 3 convolutions transformed)
and does not read the network afterwards, so later changes of the network do not reach it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast._pytorch import goes_through_dispatcher, in_functorch
from ddpm_fast.backends import missing
from ddpm_fast.models import layers
from ddpm_fast.models.levels import DownLevel, Level, Middle, UpLevel
from ddpm_fast.ops._attention import attention_cpu
from ddpm_fast.ops._conv3x3 import conv3x3_prepared
from ddpm_fast.ops._group_norm import group_norm_prepared

if TYPE_CHECKING:
    from ddpm_fast.models.unet import UNet

_KNOWN = {
    DownLevel, Middle, UpLevel, layers.Conv3x3, layers.Downsample, layers.GroupNormAct, layers.ResidualBlock, layers.SelfAttention,
    layers.TimeEmbedding, layers.Upsample, nn.Conv2d, nn.Embedding, nn.Identity, nn.Linear, nn.ModuleList,
}  # fmt: skip


def plan_obstacle(model: UNet, like: Tensor) -> str:
    """Reason why a UNet's passes cannot be planned for batches like this one; empty where they can."""
    if not like.is_cpu or like.dtype != torch.float32:
        return "plans are for the CPU in float32"
    if (
        missing("cpu")
        or goes_through_dispatcher()
        or in_functorch()
        or torch.is_autocast_enabled("cpu")
        or model._compiled_call_impl is not None
    ):
        return "there are no kernels, or something else has to see or change the operations"
    if model.training or not all(_plain(p) for p in model.parameters()):
        return "it is training, or its weights are not plain float32"
    hooks = "_forward_hooks", "_forward_pre_hooks"
    general = nn.modules.module
    if (
        general._global_forward_hooks
        or general._global_forward_pre_hooks
        or any(getattr(m, name) for m in model.modules() for name in hooks)
    ):
        return "it has hooks"
    own = {"forward", "weight", "bias"}  # as attributes of a module itself they stand for its method and its parameters
    changed = [type(m).__name__ for m in model.modules() if (m is not model and type(m) not in _KNOWN) or own & vars(m).keys()]
    return f"it was changed: {', '.join(changed)}" if changed else ""


def _plain(weight: Tensor) -> bool:
    dense = weight.is_contiguous() or (weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last))
    kind = type(weight) in (Tensor, nn.Parameter)  # a subclass need not have its values in its memory
    return kind and weight.is_cpu and weight.dtype == torch.float32 and dense and not weight.is_neg()


class UNetPlan:
    """The passes of a UNet over batches of one shape, at given time steps, with copies of the weights that it has now.

    Args:
        model: a UNet without :func:`plan_obstacle`.
        shape: (N, C, H, W) of a batch.
        timesteps: (S,) int64, the t of each row.
        labels: (N,) int64 for a class-conditional model, or None.
    """

    @torch.no_grad()
    def __init__(self, model: UNet, shape: torch.Size, timesteps: Tensor, labels: Tensor | None) -> None:
        model._check_inputs(torch.empty(shape, device="meta"), torch.empty(shape[0], device="meta"), labels)
        self._samples = shape[0]
        self._calls: list[tuple[Callable[..., object], tuple[Any, ...]]] = []
        self._free: dict[tuple[int, ...], list[Tensor]] = {}
        self._set_time: Callable[[int], object]
        self._prepare_time(model, timesteps, labels)
        self._input = _floats(self._samples, *shape[2:], shape[1])
        last = self._network(model)
        self._output = _floats(self._samples, last.shape[3], *shape[2:])
        self._add(self._output.copy_, last.permute(0, 3, 1, 2))

    @torch.no_grad()
    def __call__(self, x: Tensor, row: int) -> Tensor:
        """The model's output for x (N, C, H, W) at ``timesteps[row]``: (N, C or 2C, H, W), memory that the next pass writes over."""
        self._input.copy_(x.permute(0, 2, 3, 1))
        self._set_time(row)
        for function, arguments in self._calls:
            function(*arguments)
        return self._output

    # What the blocks add for the time, and the class.

    def _prepare_time(self, model: UNet, timesteps: Tensor, labels: Tensor | None) -> None:
        blocks = list(_blocks(model))
        weight = torch.cat([block.time_projection.weight for block in blocks])
        bias = torch.cat([block.time_projection.bias for block in blocks])
        embedding = model.time_embedding(timesteps)
        if model.label_embedding is None:
            projected, rows = torch.addmm(bias, F.silu(embedding), weight.t()), _floats(1, len(bias))
            self._set_time = lambda row: rows.copy_(projected[row])
        else:
            null = model.label_embedding.weight[model.num_classes :].clone()
            classes = null if labels is None else model.label_embedding(labels)
            rows = _floats(len(classes), len(bias))
            self._set_time = lambda row: torch.addmm(bias, F.silu(embedding[row] + classes), weight.t(), out=rows)
        widths = [block.time_projection.out_features for block in blocks]
        self._added = {id(block): part.expand(self._samples, -1) for block, part in zip(blocks, rows.split(widths, 1), strict=True)}

    # The network, as UNet.forward has it. Tensors here are (N, H, W, C), contiguous.

    def _network(self, model: UNet) -> Tensor:
        x = self._conv3x3(model.conv_in, self._input)
        skips = [x]
        for level in model.down:
            for k, block in enumerate(level.blocks):
                x = self._attended(level, k, self._block(block, x))
                skips.append(x)
            if level.downsample is not None:
                x = self._downsample(level.downsample, x)
                skips.append(x)
        first = self._block(model.mid.block1, x)
        middle = self._attention(model.mid.attention, first)
        x = self._block(model.mid.block2, middle)
        self._give(first, middle)
        for level_up in model.up:
            for k, block in enumerate(level_up.blocks):
                skip = skips.pop()
                both = self._take(x.shape[1], x.shape[2], x.shape[3] + skip.shape[3])
                self._add(torch.cat, [x, skip], 3, out=both)
                self._give(x, skip)
                x = self._attended(level_up, k, self._block(block, both))
                self._give(both)
            if level_up.upsample is not None:
                small, (height, width, channels) = x, x.shape[1:]
                large = self._take(2 * height, 2 * width, channels)
                self._add(large.view(-1, height, 2, width, 2, channels).copy_, small.view(-1, height, 1, width, 1, channels))
                x = self._conv3x3(level_up.upsample.conv, large)
                self._give(small, large)
        y = self._norm(model.norm_out, x)
        return self._conv3x3(model.conv_out, y)

    def _block(self, block: layers.ResidualBlock, x: Tensor) -> Tensor:
        normed = self._norm(block.norm1, x)
        h = self._conv3x3(block.conv1, normed)
        self._give(normed)
        normed = self._norm(block.norm2, h, self._added[id(block)])
        self._give(h)
        shortcut = x if isinstance(block.shortcut, nn.Identity) else self._conv1x1(block.shortcut, x)
        y = self._conv3x3(block.conv2, normed, shortcut)
        self._give(normed, *([] if shortcut is x else [shortcut]))
        return y

    def _attended(self, level: Level, k: int, x: Tensor) -> Tensor:
        if not len(level.attentions):
            return x
        y = self._attention(level.attentions[k], x)
        self._give(x)
        return y

    def _attention(self, layer: layers.SelfAttention, x: Tensor) -> Tensor:
        normed = self._norm(layer.norm, x)
        qkv = self._conv1x1(layer.qkv, normed)
        samples, height, width, channels = x.shape
        packed = qkv.view(samples, height * width, 3, layer.heads, channels // layer.heads)
        self._add(lambda: normed.view(samples, height * width, channels).copy_(attention_cpu(packed)))
        y = self._conv1x1(layer.proj_out, normed)
        self._add(y.add_, x)
        self._give(normed, qkv)
        return y

    def _norm(self, layer: layers.GroupNormAct, x: Tensor, added: Tensor | None = None) -> Tensor:
        y = self._take(*x.shape[1:])
        self._add(group_norm_prepared(
            x.permute(0, 3, 1, 2), y.permute(0, 3, 1, 2), layer.groups, layer.weight.clone(), layer.bias.clone(), layer.eps,
            layer.activation == "silu", added,
        ))  # fmt: skip
        return y

    def _conv3x3(self, layer: layers.Conv3x3, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self._take(x.shape[1], x.shape[2], layer.out_channels)
        added = None if residual is None else residual.permute(0, 3, 1, 2)
        self._add(conv3x3_prepared(x.permute(0, 3, 1, 2), layer.weight, layer.bias.clone(), added, y.permute(0, 3, 1, 2)))
        return y

    def _conv1x1(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        y = self._take(x.shape[1], x.shape[2], layer.out_channels)
        weight, bias = layer.weight.flatten(1).clone(), cast(Tensor, layer.bias).clone()
        self._add(torch.addmm, bias, x.view(-1, layer.in_channels), weight.t(), out=y.view(-1, layer.out_channels))
        return y

    def _downsample(self, layer: layers.Downsample, x: Tensor) -> Tensor:
        y = self._take(x.shape[1] // 2, x.shape[2] // 2, layer.conv.out_channels)
        weight, bias = layer.conv.weight.clone(), cast(Tensor, layer.conv.bias).clone()
        self._add(lambda: y.permute(0, 3, 1, 2).copy_(F.conv2d(F.pad(x.permute(0, 3, 1, 2), (0, 1, 0, 1)), weight, bias, stride=2)))
        return y

    # Calls and their memory.

    def _add(self, function: Callable[..., object], *arguments: Any, **options: Any) -> None:
        self._calls.append((partial(function, **options) if options else function, arguments))

    def _take(self, height: int, width: int, channels: int) -> Tensor:
        free = self._free.get((height, width, channels))
        return free.pop() if free else _floats(self._samples, height, width, channels)

    def _give(self, *tensors: Tensor) -> None:
        """Gives back memory that no later call reads: the next one that wants its shape writes there."""
        for x in tensors:
            self._free.setdefault(tuple(x.shape[1:]), []).append(x)


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")  # whatever PyTorch's defaults are


def _blocks(model: UNet) -> Iterator[layers.ResidualBlock]:
    for level in model.down:
        yield from level.blocks
    yield from (model.mid.block1, model.mid.block2)
    for level_up in model.up:
        yield from level_up.blocks
