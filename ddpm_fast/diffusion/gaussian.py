"""GaussianDiffusion: the method of Ho et al. 2020 and Nichol & Dhariwal 2021, from a schedule and a parameterisation.

docs/math.md maps each formula to its function here and to the test that proves it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from ddpm_fast import checks, ops
from ddpm_fast._pytorch import lasting
from ddpm_fast.diffusion.parameterisation import (
    PREDICTIONS,
    VARIANCES,
    WEIGHTS,
    bound_table,
    loss_weights,
    target_coefficients,
    x_start_coefficients,
)
from ddpm_fast.diffusion.results import BoundTerms, PMeanVariance
from ddpm_fast.diffusion.samplers import ddpm_table
from ddpm_fast.diffusion.schedules import NoiseSchedule
from ddpm_fast.noise import Noise
from ddpm_fast.ops._common import check_data, check_like, check_t, check_unit_range, gather, table_dtype
from ddpm_fast.ops._output import LEARNED, LEARNED_RANGE, check_output, clipped, guess_x_start, log_variance, split_output
from ddpm_fast.ops._p_step import GUESS_COLUMNS, gather_row
from ddpm_fast.ops._vlb_terms import CDFS, MAX_LEVELS
from ddpm_fast.types import Cdf, Loss, Prediction, Variance, VarianceKind, Weight

Model = Callable[[Tensor, Tensor], Tensor]
LOSSES: tuple[Loss, ...] = get_args(Loss)


class GaussianDiffusion:
    """A forward process and the parameterisation of its reverse.

    Args:
        schedule: the betas.
        prediction: what the model's output is: "epsilon", "x_start", "v" or "mean" (of the posterior).
        variance: of p_θ: "fixed_small" (β̃), "fixed_large" (β), "learned" (the output's second half is the
            log-variance) or "learned_range" (it interpolates between log β̃ and log β).
        levels: grey levels of the data, which set the decoder's bins: 256 for 8-bit images, 17 for the digits.
        cdf: of the decoder: "tanh" as published numbers use, or "erf", exact.

    Tables are computed once in float64 and cast once for each device and dtype that is used.

    ``clip`` is of x̂0, to [-1, 1], before anything else is made of it. A step and a measurement clip unless told otherwise;
    :meth:`vlb_terms`, which is a loss too, clips only where it is told to, and the losses never do: a clipped value has no gradient.

    Raises:
        TypeError, ValueError: for an unknown name, or a schedule that leaves no signal (ᾱ_T = 0 in fp32) for an
            ε-prediction, which could not be solved for x_0.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: Prediction = "epsilon",
        variance: Variance = "fixed_large",
        levels: int = 256,
        *,
        cdf: Cdf = "tanh",
    ) -> None:
        self.schedule = checks.instance("schedule", schedule, NoiseSchedule)
        self.prediction = checks.choice("prediction", prediction, PREDICTIONS)
        self.variance = checks.choice("variance", variance, tuple(VARIANCES))
        self.levels = checks.integer("levels", levels, 2, MAX_LEVELS)
        self.cdf = checks.choice("cdf", cdf, CDFS)
        factors = torch.stack(x_start_coefficients(schedule, prediction)).float()
        if not factors.isfinite().all():
            raise ValueError(
                f"prediction {prediction!r} needs signal at every step, but alphas_bar ends at {schedule.alphas_bar[-1]:.3g} "
                f"({schedule.name})"
            )
        self._tables: dict[tuple[object, ...], Tensor] = {}

    def __len__(self) -> int:
        """T, the number of steps."""
        return len(self.schedule)

    def __repr__(self) -> str:
        return f"GaussianDiffusion({self.schedule!r}, prediction={self.prediction!r}, variance={self.variance!r}, levels={self.levels})"

    @property
    def variance_kind(self) -> VarianceKind:
        """Kind of variance, as the ops treat it: "fixed", "learned" or "learned_range"."""
        return VARIANCES[self.variance]

    @property
    def learns_variance(self) -> bool:
        """True where the model's output must have twice the channels."""
        return self.variance_kind in (LEARNED, LEARNED_RANGE)

    def table(self, name: str, like: Tensor, make: Callable[[], Tensor] | None = None) -> Tensor:
        """A table in the dtype that ops on ``like`` read, on its device; made by ``make`` or an attribute of the schedule."""
        key = name, like.device, table_dtype(like.dtype)
        if key not in self._tables:
            with contextlib.nullcontext() if torch.compiler.is_compiling() else lasting():
                self._tables[key] = (make() if make else getattr(self.schedule, name)).to(key[1], key[2]).contiguous()
        return self._tables[key]

    def model_time(self, t: Tensor) -> Tensor:
        """The time that a model is told at t of this chain: another number where the schedule is a part of the one it was trained on.

        Args:
            t: (N,) int64 in 0..T-1; the values are looked at on the CPU only.

        Returns:
            (N,) int64.
        """
        if checks.tensor("t", t).ndim != 1:
            raise ValueError(f"t must have shape (N,), got {tuple(t.shape)}")
        check_t(t, "t", t, len(self))
        return self._told(t)

    def _told(self, t: Tensor) -> Tensor:
        times = self.schedule.timesteps
        if times[-1] == len(self) - 1:
            return t
        key = "timesteps", t.device
        if key not in self._tables:
            with contextlib.nullcontext() if torch.compiler.is_compiling() else lasting():
                self._tables[key] = times.to(t.device)
        return self._tables[key][t]

    # The forward chain.

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Noise | Tensor, *, out: Tensor | None = None) -> Tensor:
        """Draws x_t ~ q(x_t | x_0) = N(√ᾱ_t x_0, (1-ᾱ_t) I) (Ho et al., eq. 4).

        Args:
            x_start: (N, ...) data in [-1, 1].
            t: (N,) int64 in 0..T-1.
            noise: ε, as :class:`~ddpm_fast.Noise` or a tensor like x_start.
            out: contiguous tensor like x_start to write into, only without gradients.

        Returns:
            x_t like x_start, contiguous; differentiable in x_start and in a noise tensor.
        """
        checks.tensor("x_start", x_start)
        return ops.q_sample(
            x_start, t, self.table("sqrt_alphas_bar", x_start), self.table("sqrt_one_minus_alphas_bar", x_start), noise, out=out
        )

    def q_step(self, x_previous: Tensor, t: Tensor, noise: Noise | Tensor) -> Tensor:
        """Draws x_t ~ q(x_t | x_{t-1}) = N(√(1-β_t) x_{t-1}, β_t I), one step of the chain (Ho et al., eq. 2)."""
        check_data("x_previous", x_previous)
        signal = self.table("sqrt_alphas", x_previous, lambda: self.schedule.alphas.sqrt())
        return ops.q_sample(x_previous, t, signal, self.table("sqrt_betas", x_previous, lambda: self.schedule.betas.sqrt()), noise)

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance (nats) of q(x_t | x_0); the last two broadcast over x_start."""
        check_data("x_start", x_start)
        check_t(t, "x_start", x_start, len(self))
        variance = gather(self.table("one_minus_alphas_bar", x_start), t, x_start)
        return gather(self.table("sqrt_alphas_bar", x_start), t, x_start) * x_start, variance, variance.log()

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance (nats) of q(x_{t-1} | x_t, x_0) (Ho et al., eq. 6 and 7).

        The variance at t = 0 is zero, its log-variance that of t = 1. The last two broadcast over x_start.
        """
        check_data("x_t", x_t)
        check_like("x_start", x_start, "x_t", x_t)
        check_t(t, "x_t", x_t, len(self))
        mean = (
            gather(self.table("posterior_mean_coef1", x_t), t, x_t) * x_start
            + gather(self.table("posterior_mean_coef2", x_t), t, x_t) * x_t
        )
        return mean, gather(self.table("posterior_variance", x_t), t, x_t), gather(self.table("posterior_log_variance", x_t), t, x_t)

    # The reverse chain.

    def p_mean_variance(self, model_output: Tensor, x_t: Tensor, t: Tensor, clip: bool = True) -> PMeanVariance:
        """p_θ(x_{t-1} | x_t) from a model's output.

        Args:
            model_output: (N, C, ...), or (N, 2C, ...) for a learned variance.
            x_t: (N, C, ...).
            t: (N,) int64.
            clip: clip x̂0 to [-1, 1], before the mean is made of it. Where the prediction is the mean itself, the mean is the output
                and x̂0 alone is clipped, as in Ho's code.

        Returns:
            :class:`PMeanVariance`, in fp32 (float64 for float64 data), each of x_t's shape.
        """
        clip = checks.flag("clip", clip)
        check_data("x_t", x_t)
        check_output(model_output, "x_t", x_t, self.variance_kind)
        check_t(t, "x_t", x_t, len(self))
        row = gather_row(self._step_table(x_t), t, x_t)
        prediction, raw = split_output(model_output, x_t)
        x = x_t.to(prediction.dtype)
        x_start = guess(row, x, prediction, clip)
        mean = prediction if self.prediction == "mean" else row["x_start"] * x_start + row["x_t"] * x
        log_var = log_variance(self.variance_kind, row["log_variance_low"], row["log_variance_high"], raw).expand_as(x)
        return PMeanVariance(mean, log_var.exp(), log_var, x_start)

    def p_step(
        self, x_t: Tensor, model_output: Tensor, t: Tensor, noise: Noise | Tensor, clip: bool = True, *, x_next: Tensor | None = None
    ) -> Tensor:
        """Draws x_{t-1} ~ p_θ(x_{t-1} | x_t); at t = 0 returns the mean (Ho et al., algorithm 2).

        Args, Raises: as :meth:`p_mean_variance`; ``noise`` is z, drawn per sample; ``x_next`` is a contiguous tensor like x_t
            to write into, x_t itself if you like, only without gradients.

        Returns:
            x_{t-1} like x_t.
        """
        if noise is None:
            raise TypeError("noise must be a Noise or a tensor, got NoneType")
        table = self._step_table(checks.tensor("x_t", x_t))
        clip = self._clips_mean(clip)
        return ops.p_step(x_t, model_output, t, table, noise, variance=self.variance_kind, clip=clip, x_next=x_next, x_start=False)[0]

    def predict_x_start(self, model_output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x̂0 from a model's output, not clipped, in fp32 (float64 for float64 data)."""
        return self.p_mean_variance(model_output, x_t, t, clip=False).x_start

    def _clips_mean(self, clip: bool) -> bool:
        """True where the mean of p_θ is made of a clipped x̂0: not where it is the output itself."""
        return checks.flag("clip", clip) and self.prediction != "mean"

    def _step_table(self, like: Tensor) -> Tensor:
        return self.table("p_step", like, lambda: ddpm_table(self).table)

    # Losses.

    def target(self, x_start: Tensor, t: Tensor, noise: Noise | Tensor) -> Tensor:
        """The value that the model is to predict for x_t = q_sample(x_start, t, noise); like x_start."""
        return ops.q_sample(x_start, t, *self._target_tables(checks.tensor("x_start", x_start)), noise)

    def simple_loss(
        self,
        model_output: Tensor,
        x_start: Tensor,
        t: Tensor,
        noise: Noise | Tensor,
        *,
        weight: Weight = "uniform",
        gamma: float | None = None,
    ) -> Tensor:
        """Weighted mean squared error of the prediction (Ho et al., eq. 14, for any prediction).

        Args:
            weight: "uniform", "min_snr", "p2" or "vlb".
            gamma: its parameter, see :func:`ddpm_fast.diffusion.parameterisation.loss_weights`.

        Returns:
            (N,), differentiable in the model's output.
        """
        checks.choice("weight", weight, WEIGHTS)
        checks.tensor("x_start", x_start)
        weights = self.table(f"weight_{weight}_{gamma}", x_start, lambda: loss_weights(self.schedule, self.prediction, weight, gamma=gamma))
        return ops.simple_loss(model_output, x_start, t, weights, *self._target_tables(x_start), noise)

    def vlb_terms(
        self, model_output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, clip: bool = False, *, detach_mean: bool = False
    ) -> Tensor:
        """L_t of the bound: the KL divergence of the posterior from p_θ, at t = 0 the decoder's negative log-likelihood.

        Args:
            clip: clip x̂0 to [-1, 1], as :meth:`p_mean_variance` does; not by default, as this is a loss. The bound's own term is with it.
            detach_mean: no gradient to the prediction, only to the variance half.

        Returns:
            (N,) in bits per dimension, differentiable in the model's output.
        """
        table = self.table("bound", checks.tensor("x_t", x_t), lambda: bound_table(self.schedule, self.prediction, self.variance))
        return ops.vlb_terms(
            model_output, x_start, x_t, t, table,
            variance=self.variance_kind, clip=self._clips_mean(clip), levels=self.levels, cdf=self.cdf,
            detach_mean=checks.flag("detach_mean", detach_mean),
        )  # fmt: skip

    def loss(
        self,
        model_output: Tensor,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        noise: Noise | Tensor,
        *,
        kind: Loss = "simple",
        weight: Weight = "uniform",
        gamma: float | None = None,
    ) -> Tensor:
        """A training loss of each sample.

        Args:
            x_t: q_sample(x_start, t, noise).
            kind: "simple"; "vlb": T · L_t in bits per dimension, whose mean over uniform t is the bound without its
                prior; "hybrid": simple + T/1000 · L_t with no gradient from the bound to the prediction, for a learned
                variance (Nichol & Dhariwal 2021, eq. 16; the scale as in their code).
            weight, gamma: of the simple part.

        Returns:
            (N,).
        """
        checks.choice("kind", kind, LOSSES)
        if kind == "hybrid" and not self.learns_variance:
            raise ValueError(f"the hybrid loss trains a learned variance, but this diffusion's is {self.variance!r}")
        if kind == "vlb":
            return len(self) * self.vlb_terms(model_output, x_start, x_t, t)
        simple = self.simple_loss(model_output, x_start, t, noise, weight=weight, gamma=gamma)
        if kind == "simple":
            return simple
        return simple + len(self) / 1000.0 * self.vlb_terms(model_output, x_start, x_t, t, detach_mean=True)

    def _target_tables(self, like: Tensor) -> tuple[Tensor, Tensor]:
        make = partial(target_coefficients, self.schedule, self.prediction)
        return self.table("target_x_start", like, lambda: make()[0]), self.table("target_noise", like, lambda: make()[1])

    # The bound.

    def prior_bpd(self, x_start: Tensor) -> Tensor:
        """L_T = KL(q(x_T | x_0) ‖ N(0, I)) of each sample, (N,) in bits per dimension."""
        check_data("x_start", x_start)
        t = torch.full((x_start.shape[0],), len(self) - 1, device=x_start.device)
        mean, _, log_var = self.q_mean_variance(x_start, t)
        zero = torch.zeros((), dtype=mean.dtype, device=mean.device).view([1] * mean.ndim)
        return ops.gaussian_kl(mean, log_var.to(mean.dtype), zero, zero, reduction="mean_per_sample") / math.log(2.0)

    @torch.no_grad()
    def bits_per_dim(self, model: Model, x_start: Tensor, clip: bool = True, noise: Noise | None = None) -> Tensor:
        """The variational bound on -log p(x_0) of each sample, by one pass of the model for each of the T steps.

        Args:
            model: any callable (x_t, t) -> output.
            x_start: (N, C, ...) data on the grid of ``levels`` values in [-1, 1].
            clip: clip x̂0 to [-1, 1].
            noise: the key of the draws of x_t: step t uses stream t. Noise(0) if None.

        Returns:
            (N,) in bits per dimension: the prior and the sum of all terms, which :meth:`bound_terms` gives one by one.

        Raises:
            TypeError, ValueError: for data that are not finite or not in [-1, 1], a noise that is a tensor, or a model whose output is
                not what the variance asks for.
        """
        bound = self.bound_terms(model, x_start, clip=clip, noise=noise)
        return bound.prior + bound.terms.sum(1)

    @torch.no_grad()
    def bound_terms(
        self,
        model: Model,
        x_start: Tensor,
        timesteps: Iterable[Tensor] | None = None,
        clip: bool = True,
        noise: Noise | None = None,
        *,
        report: Callable[[], object] = lambda: None,
    ) -> BoundTerms:
        """The terms of the bound one by one, all or at chosen t, by one pass of the model for each: the loop under every bound.

        Args:
            model, x_start, clip: as :meth:`bits_per_dim`.
            timesteps: K tensors (N,) int64, one t for each sample; by default all t, 0..T-1, each for every sample.
            noise: the key of the draws of x_t: the k-th tensor of t uses stream k. Noise(0) if None.
            report: called after each pass.

        Returns:
            :class:`BoundTerms`.

        Raises:
            TypeError, ValueError: as :meth:`bits_per_dim`.
        """
        noise = Noise(0) if noise is None else noise
        if not isinstance(noise, Noise):
            raise TypeError(f"noise must be a Noise, which gives each step its own draw, got {type(noise).__name__}")
        checks.function("model", model)
        checks.function("report", report)
        checks.flag("clip", clip)
        check_data("x_start", x_start)
        if timesteps is None:
            timesteps = (torch.full((x_start.shape[0],), step, device=x_start.device) for step in range(len(self)))
        if not isinstance(timesteps, Iterable):
            raise TypeError(f"timesteps must be tensors of t, got {type(timesteps).__name__}")
        check_unit_range("x_start", x_start)
        x_t = torch.empty_like(x_start, memory_format=torch.contiguous_format)
        terms, errors = [], []
        for stream, t in enumerate(timesteps):
            self.q_sample(x_start, t, noise.at(stream=stream), out=x_t)
            model_output = model(x_t, self._told(t))
            terms.append(self.vlb_terms(model_output, x_start, x_t, t, clip))
            errors.append(self.x_start_mse(model_output, x_start, x_t, t, clip))
            report()
        if not terms:
            raise ValueError("timesteps must be one or more tensors of t, got none")
        return BoundTerms(self.prior_bpd(x_start), torch.stack(terms, 1), torch.stack(errors, 1))

    def x_start_mse(self, model_output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, clip: bool = True) -> Tensor:
        """Mean squared error of x̂0, the distortion of x_t as a code of x_0 (Ho et al., section 4.3).

        Returns:
            (N,) in fp32 (float64 for float64 data), on the data's scale, where black and white are 2 apart.
        """
        check_data("x_t", x_t)
        check_like("x_start", x_start, "x_t", x_t)
        check_output(model_output, "x_t", x_t, self.variance_kind)
        check_t(t, "x_t", x_t, len(self))
        checks.flag("clip", clip)
        # Only the two columns that it needs: this runs beside every pass of a model.
        row = gather_row(self._step_table(x_t), t, x_t, GUESS_COLUMNS)
        prediction, _ = split_output(model_output, x_t)
        return (guess(row, x_t.to(prediction.dtype), prediction, clip) - x_start).square_().flatten(1).mean(1)


def guess(row: dict[str, Tensor], x_t: Tensor, prediction: Tensor, clip: bool) -> Tensor:
    """x̂0 from a row of a p_step table."""
    x_start = guess_x_start(row["from_x_t"], row["from_out"], x_t, prediction)
    return clipped(x_start) if clip else x_start
