"""Networks for diffusion models, made of the package's ops, and the moving average of their weights."""

from ddpm_fast.models.ema import EMA
from ddpm_fast.models.presets import PRESETS
from ddpm_fast.models.unet import UNet

__all__ = ["EMA", "PRESETS", "UNet"]
