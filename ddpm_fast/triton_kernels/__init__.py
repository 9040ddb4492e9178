"""Triton kernels of the diffusion math and their launchers, one file an op. They need no GPU to be imported or compiled.

Formulas are csrc/common's, operation by operation and compiled without contraction: elementwise results have the bits of the
CPU kernels. ``_launch.py`` says how work is cut into programs.
"""
