"""The configuration of a training run: one flat record, which the command line fills and the checkpoint stores."""

from __future__ import annotations

import dataclasses
import json
import numbers
import operator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from ddpm_fast.data.images import ImageData
from ddpm_fast.diffusion.gaussian import LOSSES, GaussianDiffusion
from ddpm_fast.diffusion.parameterisation import WEIGHTS
from ddpm_fast.diffusion.schedules import NoiseSchedule
from ddpm_fast.models import PRESETS, UNet
from ddpm_fast.training.timestep_samplers import TIMESTEP_SAMPLERS
from ddpm_fast.types import Decay, Loss, Precision, Prediction, Preset, ScheduleName, TimestepSampler, Variance, Weight

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
DECAYS: tuple[Decay, ...] = get_args(Decay)
WARMUP_SHARE = 8  # a recipe's warm-up takes at most one part in so many of a run
# Far beyond any use (but for the seed, which has 64 bits). A larger number is a slip or a damaged file, and would fill the memory with
# tables or take hours to count through.
_MOST = {"timesteps": 1_000_000, "batch": 1_000_000, "seed": 2**64 - 1}


def autocast(device: torch.device, precision: str, name: str = "precision") -> torch.autocast:
    """Context in which a network on a device computes in a precision: "fp32" as it is, "bf16" by autocast.

    Raises:
        ValueError: for another precision, which is called ``name`` there.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"{name} must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@dataclass(frozen=True)
class TrainConfig:
    """A training run. The defaults are those of Ho et al. 2020 for CIFAR-10.

    Attributes:
        data: "digits", "photos", a folder of images, or a .npy or .npz file.
        image_size: side, or (height, width), to crop and resize a folder's images to, or None.
        levels: grey levels of a folder or file, or None for what the data have.
        value_range: (low, high), the values in a folder or file that are black and white, or None for what their type spans.
        preset: network, a name of :data:`ddpm_fast.models.PRESETS`; ``network`` overrides its arguments.
        schedule, timesteps, schedule_options: of :meth:`NoiseSchedule.from_name`.
        prediction, variance: of :class:`GaussianDiffusion`.
        loss, weight: of :meth:`GaussianDiffusion.loss`.
        steps, batch: optimiser steps, and images in each.
        learning_rate, adam_beta2, warmup, decay: Adam's; linear warm-up over ``warmup`` steps, then "constant" or "cosine" to 0.
        clip_norm: largest global norm of the gradient.
        ema: decay of the moving average of the weights.
        flip: mirror each image with probability ½.
        class_conditional, label_dropout: give the network the labels, but drop them with this probability.
        timestep_sampler: how t are drawn: "uniform" (independently), "stratified" (each batch's spread evenly over 0..T-1) or
            "loss_aware" (more often where the loss, whichever it is, has been large; weighted so that it estimates the same).
        seed: of everything random in the run.
        precision: "fp32", or "bf16" for autocast.
        device: "auto" (CUDA where there is one), "cpu" or "cuda[:i]".
    """

    data: str = "digits"
    image_size: int | tuple[int, int] | None = None
    levels: int | None = None
    value_range: tuple[float, float] | None = None
    preset: Preset = "cifar10"
    network: dict[str, Any] = field(default_factory=dict)
    schedule: ScheduleName = "linear"
    timesteps: int = 1000
    schedule_options: dict[str, float] = field(default_factory=dict)
    prediction: Prediction = "epsilon"
    variance: Variance = "fixed_large"
    loss: Loss = "simple"
    weight: Weight = "uniform"
    steps: int = 800_000
    batch: int = 128
    learning_rate: float = 2e-4
    adam_beta2: float = 0.999
    warmup: int = 5000
    decay: Decay = "constant"
    clip_norm: float = 1.0
    ema: float = 0.9999
    flip: bool = True
    class_conditional: bool = False
    label_dropout: float = 0.1
    timestep_sampler: TimestepSampler = "uniform"
    seed: int = 0
    precision: Precision = "fp32"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            object.__setattr__(self, name, _typed(name, getattr(self, name), hint))
        for name in ("network", "schedule_options"):
            try:
                json.dumps(getattr(self, name))
            except (TypeError, ValueError) as error:  # else the first checkpoint would fail
                raise TypeError(f"{name} must hold JSON values: {error}") from None
        for name, most in _MOST.items():
            if getattr(self, name) > most:
                raise ValueError(f"{name} must be at most {most}, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1), got {self.ema}")
        for name, low in (("steps", 1), ("batch", 1), ("timesteps", 1), ("warmup", 0), ("seed", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if self.loss == "vlb" and self.weight != "uniform":
            raise ValueError(f"weight is of the simple loss and has no part in loss 'vlb', got {self.weight!r}")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.adam_beta2 < 1:
            raise ValueError(f"adam_beta2 must lie in [0, 1), got {self.adam_beta2}")
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"label_dropout must lie in [0, 1], got {self.label_dropout}")
        for name, allowed in (
            ("loss", LOSSES), ("weight", WEIGHTS), ("timestep_sampler", tuple(TIMESTEP_SAMPLERS)),
            ("precision", PRECISIONS), ("decay", DECAYS), ("preset", tuple(PRESETS)),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    @classmethod
    def for_data(cls, data: str, **overrides: Any) -> TrainConfig:
        """Makes the configuration of a run: the recipe for a data set, with some entries replaced.

        Some entries follow from others, unless they are given:

        - ``warmup`` takes at most an eighth of ``steps``: a recipe's warm-up is for a run of the recipe's length, and a shorter run would
          never reach the learning rate. ``ema`` needs no such rule: :class:`~ddpm_fast.EMA` never looks back over more than about a
          ninth of the steps so far.
        - With loss "vlb", t are drawn by "loss_aware", as published, and ``weight``, which belongs to the simple loss, is "uniform".
        - With a ``variance``, the loss is one that can train it: "hybrid" for a learned variance, else "simple".
        - With a ``schedule``, its options are that schedule's defaults. With ``timesteps``, the betas of a linear schedule are scaled so
          that the chain destroys as much of the data as the recipe's.

        Args:
            data: "digits", "photos", a folder of images, or a .npy or .npz file. The first two have recipes; other data get the defaults
                of the class.
            overrides: entries to replace, by name. None counts as not given.

        Raises:
            TypeError, ValueError: an entry that does not exist, has a wrong type or value, or does not fit the others.
        """
        recipe = RECIPES.get(data, {})
        given = {name: value for name, value in overrides.items() if value is not None}
        if "variance" in given and "loss" not in given:
            recipe = {**recipe, "loss": "hybrid" if str(given["variance"]).startswith("learned") else "simple"}
        if "schedule" in given:
            recipe = {**recipe, "schedule_options": {}}
        if given.get("loss") == "vlb":
            recipe = {**recipe, "weight": "uniform", "timestep_sampler": "loss_aware"}
        config = cls(**{**recipe, "data": data, **given})
        if "warmup" not in given:
            config = dataclasses.replace(config, warmup=min(config.warmup, config.steps // WARMUP_SHARE))
        if config.schedule == "linear" and "timesteps" in given and "schedule_options" not in given:
            # A chain of another length destroys as much as the recipe's: the betas scale with 1/T.
            T, options = (recipe.get("timesteps", 1000), recipe.get("schedule_options", {})) if "schedule" not in given else (1000, {})
            start, end = options.get("beta_start", 1e-4) * T, options.get("beta_end", 0.02) * T
            if end >= config.timesteps:
                raise ValueError(
                    f"timesteps must be more than {end:.4g} for schedule 'linear', whose last beta is {end:.4g} / timesteps, "
                    f"got {config.timesteps}; schedule 'cosine' takes fewer"
                )
            config = dataclasses.replace(
                config, schedule_options=dict(beta_start=start / config.timesteps, beta_end=end / config.timesteps)
            )
        return config

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of ``dataclasses.asdict``; entries of a later version are refused."""
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"the training configuration has entries that this version does not know: {', '.join(unknown)}")
        arguments: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**arguments)  # JSON has no tuples

    def continued(self, **changes: Any) -> TrainConfig:
        """Makes the configuration with which a run goes on. ``steps`` and ``device`` may change, everything else must stay.

        Args:
            changes: entries to replace; None counts as not given. ``network`` may hold only some of its arguments.

        Raises:
            ValueError: for any other change, and for another number of steps where the learning rate decays over them.
        """
        own = {**dataclasses.asdict(self), **{f"network {name}": value for name, value in {**PRESETS[self.preset], **self.network}.items()}}
        given = {name: value for name, value in changes.items() if value is not None}
        given |= {f"network {name}": value for name, value in given.pop("network", {}).items()}
        other = [name for name, value in given.items() if name not in ("steps", "device") and value != own.get(name)]
        if other:
            what = ", ".join(
                f"{name} must be {'left out' if own.get(name) is None else repr(own[name])}, got {given[name]!r}" for name in other
            )
            raise ValueError(f"a run goes on as it began: {what}")
        if self.decay != "constant" and given.get("steps", self.steps) != self.steps:
            raise ValueError(
                f"steps must be {self.steps}, got {given['steps']}: the learning rate follows a {self.decay} to zero at "
                f"step {self.steps}; train afresh for another number"
            )
        return dataclasses.replace(self, **{name: given[name] for name in ("steps", "device") if name in given})

    @property
    def data_options(self) -> dict[str, Any]:
        """Arguments of `load_data`, without the source."""
        return dict(image_size=self.image_size, levels=self.levels, value_range=self.value_range)

    def make_diffusion(self, levels: int) -> GaussianDiffusion:
        schedule = NoiseSchedule.from_name(self.schedule, self.timesteps, **self.schedule_options)
        return GaussianDiffusion(schedule, self.prediction, self.variance, levels)

    def make_network(self, data: ImageData) -> UNet:
        """Builds the preset's network for the data's channels and image size, and for the variance. Its weights are random."""
        return UNet(**self.network_arguments(data))

    def network_arguments(self, data: ImageData) -> dict[str, Any]:
        """Arguments of the UNet that :meth:`make_network` builds.

        Raises:
            ValueError: the preset does not fit the size of the images, or the network wants labels that the data do not have.
        """
        channels, height, width = data.image_shape
        preset = PRESETS[self.preset]
        # Attention stays at the level, not at the resolution, that the preset has it at.
        levels = [preset["image_size"] // r for r in preset["attention_resolutions"]]
        arguments = {
            **preset,
            "in_channels": channels,
            "image_size": height,
            "attention_resolutions": [height // level for level in levels],
        }
        arguments.update(self.network)
        divisor = 2 ** (len(arguments["channel_mult"]) - 1)
        if height % divisor or width % divisor:
            raise ValueError(
                f"preset {self.preset!r} halves images {len(arguments['channel_mult']) - 1} times and needs sides divisible by {divisor}, "
                f"got {height}x{width}; crop or resize them (image_size does it for a folder), or choose a preset that halves less often"
            )
        if self.class_conditional and data.num_classes is None:
            why = f": {data.origin.unlabelled}" if data.origin.unlabelled else ""
            raise ValueError(f"class_conditional needs labels, and {data.name} has none{why}")
        arguments["learned_variance"] = self.variance in ("learned", "learned_range")
        arguments["num_classes"] = data.num_classes if self.class_conditional else None
        return arguments


def _typed(name: str, value: Any, hint: Any) -> Any:
    """Checks a value against its annotation. NumPy's numbers become Python's, which JSON can hold.

    Raises:
        TypeError: what was expected and what came.
    """
    kinds = (dict,) if get_origin(hint) is dict else (str,) if get_origin(hint) is Literal else get_args(hint)
    kinds = tuple(get_origin(kind) or kind for kind in kinds or (hint,))  # tuple, for tuple[int, int]
    if isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds):
        return value
    if not isinstance(value, bool):
        if int in kinds and hasattr(value, "__index__"):
            return operator.index(value)
        if float in kinds and isinstance(value, numbers.Real):
            return float(value)
    raise TypeError(f"{name} must be {' or '.join('None' if kind is type(None) else kind.__name__ for kind in kinds)}, got {value!r}")


# What the two built-in data sets are trained with unless told otherwise; other data get the class's defaults.
RECIPES: dict[str, dict[str, Any]] = {
    # A first step of 0.055 standard deviations: below that the 17 levels, 0.125 apart, are told apart by rounding, which the
    # decoder does and a network learns badly (Ho's schedule, from 0.01, costs one bit a dimension). P2 favours what samples
    # need over the bound, which the variance's share of the hybrid loss still looks after. Too short to overfit: no dropout.
    "digits": dict(
        preset="digits", network=dict(dropout=0.0), timesteps=150, schedule_options=dict(beta_start=3e-3, beta_end=0.13),
        variance="learned_range", loss="hybrid", weight="p2", steps=400, batch=64, learning_rate=3e-3, adam_beta2=0.99, warmup=50,
        decay="cosine", ema=0.98, flip=False, timestep_sampler="stratified",
    ),
    "photos": dict(preset="photos32", steps=20_000, batch=32, warmup=500, ema=0.999),
}  # fmt: skip
