"""What this installation can do: versions, the native build, the backend of each op with the reason where one is missing, and what
the autotuner has chosen.

``python -m ddpm_fast.info`` or ``ddpm-fast info``.
"""
from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from rich.console import Console


def report() -> dict[str, Any]:
    """The same as a JSON-able dictionary."""
    from ddpm_fast import autotune
    from ddpm_fast._version import __version__
    from ddpm_fast.backends import BACKENDS, missing, native, native_missing, tables

    build = dict(native.build_info(), isa=native.isa()) if native else {"missing": native_missing}
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    ops = {}
    for op, table in sorted(tables.items()):
        ops[op] = {
            "backends": {b: missing(b) or "available" for b in BACKENDS if b in table.implementations},
            "cpu tensors": table.default("cpu", torch.float32),
            "cuda tensors": table.default("cuda", torch.float32),
        }
    return {
        "ddpm_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "cuda devices": devices,
        "native build": build,
        "ops": ops,
        "autotuning": f"off: {autotune.why_off()}" if autotune.why_off() else "on",
        "autotuned": autotune.choices(),
    }


def print_report() -> None:
    from rich.console import Console
    from rich.table import Table

    facts, console = report(), Console()
    build = facts["native build"]
    rows = {name: facts[name] for name in ("ddpm_fast", "torch", "python", "platform", "threads")}
    rows["CUDA devices"] = ", ".join(facts["cuda devices"]) or "none"
    if "missing" in build:
        rows["native kernels"] = f"missing: {build['missing']}"
    else:
        rows["native kernels"] = f"{build['compiler']}, using {build['isa']} of {', '.join(build['isas'])}, OpenMP {'yes' if build['openmp'] else 'no'}"
        rows["native CUDA"] = f"CUDA {build['cuda'] / 1000:.1f} for {build['cuda_architectures']}" if build["cuda"] else f"not built: {build['cuda_missing']}"
    for name, value in rows.items():
        console.print(f"{name:<15} {value}", highlight=False, markup=False, soft_wrap=True)

    reasons = {}
    table = Table("op", "CPU tensors", "CUDA tensors", "backends", title_justify="left")
    for op, entry in facts["ops"].items():
        names = []
        for backend, state in entry["backends"].items():
            names.append(backend if state == "available" else f"({backend})")
            if state != "available":
                reasons[backend] = state
        table.add_row(op, entry["cpu tensors"], entry["cuda tensors"], ", ".join(names))
    console.print(table)
    for backend, reason in reasons.items():
        console.print(f"({backend}) is not available: {reason}", highlight=False, markup=False, soft_wrap=True)
    _print_choices(console, facts["autotuning"], facts["autotuned"])


def _print_choices(console: Console, state: str, choices: list[dict[str, Any]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    if choices:
        table = Table("op", "key", "device", "autotuned", "median µs of a call", title_justify="left")
        for choice in choices:
            times = [f"{name} {1e6 * seconds:.1f}" for name, seconds in choice["seconds"].items()]
            failures = [f"({name}: {reason})" for name, reason in choice["ruled_out"].items()]
            row = (choice["op"], choice["key"], choice["device"], choice["chosen"], "\n".join(times + failures))
            table.add_row(*map(escape, row))
        console.print(table)
    if state != "on":
        console.print(f"autotuning is {state}", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    print_report()
