"""A trained model read back from its checkpoint."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.data.images import BUILT_IN, DataError, ImageData, load_data
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.models import UNet
from ddpm_fast.training.checkpoint import Checkpoint, CheckpointError, check_fits, load_checkpoint, load_into, strip_prefix
from ddpm_fast.training.config import TrainConfig

_META = ("step", "network", "levels", "image_shape", "train", "images", "fingerprints")


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
        """Hash of the model's weights."""
        return fingerprint(*self.model.state_dict().values())

    @property
    def settings(self) -> dict[str, Any]:
        """Everything of the model and its chain that results depend on, as JSON values.

        An unfinished computation may be continued only where all of them are the same.
        """
        diffusion = self.diffusion
        return dict(
            checkpoint=self.fingerprint, network=self.model.config, betas=fingerprint(diffusion.schedule.betas),
            prediction=diffusion.prediction, variance=diffusion.variance, levels=diffusion.levels, cdf=diffusion.cdf,
        )  # fmt: skip

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes in order of their numbers; the numbers themselves if the run had no names, None if it had no classes."""
        count, names = self.model.num_classes, self.meta.get("classes")
        if count is None:
            return None
        return tuple(map(str, names if isinstance(names, list) and len(names) == count else range(count)))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load_trained(path: str | os.PathLike[str], device: torch.device | str = "cpu", *, averaged: bool = True) -> TrainedModel:
    """Reads a trained model from the checkpoint that `Trainer.save` wrote.

    Args:
        path: the run's folder, or its checkpoint file.
        device: where the model goes.
        averaged: take the moving average of the weights; else the last weights.

    Returns:
        :class:`TrainedModel`, in eval mode.

    Raises:
        CheckpointError: for a file that is missing, foreign, damaged or of a later version.
    """
    checkpoint, config = load_run(path)
    meta = checkpoint.meta
    model = rebuilt(checkpoint).to_empty(device=device)
    try:
        diffusion = config.make_diffusion(meta["levels"])
    except (TypeError, ValueError) as error:
        raise cannot_rebuild(checkpoint, error) from None
    part = "ema" if averaged else "model"
    load_into(model, strip_prefix(part, checkpoint.tensors), _weights(part, checkpoint))
    return TrainedModel(model.eval(), diffusion, config, tuple(meta["image_shape"]), meta["step"], meta)


def load_run(path: str | os.PathLike[str]) -> tuple[Checkpoint, TrainConfig]:
    """Reads the checkpoint of a training run, onto the CPU, and the run's configuration.

    Raises:
        CheckpointError: as `load_trained`.
    """
    checkpoint = load_checkpoint(path)
    absent = [name for name in _META if name not in checkpoint.meta]
    if absent:
        raise CheckpointError(f"{checkpoint.path} is a ddpm_fast checkpoint but not of a training run: it has no {', '.join(absent)}")
    try:
        _check_meta(checkpoint.meta)
        return checkpoint, TrainConfig.from_dict(checkpoint.meta["train"])
    except (TypeError, ValueError) as error:
        raise cannot_rebuild(checkpoint, error) from None


def rebuilt(checkpoint: Checkpoint) -> UNet:
    """Builds the network of a training run on the meta device, and compares it with the weights in the file.

    No memory is taken for weights that the file does not have.

    Raises:
        CheckpointError: the file does not describe a network, or describes another one than its weights are of.
    """
    arguments, weights = checkpoint.meta["network"], strip_prefix("model", checkpoint.tensors)
    try:
        if (blocks := len(arguments["channel_mult"]) * arguments["num_blocks"]) > len(weights):  # building them could take hours
            raise ValueError(f"its network has {blocks} blocks, but {len(weights)} weights")
        with torch.device("meta"):  # no random weights, which would move the global generator
            model = UNet(**arguments)
        channels, *sides = checkpoint.meta["image_shape"]
        if channels != model.in_channels or any(side % model.size_divisor for side in sides):
            raise ValueError(f"its network does not take images of shape {checkpoint.meta['image_shape']}")
    except Exception as error:  # the values may be anything, and so is what they raise
        raise cannot_rebuild(checkpoint, error) from None
    for part in ("model", "ema"):
        check_fits(model, strip_prefix(part, checkpoint.tensors), _weights(part, checkpoint))
    return model


def _weights(part: str, checkpoint: Checkpoint) -> str:
    return f"network ({part} weights of {checkpoint.path})"


def _check_meta(meta: dict[str, Any]) -> None:
    step, levels, shape, images, prints = (meta[name] for name in ("step", "levels", "image_shape", "images", "fingerprints"))
    if type(step) is not int or step < 0:
        raise ValueError(f"step must be an integer from 0, got {step!r}")
    if type(levels) is not int or not 2 <= levels <= 256:
        raise ValueError(f"levels must be in 2..256, got {levels!r}")
    if type(shape) is not list or len(shape) != 3 or not all(type(size) is int and 1 <= size < 2**16 for size in shape):
        raise ValueError(f"image_shape must be three sizes, got {shape!r}")
    if type(images) is not int or type(prints) is not dict or prints.keys() != {"train", "test"}:
        raise ValueError(f"images and fingerprints must be a number and two hashes, got {images!r} and {prints!r}")


def cannot_rebuild(checkpoint: Checkpoint, error: Exception) -> CheckpointError:
    return CheckpointError(f"{checkpoint.path} describes a run that this version cannot rebuild: {error}")


def load_run_data(config: TrainConfig) -> ImageData:
    """Loads the images that a run was trained on.

    Raises:
        DataError: as `load_data`, and if the images are no longer in their place.
    """
    if config.data not in BUILT_IN and not os.path.exists(config.data):
        raise DataError(
            f"the run's images are no longer in {config.data}; if they have moved, say where to (data, on the command line --data)"
        )
    return load_data(config.data, **config.data_options)


def fingerprint(*tensors: Tensor) -> str:
    """Hash of tensors' values. It does not depend on files, so a run that was moved or copied keeps its fingerprint."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().reshape(-1).numpy().data)
    return digest.hexdigest()[:16]
