"""q_sample beside eager PyTorch, torch.compile, diffusers and a memory copy of the same bytes. Everyone draws their own noise.

`pytest benchmarks/bench_q_sample.py` records; `python benchmarks/bench_q_sample.py` alternates the sides and prints ratios,
which are the figures to trust on a machine that is not alone.
"""
from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

from ddpm_fast import Noise, NoiseSchedule
from ddpm_fast.ops import q_sample

if __name__ == "__main__":  # pytest has them on the path
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

import peers
from measure import alternate, environment, table, threads_set
from numerics import assert_as_accurate, assert_close_to_exact

STEPS = 1000
SHAPES = [
    (64, 1, 8, 8),  # a batch of digits: the call itself costs most
    (16, 3, 32, 32),  # CIFAR-10
    (16, 3, 128, 128),  # small photos: memory and arithmetic
]
SIDES = ["ours", "eager", "torch.compile", "diffusers", "memory copy"]


def eager(x, t, signal, sigma, noise=None):
    """What is written without a library."""
    noise = torch.randn_like(x) if noise is None else noise
    return signal[t].view(-1, 1, 1, 1) * x + sigma[t].view(-1, 1, 1, 1) * noise


class Case:
    """Inputs of one size, and each side as a call without arguments."""

    def __init__(self, shape):
        schedule = NoiseSchedule.linear(STEPS)
        self.betas = schedule.betas
        alphas_bar = torch.cumprod(1 - self.betas, 0)
        self.exact_tables = alphas_bar.sqrt(), (1 - alphas_bar).sqrt()
        self.x = torch.rand(shape) * 2 - 1
        self.arguments = self.x, torch.linspace(0, STEPS - 1, shape[0]).long(), *(table.float() for table in self.exact_tables)
        torch._dynamo.reset()  # past its limit of recompilations it would run eager in silence; fullgraph makes that an error
        self.compiled = torch.compile(eager, dynamic=False, fullgraph=True)
        self.needed_bytes = 2 * self.x.numel() * self.x.element_size()  # x_start in, x_t out

    def side(self, name):
        """The call to time. Raises LookupError where a peer is missing."""
        x, t, *_ = self.arguments
        if name == "ours":
            steps = itertools.count()
            return lambda: q_sample(*self.arguments, Noise(seed=0, stream=next(steps) & 0xFFFFFFFF))
        if name == "memory copy":
            out = torch.empty_like(x)
            return lambda: out.copy_(x)
        if name == "diffusers":
            if peers.missing("diffusers"):
                raise LookupError(peers.missing("diffusers"))
            add_noise = peers.diffusers_add_noise(self.betas)
            return lambda: add_noise(x, torch.randn_like(x), t)
        return lambda: {"eager": eager, "torch.compile": self.compiled}[name](*self.arguments)

    def check(self, name):
        """A side's formula on one given noise, against float64."""
        x, t, *_ = self.arguments
        key = Noise(seed=0)
        noise = key.materialize(x.shape)
        exact = eager(x.double(), t, *self.exact_tables, noise.double())
        baseline = eager(*self.arguments, noise)
        if name == "ours":
            assert_as_accurate(q_sample(*self.arguments, key), baseline, exact, what=name)
        elif name == "torch.compile":
            assert_as_accurate(self.compiled(*self.arguments, noise), baseline, exact, what=name)
        elif name == "diffusers":
            # It subtracts ᾱ from 1 in fp32: at t = 0 half an ulp of 1 in 1e-4, halved by the root.
            allowed = 2.0**-24 / (2 * 1e-2)
            assert_close_to_exact(peers.diffusers_add_noise(self.betas)(x, noise, t), exact, rtol=1e-5, atol=6 * allowed, what=name)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.benchmark(group="q_sample", min_rounds=20, max_time=0.5)
def test_q_sample(timed, shape, side):
    case = Case(shape)
    try:
        function = case.side(side)
    except LookupError as reason:
        pytest.skip(str(reason))
    case.check(side)
    function()
    timed(function, case.needed_bytes)


def main(rounds: int = 40) -> None:
    print(", ".join(f"{name} {value}" for name, value in environment().items()))
    for threads, shape in itertools.product(sorted({1, torch.get_num_threads()}), SHAPES):
        with threads_set(threads):
            case, sides = Case(shape), {}
            for name in SIDES:
                try:
                    sides[name] = case.side(name)
                except LookupError as reason:
                    print(f"  {name} left out: {reason}")
                    continue
                case.check(name)
            print(f"q_sample {'x'.join(map(str, shape))} float32, {threads} thread{'s' * (threads > 1)}, {case.needed_bytes} bytes needed")
            print(table(alternate(sides, rounds), "ours", case.needed_bytes), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
