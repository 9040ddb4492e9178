"""Every kernel's loops are vectorised: one that the compiler leaves scalar takes 4 times (SSE) to 13 times (AVX-512) as long.

Measured against randn on the same instruction set, whose products are written with vector types and cannot be left scalar: the
ratio is that of instructions, whatever the machine. Fastest of several alternating calls, so that a neighbour does not matter.
"""
from __future__ import annotations

import time

import pytest
import torch

from ddpm_fast import GaussianDiffusion, Noise, NoiseSchedule
from ddpm_fast.ops import gaussian_kl, p_step, q_sample, randn, simple_loss, vlb_terms
from ddpm_fast.step_tables import make_table
from ddpm_fast.tables import bound_table

SHAPE = (16, 3, 64, 64)
KEY = Noise(0)
T = 10


def calls():
    """name -> (call, how many times as long as randn it may take, its upstream where it is to be differentiated)."""
    n = SHAPE[0]
    x, other, third = (torch.randn(SHAPE) for _ in range(3))
    on_grid = torch.randint(256, SHAPE) / 127.5 - 1
    t, first, table, target = torch.arange(n) % (T - 1) + 1, torch.zeros(n, dtype=torch.int64), torch.rand(T), torch.empty(SHAPE)
    found = {
        "q_sample": (lambda: q_sample(x, t, table, table, KEY, out=target), 2.0),
        "simple_loss": (lambda: simple_loss(x, other, t, table, table, table, KEY), 2.0),
        "gaussian_kl": (lambda: gaussian_kl(x, other, third, x, reduction="mean_per_sample"), 2.0),
    }
    for variance in ("fixed_large", "learned", "learned_range"):
        method = GaussianDiffusion(NoiseSchedule.linear(T, 1e-3, 0.3), variance=variance)
        out = x if variance == "fixed_large" else torch.cat([x, other - 3], 1)
        steps, bound = make_table(method).table.float(), bound_table(method.schedule, "epsilon", variance).float()
        kind = method.variance_kind
        found[f"p_step, {variance}"] = (lambda o=out, s=steps, k=kind: p_step(other, o, t, s, KEY, variance=k, x_next=target, x_start=False), 3.0)
        for name, rows, cdf, limit in (("divergence", t, "tanh", 3.0), ("decoder, tanh", first, "tanh", 10.0), ("decoder, erf", first, "erf", 15.0)):
            for wanted in (False, True):
                leaf = out.clone().requires_grad_(wanted)
                call = lambda o=leaf, b=bound, k=kind, r=rows, c=cdf: vlb_terms(o, on_grid, x, r, b, variance=k, cdf=c)  # noqa: E731
                found[f"vlb_terms, {variance}, {name}{' with its gradient' * wanted}"] = (call, limit)
    return found


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.mark.parametrize("name", calls())
def test_takes_no_longer_than_vector_instructions_do(name, isa):
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        (call, limit), target = calls()[name], torch.empty(SHAPE)
        draw = lambda: randn(SHAPE, KEY, out=target)  # noqa: E731
        call(), draw()
        times = [(seconds(call), seconds(draw)) for _ in range(7)]
    finally:
        torch.set_num_threads(threads)
    ours, drawn = (min(column) for column in zip(*times, strict=True))
    assert ours < limit * drawn, f"{name} takes {ours / drawn:.1f} times as long as randn on {isa}: its loop may not be vectorised"
