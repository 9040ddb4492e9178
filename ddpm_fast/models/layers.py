"""Building blocks of the UNet: norm + activation, attention, residual block, resampling, time embedding.

`GroupNormAct` and `SelfAttention` are the only layers that compute a normalisation or an attention, by the operators of
ddpm_fast.ops (cpu_plan.py calls the same kernels without them). All layers take NCHW tensors in channels_last memory format and keep it.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast.noise import Noise
from ddpm_fast.ops import attention, conv3x3, group_norm
from ddpm_fast.types import Activation


def init_fan_avg_uniform_(weight: Tensor, scale: float = 1.0) -> Tensor:
    """Fill a weight in place from U(-b, b) with b = sqrt(3 scale / mean(fan_in, fan_out)), as Ho et al. do.

    Args:
        weight: (out, in) or (out, in, kh, kw), any floating dtype.
        scale: variance scale, >= 0. Zero gives zeros (Ho et al. write 1e-10 there).

    Returns:
        The same tensor.

    Raises:
        ValueError: for a negative scale or a weight of fewer than two dimensions.
    """
    if scale < 0.0:
        raise ValueError(f"scale must be >= 0, got {scale}")
    fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(weight)
    bound = math.sqrt(3.0 * scale / (0.5 * (fan_in + fan_out)))
    with torch.no_grad():
        return weight.zero_() if bound == 0.0 else weight.uniform_(-bound, bound)


def conv(in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, init_scale: float = 1.0) -> nn.Conv2d:
    """A Conv2d with the initial weights of Ho et al.: fan-average uniform, zero bias."""
    layer = nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride)
    init_fan_avg_uniform_(layer.weight, init_scale)
    nn.init.zeros_(cast(Tensor, layer.bias))
    return layer


class Conv3x3(nn.Conv2d):
    """A Conv2d of 3x3, stride 1 and padding 1 with the initial weights of Ho et al.: fan-average uniform, zero bias.

    Called with a residual it adds it. Where no gradient is needed it may be ddpm_fast.ops.conv3x3's kernel.
    """

    bias: Tensor  # always there

    def __init__(self, in_channels: int, out_channels: int, *, init_scale: float = 1.0) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        init_fan_avg_uniform_(self.weight, init_scale)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return conv3x3(x, self.weight, self.bias, residual=residual)


def linear(in_features: int, out_features: int) -> nn.Linear:
    """A Linear with the initial weights of Ho et al.: fan-average uniform, zero bias."""
    layer = nn.Linear(in_features, out_features)
    init_fan_avg_uniform_(layer.weight)
    nn.init.zeros_(cast(Tensor, layer.bias))
    return layer


def timestep_embedding(t: Tensor, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sinusoidal embedding [sin(t w_0), ..., sin(t w_{h-1}), cos(t w_0), ..., cos(t w_{h-1})], h = channels / 2.

    The frequencies w_k = 10000^(-k / (h - 1)) run from 1 to exactly 1/10000: the divisor is h - 1, as in the code of
    Ho et al. (2020), where Vaswani et al. (2017) have h.

    Args:
        t: (N,), int64 or floating point, in time steps and not scaled.
        channels: width of the embedding, even and at least 4.
        dtype: float32 or float64, the arithmetic and the result.

    Returns:
        (N, channels) of `dtype`.

    Raises:
        ValueError: for an odd or too small number of channels.
    """
    if channels < 4 or channels % 2:
        raise ValueError(f"channels must be even and at least 4, got {channels}")
    half = channels // 2
    index = torch.arange(half, device=t.device, dtype=dtype)
    frequencies = torch.exp(index * (-math.log(10000.0) / (half - 1)))
    angles = t.to(dtype)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class TimeEmbedding(nn.Module):
    """Timesteps (N,) -> (N, 4 channels): sinusoids, linear, SiLU, linear (Ho et al. 2020, appendix B)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.linear1 = linear(channels, 4 * channels)
        self.linear2 = linear(4 * channels, 4 * channels)

    def forward(self, t: Tensor) -> Tensor:
        weight_dtype = self.linear1.weight.dtype
        # t = 999 times a frequency has no meaning in bf16 or fp16, so the sinusoids never see less than fp32.
        sinusoids_dtype = torch.float64 if weight_dtype == torch.float64 else torch.float32
        sinusoids = timestep_embedding(t, self.channels, sinusoids_dtype).to(weight_dtype)
        return self.linear2(F.silu(self.linear1(sinusoids)))


class GroupNormAct(nn.Module):
    """dropout(silu(GroupNorm(x + pre_bias))), with activation, dropout and pre_bias each optional.

    Args:
        groups: number of groups; divides `channels`.
        channels: C of the input.
        eps: added to the variance.
        activation: "silu" or None.
        dropout: probability that an element is zeroed while training, in [0, 1).
    """

    def __init__(
        self, groups: int, channels: int, eps: float = 1e-6, *, activation: Activation | None = "silu", dropout: float = 0.0
    ) -> None:
        super().__init__()
        if activation not in ("silu", None):
            raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
        if channels % groups:
            raise ValueError(f"groups must divide channels, got groups={groups}, channels={channels}")
        self.groups = groups
        self.eps = eps
        self.activation = activation
        self.dropout = dropout
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, pre_bias: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """x: (N, C, H, W); pre_bias: (N, C) or None. Returns (N, C, H, W) in the layout of x.

        noise: what the dropout's mask is made from; without it the mask comes from PyTorch's generator.
        """
        drops = self.dropout > 0.0 and self.training
        x = group_norm(
            x, self.groups, self.weight, self.bias, eps=self.eps, activation=self.activation, pre_bias=pre_bias,
            dropout=None if noise is None or not drops else (self.dropout, noise),
        )  # fmt: skip
        return F.dropout(x, self.dropout) if drops and noise is None else x

    def extra_repr(self) -> str:
        return (
            f"groups={self.groups}, channels={self.weight.numel()}, eps={self.eps}, activation={self.activation!r}, dropout={self.dropout}"
        )


class SelfAttention(nn.Module):
    """x + proj_out(attention(qkv(norm(x)))) over the H W positions, with scale 1/sqrt(channels per head).

    The channels of `qkv` are ordered (3, heads, head channels), so that its channels_last output *is* the packed
    (N, tokens, 3, heads, d) tensor: queries, keys and values are views of it.
    """

    def __init__(self, channels: int, heads: int, norm_groups: int, norm_eps: float) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"heads must divide channels, got heads={heads}, channels={channels}")
        self.heads = heads
        self.norm = GroupNormAct(norm_groups, channels, norm_eps, activation=None)
        self.qkv = conv(channels, 3 * channels, 1)
        # Packed, the three projections would share one fan_out of 3C; each is initialised as the C -> C map it is.
        for part in self.qkv.weight.detach().chunk(3):
            init_fan_avg_uniform_(part)
        self.proj_out = conv(channels, channels, 1, init_scale=0.0)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(n, h * w, 3, self.heads, c // self.heads)
        out = attention(qkv).view(n, h, w, c).permute(0, 3, 1, 2)
        return x + self.proj_out(out)


class ResidualBlock(nn.Module):
    """shortcut(x) + conv2(dropout(silu(norm2(conv1(silu(norm1(x))) + time_projection(embedding))))).

    `embedding` (N, E) comes with its SiLU already applied: it is the same for all blocks, so the UNet applies it once.
    conv2 starts at zero and the shortcut is a 1x1 convolution where the number of channels changes. `noise` is the dropout's.
    """

    def __init__(
        self, in_channels: int, out_channels: int, embedding_channels: int, *, dropout: float, norm_groups: int, norm_eps: float
    ) -> None:
        super().__init__()
        self.norm1 = GroupNormAct(norm_groups, in_channels, norm_eps)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.time_projection = linear(embedding_channels, out_channels)
        self.norm2 = GroupNormAct(norm_groups, out_channels, norm_eps, dropout=dropout)
        self.conv2 = Conv3x3(out_channels, out_channels, init_scale=0.0)
        self.shortcut = nn.Identity() if in_channels == out_channels else conv(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor, noise: Noise | None = None) -> Tensor:
        h = self.conv1(self.norm1(x))
        h = self.norm2(h, self.time_projection(embedding), noise)
        return self.conv2(h, self.shortcut(x))


class Downsample(nn.Module):
    """Halve H and W with a 3x3 convolution of stride 2; the padding is below and to the right only (Ho et al.)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double H and W by repeating each pixel, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
