"""Every op's time in units of randn's, on each instruction set: `python benchmarks/bench_vectorised.py` prints the ratios.

randn is written with vector types and cannot be left scalar, so the ratio is about that of instructions, whatever the machine: a loop
that the compiler leaves scalar takes 4 times (SSE) to 13 times (AVX-512) as long. That none is left so is proved by the machine
code, in tests/ops/test_vectorised.py.
"""

from __future__ import annotations

from bench_sizes import KEPT, pairs
from measure import alternate, environment, threads_set

from ddpm_fast.backends import native

SHAPE = (48, 1, 64, 64)


def in_randns(op: str, backward: bool) -> float:
    """Fastest of alternating calls, so that a neighbour on the machine does not matter."""
    times = alternate({"op": pairs(op, SHAPE, backward)[0], "randn": pairs("randn", SHAPE, False)[0]}, 15)
    return min(times["op"].times) / min(times["randn"].times)


def main() -> None:
    print(", ".join(f"{name} {value}" for name, value in environment().items()))
    for isa in native.build_info()["isas"]:
        native.select_isa(isa)
        for op in (op for op in KEPT if op != "randn"):
            print(f"{isa}: {op} {in_randns(op, False):.2f}, with its gradient {in_randns(op, True):.2f}", flush=True)
    native.select_isa(None)


if __name__ == "__main__":
    with threads_set(1):
        main()
