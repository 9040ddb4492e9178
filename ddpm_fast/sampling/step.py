"""One reverse step of a batch: the model, guidance, thresholding and p_step by one row of a sampler's table."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_fast import checks, ops
from ddpm_fast._memory import overlap
from ddpm_fast.diffusion.samplers import StepTable
from ddpm_fast.noise import Noise
from ddpm_fast.ops._output import check_output, guess_x_start, split_output
from ddpm_fast.ops._p_step import COLUMNS, GUESS_COLUMNS, gather_row


class Guidance(NamedTuple):
    """Classifier-free guidance: its scale (1 for none) and the label that means "no class"."""

    scale: float = 1.0
    null_label: int | None = None


class ReverseStep:
    """The step of a sampler for batches of one shape. Its tables go to the device once, here.

    Args:
        model: any callable (x_t, t) -> output, or (x_t, t, labels) -> output where there are labels.
        like: (N, C, ...), a state of the batch: its shape, device and dtype.
        threshold: dynamic thresholding in place of clipping, or None.
        labels: (N,) int64 on the device, or None.
        planned: make the passes by the model's own ``cpu_plan``, where it has one, as :class:`~ddpm_fast.UNet` has on the CPU.

    Attributes:
        timesteps: (S,) ints, the t that the model is told at each row.
        chain_times: (S,) ints, the time of the diffusion's chain at each row.
        multistep: true if a step reads x̂0 of the step before.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        table: StepTable,
        like: Tensor,
        *,
        clip: bool = True,
        threshold: float | None = None,
        labels: Tensor | None = None,
        guidance: Guidance = Guidance(),  # noqa: B008 - immutable
        planned: bool = True,
    ) -> None:
        self.model, self.table, self.clip, self.threshold = model, table, clip, threshold
        self.rows = table.table.to(like.device, torch.float64 if like.dtype == torch.float64 else torch.float32).contiguous()
        self.timesteps = table.timesteps.tolist()
        self.chain_times = table.chain_times.tolist()
        self.multistep = table.multistep
        count = len(like)
        self.row_index = torch.arange(len(self.timesteps), device=like.device)[:, None].expand(-1, count).contiguous()
        self.guidance = guidance
        self.guided, self.labels = False, labels
        if labels is not None and guidance.null_label is not None and guidance.scale != 1.0:
            self.guided, self.labels = True, torch.cat([labels, torch.full_like(labels, guidance.null_label)])
        self.model_t = table.timesteps.to(like.device)[:, None].expand(-1, 2 * count if self.guided else count).contiguous()
        make_plan = getattr(type(model), "cpu_plan", None) if planned else None
        self.plan = None if make_plan is None else make_plan(model, like, self.model_t.shape[1], table.timesteps, self.labels)
        if threshold is not None:
            # p_step then gets x̂0 itself for a prediction.
            self.given_x_start = self.rows.clone()
            self.given_x_start[:, COLUMNS.index("from_x_t")], self.given_x_start[:, COLUMNS.index("from_out")] = 0.0, 1.0

    def __call__(
        self,
        row: int,
        x_t: Tensor,
        noise: Noise | Tensor,
        x_start_previous: Tensor | None = None,
        *,
        keep: bool = True,
        with_x_start: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Goes from the state at ``row`` to the one before it.

        Args:
            row: of the sampler's table.
            x_t: (N, C, ...) the state.
            noise: z, as a Noise or a tensor like x_t.
            x_start_previous: x̂0 of the step before, for multistep samplers.
            keep: write the results into new memory. Without it, x' is written over x_t and x̂0 over x_start_previous where possible.
            with_x_start: return x̂0 too. For a multistep sampler it is always returned.

        Returns:
            (x', x̂0 or None), each like x_t.
        """
        model_output = self.plan(self.doubled(x_t), row) if self.plan is not None else self.predict(x_t, self.model_t[row])
        reuse = not keep and x_t.is_contiguous() and not overlap(x_t, model_output)  # it may return its input
        into = x_start_previous if x_start_previous is not None and not keep else with_x_start or self.multistep
        return self.apply(x_t, model_output, self.row_index[row], noise, x_start_previous, x_t if reuse else None, into)

    def predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The model's output: of 2N samples, conditional and not, where it is guided. ``t`` is a row of ``model_t``."""
        x = self.doubled(x_t)
        model_output = self.model(x, t) if self.labels is None else self.model(x, t, self.labels)
        if self.guided or self.threshold is not None:  # else p_step will check the rest
            check_output(model_output, "x_t", x, self.table.variance)
        return checks.tensor("the model output", model_output)

    def doubled(self, x_t: Tensor) -> Tensor:
        """The model's input: every sample twice where it is guided."""
        return torch.cat([x_t, x_t]) if self.guided else x_t

    def apply(
        self,
        x_t: Tensor,
        model_output: Tensor,
        row: Tensor,
        noise: Noise | Tensor | None,
        x_start_previous: Tensor | None,
        x_next: Tensor | None,
        x_start: Tensor | bool,
    ) -> tuple[Tensor, Tensor | None]:
        """p_step, after what the model gave is guided and thresholded; arguments as there."""
        rows, clip, guidance = self.rows, self.clip, None
        if self.guided:
            model_output, without = model_output.chunk(2)
            guidance = without, self.guidance.scale
        if self.threshold is not None:
            model_output = self._thresholded(x_t, model_output, row, guidance, self.threshold)
            guidance, rows, clip = None, self.given_x_start, False
        x_next, guess = ops.p_step(
            x_t, model_output, row, rows, noise, variance=self.table.variance, clip=clip and not self.table.output_is_mean,
            x_start_previous=x_start_previous, guidance=guidance, x_next=x_next, x_start=x_start,
        )  # fmt: skip
        if clip and self.table.output_is_mean and guess is not None:
            guess.clamp_(-1.0, 1.0)
        return x_next, guess

    def _thresholded(self, x_t: Tensor, model_output: Tensor, row: Tensor, guidance: tuple[Tensor, float] | None, share: float) -> Tensor:
        """The output with x̂0, thresholded, in place of its prediction."""
        prediction, raw = split_output(model_output, x_t)
        if guidance is not None:
            without, scale = guidance
            prediction = torch.lerp(split_output(without, x_t)[0], prediction, scale)
        from_x_t, from_out = gather_row(self.rows, row, x_t, GUESS_COLUMNS).values()
        x_start = dynamic_threshold(guess_x_start(from_x_t, from_out, x_t, prediction), share)
        return x_start if raw is None else torch.cat([x_start, raw], 1)


def dynamic_threshold(x_start: Tensor, share: float) -> Tensor:
    """Clips each sample to ±s and divides it by s, the ``share``-quantile of its |x_start|, but at least 1.

    Saharia et al. 2022, section 2.3 (https://arxiv.org/abs/2205.11487): strong guidance drives values beyond the data's range,
    where clipping would saturate them all.

    Args:
        x_start: (N, ...).
        share: in (0, 1].

    Returns:
        Like x_start, in [-1, 1].
    """
    magnitude = x_start.abs().flatten(1).sort(1).values  # torch.quantile refuses large tensors
    place = share * (magnitude.shape[1] - 1)
    below, above = magnitude[:, int(place)], magnitude[:, min(int(place) + 1, magnitude.shape[1] - 1)]
    s = torch.lerp(below, above, place - int(place)).clamp_min(1.0).view(-1, *[1] * (x_start.ndim - 1))
    return x_start.clamp(-s, s) / s
