"""ddpm_fast: denoising diffusion probabilistic models that are fast to train, to sample and to evaluate."""
from importlib.metadata import PackageNotFoundError, version

from ddpm_fast import autotune, ops
from ddpm_fast.diffusion import BoundTerms, GaussianDiffusion, PMeanVariance
from ddpm_fast.models import EMA, UNet
from ddpm_fast.noise import Noise
from ddpm_fast.ops import attention, gaussian_kl, group_norm
from ddpm_fast.sampling import Sampler, sample
from ddpm_fast.schedules import NoiseSchedule

try:
    __version__ = version("ddpm_fast")
except PackageNotFoundError:  # used from a source tree that was not installed
    __version__ = "0+unknown"

__all__ = [
    "EMA",
    "BoundTerms",
    "GaussianDiffusion",
    "Noise",
    "NoiseSchedule",
    "PMeanVariance",
    "Sampler",
    "UNet",
    "attention",
    "autotune",
    "gaussian_kl",
    "group_norm",
    "ops",
    "sample",
]
