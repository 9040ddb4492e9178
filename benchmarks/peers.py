"""Other people's code for the same step, called as their users call it."""
from __future__ import annotations

import importlib.util
from collections.abc import Callable

from torch import Tensor


def missing(package: str) -> str:
    """Why a peer cannot be measured here; empty where it can."""
    return "" if importlib.util.find_spec(package) else f"{package} is not installed (pip install ddpm_fast[bench])"


def diffusers_add_noise(betas: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """diffusers' DDPMScheduler.add_noise(x_start, noise, t) on a schedule."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(num_train_timesteps=len(betas), trained_betas=betas.tolist()).add_noise
