"""Noise that is generated where it is needed: the contract and its key in noise.py, its reference in philox.py."""

from ddpm_fast.noise.noise import (
    FOLD_AUGMENT,
    FOLD_DROPOUT,
    FOLD_EVAL_NOISE,
    FOLD_EVAL_TIMESTEPS,
    FOLD_LABELS,
    FOLD_SAMPLE_KNOWN,
    FOLD_SAMPLE_START,
    FOLD_SAMPLE_STEPS,
    FOLD_TRAIN_NOISE,
    FOLD_TRAIN_TIMESTEPS,
    Noise,
)
from ddpm_fast.noise.philox import MAX_ELEMENTS_PER_SAMPLE

__all__ = [
    "FOLD_AUGMENT",
    "FOLD_DROPOUT",
    "FOLD_EVAL_NOISE",
    "FOLD_EVAL_TIMESTEPS",
    "FOLD_LABELS",
    "FOLD_SAMPLE_KNOWN",
    "FOLD_SAMPLE_START",
    "FOLD_SAMPLE_STEPS",
    "FOLD_TRAIN_NOISE",
    "FOLD_TRAIN_TIMESTEPS",
    "MAX_ELEMENTS_PER_SAMPLE",
    "Noise",
]
