"""ddpm_fast: denoising diffusion probabilistic models that are fast to train, to sample and to evaluate."""

import importlib
from typing import TYPE_CHECKING, Any

from ddpm_fast import autotune, backends, ops, types
from ddpm_fast._version import __version__
from ddpm_fast.diffusion import BoundTerms, GaussianDiffusion, PMeanVariance
from ddpm_fast.diffusion.schedules import NoiseSchedule
from ddpm_fast.models import EMA, UNet
from ddpm_fast.noise import Noise
from ddpm_fast.ops import attention, gaussian_kl, group_norm
from ddpm_fast.sampling import Sampler, sample

if TYPE_CHECKING:
    from ddpm_fast import data, evaluation, training

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
    "backends",
    "data",
    "evaluation",
    "gaussian_kl",
    "group_norm",
    "ops",
    "sample",
    "training",
    "types",
]
_LATER = ("data", "evaluation", "training")  # imported when they are first asked for: they bring Pillow, matplotlib and more


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return importlib.import_module(f"{__name__}.{name}")  # which sets the attribute: this is asked once
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
