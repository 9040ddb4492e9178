"""Sampling: one loop for all samplers, whose tables of coefficients are made in diffusion/samplers.py.

Guidance, thresholding, inpainting and interpolation change the inputs or the outputs of a step, never the step itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ddpm_fast import checks
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.diffusion.samplers import StepTable, make_table, start_row
from ddpm_fast.noise import FOLD_SAMPLE_KNOWN, FOLD_SAMPLE_START, FOLD_SAMPLE_STEPS, Noise
from ddpm_fast.ops._common import check_data, check_unit_range
from ddpm_fast.sampling.cuda_graph import Capture, StepGraph, cuda_capture
from ddpm_fast.sampling.step import Guidance, ReverseStep
from ddpm_fast.types import SamplerName, Spacing

Model = Callable[..., Tensor]
Callback = Callable[[int, Tensor, Tensor], object]
Constrain = Callable[[int | None, Tensor], Tensor]


@torch.no_grad()
def sample_loop(
    step: ReverseStep | StepGraph,
    x_t: Tensor,
    noise: Noise,
    *,
    constrain: Constrain | None = None,
    keep: bool = True,
    with_x_start: bool = True,
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Walks a sampler's table from its last row to its first, without waiting for the device.

    Args:
        step: of the sampler, or the CUDA graph of it.
        x_t: (N, C, ...), the start, usually N(0, I).
        noise: key of the steps' noise: the step at model time t draws from stream t.
        constrain: called as constrain(t, x) after each step, where t is x's time in the chain, or None at the end, when x is the
            sample; returns the x to go on with.
        keep: give new tensors at each step; False writes each step over the one before, ``x_t`` first of all, which saves
            the memory and the time that new memory costs.
        with_x_start: give x̂0 too.

    Yields:
        (t, x, x̂0 or None) after each step, with the t that the model was told; x after the last one is the sample.
    """
    timesteps = step.timesteps
    x_start = None
    for row in range(len(timesteps) - 1, -1, -1):
        x_t, x_start = step(
            row, x_t, noise.at(stream=timesteps[row]), x_start if step.multistep else None, keep=keep, with_x_start=with_x_start
        )
        if constrain is not None:
            x_t = constrain(step.chain_times[row - 1] if row else None, x_t)
        yield timesteps[row], x_t, x_start


class Sampler:
    """Draws samples from a model, any number of times.

    The noise of sample i depends on (seed, first_sample + i) alone, so that the batch size and the number of processes
    change a sample by the rounding of the model's own arithmetic only.

    Args:
        model: any callable (x_t, t) -> output, or (x_t, t, labels) -> output where labels are given; put it in eval mode first. It gets
            x_t in float32, which a UNet in another dtype casts.
        diffusion: the diffusion that the model was trained with.
        sampler: "ddpm", "ddim" or "dpmpp_2m".
        steps: None for all T, a number of steps, or their ascending list.
        spacing: how a number of steps is spaced: "even", "quadratic" or "logsnr".
        eta: DDIM's share of noise, 0..1.
        clip: clip each x̂0 to [-1, 1].
        threshold: dynamic thresholding in place of clipping: the share of |x̂0|, in (0, 1], that may be scaled to lie within
            [-1, 1] (Saharia et al. 2022, section 2.3; 0.995 there).
        guidance: scale of classifier-free guidance, 1 for none: unconditional + scale · (conditional - unconditional) (Ho &
            Salimans 2022, whose w is the scale less 1).
        null_label: the label that means "no class" to the model; by default its ``num_classes``, as in the UNet here.
        graph: capture a step in a CUDA graph and replay it; by default for modules on CUDA. Anything that the model does on the
            host, such as reading a value of a tensor, cannot be captured.

    Attributes:
        table: the :class:`~ddpm_fast.diffusion.samplers.StepTable`.

    Raises:
        ValueError: for an unknown name, or a value out of range.
    """

    def __init__(
        self,
        model: Model,
        diffusion: GaussianDiffusion,
        sampler: SamplerName = "ddpm",
        *,
        steps: int | Sequence[int] | Tensor | None = None,
        spacing: Spacing = "even",
        eta: float = 0.0,
        clip: bool = True,
        threshold: float | None = None,
        guidance: float = 1.0,
        null_label: int | None = None,
        graph: bool | None = None,
    ) -> None:
        self.model, self.diffusion = checks.function("model", model), checks.instance("diffusion", diffusion, GaussianDiffusion)
        self.clip, self.graph = checks.flag("clip", clip), None if graph is None else checks.flag("graph", graph)
        self._make_table = partial(make_table, diffusion, sampler, eta=eta)
        self.table = self._make_table(steps, spacing=spacing)
        share = None if threshold is None else checks.number("threshold", threshold, "lie in (0, 1]")
        if share is not None and not 0.0 < share <= 1.0:
            raise ValueError(f"threshold must lie in (0, 1], got {threshold}")
        self.threshold = share
        guidance = checks.number("guidance", guidance)
        if threshold is not None and self.table.output_is_mean:
            raise ValueError(
                "threshold acts on x̂0, which the steps of a model that predicts the mean do not read; leave steps out, or take "
                "sampler 'ddim'"
            )
        null_label = getattr(model, "num_classes", None) if null_label is None else checks.integer("null_label", null_label, 0)
        if guidance != 1.0 and null_label is None:
            raise ValueError(f"guidance {guidance} needs to know what the model takes for no class; give null_label")
        self.guidance = Guidance(guidance, null_label)
        self._graphs: dict[tuple[object, ...], StepGraph] = {}
        self._capture: Capture = cuda_capture  # a test puts another in its place

    def __call__(
        self,
        shape: Sequence[int],
        seed: int = 0,
        *,
        labels: Tensor | None = None,
        known: tuple[Tensor, Tensor] | None = None,
        first_sample: int = 0,
        device: torch.device | str | None = None,
        callback: Callback | None = None,
        keep: bool = True,
    ) -> Tensor:
        """Draws a batch, the same one on each call with the same ``seed``, which is 0 unless given.

        Args:
            shape: (N, C, ...).
            seed: 0..2^64-1; another one, or another ``first_sample``, gives other images.
            labels: (N,) int64, classes for a class-conditional model: in 0..K-1 where it has a ``num_classes`` of K, or the null label.
            known: (x_start, mask) for inpainting: where mask is True, images keep x_start, which is noised to each step's level so
                that the rest is drawn to fit (Lugmayr et al. 2022, algorithm 1 without resampling; Song et al. 2021, appendix I.2).
                x_start in [-1, 1] and the bool mask broadcast to ``shape``.
            first_sample: global index of the first sample.
            device: of the computation; by default the model's, where it has parameters, else the CPU.
            callback: called as callback(t, x, x̂0) after each step. What it changes of a UNet on the CPU (weights, mode, hooks) counts
                from the next call on: each call samples from the network as it is when it starts.
            keep: give ``callback`` new tensors at each step; False writes each step over the one before, which saves memory.

        Returns:
            (N, C, ...) float32.

        Raises:
            TypeError, ValueError: for a shape, labels or a known part that do not fit.
        """
        shape = _shape(shape)
        if callback is not None:
            checks.function("callback", callback)
        checks.flag("keep", keep)
        device = self._device(device)
        labels = self._labels(labels, shape[0], device)
        key = Noise(seed, first_sample=first_sample)
        constrain = None if known is None else self._constrain(known, shape, device, key.fold_in(FOLD_SAMPLE_KNOWN))
        x = key.fold_in(FOLD_SAMPLE_START).materialize(shape, device)
        if constrain is not None:
            x = constrain(int(self.table.chain_times[-1]), x)
        return self._run(x, key, labels, constrain=constrain, callback=callback, keep=keep)

    def interpolate(
        self, a: Tensor, b: Tensor, weights: Sequence[float], t: int, seed: int = 0, *, labels: Tensor | None = None, first_sample: int = 0
    ) -> Tensor:
        """Images between pairs of images, mixed at the noise level of time t (Ho et al. 2020, section 4.4).

        Both images are noised to t, mixed there, and sampled back. The signal is mixed linearly, and the noise by sine and cosine
        of the weight, so that the mixture has the variance that the model expects at t; mixed linearly it would have as little as
        half.

        Args:
            a, b: (N, C, ...) float32 in [-1, 1].
            weights: (K,) share of b, 0..1.
            t: time of the chain, 0..T-1. With a larger t the result keeps less of the images. Sampling starts at the last of the
                sampler's steps that is not after t.
            labels: (N,) int64, for a class-conditional model.

        Returns:
            (K, N, C, ...) float32; the same noise serves every weight of a pair.

        Raises:
            ValueError: for images, weights or a t that do not fit.
        """
        if checks.tensor("a", a).shape != checks.tensor("b", b).shape or a.ndim < 2:
            raise ValueError(f"a and b must have one shape (N, C, ...), got {tuple(a.shape)} and {tuple(b.shape)}")
        if not len(a):
            raise ValueError("a and b must have at least one image, got none")
        for name, images in (("a", a), ("b", b)):
            check_data(name, images)
            check_unit_range(name, images)
        weights = _weights(weights)
        t = checks.integer("t", t, 0, len(self.diffusion) - 1)
        # A new table, because its first step must not read x̂0 of a step before, as the same step in the whole table may.
        table = self._make_table(self.table.chain_times[: start_row(self.table, t) + 1], spacing="even")
        table = replace(table, output_is_mean=self.table.output_is_mean)
        device = self._device(a.device if not isinstance(self.model, torch.nn.Module) else None)
        labels = self._labels(labels, len(a), device)
        key = Noise(seed, first_sample=first_sample)
        noises = [key.fold_in(FOLD_SAMPLE_KNOWN).at(stream=k).materialize(a.shape, device) for k in range(2)]
        time = torch.full((len(a),), int(table.chain_times[-1]), device=device)
        results = []
        for weight in weights:
            angle = 0.5 * math.pi * weight
            noise = math.cos(angle) * noises[0] + math.sin(angle) * noises[1]
            x = self.diffusion.q_sample(torch.lerp(a.to(device, torch.float32), b.to(device, torch.float32), weight), time, noise)
            results.append(self._run(x, key, labels, table))
        return torch.stack(results)

    @torch.no_grad()
    def _run(
        self,
        x: Tensor,
        key: Noise,
        labels: Tensor | None,
        table: StepTable | None = None,
        *,
        constrain: Constrain | None = None,
        callback: Callback | None = None,
        keep: bool = False,
    ) -> Tensor:
        watched = callback is not None
        step = self._step(x, labels, table or self.table)
        steps = sample_loop(step, x, key.fold_in(FOLD_SAMPLE_STEPS), constrain=constrain, keep=watched and keep, with_x_start=watched)
        for t, x, x_start in steps:
            if callback is not None and x_start is not None:
                callback(t, x, x_start)
        return x.clone() if isinstance(step, StepGraph) else x  # x is the graph's memory, which the next batch overwrites

    def _step(self, x: Tensor, labels: Tensor | None, table: StepTable) -> ReverseStep | StepGraph:
        captures = x.is_cuda and isinstance(self.model, torch.nn.Module) if self.graph is None else self.graph
        make = partial(
            ReverseStep,
            self.model,
            table,
            x,
            clip=self.clip,
            threshold=self.threshold,
            labels=labels,
            guidance=self.guidance,
            planned=not captures,
        )
        if not captures:
            return make()
        place = x.shape, x.device, labels is None, len(table), self._state_of_model()
        if place not in self._graphs:
            self._graphs.clear()  # one at a time: a graph holds the memory of a whole pass
            self._graphs[place] = StepGraph(make(), x, self._capture)
        return self._graphs[place].set_labels(labels)

    def _state_of_model(self) -> tuple[object, ...]:
        """Everything that a recorded pass depends on: the modules, their modes and hooks, and the weights' addresses and strides.

        The weights' values are not part of it: a replay reads them anew.
        """
        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        if not isinstance(self.model, torch.nn.Module):
            return autocast
        modules = [(module, module.training, *module._forward_pre_hooks, *module._forward_hooks) for module in self.model.modules()]
        tensors = [(x.data_ptr(), x.dtype, x.shape, x.stride()) for x in (*self.model.parameters(), *self.model.buffers())]
        return *autocast, *modules, *tensors

    def _device(self, device: torch.device | str | None) -> torch.device:
        if device is None:
            parameter = next(self.model.parameters(), None) if isinstance(self.model, torch.nn.Module) else None
            device = "cpu" if parameter is None else parameter.device
        return checks.device("device", device)

    def _labels(self, labels: Tensor | None, count: int, device: torch.device) -> Tensor | None:
        if labels is None:
            if self.guidance.scale != 1.0:
                raise ValueError(f"guidance {self.guidance.scale} needs labels, got none")
            return None
        classes = getattr(self.model, "num_classes", self)  # None says that it is unconditional
        if classes is None:
            raise ValueError("labels must be None for a model without classes (num_classes=None)")
        if checks.tensor("labels", labels).dtype != torch.int64 or labels.shape != (count,):
            raise ValueError(f"labels must be int64 of shape ({count},), got {labels.dtype} {tuple(labels.shape)}")
        if labels.is_cpu and isinstance(classes, int):  # elsewhere it would wait for the device
            outside = ((labels < 0) | (labels >= classes)) & (
                labels != (classes if self.guidance.null_label is None else self.guidance.null_label)
            )
            if outside.any():
                i = int(outside.nonzero()[0])
                raise ValueError(f"labels must lie in 0..{classes - 1}, or be the null label, got labels[{i}] = {int(labels[i])}")
        return labels.to(device)

    def _constrain(self, known: tuple[Tensor, Tensor], shape: torch.Size, device: torch.device, key: Noise) -> Constrain:
        """Makes the function that puts the known part of an image, noised to time t, into x. For t = None it puts it in without noise."""
        if not isinstance(known, (tuple, list)) or len(known) != 2 or not all(isinstance(part, Tensor) for part in known):
            raise TypeError(f"known must be two tensors, (x_start, mask), got {type(known).__name__}")
        x_start, mask = known
        if mask.dtype != torch.bool:
            raise TypeError(f"the mask must be bool, True where the image is known, got {mask.dtype}")
        try:
            x_start, mask = (part.to(device).expand(shape) for part in (x_start.float(), mask))
        except RuntimeError:
            raise ValueError(
                f"the known image and its mask must broadcast to {tuple(shape)}, got {tuple(x_start.shape)} and {tuple(mask.shape)}"
            ) from None
        check_unit_range("the known image", x_start)
        x_start = x_start.contiguous()
        times = torch.arange(len(self.diffusion), device=device)[:, None].expand(-1, shape[0]).contiguous()

        def constrain(t: int | None, x: Tensor) -> Tensor:
            noised = x_start if t is None else self.diffusion.q_sample(x_start, times[t], key.at(stream=t))
            return torch.where(mask, noised, x)

        return constrain


def _shape(shape: Sequence[int]) -> torch.Size:
    try:
        sizes = [checks.integer("a size", size, 1) for size in shape]
    except (TypeError, ValueError):
        sizes = []
    if len(sizes) < 2:
        got = tuple(shape) if isinstance(shape, (list, tuple)) else shape
        raise ValueError(f"shape must be (N, C, ...) with sizes of at least 1, got {checks.shown(got)}")
    return torch.Size(sizes)


def _weights(weights: Sequence[float]) -> list[float]:
    try:
        found = [checks.number("a weight", weight) for weight in weights]
    except (TypeError, ValueError):
        found = []
    if not found or not all(0.0 <= weight <= 1.0 for weight in found):
        raise ValueError(f"weights must be one or more numbers in [0, 1], got {checks.shown(weights)}")
    return found


def sample(
    model: Model,
    diffusion: GaussianDiffusion,
    shape: Sequence[int],
    seed: int = 0,
    *,
    sampler: SamplerName = "ddpm",
    steps: int | Sequence[int] | Tensor | None = None,
    spacing: Spacing = "even",
    eta: float = 0.0,
    clip: bool = True,
    threshold: float | None = None,
    guidance: float = 1.0,
    null_label: int | None = None,
    graph: bool | None = None,
    labels: Tensor | None = None,
    known: tuple[Tensor, Tensor] | None = None,
    first_sample: int = 0,
    device: torch.device | str | None = None,
    callback: Callback | None = None,
    keep: bool = True,
) -> Tensor:
    """Draws one batch of samples, the same one on each call with the same ``seed``, which is 0 unless given.

    Args, Raises: as :class:`Sampler` has them, up to ``graph``, and as its call has them. Two batches that are to differ need
        two seeds, or one seed and another ``first_sample``.

    Returns:
        (N, C, ...) float32.
    """
    draw = Sampler(
        model, diffusion, sampler, steps=steps, spacing=spacing, eta=eta, clip=clip, threshold=threshold, guidance=guidance,
        null_label=null_label, graph=graph,
    )  # fmt: skip
    return draw(shape, seed, labels=labels, known=known, first_sample=first_sample, device=device, callback=callback, keep=keep)
