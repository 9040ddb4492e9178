"""The PTX simulator as a device for the Triton kernels: what a launcher would start is compiled for it and run there, on CPU tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from ptxsim import Report
from ptxsim.triton_runner import compile_triton, run_triton

from ddpm_fast import backends
from ddpm_fast.ops.triton import _launch

PER_SAMPLE = ("t_ptr", "table_ptr", "signal_ptr", "sigma_ptr", "weight_ptr", "x_start_coef_ptr", "noise_coef_ptr")


@dataclass
class Started:
    """One launch: what it was given, the compiled kernel, and where it ran the simulator's report."""

    name: str
    grid: tuple[int, int, int]
    reads: dict[str, torch.Tensor]
    writes: dict[str, torch.Tensor]
    compiled: Any
    report: Report | None

    @property
    def data(self) -> list[torch.Tensor]:
        """Tensors of the data's size, and one value a sample: all but t and the tables."""
        return [x for name, x in (self.reads | self.writes).items() if name not in PER_SAMPLE]


def _present(tensors: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    return {name: x for name, x in tensors.items() if x is not None}


def memory(x: Any) -> Any:
    """A strided tensor as the flat piece of memory that it lies in."""
    if not isinstance(x, torch.Tensor) or x.is_contiguous():
        return x
    return x.as_strided((1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)),), (1,))


@contextlib.contextmanager
def simulated(arch: int, *, run: bool = True) -> Iterator[list[Started]]:
    """Within it backend="triton" takes CPU tensors; gives the list of launches, in order.

    Args:
        arch: 80 or 90.
        run: False compiles only.
    """
    launches: list[Started] = []
    options = dict(_launch.OPTIONS)
    compiler = dict(num_warps=options.pop("num_warps"), num_stages=options.pop("num_stages"), options=options, arch=arch)

    def start(device, kernel, grid, reads, writes, numbers, constants):
        arguments = {name: memory(x) for name, x in reads.items()} | writes | numbers
        assert arguments.keys() | constants.keys() == {param.name for param in kernel.params}, "a launch would refuse more, or lack some"
        report = None
        if run:
            inputs = {x.data_ptr() for x in _present(reads).values()}
            for x in _present(writes).values():
                if x.data_ptr() not in inputs:
                    x.detach().fill_(
                        torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).min
                    )  # what a kernel forgets to write must not be right by chance
            report = run_triton(kernel, grid, arguments, constants, uninitialised_outputs=tuple(_present(writes)), **compiler)
        _, compiled, _ = compile_triton(kernel, arguments, constants, **compiler)
        launches.append(Started(kernel.__name__, grid, _present(reads), _present(writes), compiled, report))

    missing = backends.missing
    with (
        mock.patch.object(_launch, "start", start),
        mock.patch.object(backends, "missing", lambda backend, device=None: "" if backend == "triton" else missing(backend, device)),
        mock.patch.dict(backends.TAKES, triton=("cpu",)),
    ):
        yield launches
