"""Other people's code for the same step, called as their users call it."""
from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from diffusers import DDPMScheduler


def missing(package: str) -> str:
    """Why a peer cannot be measured here; empty where it can."""
    return "" if importlib.util.find_spec(package) else f"{package} is not installed (pip install ddpm_fast[bench])"


def diffusers_scheduler(betas: Tensor, variance_type: str = "fixed_small") -> DDPMScheduler:
    """diffusers' DDPMScheduler on a schedule, with all of its steps; `add_noise` noises, `step` is the reverse step."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(num_train_timesteps=len(betas), trained_betas=betas.tolist(), variance_type=variance_type, clip_sample=True)
    scheduler.set_timesteps(len(betas))
    return scheduler
