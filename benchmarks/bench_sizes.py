"""Every op against its reference twin from 1 element to 10^8, in one large sample and in samples of 64 elements.

`python benchmarks/bench_sizes.py [largest size]` prints how many times our time the twin takes, and fails where it takes less.
The twin is given a tensor of torch.randn drawn in the call: its own generator of the contract's noise is no rival. One thread,
because a second one waits for whoever else the machine serves, and a slice of its scheduler is longer than most calls.
"""

from __future__ import annotations

import sys

import pytest
import torch
from harness import EAGER, OURS, STEPS, diffusion, timesteps
from measure import alternate, environment, threads_set

from ddpm_fast import Noise, ops
from ddpm_fast.diffusion.parameterisation import bound_table
from ddpm_fast.diffusion.samplers import make_table
from ddpm_fast.ops._gaussian_kl import gaussian_kl_reference
from ddpm_fast.ops._p_step import p_step_reference
from ddpm_fast.ops._q_sample import q_sample_reference
from ddpm_fast.ops._simple_loss import simple_loss_reference
from ddpm_fast.ops._vlb_terms import vlb_terms_reference

KEY = Noise(0)
LARGEST = 10**8
# Of all that the twin keeps for backward, in tensors of the data's size: what does not fit memory is not run.
KEPT = {"q_sample": 4, "simple_loss": 8, "p_step": 24, "gaussian_kl": 40, "vlb_terms": 120, "randn": 20}
MEMORY = 12 * 2**30


def pairs(op: str, shape: tuple[int, ...], backward: bool):
    """(ours, the twin's), as calls without arguments."""
    if op == "randn":
        return lambda: ops.randn(shape, KEY), lambda: ops.randn(shape, KEY, backend="reference")
    draw = lambda: torch.randn(shape)  # noqa: E731
    x, t = torch.rand(shape) * 2 - 1, timesteps(shape[0])
    table = torch.rand(STEPS)
    if op == "q_sample":
        data = x.requires_grad_(backward)
        ours, theirs = lambda: ops.q_sample(data, t, table, table, KEY), lambda: q_sample_reference(data, t, table, table, draw())
    elif op == "simple_loss":
        data, zero = torch.randn(shape).requires_grad_(backward), torch.zeros(STEPS)
        ours = lambda: ops.simple_loss(data, x, t, table, zero, table, KEY)  # noqa: E731
        theirs = lambda: simple_loss_reference(data, x, t, table, zero, table, draw())  # noqa: E731
    elif op == "gaussian_kl":
        data = torch.randn(shape).requires_grad_(backward)
        ours = lambda: ops.gaussian_kl(data, x, x, x, reduction="mean_per_sample")  # noqa: E731
        theirs = lambda: gaussian_kl_reference(data, x, x, x, "mean_per_sample")  # noqa: E731
    else:
        data = torch.randn(shape[0], 2, *shape[2:]).requires_grad_(backward)
        method = diffusion("learned_range")
        if op == "p_step":
            rows = make_table(method).table.float()
            ours = lambda: ops.p_step(x, data, t, rows, KEY, variance="learned_range", x_start=False)[0]  # noqa: E731
            theirs = lambda: p_step_reference(x, data, t, rows, draw(), "learned_range", True)[0]  # noqa: E731
        else:
            rows = bound_table(method.schedule, method.prediction, "learned_range").float()
            ours = lambda: ops.vlb_terms(data, x, x, t, rows, variance="learned_range")  # noqa: E731
            theirs = lambda: vlb_terms_reference(data, x, x, t, rows, "learned_range", False, 256, "tanh", False)  # noqa: E731
    if not backward:
        return ours, theirs
    upstream = torch.ones_like(ours()).detach()
    return tuple(lambda f=f: torch.autograd.grad(f(), data, upstream) for f in (ours, theirs))


def ratio(op: str, shape: tuple[int, ...], backward: bool, rounds: int) -> float:
    ours, theirs = pairs(op, shape, backward)
    results = alternate({OURS: ours, EAGER: theirs}, rounds)
    return results[EAGER].median / results[OURS].median


@pytest.mark.parametrize("op", KEPT)
@pytest.mark.benchmark(group="sizes", min_rounds=5, max_time=0.2)
def test_smallest_size(benchmark, op):
    """The call itself: one element."""
    benchmark(pairs(op, (1, 1, 1), False)[0])


def main(largest: int = LARGEST) -> int:
    print(", ".join(f"{name} {value}" for name, value in environment().items()))
    slower = 0
    for op in KEPT:
        for backward in (False, True)[: 1 if op == "randn" else 2]:
            row = []
            for exponent in range(9):
                for shape in ((1, 1, 10**exponent), (max(10**exponent // 64, 1), 1, 64)):
                    size = shape[0] * shape[2]
                    if size > largest or (4 * size * KEPT[op] > MEMORY and (backward or KEPT[op] >= 20)):
                        continue
                    value = ratio(op, shape, backward, 9 if size < 10**7 else 3)
                    slower += value < 1
                    row.append(f"{shape[0]}x{shape[2]} {value:.2f}{'' if value >= 1 else ' SLOWER'}")
            print(f"{op}{' + backward' if backward else ''}: {', '.join(row)}", flush=True)
    return slower


if __name__ == "__main__":
    with threads_set(1):
        sys.exit(main(*map(int, sys.argv[1:2])) > 0)
