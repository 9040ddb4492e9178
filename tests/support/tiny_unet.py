"""The smallest network with every kind of layer, and images for it."""

import torch

from ddpm_fast.models import UNet

# Two levels, attention at one of them, both kinds of shortcut: the smallest network with every kind of layer.
TINY = {
    "in_channels": 2,
    "base_channels": 8,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attention_resolutions": (4,),
    "image_size": 8,
    "norm_groups": 4,
}


def randomised(model, seed=0):
    """Move every parameter away from its initial value, the zero-initialised ones above all."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def tiny(dtype=torch.float32, **overrides):
    torch.manual_seed(0)
    return randomised(UNet(**{**TINY, **overrides})).to(dtype).eval()


def batch(n=3, dtype=torch.float32, size=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, size, size, generator=generator, dtype=dtype)
    return x, torch.tensor([0, 999, 500, 7, 1])[:n]
