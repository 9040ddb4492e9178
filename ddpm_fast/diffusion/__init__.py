"""The method: schedules, what networks predict, the process and its bound, and samplers as tables."""

from ddpm_fast.diffusion.gaussian import GaussianDiffusion
from ddpm_fast.diffusion.results import BoundTerms, PMeanVariance
from ddpm_fast.diffusion.schedules import NoiseSchedule

__all__ = ["BoundTerms", "GaussianDiffusion", "NoiseSchedule", "PMeanVariance"]
