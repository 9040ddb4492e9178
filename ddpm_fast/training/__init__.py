"""Training: data, the loop, checkpoints."""

from ddpm_fast.data.images import ImageData, load_data
from ddpm_fast.training.config import TrainConfig
from ddpm_fast.training.trained import TrainedModel, load_trained
from ddpm_fast.training.trainer import Trainer

__all__ = ["ImageData", "TrainConfig", "TrainedModel", "Trainer", "load_data", "load_trained"]
