"""What the Triton kernels move, counted by the simulator; ``python tests/support/traffic.py`` prints the table of docs/kernels.md.

Times are a model from public peak figures (ptxsim/report.py), never a measurement.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # ptxsim, where this is run as a program

from op_cases import KEY, Case, make, upstreams
from ptxsim import GPUS
from simulator import Started, simulated

from ddpm_fast.ops import randn

MODELLED = ("A100-80G", "H100-SXM")
SHAPE = (4, 3, 64, 64)
ELEMENTS = 4 * 3 * 64 * 64


def _epsilon_loss(dtype: torch.dtype) -> Case:
    """As training has it: ε is predicted, so the clean data is not read."""
    case = make("simple_loss", "Noise", SHAPE, dtype)
    return case.given(x_start_coef=torch.zeros_like(case.arguments["x_start_coef"]))


def _noisy_step(name: str, dtype: torch.dtype) -> Case:
    """Clipped, and all samples before the last step, which takes no noise."""
    case = make(name, "Noise", SHAPE, dtype)
    return case.given(clip=True, t=case.arguments["t"].clamp_min(1))


def _bound(name: str, dtype: torch.dtype, first: int = 1) -> Case:
    case = make(name, None, SHAPE, dtype)
    return case.given(t=case.arguments["t"].clamp_min(1) if first else torch.zeros_like(case.arguments["t"]))


def _divergence(reduction: str | None, dtype: torch.dtype) -> Case:
    return make("gaussian_kl", None, SHAPE, dtype).given(reduction=reduction)


# Name: (the call, reads and writes of forward and of backward, in tensors of the data's size; None where there is no backward).
CALLS: dict[str, tuple[Callable[[torch.dtype], Case], int, int | None]] = {
    "q_sample": (lambda dtype: make("q_sample", "Noise", SHAPE, dtype), 1 + 1, 1 + 1),
    "simple_loss, ε": (_epsilon_loss, 1, 1 + 1),
    "simple_loss, x_start and ε": (lambda dtype: make("simple_loss", "Noise", SHAPE, dtype), 2, 2 + 1),
    "p_step, fixed": (lambda dtype: _noisy_step("p_step", dtype), 2 + 2, 4 + 2),
    "p_step, learned range, multistep, guided": (lambda dtype: _noisy_step("p_step learned, multistep and guided", dtype), 5 + 2, 6 + 6),
    "gaussian_kl": (lambda dtype: _divergence(None, dtype), 4 + 1, 5 + 4),
    "gaussian_kl, mean": (lambda dtype: _divergence("mean_per_sample", dtype), 4, 4 + 4),
    "vlb_terms, fixed, t > 0": (lambda dtype: _bound("vlb_terms", dtype), 3, 3 + 1),
    "vlb_terms, learned range, t > 0": (lambda dtype: _bound("vlb_terms learned, clipped, erf", dtype), 4, 4 + 2),
    "vlb_terms, fixed, t = 0, tanh": (lambda dtype: _bound("vlb_terms", dtype, 0), 3, 3 + 1),
    "vlb_terms, learned range, t = 0, erf": (lambda dtype: _bound("vlb_terms learned, clipped, erf", dtype, 0), 4, 4 + 2),
}


@dataclass
class Row:
    """One direction of an op: its launches, and the bytes that it cannot do without."""

    name: str
    dtype: torch.dtype
    needed: int
    launches: list[Started]

    def total(self, value: Callable) -> float:
        return sum(value(launch.report) for launch in self.launches)

    @property
    def unique(self) -> int:
        """Bytes of the 32-byte sectors that are touched: what goes through to memory under an ideal cache."""
        return self.total(lambda r: r.global_load.unique_bytes + r.global_store.unique_bytes)

    @property
    def sectors(self) -> tuple[int, int]:
        """(sectors of all requests, as few as they could be)."""
        return tuple(
            self.total(lambda r, kind=kind: getattr(r.global_load, kind) + getattr(r.global_store, kind))
            for kind in ("sectors", "ideal_sectors")
        )

    @property
    def instructions(self) -> float:
        """PTX instructions of a thread for each of its elements."""
        return self.total(lambda r: r.total_thread_instructions) / ELEMENTS

    def modelled(self, gpu: str) -> tuple[float, str]:
        """(microseconds for 2^20 elements, what bounds them): a model."""
        bounds = {name: self.total(lambda r, bound=bound: r.roofline(gpu)[bound]) for bound, name in (("dram", "M"), ("issue", "I"))}
        bound = max(bounds, key=bounds.get)
        return bounds[bound] * 2**20 / ELEMENTS, bound


def measure(name: str, dtype: torch.dtype, arch: int) -> list[Row]:
    """Forward and backward of one of CALLS, or "randn", run in the simulator."""
    size = ELEMENTS * torch.empty(0, dtype=dtype).element_size()
    with simulated(arch) as launches:
        if name == "randn":
            randn(SHAPE, KEY, dtype=dtype, backend="triton")
            return [Row(name, dtype, size, list(launches))]
        call, forward, backward = CALLS[name]
        case = call(dtype).watched()
        results = case(backend="triton")
        rows = [Row(name, dtype, forward * size, list(launches))]
        launches.clear()
        torch.autograd.grad(results, case.inputs(), upstreams(results))
        rows.append(Row(f"{name}, backward", dtype, backward * size, list(launches)))
    return rows


def resources(launch: Started) -> dict[str, int]:
    """REG, STACK, LOCAL, ... of a compiled kernel, by the tool that comes with Triton. Spilled registers show as STACK."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(launch.compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(count) for name, count in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def _pair(row: Row, others: list[Row]) -> str:
    """A line of the table: sm_80's fp32 / bf16, registers of sm_90 in brackets."""
    rows = [row, others[0]]
    registers = [resources(x.launches[0])["REG"] for x in (row, *others)]
    times = ["{:.1f} {}".format(*x.modelled(gpu)) for gpu in MODELLED for x in rows]
    cells = [
        row.name,
        len(row.launches),
        *(f"{getattr(rows[0], kind)} / {getattr(rows[1], kind)}" for kind in ("needed", "unique")),
        "{} / {} ({} / {})".format(*registers),
        " / ".join(f"{x.instructions:.0f}" for x in rows),
        f"{times[0]} / {times[1]}",
        f"{times[2]} / {times[3]}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    assert set(MODELLED) <= set(GPUS)
    print("| op | launches | bytes needed | bytes moved | registers | instructions an element | A100 model | H100 model |")
    print("|---|---|---|---|---|---|---|---|")
    for name in ("randn", *CALLS):
        runs = [measure(name, dtype, arch) for arch in (80, 90) for dtype in (torch.float32, torch.bfloat16)]
        for row, *others in zip(*runs, strict=True):
            print(_pair(row, others))


if __name__ == "__main__":
    main()
