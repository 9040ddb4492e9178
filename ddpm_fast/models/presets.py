"""Named architectures: arguments of `UNet`."""

from __future__ import annotations

from typing import Any

from ddpm_fast.types import Preset

PRESETS: dict[Preset, dict[str, Any]] = {
    # The network of Ho et al. (2020) for CIFAR-10, argument by argument: 35,746,307 parameters.
    "cifar10": dict(
        in_channels=3,
        base_channels=128,
        channel_mult=(1, 2, 2, 2),
        num_blocks=2,
        attention_resolutions=(16,),
        image_size=32,
        num_heads=1,
        dropout=0.1,
        norm_groups=32,
        norm_eps=1e-6,
    ),
    # 2.7 million parameters, most of them at 8x8 where a convolution is cheap: a short training fits on a CPU.
    # No dropout, as a short training does not overfit. Eight groups keep at least four channels in each.
    "photos32": dict(
        in_channels=3,
        base_channels=32,
        channel_mult=(1, 2, 4),
        num_blocks=1,
        attention_resolutions=(8,),
        image_size=32,
        num_heads=1,
        dropout=0.0,
        norm_groups=8,
        norm_eps=1e-6,
    ),
    # 0.65 million parameters for 8x8 grey images, fast on two cores: widths in whole vector blocks of oneDNN, about
    # half of the arithmetic at 4x4. There two 3x3 convolutions see the whole image, so only the middle has attention.
    # Dropout as in the paper, because the set of digits is small enough to be learnt by heart.
    "digits": dict(
        in_channels=1,
        base_channels=32,
        channel_mult=(1, 2),
        num_blocks=1,
        attention_resolutions=(),
        image_size=8,
        num_heads=1,
        dropout=0.1,
        norm_groups=8,
        norm_eps=1e-6,
    ),
}
