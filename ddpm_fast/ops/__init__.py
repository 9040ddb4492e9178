"""The ops, with explicit tables. One file an op: formula, reference twin, backends, autograd rule, public function."""
from ddpm_fast.ops.attention import attention
from ddpm_fast.ops.conv3x3 import conv3x3
from ddpm_fast.ops.gaussian_kl import gaussian_kl
from ddpm_fast.ops.group_norm import group_norm
from ddpm_fast.ops.p_step import p_step
from ddpm_fast.ops.q_sample import q_sample
from ddpm_fast.ops.randn import randn
from ddpm_fast.ops.simple_loss import simple_loss
from ddpm_fast.ops.vlb_terms import discretized_gaussian_log_likelihood, vlb_terms

__all__ = ["attention", "conv3x3", "discretized_gaussian_log_likelihood", "gaussian_kl", "group_norm", "p_step", "q_sample", "randn", "simple_loss", "vlb_terms"]
