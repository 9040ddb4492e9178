"""ddpm_fast: denoising diffusion probabilistic models that are fast to train, to sample and to evaluate."""
from ddpm_fast import autotune, ops
from ddpm_fast._version import __version__
from ddpm_fast.diffusion import BoundTerms, GaussianDiffusion, PMeanVariance
from ddpm_fast.diffusion.schedules import NoiseSchedule
from ddpm_fast.models import EMA, UNet
from ddpm_fast.noise import Noise
from ddpm_fast.ops import attention, gaussian_kl, group_norm
from ddpm_fast.sampling import Sampler, sample

__all__ = [
    "EMA",
    "BoundTerms",
    "GaussianDiffusion",
    "Noise",
    "NoiseSchedule",
    "PMeanVariance",
    "Sampler",
    "UNet",
    "__version__",
    "attention",
    "autotune",
    "gaussian_kl",
    "group_norm",
    "ops",
    "sample",
]
