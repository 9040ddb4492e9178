"""The names that arguments take, as types: a type checker refuses a misspelt one.

Each list of names is written here and nowhere else. The checks at run time read it from here.

Example:
    >>> from typing import get_args
    >>> get_args(SamplerName)
    ('ddpm', 'ddim', 'dpmpp_2m')
"""

from __future__ import annotations

from typing import Literal, TypeAlias

Prediction: TypeAlias = Literal["epsilon", "x_start", "v", "mean"]
Variance: TypeAlias = Literal["fixed_small", "fixed_large", "learned", "learned_range"]
Cdf: TypeAlias = Literal["tanh", "erf"]
ScheduleName: TypeAlias = Literal["linear", "cosine", "quadratic", "constant", "jsd", "sigmoid"]
Loss: TypeAlias = Literal["simple", "vlb", "hybrid"]
Weight: TypeAlias = Literal["uniform", "min_snr", "p2", "vlb"]

SamplerName: TypeAlias = Literal["ddpm", "ddim", "dpmpp_2m"]
Spacing: TypeAlias = Literal["even", "quadratic", "logsnr"]

Preset: TypeAlias = Literal["cifar10", "photos32", "digits"]
TimestepSampler: TypeAlias = Literal["uniform", "stratified", "loss_aware"]
Precision: TypeAlias = Literal["fp32", "bf16"]
Decay: TypeAlias = Literal["constant", "cosine"]
Split: TypeAlias = Literal["train", "test"]

Backend: TypeAlias = Literal["reference", "cpu", "triton", "cuda"]
# Of the ops in ddpm_fast.ops.
VarianceKind: TypeAlias = Literal["fixed", "learned", "learned_range"]
Reduction: TypeAlias = Literal["mean_per_sample"]
Activation: TypeAlias = Literal["silu"]
