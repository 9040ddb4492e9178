"""The UNet of Ho et al. (2020, appendix B): eps_theta(x_t, t), with optional class conditioning and learned variance.

Residual blocks at every resolution, self-attention at some, skip connections by concatenation. The default arguments
are the paper's CIFAR-10 network: 35,746,307 parameters.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any, SupportsIndex, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast import checks
from ddpm_fast._pytorch import channels_last
from ddpm_fast.models.cpu_plan import UNetPlan, plan_obstacle
from ddpm_fast.models.layers import Conv3x3, Downsample, GroupNormAct, ResidualBlock, SelfAttention, TimeEmbedding, Upsample
from ddpm_fast.models.levels import SAMPLES_A_BLOCK, DownLevel, Masks, Middle, UpLevel
from ddpm_fast.models.presets import PRESETS
from ddpm_fast.noise import Noise
from ddpm_fast.types import Preset


class UNet(nn.Module):
    """UNet of Ho et al. (2020) with the details of their code.

    norm2 + SiLU, then dropout, then a zero-initialised conv2; stride-2 convolutions padded below and to the right;
    nearest upsampling then convolution; residual, attention, residual in the middle; num_blocks + 1 blocks per level on
    the way up; attention after each block at the listed resolutions. The last convolution starts at zero, so a new
    network returns zeros.

    `model.config` is a JSON-able dictionary, and `UNet(**model.config)` builds the same architecture.

    Weights are channels_last, as the activations are: contiguous ones would be laid out anew on each call, and their gradients
    too. FSDP2 takes contiguous parameters only: `fully_shard(model.to(memory_format=torch.contiguous_format))` computes the same.

    Args:
        in_channels: channels of x_t.
        out_channels: channels of the prediction; `in_channels` by default.
        base_channels: channels of the first level, even and at least 4.
        channel_mult: one positive integer a level: channels as a multiple of `base_channels`. Each level after the
            first halves H and W.
        num_blocks: residual blocks per level on the way down.
        attention_resolutions: heights (pixels, at `image_size`) of the levels with attention. The middle always has it.
        image_size: H = W of the training images, divisible by 2**(levels - 1). Other sizes are accepted by `forward`.
        num_heads: attention heads at every level.
        head_channels: channels per head, in place of `num_heads`.
        dropout: probability, in [0, 1), after norm2.
        num_classes: number of classes K, or None for an unconditional model.
        learned_variance: double the output channels; the second half parametrises the variance (Nichol & Dhariwal).
        norm_groups: groups of each GroupNorm; divides the channels of every level.
        norm_eps: epsilon of each GroupNorm.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: for an argument out of range or arguments that do not fit each other.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int | None = None,
        base_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        num_blocks: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        image_size: int = 32,
        num_heads: int = 1,
        head_channels: int | None = None,
        dropout: float = 0.1,
        num_classes: int | None = None,
        learned_variance: bool = False,
        norm_groups: int = 32,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        self._config: dict[str, Any] = dict(
            in_channels=in_channels,
            out_channels=out_channels,
            base_channels=base_channels,
            channel_mult=channel_mult,
            num_blocks=num_blocks,
            attention_resolutions=attention_resolutions,
            image_size=image_size,
            num_heads=num_heads,
            head_channels=head_channels,
            dropout=dropout,
            num_classes=num_classes,
            learned_variance=learned_variance,
            norm_groups=norm_groups,
            norm_eps=norm_eps,
        )
        _check_config(self._config)
        (in_channels, out_channels, base_channels, channel_mult, num_blocks, attention_resolutions, image_size, num_heads, head_channels,
         dropout, num_classes, learned_variance, norm_groups, norm_eps) = self._config.values()  # fmt: skip
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.size_divisor = 2 ** (len(channel_mult) - 1)

        widths = [base_channels * m for m in channel_mult]
        resolutions = [image_size // 2**level for level in range(len(widths))]
        embedding_channels = 4 * base_channels

        def block(channels_in: int, channels_out: int) -> ResidualBlock:
            return ResidualBlock(channels_in, channels_out, embedding_channels, dropout=dropout, norm_groups=norm_groups, norm_eps=norm_eps)

        def attention(channels: int) -> SelfAttention:
            heads = num_heads if head_channels is None else channels // head_channels
            return SelfAttention(channels, heads, norm_groups, norm_eps)

        self.time_embedding = TimeEmbedding(base_channels)
        # Row K is the null class: what `labels=None` means, and what label dropout trains.
        self.label_embedding = None if num_classes is None else nn.Embedding(num_classes + 1, embedding_channels)
        self.conv_in = Conv3x3(in_channels, base_channels)

        channels = base_channels
        skip_channels = [channels]
        down = []
        for level, width in enumerate(widths):
            blocks, attentions = [], []
            for _ in range(num_blocks):
                blocks.append(block(channels, width))
                channels = width
                if resolutions[level] in attention_resolutions:
                    attentions.append(attention(channels))
                skip_channels.append(channels)
            last = level == len(widths) - 1
            if not last:
                skip_channels.append(channels)
            down.append(DownLevel(blocks, attentions, None if last else Downsample(channels)))
        self.down = cast("Sequence[DownLevel]", nn.ModuleList(down))

        self.mid = Middle(block(channels, channels), attention(channels), block(channels, channels))

        # In order of execution: up[0] has the lowest resolution.
        up = []
        for level, width in reversed(list(enumerate(widths))):
            blocks, attentions = [], []
            for _ in range(num_blocks + 1):
                blocks.append(block(channels + skip_channels.pop(), width))
                channels = width
                if resolutions[level] in attention_resolutions:
                    attentions.append(attention(channels))
            up.append(UpLevel(blocks, attentions, Upsample(channels) if level > 0 else None))
        self.up = cast("Sequence[UpLevel]", nn.ModuleList(up))

        self.norm_out = GroupNormAct(norm_groups, channels, norm_eps)
        self.conv_out = Conv3x3(channels, out_channels * (2 if learned_variance else 1), init_scale=0.0)
        # With weights in the layout of the activations no convolution reorders them on each call.
        self.to(memory_format=torch.channels_last)

    @classmethod
    def from_preset(cls, name: Preset, **overrides: Any) -> UNet:
        """Build a network of the table in presets.py.

        Args:
            name: "cifar10", "photos32" or "digits".
            **overrides: arguments of `UNet` that replace those of the preset.

        Raises:
            ValueError: for an unknown name; TypeError and ValueError as `UNet`.
        """
        return cls(**{**PRESETS[checks.choice("preset", name, sorted(PRESETS))], **overrides})

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of this network, JSON-able: `UNet(**model.config)` has the same architecture."""
        return copy.deepcopy(self._config)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, *, dropout: Noise | None = None) -> Tensor:
        """Predict from x_t and t (the noise, or whatever the network was trained for).

        Args:
            x_t: (N, in_channels, H, W) of any floating dtype, NCHW or channels_last, with H and W divisible by 2**(levels - 1). The
                network computes in the dtype of its weights, or in autocast's, and in channels_last.
            t: (N,), int64 in {0, ..., T-1} or floating point, on the device of x_t.
            labels: (N,), int64 in {0, ..., K}, for a class-conditional model. K is the null class; None gives it to all samples.
                The values are not checked here: that would synchronise the device. (On CPU the lookup raises.)
            dropout: the Noise that the masks are made from in training. They are the same on any device and for any batch size;
                first_sample is the index of the batch's first sample, and all indices must be below 2^48. Replicas of the model
                that each have a part of the batch each need their own Noise. Without one the masks come from PyTorch's generator.

        Returns:
            (N, out_channels, H, W), twice the channels with `learned_variance`, in the dtype of x_t (under autocast in its own, but
            for float64), contiguous (NCHW) because the diffusion operators read it linearly.

        Raises:
            TypeError: for an argument that is not a tensor, or has a wrong dtype.
            ValueError: for a wrong shape, or labels given to a model without classes.
        """
        self._check_inputs(x_t, t, labels)
        dtype = self.conv_in.weight.dtype
        if x_t.dtype != dtype and not _autocast_unites(x_t, dtype):
            return self.forward(x_t.to(dtype), t, labels, dropout=dropout).to(x_t.dtype)
        if dropout is not None and checks.instance("dropout", dropout, Noise).first_sample + x_t.shape[0] > SAMPLES_A_BLOCK:
            raise ValueError(f"dropout must be a Noise whose samples are below 2^48, got {dropout} for {x_t.shape[0]} samples")
        masks = Masks(dropout)
        embedding = self.time_embedding(t)
        if self.label_embedding is not None:
            classes = self.label_embedding.weight[self.num_classes] if labels is None else self.label_embedding(labels)
            embedding = embedding + classes
        embedding = F.silu(embedding)

        # A one-channel image is in both layouts at once and the convolution would choose NCHW: hence after conv_in too.
        x = self.conv_in(channels_last(x_t))
        x = channels_last(x)
        skips = [x]
        for level in self.down:
            x = level(x, embedding, masks, skips)
        x = self.mid(x, embedding, masks)
        for level_up in self.up:
            x = level_up(x, embedding, masks, skips)
        return self.conv_out(self.norm_out(x)).contiguous()

    def cpu_plan(self, like: Tensor, samples: int, timesteps: Tensor, labels: Tensor | None) -> UNetPlan | None:
        """The network's pass as a list of kernel calls, for sampling on the CPU; None if it cannot be planned (`plan_obstacle`).

        Args:
            like: (N, C, H, W), a state: its shape, dtype and device.
            samples: number of samples in a pass: N, or 2N with guidance.
            timesteps: (S,) int64, the t of each row.
            labels: (samples,) int64 for a class-conditional model, or None.
        """
        if type(self) is not UNet or plan_obstacle(self, like):
            return None
        return UNetPlan(self, torch.Size((samples, *like.shape[1:])), timesteps, labels)

    def _check_inputs(self, x_t: Tensor, t: Tensor, labels: Tensor | None) -> None:
        if checks.tensor("x_t", x_t).dim() != 4 or x_t.shape[1] != self.in_channels:
            raise ValueError(f"x_t must have shape (N, {self.in_channels}, H, W), got {tuple(x_t.shape)}")
        if not x_t.is_floating_point():
            raise TypeError(f"x_t must have a floating-point dtype, got {x_t.dtype}")
        n, _, height, width = x_t.shape
        if height % self.size_divisor or width % self.size_divisor:
            raise ValueError(f"height and width of x_t must be divisible by {self.size_divisor}, got {height} x {width}")
        if checks.tensor("t", t).dtype != torch.int64 and not t.is_floating_point():
            raise TypeError(f"t must have dtype torch.int64 or a floating-point dtype, got {t.dtype}")
        if t.dim() != 1 or t.shape[0] != n:
            raise ValueError(f"t must have shape ({n},), got {tuple(t.shape)}")
        if labels is None:
            return
        if self.label_embedding is None:
            raise ValueError("labels must be None for a model without classes (num_classes=None)")
        if checks.tensor("labels", labels).dtype != torch.int64:
            raise TypeError(f"labels must have dtype torch.int64, got {labels.dtype}")
        if labels.dim() != 1 or labels.shape[0] != n:
            raise ValueError(f"labels must have shape ({n},), got {tuple(labels.shape)}")


def _autocast_unites(x: Tensor, dtype: torch.dtype) -> bool:
    """True where autocast, which leaves float64 alone, casts both x and weights of another dtype."""
    device = x.device.type
    return torch.float64 not in (x.dtype, dtype) and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


_OPTIONAL = "head_channels", "num_classes"
_INTEGERS = "in_channels", "out_channels", "base_channels", "num_blocks", "image_size", "num_heads", "norm_groups", *_OPTIONAL


def _check_config(config: dict[str, Any]) -> None:
    """Raise TypeError or ValueError unless the arguments describe a network. Numbers become Python's own, which JSON can hold."""
    for name in _INTEGERS:
        if config[name] is not None or name not in _OPTIONAL:
            config[name] = _positive_int(name, config[name])
    for name in ("channel_mult", "attention_resolutions"):  # lists, so that the dictionary is equal to itself after JSON
        if isinstance(config[name], (str, bytes)) or not hasattr(config[name], "__len__") or not getattr(config[name], "ndim", 1):
            raise TypeError(f"{name} must be a list of integers, got {type(config[name]).__name__}")
        config[name] = [_positive_int(f"each entry of {name}", value) for value in config[name]]
    for name in ("dropout", "norm_eps"):
        if isinstance(config[name], bool) or not isinstance(config[name], Real):
            raise TypeError(f"{name} must be a number, got {type(config[name]).__name__}")
        config[name] = float(config[name])
    (_, _, base_channels, channel_mult, _, attention_resolutions, image_size, num_heads, head_channels,
     dropout, _, learned_variance, norm_groups, norm_eps) = config.values()  # fmt: skip
    if not channel_mult:
        raise ValueError("channel_mult must have at least one level, got none")
    if not isinstance(learned_variance, bool):
        raise TypeError(f"learned_variance must be a bool, got {type(learned_variance).__name__}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if not (norm_eps > 0.0 and math.isfinite(norm_eps)):
        raise ValueError(f"norm_eps must be positive and finite, got {norm_eps}")

    if base_channels < 4 or base_channels % 2:
        raise ValueError(f"base_channels must be even and at least 4 (time embedding), got {base_channels}")
    divisor = 2 ** (len(channel_mult) - 1)
    if image_size % divisor:
        raise ValueError(f"image_size must be divisible by 2**(levels - 1) = {divisor}, got {image_size}")
    resolutions = [image_size // 2**level for level in range(len(channel_mult))]
    never = [r for r in attention_resolutions if r not in resolutions]
    if never:
        raise ValueError(f"attention_resolutions must be among {resolutions}, got {never}")
    # The skip connections concatenate these widths, so their sums are divisible as well.
    for width in (base_channels * m for m in (1, *channel_mult)):
        if width % norm_groups:
            raise ValueError(f"norm_groups must divide the channels of every level, got {norm_groups} and {width}")
    if head_channels is not None and num_heads != 1:
        raise ValueError(f"give num_heads or head_channels, not both: got {num_heads} and {head_channels}")
    name, divisor = ("num_heads", num_heads) if head_channels is None else ("head_channels", head_channels)
    for multiplier, resolution in zip(channel_mult, resolutions, strict=True):
        # The middle, as wide as the last level, has attention in any case.
        has_attention = resolution in attention_resolutions or resolution == resolutions[-1]
        width = base_channels * multiplier
        if has_attention and width % divisor:
            raise ValueError(f"{name} must divide the channels of every level with attention, got {divisor} and {width}")


def _positive_int(name: str, value: object) -> int:
    """Check a positive integer, which may be one of NumPy's."""
    try:
        found = operator.index(cast(SupportsIndex, None if isinstance(value, bool) else value))  # raises if it is not an integer
    except TypeError:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}") from None
    if found < 1:
        raise ValueError(f"{name} must be at least 1, got {found}")
    return found
