"""A trained model read back from its checkpoint."""
from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.models import UNet
from ddpm_fast.training.checkpoint import Checkpoint, CheckpointError, load_checkpoint, load_into, strip_prefix
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

    @property
    def fingerprint(self) -> str:
        """Of the weights."""
        return fingerprint(*self.model.state_dict().values())

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes in order of their numbers, which stand for names that the run did not have; None without classes."""
        count, names = self.model.num_classes, self.meta.get("classes")
        if count is None:
            return None
        return tuple(map(str, names if isinstance(names, list) and len(names) == count else range(count)))

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
    checkpoint, config = load_run(path)  # on the CPU: the optimiser's half of it is not wanted on the device
    meta = checkpoint.meta
    try:
        with torch.device("meta"):  # no random weights, which would move the global generator
            model = UNet(**meta["network"])
        model = model.to_empty(device=device)
        image_shape = tuple(meta["image_shape"])
        diffusion = config.make_diffusion(meta["levels"])
    except (TypeError, ValueError) as error:
        raise cannot_rebuild(checkpoint, error) from None
    part = "ema" if averaged else "model"
    load_into(model, strip_prefix(part, checkpoint.tensors), f"network ({part} weights of {checkpoint.path})")
    return TrainedModel(model.eval(), diffusion, config, image_shape, meta["step"], meta)


def load_run(path: str | os.PathLike) -> tuple[Checkpoint, TrainConfig]:
    """The checkpoint of a training run, on the CPU, and the run's configuration.

    Raises:
        CheckpointError: as `load_trained`.
    """
    checkpoint = load_checkpoint(path)
    absent = [name for name in _META if name not in checkpoint.meta]
    if absent:
        raise CheckpointError(f"{checkpoint.path} is a ddpm_fast checkpoint but not of a training run: it has no {', '.join(absent)}")
    try:
        return checkpoint, TrainConfig.from_dict(checkpoint.meta["train"])
    except (TypeError, ValueError) as error:
        raise cannot_rebuild(checkpoint, error) from None


def cannot_rebuild(checkpoint: Checkpoint, error: Exception) -> CheckpointError:
    return CheckpointError(f"{checkpoint.path} describes a run that this version cannot rebuild: {error}")


def fingerprint(*tensors: Tensor) -> str:
    """Of values, whatever file they came from: a run that was moved or copied is the same."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
