"""A training that takes a moment: its data and configuration, and its checkpoint with something changed."""

import torch

from ddpm_fast.data.images import ImageData
from ddpm_fast.training import TrainConfig
from ddpm_fast.training.checkpoint import load_checkpoint, save_checkpoint

TINY = dict(
    preset="digits",
    network=dict(base_channels=8, channel_mult=[1], norm_groups=4),
    timesteps=20,
    batch=8,
    steps=4,
    warmup=2,
    learning_rate=1e-3,
    flip=False,
)


def images(n=24, channels=1, size=8, levels=17, classes=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, levels, (n, channels, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.arange(n) % classes
    return ImageData("tiny", x, x[:6], levels, labels, labels[:6])


def config(**changes):
    return TrainConfig(**{**TINY, **changes})


def rewrite(run, out, change):
    """Into another folder, the checkpoint of a run with something in it changed: change(tensors, meta)."""
    checkpoint = load_checkpoint(run)
    change(checkpoint.tensors, checkpoint.meta)
    save_checkpoint(out, checkpoint.tensors, checkpoint.meta)
