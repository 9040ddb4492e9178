"""The ops, with explicit tables. One file an op: formula, reference twin, backends, autograd rule, public function."""

from ddpm_fast.ops._attention import attention
from ddpm_fast.ops._conv3x3 import conv3x3
from ddpm_fast.ops._gaussian_kl import gaussian_kl
from ddpm_fast.ops._group_norm import group_norm
from ddpm_fast.ops._p_step import p_step
from ddpm_fast.ops._q_sample import q_sample
from ddpm_fast.ops._randn import randn
from ddpm_fast.ops._simple_loss import simple_loss
from ddpm_fast.ops._vlb_terms import discretized_gaussian_log_likelihood, vlb_terms

__all__ = [
    "attention",
    "conv3x3",
    "discretized_gaussian_log_likelihood",
    "gaussian_kl",
    "group_norm",
    "p_step",
    "q_sample",
    "randn",
    "simple_loss",
    "vlb_terms",
]
