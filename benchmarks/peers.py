"""Other people's code for the same step, called as their users call it."""

from __future__ import annotations

import importlib.util
import re
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DModel

    from ddpm_fast import UNet

# Names of our UNet's parameters to those of UNet2DModel; in this order, each on what the ones before have made of the name.
UNET_NAMES = [
    (r"^time_embedding\.linear(\d)", r"time_embedding.linear_\1"),
    (r"^(down|up)\.(\d+)\.", r"\1_blocks.\2."),
    (r"\.blocks\.", ".resnets."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"^mid\.attention\.", "mid_block.attentions.0."),
    (r"^mid\.block1\.", "mid_block.resnets.0."),
    (r"^mid\.block2\.", "mid_block.resnets.1."),
    (r"\.time_projection\.", ".time_emb_proj."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"\.proj_out\.", ".to_out.0."),
    (r"^norm_out\.", "conv_norm_out."),
]


def missing(package: str) -> str:
    """Why a peer cannot be measured here; empty where it can."""
    return "" if importlib.util.find_spec(package) else f"{package} is not installed (pip install ddpm_fast[bench])"


def diffusers_scheduler(betas: Tensor, variance_type: str = "fixed_small") -> DDPMScheduler:
    """diffusers' DDPMScheduler on a schedule, with all of its steps; `add_noise` noises, `step` is the reverse step."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(num_train_timesteps=len(betas), trained_betas=betas.tolist(), variance_type=variance_type, clip_sample=True)
    scheduler.set_timesteps(len(betas))
    return scheduler


def diffusers_unet(model: UNet) -> UNet2DModel:
    """diffusers' UNet2DModel of the same architecture with the same weights.

    Raises:
        ValueError: for what UNet2DModel does not have in this form: several heads, classes.
    """
    from diffusers import UNet2DModel

    config = model.config
    if config["num_heads"] != 1 or config["head_channels"] or config["num_classes"]:
        raise ValueError(f"expected a model with one head and no classes, got {config}")
    levels = len(config["channel_mult"])
    attends = [config["image_size"] // 2**level in config["attention_resolutions"] for level in range(levels)]
    found = UNet2DModel(
        sample_size=config["image_size"],
        in_channels=config["in_channels"],
        out_channels=config["out_channels"] * (2 if config["learned_variance"] else 1),
        freq_shift=1,  # the divisor of the sinusoids is half - 1
        flip_sin_to_cos=False,
        down_block_types=tuple("AttnDownBlock2D" if attention else "DownBlock2D" for attention in attends),
        up_block_types=tuple("AttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(attends)),
        block_out_channels=tuple(config["base_channels"] * m for m in config["channel_mult"]),
        layers_per_block=config["num_blocks"],
        downsample_padding=0,  # and then it pads below and to the right
        dropout=config["dropout"],
        attention_head_dim=None,  # one head of all channels
        norm_num_groups=config["norm_groups"],
        norm_eps=config["norm_eps"],
    )
    found.load_state_dict(diffusers_unet_weights(model.state_dict()))  # strict: every name is there, and no other
    return found.train(model.training)


def diffusers_unet_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our UNet's state under the names and in the shapes of UNet2DModel's; qkv, packed in a 1x1 convolution, becomes three linear maps."""
    found = {}
    for name, value in state.items():
        for pattern, replacement in UNET_NAMES:
            name = re.sub(pattern, replacement, name)
        if ".qkv." in name:
            for part, piece in zip("qkv", value.chunk(3)):  # channels are ordered (3, heads, head channels)
                found[name.replace(".qkv.", f".to_{part}.")] = piece.flatten(1) if piece.ndim == 4 else piece
        else:
            found[name] = value.flatten(1) if ".to_out." in name and value.ndim == 4 else value
    return found
