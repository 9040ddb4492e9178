"""Networks for diffusion models and the moving average of their weights; depends on PyTorch alone."""

from .ema import EMA
from .presets import PRESETS
from .unet import UNet

__all__ = ["EMA", "PRESETS", "UNet"]
