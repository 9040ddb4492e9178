"""Samplers of the time steps t in training: "uniform", "stratified" or "loss_aware".

The loss is a sum over all t, estimated from one t for each image. Any distribution p_t > 0 gives an unbiased estimate if a sample's
loss is weighted by 1 / (T p_t). The estimate's variance is least for p_t in proportion to sqrt(E[L_t²]) (Nichol & Dhariwal 2021,
section 3.3, eq. 18).

Draws depend on (seed, step, state) only. Everything stays on the device: no value is read back, no shape depends on data, and
no sum or scatter depends on the order in which a GPU works.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddpm_fast.noise import Noise
from ddpm_fast.types import TimestepSampler

HISTORY = 10  # losses of each t that E[L_t²] is the mean of, as published
UNIFORM_SHARE = 0.001  # of p, so that no weight exceeds 1000 (improved-diffusion, resample.py)
_GRID = 2.0**32  # Noise.uniform gives multiples of its inverse


class UniformTimesteps(nn.Module):
    """Independent draws, each t as likely as any other.

    It is a module so that its buffers, the sampler's state, can be saved by ``state_dict`` and loaded by ``load_into``.

    Args:
        timesteps: T, the length of the chain.
        batch: N, how many t a step needs.
        noise: the key of the draws; step s uses stream s.
        device: of the draws and of the state.
    """

    def __init__(self, timesteps: int, batch: int, noise: Noise, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.T, self.batch, self.noise, self.device = timesteps, batch, noise, torch.device(device)

    def draw(self, step: int) -> tuple[Tensor, Tensor | None]:
        """The t of a step's batch.

        Args:
            step: 0..2^32-1, optimiser steps done before.

        Returns:
            t, (N,) int64 in 0..T-1, and the factor of each sample's loss, (N,) float32, or None where all are 1.
        """
        return self.noise.at(stream=step).integers(self.batch, self.T, self.device), None

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Learns from a step's losses (nothing here).

        Args:
            t: (N,) int64, as drawn.
            losses: (N,) each sample's loss at its t, without the factor and without gradient.
        """

    def strata(self, step: int) -> Tensor:
        """(N,) float64, where number n is uniform in [n, n + 1). Divided by N they are spread evenly over [0, 1)."""
        offset = torch.arange(self.batch, dtype=torch.float64, device=self.device)
        return offset + self.noise.at(stream=step).uniform(self.batch, self.device)


class StratifiedTimesteps(UniformTimesteps):
    """Each t as likely as any other, but a batch's spread evenly: sample n draws from the n-th of N equal parts of 0..T-1."""

    def draw(self, step: int) -> tuple[Tensor, Tensor | None]:
        return (self.strata(step) * (self.T / self.batch)).long().clamp_max(self.T - 1), None


class LossAwareTimesteps(UniformTimesteps):
    """p_t in proportion to sqrt(E[L_t²]), from the last 10 losses of each t; uniform until every t has 10.

    Nichol & Dhariwal 2021, eq. 18, mixed with a uniform share of 0.001 as in their code. Unlike there, the N numbers that choose a
    batch's t are spread evenly over [0, 1), which leaves p as it is and takes more variance away.

    L_t is whichever loss the run minimises: T times the bound's term for "vlb", as published, but the whole weighted sum for "simple"
    and "hybrid", because it is the variance of that estimate that is to fall.

    Attributes:
        losses: (T, 10) float32, the last losses of each t, oldest first; zeros before the first.
        seen: (T,) int64, how many of them there are.
    """

    losses: Tensor
    seen: Tensor

    def __init__(self, timesteps: int, batch: int, noise: Noise, device: torch.device | str = "cpu") -> None:
        super().__init__(timesteps, batch, noise, device)
        self.register_buffer("losses", torch.zeros(timesteps, HISTORY, device=device))
        self.register_buffer("seen", torch.zeros(timesteps, dtype=torch.int64, device=device))

    def cdf(self) -> Tensor:
        """P(t <= k) for each k: (T,) float64, rising multiples of 2^-32 that end in exactly 1.

        The numbers of :meth:`Noise.uniform` are multiples of 2^-32 too, so the difference of two entries is exactly the probability of t.
        """
        root = self.losses.double().square().mean(1).sqrt()
        total = root.sum()
        # If all losses are zero, no t needs more draws than another.
        aware = (self.seen == HISTORY).all() & (total > 0)
        # Filled, as torch.where would first copy a Python number to the device, and wait.
        p = ((1.0 - UNIFORM_SHARE) * root / total + UNIFORM_SHARE / self.T).masked_fill(~aware, 1.0 / self.T)
        # Summed as integers: a GPU adds floats up in an order that changes from call to call.
        mass = (p * 2.0**52).long().cumsum(0).double()
        return (mass * (_GRID / mass[-1])).round() / _GRID

    def draw(self, step: int) -> tuple[Tensor, Tensor | None]:
        return self.invert(self.strata(step) / self.batch)

    def invert(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The t, (N,) int64, whose part of [0, 1) each u, (N,) float64, lies in, and its weight 1 / (T p_t), (N,) float32."""
        cdf = self.cdf()
        p = torch.diff(cdf, prepend=cdf.new_zeros(1))
        t = torch.searchsorted(cdf, u, right=True).clamp_max(self.T - 1)  # u = 1 would be beyond the last edge
        return t, (1.0 / (self.T * p[t])).float()

    @torch.no_grad()
    def update(self, t: Tensor, losses: Tensor) -> None:
        """Appends each sample's loss to the history of its t, in the order of the batch; losses that are not finite are left out.

        Args: as :meth:`UniformTimesteps.update`.
        """
        losses = losses.float()
        # A NaN would make p NaN from then on. Samples with such losses get the key T, which sorts them behind all t.
        key, order = t.masked_fill(~losses.isfinite(), self.T).sort(stable=True)
        losses, every_t = losses[order], torch.arange(self.T, device=key.device)
        first = torch.searchsorted(key, every_t)
        new = torch.searchsorted(key, every_t, right=True) - first
        # Column k of the old history followed by the new losses, the last 10 of it: gathered, as scatters of equal t would race.
        k = torch.arange(HISTORY, device=key.device) + new[:, None]
        appended = losses[(first[:, None] + k - HISTORY).clamp(0, len(losses) - 1)]
        self.losses.copy_(torch.where(k < HISTORY, self.losses.gather(1, k.clamp_max(HISTORY - 1)), appended))
        self.seen.add_(new).clamp_max_(HISTORY)


TIMESTEP_SAMPLERS: dict[TimestepSampler, type[UniformTimesteps]] = {
    "uniform": UniformTimesteps,
    "stratified": StratifiedTimesteps,
    "loss_aware": LossAwareTimesteps,
}
