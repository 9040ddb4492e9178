"""The levels of the UNet, which are the blocks at one resolution each, and the noise of the dropouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ddpm_fast.models.layers import Downsample, ResidualBlock, SelfAttention, Upsample
from ddpm_fast.noise import Noise

SAMPLES_A_BLOCK = 2**48  # how far apart the dropouts of two blocks take their masks from


class Masks:
    """The noise of each residual block's dropout, in order of execution: block k has the samples from first_sample + 2^48 k on."""

    def __init__(self, noise: Noise | None) -> None:
        self.noise = noise
        self.used = 0

    def next(self) -> Noise | None:
        if self.noise is None:
            return None
        self.used += 1
        return self.noise.at(first_sample=self.noise.first_sample + (self.used - 1) * SAMPLES_A_BLOCK)


class Level(nn.Module):
    """The blocks of one resolution on the way down or up, then the change of resolution, if there is one."""

    def __init__(self, blocks: Sequence[ResidualBlock], attentions: Sequence[SelfAttention]) -> None:
        super().__init__()
        # Type checkers do not know which modules a ModuleList holds.
        self.blocks = cast("Sequence[ResidualBlock]", nn.ModuleList(blocks))
        self.attentions = cast("Sequence[SelfAttention]", nn.ModuleList(attentions))

    def step(self, index: int, x: Tensor, embedding: Tensor, masks: Masks) -> Tensor:
        """One residual block and, where this level has attention, the attention after it."""
        x = self.blocks[index](x, embedding, masks.next())
        return self.attentions[index](x) if len(self.attentions) else x


class DownLevel(Level):
    def __init__(self, blocks: Sequence[ResidualBlock], attentions: Sequence[SelfAttention], downsample: Downsample | None) -> None:
        super().__init__(blocks, attentions)
        self.downsample = downsample

    def forward(self, x: Tensor, embedding: Tensor, masks: Masks, skips: list[Tensor]) -> Tensor:
        """Appends each output, the downsampled one too, to `skips`."""
        for index in range(len(self.blocks)):
            x = self.step(index, x, embedding, masks)
            skips.append(x)
        if self.downsample is not None:
            x = self.downsample(x)
            skips.append(x)
        return x


class UpLevel(Level):
    def __init__(self, blocks: Sequence[ResidualBlock], attentions: Sequence[SelfAttention], upsample: Upsample | None) -> None:
        super().__init__(blocks, attentions)
        self.upsample = upsample

    def forward(self, x: Tensor, embedding: Tensor, masks: Masks, skips: list[Tensor]) -> Tensor:
        """Takes one entry from the end of `skips` for each block."""
        for index in range(len(self.blocks)):
            x = self.step(index, torch.cat([x, skips.pop()], dim=1), embedding, masks)
        return x if self.upsample is None else self.upsample(x)


class Middle(nn.Module):
    def __init__(self, block1: ResidualBlock, attention: SelfAttention, block2: ResidualBlock) -> None:
        super().__init__()
        self.block1 = block1
        self.attention = attention
        self.block2 = block2

    def forward(self, x: Tensor, embedding: Tensor, masks: Masks) -> Tensor:
        x = self.attention(self.block1(x, embedding, masks.next()))
        return self.block2(x, embedding, masks.next())
