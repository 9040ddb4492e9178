"""The training loop. Step s is a function of the weights before it, the data and (seed, s) alone."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import json
import math
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_fast.data.images import Batches, ImageData
from ddpm_fast.io.lock import exclusive
from ddpm_fast.io.signals import terminable, uninterrupted
from ddpm_fast.models import EMA, UNet
from ddpm_fast.noise import FOLD_AUGMENT, FOLD_DROPOUT, FOLD_LABELS, FOLD_TRAIN_NOISE, FOLD_TRAIN_TIMESTEPS, Noise
from ddpm_fast.training.checkpoint import (
    CHECKPOINT_FILES,
    Checkpoint,
    CheckpointError,
    add_prefix,
    load_into,
    save_checkpoint,
    strip_prefix,
)
from ddpm_fast.training.config import TrainConfig, autocast
from ddpm_fast.training.metrics import METRICS, open_metrics, read_metrics
from ddpm_fast.training.timestep_samplers import TIMESTEP_SAMPLERS
from ddpm_fast.training.trained import cannot_rebuild, fingerprint, load_run, load_run_data, rebuilt

SAVE_MINUTES = 10.0


class Progress(NamedTuple):
    """Report of the trainer after each step. ``loss`` is None for most steps, as reading it waits for the device."""

    step: int
    steps: int
    loss: float | None


class Trainer:
    """Trains a UNet on images.

    Args:
        config: the run.
        data: the images, as ``load_data(config.data)`` gives them.

    Attributes:
        model, ema, optimizer, diffusion, timestep_sampler: the parts, on ``device``.
        step: optimiser steps done.

    Raises:
        ValueError, TypeError: where the configuration does not fit the data.
    """

    def __init__(self, config: TrainConfig, data: ImageData) -> None:
        self.config, self.data = config, data
        self.device = resolve_device(config.device)
        self.diffusion = config.make_diffusion(data.levels)
        if config.loss == "hybrid" and not self.diffusion.learns_variance:
            raise ValueError(f"loss 'hybrid' trains a learned variance, got variance {config.variance!r}; use learned or learned_range")
        if config.loss == "simple" and self.diffusion.learns_variance:
            raise ValueError(f"loss 'simple' does not train a variance, got variance {config.variance!r}; use loss hybrid or vlb")
        with seeded(config.seed), torch.device("cpu"):  # on the CPU: the same weights on any device
            self.model = config.make_network(data).to(self.device).train()
        self.ema = EMA(self.model, config.ema)
        # One fused kernel for all parameters, on CPU as on CUDA.
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate, betas=(0.9, config.adam_beta2), fused=True)
        self.batches = Batches(len(data.train), config.batch, config.seed)
        self.step = 0
        key = Noise(config.seed)
        make_sampler = TIMESTEP_SAMPLERS[config.timestep_sampler]
        self.timestep_sampler = make_sampler(len(self.diffusion), config.batch, key.fold_in(FOLD_TRAIN_TIMESTEPS), self.device)
        self._noise = key.fold_in(FOLD_TRAIN_NOISE)
        self._flips, self._labels = key.fold_in(FOLD_AUGMENT), key.fold_in(FOLD_LABELS)
        self._dropout = key.fold_in(FOLD_DROPOUT)

    @classmethod
    def restore(cls, path: Path | str, images: ImageData | None = None, **changes: Any) -> Trainer:
        """A trainer that goes on from a checkpoint, bit for bit as if it had never stopped (on the same device and PyTorch).

        Args:
            path: the run's folder, or its checkpoint file.
            images: what the run was trained on; by default loaded as its configuration, or ``data`` among the changes, says.
            changes: entries of the configuration to replace, as :meth:`TrainConfig.continued` allows: steps and device. And
                ``data``, where the same images now lie.

        Raises:
            CheckpointError: for a file that is missing, foreign, damaged, incomplete or of a later version.
            ValueError: for a change that is not allowed, fewer steps than are done, or data that are not the run's.
        """
        checkpoint, config = load_run(path)
        # Fingerprints say whether they are the same images, wherever they lie.
        config = dataclasses.replace(config, data=changes.pop("data", None) or config.data)
        config, step = config.continued(**changes), checkpoint.meta["step"]
        if config.steps < step:
            raise ValueError(f"steps must be at least the {step} that are done, got {config.steps}")
        network = rebuilt(checkpoint).config
        if images is None:
            images = load_run_data(config)
        _check_images(images, checkpoint, config)
        try:
            _check_network(network, config.network_arguments(images))
        except (TypeError, ValueError) as error:
            raise cannot_rebuild(checkpoint, error) from None
        trainer = cls(config, images)
        try:
            trainer._load(checkpoint)
        except CheckpointError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise cannot_rebuild(checkpoint, error) from error
        return trainer

    def _load(self, checkpoint: Checkpoint) -> None:
        """Takes over everything that `save` wrote, from a run with this configuration."""
        tensors, meta, where = checkpoint.tensors, checkpoint.meta, f"of {checkpoint.path}"
        if absent := [name for name in ("ema_updates", "optimizer") if name not in meta]:
            raise CheckpointError(f"{checkpoint.path} can be sampled from but not resumed: it has no {', '.join(absent)}")
        load_into(self.model, strip_prefix("model", tensors), f"network (model weights {where})")
        averages = strip_prefix("ema", tensors)
        buffers = {name: averages.pop(name) for name, _ in self.model.named_buffers() if name in averages}
        self.ema.load_state_dict({"num_updates": meta["ema_updates"], "parameters": averages, "buffers": buffers})
        self._load_optimizer(strip_prefix("optimizer", tensors), meta)
        state, sampler = strip_prefix("timesteps", tensors), f"timestep_sampler {self.config.timestep_sampler!r}"
        if not state and self.timestep_sampler.state_dict():
            raise CheckpointError(f"{checkpoint.path} has no state of its {sampler} and cannot be resumed")
        load_into(self.timestep_sampler, state, f"{sampler} {where}")
        self.step = meta["step"]

    def _load_optimizer(self, packed: dict[str, Tensor], meta: dict[str, Any]) -> None:
        expected: dict[str, Tensor] = {
            f"{index}.{name}": p for index, p in enumerate(self.model.parameters()) for name in ("exp_avg", "exp_avg_sq")
        }
        expected |= {f"{index}.step": torch.zeros((), device="cpu") for index, _ in enumerate(self.model.parameters())}
        shapes = {name: tuple(tensor.shape) for name, tensor in packed.items()}
        if meta["step"] and shapes != {name: tuple(like.shape) for name, like in expected.items()}:
            raise ValueError(f"its optimizer's state must be that of {len(expected) // 3} parameters, got other tensors")
        if other := {tensor.dtype for tensor in packed.values()} - {torch.float32}:
            raise ValueError(f"its optimizer's state must be float32, got {', '.join(map(str, other))}")
        # The groups are made from the configuration, and the learning rate anew for each step: those of the file may only agree.
        own, found = self.optimizer.state_dict()["param_groups"], meta["optimizer"]
        for name in ("betas", "eps", "weight_decay", "amsgrad", "maximize"):
            values = [group.get(name) for group in found["groups"]]
            if json.dumps(values) != json.dumps([group[name] for group in own]):
                raise ValueError(
                    f"its optimizer must be Adam with {name} {own[0][name]} in one parameter group, "
                    f"got {name} {', '.join(map(str, values))}"
                )
        # Files hold rows in order; the fused kernel wants a parameter and its state laid out alike, here channels_last.
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in packed.items():
            index, name = key.split(".")
            state.setdefault(int(index), {})[name] = torch.empty_like(expected[key], dtype=tensor.dtype).copy_(tensor)
        self.optimizer.load_state_dict({"state": state, "param_groups": own})

    def learning_rate(self, step: int) -> float:
        """Warm-up, then constant or a half cosine that would reach zero after the last step."""
        config = self.config
        rate = config.learning_rate * min(1.0, (step + 1) / max(config.warmup, 1))
        return rate * 0.5 * (1.0 + math.cos(math.pi * step / config.steps)) if config.decay == "cosine" else rate

    def batch(self, step: int) -> tuple[Tensor, Tensor | None]:
        """Images (N, C, H, W) in [-1, 1] and, for a conditional model, labels with some dropped."""
        config = self.config
        x, labels = self.data.batch("train", self.batches.indices(step), self.device)
        if config.flip:
            mirrored = self._flips.at(stream=step).integers(len(x), 2, self.device).bool()
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        if labels is None or self.model.num_classes is None:  # it is not conditional
            return x, None
        dropped = self._labels.at(stream=step).uniform(len(x), self.device) < config.label_dropout
        return x, labels.masked_fill(dropped, self.model.num_classes)

    def train_step(self) -> tuple[Tensor, Tensor]:
        """One optimiser step. Returns (loss, norm of the gradient) as tensors: reading them is the caller's choice."""
        config, step = self.config, self.step
        x_start, labels = self.batch(step)
        (t, factor), noise = self.timestep_sampler.draw(step), self._noise.at(stream=step)
        x_t = self.diffusion.q_sample(x_start, t, noise)
        with autocast(self.device, self.config.precision):
            model_output = self.model(x_t, t, labels, dropout=self._dropout.at(stream=step))
        losses = self.diffusion.loss(model_output.float(), x_start, x_t, t, noise, kind=config.loss, weight=config.weight)
        loss = (losses if factor is None else losses * factor).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        with uninterrupted():  # a checkpoint of half a step could not be resumed exactly
            self.optimizer.step()
            self.ema.update(self.model)
            self.timestep_sampler.update(t, losses.detach())
            self.step += 1
        return loss.detach(), norm

    def run(
        self,
        out: Path | str | None = None,
        *,
        log_every: int = 10,
        save_every: int | None = None,
        save_minutes: float | None = SAVE_MINUTES,
        report: Callable[[Progress], Any] = lambda _: None,
    ) -> list[dict[str, Any]]:
        """Trains up to the last step.

        Args:
            out: folder for metrics.jsonl and the checkpoint; None writes nothing. Of the metrics that are there already, the
                lines of steps done before are kept, none for a new run.
            log_every: steps between two lines of metrics (and of reading the loss).
            save_every: steps between checkpoints; None for none by number.
            save_minutes: time between checkpoints, whatever ``save_every`` is; None for none by time. A process that is killed
                loses no more than has passed since the last one. The last step always saves one, and so do Ctrl-C and SIGTERM
                (`ddpm_fast.io.signals.Terminated`, a KeyboardInterrupt, unless the program has a handler of its own), before the
                exception goes on.
            report: called after each step.

        Returns:
            The lines of metrics, those that were kept first.

        Raises:
            ValueError: for an interval that is not positive, and where metrics of steps done before cannot be read.
            FloatingPointError: where the loss is not finite; no checkpoint is written over the last good one.
            BlockingIOError: where another run trains into ``out``.
            OSError: where ``out`` cannot be written.
        """
        for name, value in dict(log_every=log_every, save_every=save_every, save_minutes=save_minutes).items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        with contextlib.ExitStack() as stack:
            if out is not None:
                stack.enter_context(exclusive(out, "training", *CHECKPOINT_FILES, METRICS))
                stack.enter_context(terminable())
            return self._run(out, log_every, save_every, save_minutes, report)

    def _run(
        self, out: Path | str | None, log_every: int, save_every: int | None, save_minutes: float | None, report: Callable[[Progress], Any]
    ) -> list[dict[str, Any]]:
        history: list[dict[str, Any]] = [] if out is None else read_metrics(Path(out) / METRICS, self.step)
        with contextlib.ExitStack() as stack:
            metrics = stack.enter_context(open_metrics(Path(out) / METRICS, history)) if out is not None else None
            start = saved = time.perf_counter()
            first, spent = self.step, history[-1]["elapsed_s"] if history else 0.0
            loss = norm = torch.zeros((), device="cpu")
            try:
                while self.step < self.config.steps:
                    loss, norm = self.train_step()
                    last = self.step == self.config.steps
                    read = self.step % log_every == 0 or last
                    due = save_minutes is not None and time.perf_counter() - saved >= 60 * save_minutes
                    saves = out is not None and (last or due or (save_every is not None and self.step % save_every == 0))
                    if read or saves:
                        self._check_finite(loss, norm)
                    if read:
                        elapsed = time.perf_counter() - start
                        history.append(dict(
                            step=self.step, loss=loss.item(), grad_norm=norm.item(), lr=self.learning_rate(self.step - 1),
                            elapsed_s=round(spent + elapsed, 3), images_per_s=round((self.step - first) * self.config.batch / elapsed, 1),
                        ))  # fmt: skip
                        if metrics:
                            print(json.dumps(history[-1]), file=metrics, flush=True)
                    if saves and out is not None:
                        self.save(out)
                        saved = time.perf_counter()
                    report(Progress(self.step, self.config.steps, history[-1]["loss"] if read else None))
            except KeyboardInterrupt:
                if out is not None and first < self.step:
                    self._check_finite(loss, norm)
                    with uninterrupted():  # a second Ctrl-C, or a scheduler that sends both signals, must not stop the save
                        self.save(out)
                raise
        return history

    def _check_finite(self, loss: Tensor, norm: Tensor) -> None:
        """Raises if the loss or the gradient is not finite, before anything is saved.

        An infinite gradient makes the weights NaN even if the loss is finite.

        Raises:
            FloatingPointError: the message gives both.
        """
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            raise FloatingPointError(
                f"the loss is {loss.item()} and the gradient's norm {norm.item()} at step {self.step}; "
                "lower the learning rate or check the data"
            )

    def save(self, out: Path | str) -> Path:
        """Writes the checkpoint into a folder, atomically: weights, their average, the optimiser, and the configuration."""
        from ddpm_fast._version import __version__

        optimizer = self.optimizer.state_dict()
        ema = self.ema.state_dict()
        tensors = {
            **add_prefix("model", self.model.state_dict()),
            **add_prefix("ema", {**ema["parameters"], **ema["buffers"]}),
            **{f"optimizer.{k}.{name}": x for k, state in optimizer["state"].items() for name, x in state.items() if isinstance(x, Tensor)},
            **add_prefix("timesteps", self.timestep_sampler.state_dict()),
        }
        meta = dict(
            ddpm_fast_version=__version__,
            step=self.step,
            network=self.model.config,
            levels=self.data.levels,
            image_shape=list(self.data.image_shape),
            classes=None if self.data.classes is None else list(self.data.classes),
            images=len(self.data.train),
            fingerprints=self._fingerprints,
            train=dataclasses.asdict(self.config),
            ema_updates=ema["num_updates"],
            optimizer={
                "groups": [
                    {name: x.item() if isinstance(x, Tensor) else x for name, x in group.items()} for group in optimizer["param_groups"]
                ]
            },
        )
        return save_checkpoint(out, tensors, meta)

    @cached_property
    def _fingerprints(self) -> dict[str, str]:
        return image_fingerprints(self.data, self.config)

    def averaged_model(self) -> UNet:
        """A copy of the network with the averaged weights, in eval mode."""
        model = copy.deepcopy(self.model)
        self.ema.copy_to(model)
        return model.eval()


def resolve_device(name: str) -> torch.device:
    """The device with a name. "auto" is CUDA if there is a GPU, else the CPU.

    Raises:
        ValueError: for a device that PyTorch does not know or does not see here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu or cuda[:i], got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda[:i], got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return device


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds PyTorch's CPU generator, which initial weights are drawn from, within the block, and restores it afterwards."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        yield


def image_fingerprints(images: ImageData, config: TrainConfig) -> dict[str, str]:
    """Hashes of the training and the held-out images, by part. Labels are included in the first if the network is trained with them."""
    labels = [images.train_labels] if config.class_conditional and images.train_labels is not None else []
    return dict(train=fingerprint(images.train, *labels), test=fingerprint(images.test))


def _check_images(images: ImageData, checkpoint: Checkpoint, config: TrainConfig) -> None:
    """Checks that images are those that a checkpoint was trained on: number, shape, levels, labels and values.

    Raises:
        ValueError: what was expected and what came.
    """
    meta, found = checkpoint.meta, (len(images.train), images.image_shape, images.levels)
    expected = (meta["images"], tuple(meta["image_shape"]), meta["levels"])
    if found != expected:
        described = ["{} images of {} with {} levels".format(*values) for values in (expected, found)]
        raise ValueError(f"{images.name} must be the {described[0]} that {checkpoint.path} was trained on, got {described[1]}")
    if config.class_conditional and images.train_labels is None:
        raise ValueError(f"class_conditional needs labels, and {images.name} has none")
    if meta["fingerprints"] != image_fingerprints(images, config):
        raise ValueError(
            f"{images.name} must be the images that {checkpoint.path} was trained on, got as many, but others; train afresh on them"
        )


def _check_network(network: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Compares the arguments of the file's network with those that the configuration gives.

    Not all of them can be seen in the weights' shapes: a dropout cannot.

    Raises:
        ValueError: what was expected and what came.
    """
    own = {name: parameter.default for name, parameter in inspect.signature(UNet).parameters.items()} | arguments
    own["out_channels"] = own["in_channels"] if own["out_channels"] is None else own["out_channels"]
    own = {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}
    if other := [f"{name} {value!r}, got {own.get(name)!r}" for name, value in network.items() if value != own.get(name)]:
        raise ValueError(f"its network must have {', '.join(other)}")
