"""Samplers as tables: each is a list of time steps and, for each, the coefficients that :func:`ddpm_fast.ops.p_step` reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, cast, get_args

import numpy as np
import torch
from torch import Tensor

from ddpm_fast import checks
from ddpm_fast.diffusion.parameterisation import VARIANCES, log_variance_range, x_start_coefficients
from ddpm_fast.diffusion.schedules import NoiseSchedule, as_timesteps
from ddpm_fast.ops._output import FIXED
from ddpm_fast.ops._p_step import COLUMNS
from ddpm_fast.types import Prediction, SamplerName, Spacing, Variance, VarianceKind

SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)
SPACINGS: tuple[Spacing, ...] = get_args(Spacing)


class Chain(Protocol):
    """Parts that a sampler's table is made from: those of :class:`~ddpm_fast.GaussianDiffusion`, or of anything that has these three."""

    @property
    def schedule(self) -> NoiseSchedule: ...
    @property
    def prediction(self) -> Prediction: ...
    @property
    def variance(self) -> Variance: ...


@dataclass(frozen=True)
class StepTable:
    """A sampler: rows in the order of time, so that sampling walks them from the last to the first.

    Attributes:
        table: (S, 8) float64, columns as COLUMNS in ddpm_fast/ops/_p_step.py.
        timesteps: (S,) int64, the t that the model is told at each row.
        chain_times: (S,) int64, the time in the diffusion's own chain, which differs from ``timesteps`` if its schedule was respaced.
        variance: how the log-variance columns are read.
        output_is_mean: true if the model's output is the step's mean itself, which is not changed when x̂0 is clipped.
    """

    table: Tensor
    timesteps: Tensor
    chain_times: Tensor
    variance: VarianceKind
    output_is_mean: bool = False

    def __len__(self) -> int:
        """S, the number of steps."""
        return len(self.timesteps)

    @cached_property
    def multistep(self) -> bool:
        """True where a step reads x̂0 of the step before."""
        return bool((self.table[:, COLUMNS.index("previous")] != 0).any())

    @cached_property
    def draws(self) -> bool:
        """True where any step takes noise."""
        return bool((self.table[:, COLUMNS.index("noise")] != 0).any())


def spaced_timesteps(T: int, steps: int, spacing: Spacing = "even", log_snr: Tensor | None = None) -> Tensor:
    """``steps`` time indices from 0 to T-1, both ends included (the last alone if steps is 1), all different.

    Args:
        T: length of the chain.
        steps: 1..T.
        spacing: "even"; "quadratic", dense near the data (Song et al. 2021, appendix D.2); or "logsnr", even in the
            logarithm of the signal-to-noise ratio, which multistep solvers are exact in (Lu et al. 2022).
        log_snr: (T,), falling, for "logsnr".

    Returns:
        (steps,) int64, ascending.
    """
    T = checks.integer("T", T, 1)
    steps = checks.integer("steps", steps, 1, T)
    checks.choice("spacing", spacing, SPACINGS)
    if steps == 1:
        return torch.tensor([T - 1], device="cpu")
    if spacing == "logsnr":
        if log_snr is None:
            raise ValueError("spacing 'logsnr' needs log_snr, the schedule's")
        wanted = torch.linspace(float(log_snr[0]), float(log_snr[-1]), steps, dtype=torch.float64, device="cpu")
        above = torch.searchsorted(-log_snr, -wanted).clamp(1, T - 1)
        nearer = wanted - log_snr[above] > log_snr[above - 1] - wanted
        chosen = above - nearer.long()
    else:
        power = 2 if spacing == "quadratic" else 1
        chosen = torch.linspace(0, (T - 1) ** (1 / power), steps, dtype=torch.float64, device="cpu").pow(power).round().long()
    # Where the wish is for less than one step of the chain, every step of it is taken.
    place = torch.arange(steps, device="cpu")
    return (chosen - place).cummax(0).values.clamp_max(T - steps) + place


def ddpm_table(chain: Chain, timesteps: Tensor | Sequence[int] | None = None) -> StepTable:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), on all steps or on the ascending ``timesteps`` alone.

    A part of the steps is sampled through the respaced schedule, whose posterior and variances belong to the jump
    from one listed step to the one before (Nichol & Dhariwal 2021, section 4). On all steps a model that predicts the mean gives that
    of the step; on a part of them it is that of another step, and the mean comes from x̂0 as it does for the other predictions.
    """
    schedule = _respaced(chain, timesteps)
    noise = torch.ones(len(schedule), dtype=torch.float64, device="cpu")
    noise[0] = 0.0  # the last step returns the mean
    low, high = log_variance_range(schedule, chain.variance)
    table = _table(
        chain,
        timesteps,
        schedule,
        schedule.posterior_mean_coef1,
        schedule.posterior_mean_coef2,
        None,
        low,
        high,
        noise,
        VARIANCES[chain.variance],
    )
    return replace(table, output_is_mean=chain.prediction == "mean" and schedule is chain.schedule)


def ddim_table(chain: Chain, timesteps: Tensor | Sequence[int] | None = None, eta: float = 0.0) -> StepTable:
    """DDIM (Song et al. 2021, eq. 12 and 16, https://arxiv.org/abs/2010.02502).

    ε is derived again from the clipped x̂0, which folds it into the weights of x̂0 and x_t. ``eta`` = 0 is deterministic,
    1 has the variance of ancestral sampling; a learned variance is not used.
    """
    eta = checks.number("eta", eta, "lie in [0, 1]")
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    schedule = _respaced(chain, timesteps)
    rest, variance = schedule.one_minus_alphas_bar_prev, eta**2 * schedule.posterior_variance
    # √((1-ᾱ_{t-1}) - η² β̃) / √(1-ᾱ), with 1-ᾱ = β + α (1-ᾱ_{t-1}) put in: a sum, where the difference would cancel.
    direction = (rest * ((1.0 - eta**2) * schedule.betas + schedule.alphas * rest)).sqrt() / schedule.one_minus_alphas_bar
    from_x_start = schedule.alphas_bar_prev.sqrt() - direction * schedule.sqrt_alphas_bar
    log_var = variance.clamp_min(torch.finfo(torch.float32).tiny).log()
    return _table(chain, timesteps, schedule, from_x_start, direction, None, log_var, log_var, (variance > 0).double(), FIXED)


def dpm_solver_table(chain: Chain, timesteps: Tensor | Sequence[int] | None = None) -> StepTable:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2, https://arxiv.org/abs/2211.01095): second order, deterministic.

    From t to s, with λ = log(√ᾱ / √(1-ᾱ)), h = λ_s - λ_t and r = (h of the step before) / h::

        x_s = σ_s/σ_t x_t - √ᾱ_s (e^-h - 1) ((1 + 1/2r) x̂0 - 1/2r x̂0_before)

    The first step has no history, and the last one ends in the data, where h is infinite: both are of first order, and the
    last returns x̂0. A learned variance is not used.
    """
    schedule = _respaced(chain, timesteps)
    signal, sigma = schedule.sqrt_alphas_bar, schedule.sqrt_one_minus_alphas_bar
    half_log_snr = 0.5 * schedule.log_snr
    zero = torch.zeros_like(signal)
    step = half_log_snr[:-1] - half_log_snr[1:]  # entry k is of row k + 1, which goes to the time of row k
    ends = torch.ones(1, dtype=torch.float64, device="cpu")
    from_x_start = torch.cat([ends, -signal[:-1] * torch.expm1(-step)])
    from_x_t = torch.cat([0 * ends, sigma[:-1] / sigma[1:]])
    previous = zero.clone()
    if len(schedule) > 2:
        ratio = step[1:] / step[:-1]  # of rows 1 .. S-2: the step before, that of the next row, over this one
        previous[1:-1] = -from_x_start[1:-1] / (2.0 * ratio)
    return _table(chain, timesteps, schedule, from_x_start - previous, from_x_t, previous, zero, zero, zero, FIXED)


def make_table(
    chain: Chain,
    sampler: SamplerName = "ddpm",
    steps: int | Sequence[int] | Tensor | None = None,
    eta: float = 0.0,
    spacing: Spacing = "even",
) -> StepTable:
    """The table of a sampler by name.

    Args:
        sampler: "ddpm", "ddim" or "dpmpp_2m".
        steps: None for all T; a number, spaced as :func:`spaced_timesteps` does; or the ascending list itself, in 0..T-1, which may
            be an array or a tensor.
        eta: DDIM's share of noise, 0..1.
        spacing: of a number of steps.

    Raises:
        ValueError: for an unknown name, or what is out of range.
    """
    checks.choice("sampler", sampler, SAMPLERS)
    checks.choice("spacing", spacing, SPACINGS)
    if checks.number("eta", eta, "lie in [0, 1]") and sampler != "ddim":
        raise ValueError(f"eta is a part of sampler 'ddim', got {eta} for {sampler!r}")
    T = len(chain.schedule)
    listed = isinstance(steps, (Sequence, np.ndarray, Tensor)) and not isinstance(steps, str) and getattr(steps, "ndim", 1) > 0
    if (steps is None or listed) and spacing != "even":
        raise ValueError(f"spacing is of a number of steps, got {spacing!r} for {'a list of them' if listed else 'all of them'}")
    if listed:
        chosen = as_timesteps(cast("Tensor | Sequence[int]", steps), "steps", T)
    else:
        chosen = spaced_timesteps(T, T if steps is None else cast(int, steps), spacing, chain.schedule.log_snr)
    timesteps = None if torch.equal(chosen, torch.arange(T, device="cpu")) else chosen
    if sampler == "ddim":
        return ddim_table(chain, timesteps, eta)
    return ddpm_table(chain, timesteps) if sampler == "ddpm" else dpm_solver_table(chain, timesteps)


def start_row(table: StepTable, t: int) -> int:
    """The row to start from for a state with the noise of time ``t`` of the chain: the last one that is not later."""
    if t < table.chain_times[0]:
        raise ValueError(f"t must be at least the first of the sampler's time steps, {int(table.chain_times[0])}, got {t}")
    return int((table.chain_times <= t).sum()) - 1


def _respaced(chain: Chain, timesteps: Tensor | Sequence[int] | None) -> NoiseSchedule:
    return chain.schedule if timesteps is None else chain.schedule.respace(timesteps)


def _table(
    chain: Chain,
    timesteps: Tensor | Sequence[int] | None,
    schedule: NoiseSchedule,
    x_start: Tensor,
    x_t: Tensor,
    previous: Tensor | None,
    low: Tensor,
    high: Tensor,
    noise: Tensor,
    variance: VarianceKind,
) -> StepTable:
    """x̂0 comes from the schedule that the model was trained on: only where the step goes depends on its length."""
    times = torch.arange(len(chain.schedule), device="cpu") if timesteps is None else as_timesteps(timesteps)
    previous = torch.zeros_like(x_t) if previous is None else previous
    columns = [column[times] for column in x_start_coefficients(chain.schedule, chain.prediction)] + [
        x_start,
        x_t,
        previous,
        low,
        high,
        noise,
    ]
    return StepTable(torch.stack(columns, 1), schedule.timesteps, times, variance)
