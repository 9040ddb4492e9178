"""What every bench_<op>.py shares: a case gives the sides, pytest records them, `main` alternates them and prints ratios."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "support"))  # numerics: the same comparison as in the tests

import peers
from measure import alternate, environment, table, threads_set

from ddpm_fast import GaussianDiffusion, NoiseSchedule

STEPS = 1000
SHAPES = [
    (64, 1, 8, 8),  # a batch of digits: the call itself costs most
    (16, 3, 32, 32),  # CIFAR-10
    (16, 3, 128, 128),  # small photos: memory and arithmetic
]
OURS, EAGER, COMPILED, COPY = "ours", "eager", "torch.compile", "memory copy"


def shape_name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


class Case:
    """One op at one size: its inputs, and each side as a call without arguments.

    A subclass sets ``needed_bytes``, what a call must move, and ``sides``, name to a function that makes the call to
    time; it may raise LookupError where something is missing. ``check`` compares a side's result before it is timed.
    """

    op: str
    needed_bytes: int
    sides: dict[str, Callable[[], Callable[[], object]]]

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)  # the same inputs, and so the same outcome of the checks, in every run
        self.name = name

    def side(self, name: str) -> Callable[[], object]:
        if name == COPY:
            return self.copy()
        return self.sides[name]()

    def check(self, name: str) -> None:
        raise NotImplementedError

    def copy(self) -> Callable[[], object]:
        """A copy that moves as many bytes: half of them read, half written."""
        source = torch.zeros(max(self.needed_bytes // 8, 1))
        target = torch.empty_like(source)
        return lambda: target.copy_(source)


def compiled(function: Callable) -> Callable:
    torch._dynamo.reset()  # past its limit of recompilations it would run eager in silence; fullgraph makes that an error
    return torch.compile(function, dynamic=False, fullgraph=True)


def timesteps(count: int) -> torch.Tensor:
    """(count,) spread over all of time, both ends included: as many at t = 0, whose formula is another, as in training."""
    return torch.linspace(0, STEPS - 1, count).long()


def diffusion(variance: str = "fixed_small") -> GaussianDiffusion:
    return GaussianDiffusion(NoiseSchedule.linear(STEPS), variance=variance)


def main(cases: Iterable[Callable[[], Case]]) -> None:
    """Prints every case's sides at one thread and at all; the first argument of the command line is the number of rounds."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    if rounds < 2:
        sys.exit(f"quartiles need at least 2 rounds, {rounds} asked for")
    print(", ".join(f"{name} {value}" for name, value in environment().items()))
    for threads, make in itertools.product(sorted({1, torch.get_num_threads()}), list(cases)):
        with threads_set(threads):
            case, sides = make(), {}
            for name in (*case.sides, COPY):
                try:
                    sides[name] = case.side(name)
                except LookupError as reason:
                    print(f"  {name} left out: {reason}")
                    continue
                if name != COPY:
                    case.check(name)
            print(f"{case.op} {case.name}, {threads} thread{'s' * (threads > 1)}, {case.needed_bytes} bytes needed")
            print(table(alternate(sides, rounds), OURS, case.needed_bytes), flush=True)


def need(package: str) -> None:
    if peers.missing(package):
        raise LookupError(peers.missing(package))
