"""Sampling: the sampler, its step, and the step as a CUDA graph."""

from ddpm_fast.sampling.sampler import Sampler, sample

__all__ = ["Sampler", "sample"]
