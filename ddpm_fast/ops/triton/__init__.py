"""Triton kernels of the diffusion math and their launchers, one file an op. They need no GPU to be imported or compiled.

Formulas are csrc/common's, operation by operation and compiled without contraction: noise, q_sample, p_step and elementwise
gaussian_kl have the bits of the CPU kernels, forward and backward, but for the payload of a NaN; so have the elementwise
gradients of the losses those that the CPU's backward computes (in fp32 its forward writes them ahead, rounded otherwise).
``_launch.py`` says how work is cut into programs.
"""
