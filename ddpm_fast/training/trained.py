"""A trained model read back from its checkpoint."""
from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.models import UNet
from ddpm_fast.training.checkpoint import CheckpointError, load_checkpoint, load_into, strip_prefix
from ddpm_fast.training.config import TrainConfig

_META = ("step", "network", "levels", "image_shape", "train")


@dataclass(frozen=True)
class TrainedModel:
    """A network with its averaged weights, in eval mode, and the diffusion that it was trained for."""

    model: UNet
    diffusion: GaussianDiffusion
    config: TrainConfig
    image_shape: tuple[int, int, int]
    step: int
    meta: dict[str, Any]
    checkpoint_id: str

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load_trained(path: str | os.PathLike, device: torch.device | str = "cpu", *, averaged: bool = True) -> TrainedModel:
    """Reads what `Trainer.save` wrote.

    Args:
        path: the run's folder, or its checkpoint file.
        averaged: the moving average of the weights, or the last ones.

    Raises:
        CheckpointError: for a file that is missing, foreign, damaged or of a later version.
    """
    checkpoint = load_checkpoint(path)  # on the CPU: the optimiser's half of it is not wanted on the device
    meta = checkpoint.meta
    absent = [name for name in _META if name not in meta]
    if absent:
        raise CheckpointError(f"{checkpoint.path} is a ddpm_fast checkpoint but not of a training run: it has no {', '.join(absent)}")
    try:
        config = TrainConfig.from_dict(meta["train"])
        with torch.device("meta"):  # no random weights, which would move the global generator
            model = UNet(**meta["network"])
        model = model.to_empty(device=device)
        image_shape = tuple(meta["image_shape"])
        diffusion = config.make_diffusion(meta["levels"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path} describes a run that this version cannot rebuild: {error}") from None
    part = "ema" if averaged else "model"
    load_into(model, strip_prefix(part, checkpoint.tensors), f"network ({part} weights of {checkpoint.path})")
    return TrainedModel(model.eval(), diffusion, config, image_shape, meta["step"], meta, checkpoint.id)
