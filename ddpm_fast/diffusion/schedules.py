"""Noise schedules: from the betas to every table of the method, in float64. The only place that computes them.

Time index, for the whole library: t runs over 0..T-1, and t = 0 means *one* noising step (the paper's x_1). So
``alphas_bar[t]`` is the product of the first t + 1 alphas, and ``alphas_bar_prev[0]`` is 1.

Formulas: Ho et al. 2020, sections 2 and 3 (https://arxiv.org/abs/2006.11239); cosine: Nichol & Dhariwal 2021, eq. 17
(https://arxiv.org/abs/2102.09672); 1/t: Sohl-Dickstein et al. 2015, section 2.4.1 (https://arxiv.org/abs/1503.03585).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from ddpm_fast import checks
from ddpm_fast.types import ScheduleName

SCHEDULES: tuple[ScheduleName, ...] = get_args(ScheduleName)
MAX_BETA = 0.999  # Nichol & Dhariwal's cap: a larger last step makes x_start unrecoverable from the noise


class NoiseSchedule:
    """The forward process q, given by its betas: one variance for each step.

    Every table is a float64 CPU tensor of shape (T,); :class:`~ddpm_fast.GaussianDiffusion` casts them to the data's
    dtype and device once, after all arithmetic.

    Args:
        betas: (T,) floating-point numbers inside (0, 1). The methods below make the published ones.
        name: of the schedule, for messages.
        timesteps: (T,), the time indices that the model is told; 0..T-1 by default.

    Attributes:
        betas: variance added by step t, in (0, 1).
        alphas: 1 - betas, the share of the signal's variance that step t leaves.
        log_alphas_bar: log of alphas_bar. A long chain leaves so little that a jump over much of it has a beta that rounds to 1,
            and alphas_bar itself may underflow: what follows from their logarithms stays right.
        alphas_bar: share of the signal's variance that is left after step t.
        one_minus_alphas_bar: variance of the noise after step t, without the cancellation of ``1 - alphas_bar``.
        snr, log_snr: signal-to-noise ratio, alphas_bar / (1 - alphas_bar), and its logarithm.
        posterior_variance: variance of q(x_{t-1} | x_t, x_0), eq. 7; zero at t = 0.
        posterior_log_variance: its logarithm, nats; t = 0 takes the value of t = 1, so that it is finite.
        posterior_mean_coef1, posterior_mean_coef2: weights of x_0 and of x_t in that posterior's mean, eq. 7.
        fixed_large_log_variance: log of (posterior_variance[1], betas[1:]): the upper choice of Ho et al., section 3.2.
        timesteps: the time index that the model is told at each row; 0..T-1 unless the schedule was respaced.
    """

    def __init__(self, betas: Tensor | Sequence[float], *, name: str = "betas", timesteps: Tensor | None = None) -> None:
        betas = _as_betas(betas)
        outside = ~((betas > 0) & (betas < 1))  # written so that NaN counts as outside
        if outside.any():
            i = int(outside.nonzero()[0])
            raise ValueError(f"every beta must lie inside (0, 1), got betas[{i}] = {betas[i].item():g} ({name})")
        timesteps = torch.arange(len(betas), device="cpu") if timesteps is None else as_timesteps(timesteps)
        if len(timesteps) != len(betas):
            raise ValueError(f"timesteps must have shape ({len(betas)},), as betas have, got {tuple(timesteps.shape)}")
        self._derive(name, timesteps, betas, 1.0 - betas, torch.log1p(-betas).cumsum(0))

    def _derive(self, name: str, timesteps: Tensor, betas: Tensor, alphas: Tensor, log_alphas_bar: Tensor) -> None:
        self.name, self.timesteps = name, timesteps
        self.betas, self.alphas, self.log_alphas_bar = betas, alphas, log_alphas_bar
        self.alphas_bar = log_alphas_bar.exp()
        self.one_minus_alphas_bar = -torch.expm1(log_alphas_bar)
        one = torch.ones(1, dtype=torch.float64, device="cpu")
        self.alphas_bar_prev = torch.cat([one, self.alphas_bar[:-1]])
        self.one_minus_alphas_bar_prev = torch.cat([0 * one, self.one_minus_alphas_bar[:-1]])
        self.sqrt_alphas_bar = self.alphas_bar.sqrt()
        self.sqrt_one_minus_alphas_bar = self.one_minus_alphas_bar.sqrt()
        self.snr = self.alphas_bar / self.one_minus_alphas_bar
        self.log_snr = log_alphas_bar - self.one_minus_alphas_bar.log()

        self.posterior_variance = betas * self.one_minus_alphas_bar_prev / self.one_minus_alphas_bar
        self.posterior_mean_coef1 = betas * self.alphas_bar_prev.sqrt() / self.one_minus_alphas_bar
        self.posterior_mean_coef2 = self.one_minus_alphas_bar_prev * alphas.sqrt() / self.one_minus_alphas_bar
        # The decoder's variance at t = 0 is not the posterior's (zero) but that of t = 1, as in Ho's code. A schedule
        # of a single step has no t = 1 and takes its beta.
        first = self.posterior_variance[1:2] if len(betas) > 1 else betas[:1]
        self.posterior_log_variance = torch.cat([first, self.posterior_variance[1:]]).log()
        self.fixed_large_log_variance = torch.cat([first, betas[1:]]).log()
        self.log_betas = betas.log()

    def __len__(self) -> int:
        return len(self.betas)

    def __repr__(self) -> str:
        return f"NoiseSchedule({self.name}, T={len(self)}, alphas_bar: {self.alphas_bar[0]:.6f} to {self.alphas_bar[-1]:.3g})"

    @classmethod
    def linear(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, *, rescale: bool = False) -> NoiseSchedule:
        """Betas evenly spaced from ``beta_start`` to ``beta_end`` (Ho et al., section 4).

        Args:
            T: number of steps, at least 1.
            rescale: multiply both ends by 1000 / T, so that a chain of any length destroys the data as much as
                Ho's 1000 steps do (improved-diffusion); it needs T > 20 with the default ends.

        Raises:
            ValueError: where a beta falls outside (0, 1).
        """
        T, name = _steps(T), f"linear({T}{', rescale' if checks.flag('rescale', rescale) else ''})"
        start, end = _ends(name, beta_start, beta_end, 1000.0 / T if rescale else 1.0)
        return cls(_linspace(start, end, T), name=name)

    @classmethod
    def quadratic(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """Betas whose square roots are evenly spaced (Ho's "quad", diffusers' "scaled_linear")."""
        T, name = _steps(T), f"quadratic({T})"
        start, end = _ends(name, beta_start, beta_end)
        return cls(_linspace(math.sqrt(start), math.sqrt(end), T) ** 2, name=name)

    @classmethod
    def constant(cls, T: int = 1000, beta: float = 0.01) -> NoiseSchedule:
        """The same beta at each step."""
        return cls(torch.full((_steps(T),), checks.number("beta", beta), dtype=torch.float64, device="cpu"), name=f"constant({T})")

    @classmethod
    def jsd(cls, T: int = 1000, *, max_beta: float = MAX_BETA) -> NoiseSchedule:
        """beta_t = 1 / (T - t): each step erases the same share of the signal (Sohl-Dickstein et al., section 2.4.1).

        The formula ends at exactly 1, which leaves no signal to predict the noise from; it is capped at ``max_beta``.
        """
        betas = 1.0 / torch.arange(_steps(T), 0, -1, dtype=torch.float64, device="cpu")
        return cls(betas.clamp_max(checks.number("max_beta", max_beta)), name=f"jsd({T})")

    @classmethod
    def sigmoid(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """Betas on a logistic curve from ``beta_start`` to ``beta_end`` over [-6, 6] (Xu et al. 2022, GeoDiff)."""
        T, name = _steps(T), f"sigmoid({T})"
        start, end = _ends(name, beta_start, beta_end)
        return cls(start + (end - start) * torch.sigmoid(_linspace(-6.0, 6.0, T)), name=name)

    @classmethod
    def cosine(cls, T: int = 1000, *, s: float = 0.008, max_beta: float = MAX_BETA) -> NoiseSchedule:
        """alphas_bar follows cos² (Nichol & Dhariwal, eq. 17), each beta at most ``max_beta``."""
        T, s = _steps(T), checks.number("s", s)
        u = (torch.arange(T + 1, dtype=torch.float64, device="cpu") / T + s) / (1 + s)
        alphas_bar = torch.cos(u * (math.pi / 2)) ** 2
        return cls((1 - alphas_bar[1:] / alphas_bar[:-1]).clamp_max(checks.number("max_beta", max_beta)), name=f"cosine({T})")

    @classmethod
    def from_name(cls, name: ScheduleName, T: int, **options: float) -> NoiseSchedule:
        """A schedule by name, one of :data:`SCHEDULES`; ``options`` are its keyword arguments."""
        make: Callable[..., NoiseSchedule] = getattr(cls, checks.choice("schedule", name, SCHEDULES))
        try:
            return make(T, **options)
        except TypeError as error:
            raise ValueError(f"schedule {name!r} does not take these options: {error}") from None

    def respace(self, timesteps: Tensor | Sequence[int]) -> NoiseSchedule:
        """The schedule that visits only ``timesteps`` (ascending) and has the same marginals there.

        Its betas are 1 - alphas_bar[t] / alphas_bar[t_prev], with t_prev taken from the list (Nichol & Dhariwal,
        section 4), so uneven lists are right too.
        """
        timesteps = as_timesteps(timesteps, T=len(self))
        if len(timesteps) == len(self):
            return self
        log_alphas_bar = self.log_alphas_bar[timesteps]
        log_alphas = torch.diff(log_alphas_bar, prepend=torch.zeros(1, dtype=torch.float64, device="cpu"))
        # Not by the constructor, which would go from the betas to these logarithms: those that round to 1 have lost them.
        respaced, name = NoiseSchedule.__new__(NoiseSchedule), f"{self.name}, {len(timesteps)} of {len(self)} steps"
        respaced._derive(name, self.timesteps[timesteps], -torch.expm1(log_alphas), log_alphas.exp(), log_alphas_bar)
        return respaced


def as_timesteps(timesteps: Tensor | Sequence[int], name: str = "timesteps", T: int | None = None) -> Tensor:
    """Time steps as an int64 tensor of shape (S,) on the CPU.

    Args:
        timesteps: a list, an array or a tensor of integers.
        name: the argument's, for messages.
        T: if given, the steps must ascend and lie in 0..T-1.
    """
    try:
        found = torch.as_tensor(timesteps, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{name} must be integers of shape (S,) with S >= 1, got {checks.shown(timesteps)}") from None
    if found.ndim != 1 or found.numel() == 0 or found.dtype == torch.bool or found.is_floating_point() or found.is_complex():
        raise ValueError(f"{name} must be integers of shape (S,) with S >= 1, got {found.dtype} {tuple(found.shape)}")
    found = found.long()
    if T is not None and (found[0] < 0 or found[-1] >= T or (found.diff() <= 0).any()):
        raise ValueError(f"{name} must ascend strictly within 0..{T - 1}, got {found.tolist()}")
    return found


def _as_betas(betas: Tensor | Sequence[float]) -> Tensor:
    """Floating-point betas as a float64 tensor on the CPU, which shares no memory with them and carries no graph."""
    if not isinstance(betas, Tensor):
        try:
            array = np.asarray(betas)
            kind, shape = str(array.dtype), array.shape
            found = torch.from_numpy(array.astype(np.float64)) if array.dtype.kind == "f" else None
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"betas must be floating-point numbers of shape (T,) with T >= 1, got {type(betas).__name__}") from None
    else:
        kind, shape = str(betas.dtype), tuple(betas.shape)
        found = betas.detach().to("cpu", torch.float64, copy=True) if betas.is_floating_point() else None
    if found is None:
        raise ValueError(f"betas must be floating-point numbers, got {kind} {shape}")
    if len(shape) != 1 or found.numel() == 0:
        raise ValueError(f"betas must have shape (T,) with T >= 1, got {shape}")
    return found


def _steps(T: int) -> int:
    return checks.integer("T", T, 1)


def _ends(name: str, start: float, end: float, scale: float = 1.0) -> tuple[float, float]:
    start, end = scale * checks.number("beta_start", start), scale * checks.number("beta_end", end)
    if not (0.0 < start < 1.0 and 0.0 < end < 1.0):
        raise ValueError(
            f"the betas of {name} must lie inside (0, 1), but run from {start:g} to {end:g}: take more steps, smaller betas or the "
            "cosine schedule"
        )
    return start, end


def _linspace(start: float, end: float, steps: int) -> Tensor:
    return torch.linspace(start, end, steps, dtype=torch.float64, device="cpu")
