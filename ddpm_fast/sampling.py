"""Samplers: each is a table of coefficients for :func:`ddpm_fast.ops.p_step`, and one loop runs them all."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.noise import FOLD_SAMPLE_START, FOLD_SAMPLE_STEPS, Noise
from ddpm_fast.ops._output import FIXED
from ddpm_fast.ops.p_step import COLUMNS
from ddpm_fast.tables import VARIANCES, log_variance_range, x_start_coefficients

if TYPE_CHECKING:
    from ddpm_fast.diffusion import GaussianDiffusion

SAMPLERS = ("ddpm", "ddim")


@dataclass(frozen=True)
class StepTable:
    """A sampler: rows in the order of time, so that sampling walks them from the last to the first.

    table: (S, 8) float64, columns as COLUMNS in ddpm_fast/ops/p_step.py. timesteps: (S,) int64, the t that the model is
    told at each row. variance: how the log-variance columns are read.
    """

    table: Tensor
    timesteps: Tensor
    variance: str


def spaced_timesteps(T: int, steps: int) -> Tensor:
    """``steps`` time indices from 0 to T-1, evenly spaced, rounded, both ends included (the last alone if steps is 1)."""
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= T:
        raise ValueError(f"steps must be an integer in 1..{T}, got {steps!r}")
    if steps == 1:
        return torch.tensor([T - 1])
    return torch.linspace(0, T - 1, steps, dtype=torch.float64).round().long()


def ddpm_table(diffusion: GaussianDiffusion, timesteps: Tensor | Sequence[int] | None = None) -> StepTable:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), on all steps or on the ascending ``timesteps`` alone.

    A part of the steps is sampled through the respaced schedule, whose posterior and variances belong to the jump
    from one listed step to the one before (Nichol & Dhariwal 2021, section 4).
    """
    schedule = diffusion.schedule if timesteps is None else diffusion.schedule.respace(timesteps)
    zero = torch.zeros(len(schedule), dtype=torch.float64)
    noise = torch.ones_like(zero)
    noise[0] = 0.0  # the last step returns the mean
    columns = (
        *_x_start_columns(diffusion, timesteps),
        schedule.posterior_mean_coef1,
        schedule.posterior_mean_coef2,
        zero,
        *log_variance_range(schedule, diffusion.variance),
        noise,
    )
    return StepTable(torch.stack(columns, 1), schedule.timesteps, VARIANCES[diffusion.variance])


def ddim_table(diffusion: GaussianDiffusion, timesteps: Tensor | Sequence[int] | None = None, eta: float = 0.0) -> StepTable:
    """DDIM (Song et al. 2021, eq. 12 and 16, https://arxiv.org/abs/2010.02502).

    ε is derived again from the clipped x̂0, which folds it into the weights of x̂0 and x_t. ``eta`` = 0 is deterministic,
    1 has the variance of ancestral sampling; a learned variance is not used.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    schedule = diffusion.schedule if timesteps is None else diffusion.schedule.respace(timesteps)
    previous, variance = schedule.alphas_bar_prev, eta**2 * schedule.posterior_variance
    direction = (1.0 - previous - variance).clamp_min(0.0).sqrt() / schedule.sqrt_one_minus_alphas_bar
    log_var = variance.clamp_min(torch.finfo(torch.float32).tiny).log()
    columns = (
        *_x_start_columns(diffusion, timesteps),
        previous.sqrt() - direction * schedule.sqrt_alphas_bar,
        direction,
        torch.zeros_like(previous),
        log_var,
        log_var,
        (variance > 0).double(),
    )
    return StepTable(torch.stack(columns, 1), schedule.timesteps, FIXED)


def _x_start_columns(diffusion: GaussianDiffusion, timesteps: Tensor | Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """x̂0 comes from the schedule that the model was trained on: only its posterior mean depends on the step's length."""
    columns = x_start_coefficients(diffusion.schedule, diffusion.prediction)
    return columns if timesteps is None else tuple(column[torch.as_tensor(timesteps).long()] for column in columns)


def make_table(diffusion: GaussianDiffusion, sampler: str = "ddpm", steps: int | None = None, eta: float = 0.0) -> StepTable:
    """The table of a sampler by name; ``steps`` evenly spaced steps, or all T."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    timesteps = None if steps is None or steps == len(diffusion) else spaced_timesteps(len(diffusion), steps)
    return ddpm_table(diffusion, timesteps) if sampler == "ddpm" else ddim_table(diffusion, timesteps, eta)


@torch.no_grad()
def sample_loop(
    model: Callable[[Tensor, Tensor], Tensor], table: StepTable, x_t: Tensor, noise: Noise, *, clip: bool = True, keep: bool = True, with_x_start: bool = True
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Walks a sampler's table from its last row to its first.

    Args:
        model: any callable (x_t, t) -> output.
        x_t: (N, C, ...), the start, usually N(0, I).
        noise: key of the steps' noise: the step at model time t draws from stream t.
        keep: give new tensors at each step; False writes each step over the one before, ``x_t`` first of all, which saves
            the memory and the time that new memory costs.
        with_x_start: whether x̂0 is wanted.

    Yields:
        (t, x, x̂0 or None) after each step; x after the last one is the sample.
    """
    rows = table.table.to(x_t.device, torch.float64 if x_t.dtype == torch.float64 else torch.float32).contiguous()
    timesteps = table.timesteps.tolist()
    model_t = table.timesteps.to(x_t.device)[:, None].expand(-1, x_t.shape[0]).contiguous()
    row_index = torch.arange(len(timesteps), device=x_t.device)[:, None].expand(-1, x_t.shape[0]).contiguous()
    multistep = bool((table.table[:, COLUMNS.index("previous")] != 0).any())
    x_start = None
    for row in range(len(timesteps) - 1, -1, -1):
        out = model(x_t, model_t[row])
        reuse = not keep and x_t.is_contiguous() and out.untyped_storage().data_ptr() != x_t.untyped_storage().data_ptr()  # it may return its input
        x_t, x_start = ops.p_step(
            x_t, out, row_index[row], rows, noise.at(stream=timesteps[row]),
            variance=table.variance, clip=clip, x_start_previous=x_start if multistep else None, x_next=x_t if reuse else None,
            x_start=x_start if multistep and not keep and x_start is not None else with_x_start or multistep,
        )  # fmt: skip
        yield timesteps[row], x_t, x_start


def sample(
    model: Callable[[Tensor, Tensor], Tensor],
    diffusion: GaussianDiffusion,
    shape: tuple[int, ...],
    seed: int = 0,
    *,
    sampler: str = "ddpm",
    steps: int | None = None,
    eta: float = 0.0,
    clip: bool = True,
    first_sample: int = 0,
    device: torch.device | str | None = None,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
    keep: bool = True,
) -> Tensor:
    """Draws samples from a model.

    The noise of sample i depends on (seed, first_sample + i) alone, so that the batch size and the number of processes
    change a sample by the rounding of the model's own arithmetic only.

    Args:
        model: any callable (x_t, t) -> output; put it in eval mode first.
        shape: (N, C, ...).
        seed: 0..2^64-1.
        sampler: "ddpm" or "ddim".
        steps: None for all T, else that many evenly spaced ones.
        eta: DDIM's share of noise, 0..1.
        clip: clip each x̂0 to [-1, 1].
        first_sample: global index of the first sample.
        device: of the computation; by default the model's, where it has parameters, else the CPU.
        callback: called as callback(t, x, x̂0) after each step.
        keep: give ``callback`` new tensors at each step; False writes each step over the one before, which saves memory.

    Returns:
        (N, C, ...) float32.

    Raises:
        ValueError: for an unknown sampler, or steps, eta or a shape out of range.
    """
    if len(shape) < 2 or any(size < 1 for size in shape):
        raise ValueError(f"shape must be (N, C, ...) with sizes of at least 1, got {tuple(shape)}")
    if device is None:
        parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
        device = "cpu" if parameter is None else parameter.device
    key = Noise(seed, first_sample=first_sample)
    table = make_table(diffusion, sampler, steps, eta)
    start = key.fold_in(FOLD_SAMPLE_START).materialize(shape, device)
    watched = callback is not None
    for t, x, x_start in sample_loop(model, table, start, key.fold_in(FOLD_SAMPLE_STEPS), clip=clip, keep=watched and keep, with_x_start=watched):
        if callback is not None:
            callback(t, x, x_start)
    return x
