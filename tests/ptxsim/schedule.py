"""In which order threads run, and what hardware leaves undefined: choices that the results of a right kernel do not depend on.

A schedule is written ORDER or ORDER:SEED. Orders:

    in order    all threads at the lowest PC, so that what diverged meets again
    reversed    the last warp that can run, its threads at the highest PC first, until it must wait
    random      warps have random ranks, and those of the lowest rank run; before a memory access and at a branch the ranks
                may be drawn anew, and others go on

With a seed, registers, shared and local memory and unwritten global memory begin as garbage (NaN, where it is read as a
float), cp.async reads its source when it is waited for instead of at issue, and the results of approximate instructions
are an ulp off.
"""

from __future__ import annotations

import bisect
import os

import numpy as np

from .core import F32, U32, U64
from .memory import ALLOCATED, INITIALISED

VARIABLE = "PTXSIM_SCHEDULE"  # the environment's choice for launches that do not name one
NEVER = 1 << 60


class InOrder:
    def take(self, m):
        """(pc, mask) of the threads that run next, taken out of m.ready."""
        pc = min(m.ready)
        return pc, m.ready.pop(pc)

    def limit(self, m, pc, jumped):
        """The PC before which they stop to let others run."""
        return min(m.ready, default=NEVER)


class Reversed:
    def take(self, m):
        last = {pc: np.flatnonzero(mask.reshape(m.ctas, -1).any(axis=0))[-1] >> 5 for pc, mask in m.ready.items()}
        pc = max(last, key=lambda pc: (last[pc], pc))
        return pc, take(m, pc, m.who >> 5 == last[pc])

    def limit(self, m, pc, jumped):
        return NEVER


class Random:
    def __init__(self, kernel, seed):
        self.rng, self.ranks = np.random.default_rng(seed), None  # of the warps; the lowest goes first
        self.memory = [pc for pc, (ins, _) in enumerate(kernel.flat) if ins.op[0] in MEMORY and "param" not in ins.op]

    def take(self, m):
        if self.ranks is None or len(self.ranks) != m.total // 32 or self.rng.random() < REDRAW:
            self.ranks = self.rng.integers(0, 3, m.total // 32)
        ready = {pc: self.ranks[mask.reshape(-1, 32).any(axis=1)].min() for pc, mask in sorted(m.ready.items())}
        first = min(ready.values())
        pc = self.rng.choice([pc for pc, rank in ready.items() if rank == first]).item()
        return pc, take(m, pc, np.repeat(self.ranks == first, 32))

    def limit(self, m, pc, jumped):
        after = bisect.bisect_right(self.memory, pc)
        return pc if jumped else self.memory[after] if after < len(self.memory) else NEVER


REDRAW = 1 / 8  # chance of new ranks at a point where warps may be pre-empted
MEMORY = {"ld", "ldu", "st", "atom", "red", "cp", "ldmatrix", "stmatrix", "wmma"}


def take(m, pc, chosen):
    mask = m.ready.pop(pc)
    if (mask & ~chosen).any():
        m.ready[pc] = mask & ~chosen
    return mask & chosen


def parse(text, kernel):
    """(order, seed or None) of a schedule's text; None: what the environment says, else in order."""
    name, _, seed = (text or os.environ.get(VARIABLE) or "in order").partition(":")
    seed = int(seed) if seed else None
    orders = {"in order": InOrder, "reversed": Reversed, "random": lambda: Random(kernel, seed or 0)}
    if name not in orders:
        raise ValueError(f"a schedule is one of {', '.join(orders)}, with :SEED or without, got {text or os.environ[VARIABLE]!r}")
    return orders[name](), seed


def garbage(seed, width):
    """A register's undefined contents: NaN as fp32, another word for each seed."""
    word = 0x7FC00001 + (seed * 0x9E3779B1 & 0x3FFFFF)
    return np.array([seed % 2 == 0]) if width == 1 else np.array([word * 0x100000001 & (1 << 8 * width) - 1], f"u{width}")


def fill(space, seed):
    """Garbage in all bytes of a space that nothing has written."""
    word = garbage(seed, 4)
    where = space.state & (ALLOCATED | INITIALISED) == ALLOCATED
    space.data[where] = np.broadcast_to(word, len(space.data) // 4).copy().view(np.uint8)[where]


def nudge(out, args, seed, most):
    """float32 results moved by -1, 0 or 1 ulp, by a hash of the operands; not past `most` in magnitude.

    Zeros, infinities, NaN and what comes of them stay, as the ISA's tables of special values say.
    """
    key = sum((x.view(U32).astype(U64) * np.uint64(odd) for x, odd in zip(args, (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F))), np.uint64(seed))
    key = (key ^ key >> np.uint64(29)) * np.uint64(0xBF58476D1CE4E5B9)
    step = ((key >> np.uint64(40)) % np.uint64(3)).astype(np.int32) - 1
    plain = np.abs(out) < F32.type(3e38)
    for x in (out, *args):
        plain = plain & np.isfinite(x) & (np.abs(x) > F32.type(1e-37))
    moved = (out.view(np.int32) + np.where(plain, step, 0)).view(F32)
    return np.where(np.abs(moved) > most, out, moved)
