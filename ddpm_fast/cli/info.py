"""``ddpm-fast info``: versions, the native build, and the backend of each op with the reason where one is missing."""

from __future__ import annotations

import json
import platform
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from ddpm_fast import autotune
from ddpm_fast._version import __version__
from ddpm_fast.backends import BACKENDS, missing, native, native_missing, tables
from ddpm_fast.cli._common import app, console


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False) -> None:
    """Versions, the native build, and which backend each op uses, or why not."""
    if as_json:
        print(json.dumps(report(), indent=2))
    else:
        print_report()


def report() -> dict[str, Any]:
    """The same as a JSON-able dictionary."""
    ops = {}
    for op, table in sorted(tables.items()):
        ops[op] = {
            "backends": {b: missing(b) or "available" for b in BACKENDS if b in table.implementations},
            "cpu tensors": table.default(torch.device("cpu"), torch.float32),
            "cuda tensors": table.default(torch.device("cuda"), torch.float32),
        }
    return {
        "ddpm_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "cuda devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
        "native build": dict(native.build_info(), isa=native.isa()) if native else {"missing": native_missing},
        "ops": ops,
        "autotuning": f"off: {autotune.why_off()}" if autotune.why_off() else "on",
    }


def print_report() -> None:
    facts = report()
    build = facts["native build"]
    rows = {name: facts[name] for name in ("ddpm_fast", "torch", "python", "platform", "threads")}
    rows["CUDA devices"] = ", ".join(facts["cuda devices"]) or "none"
    if "missing" in build:
        rows["native kernels"] = f"missing: {build['missing']}"
    else:
        rows["native kernels"] = (
            f"{build['compiler']}, using {build['isa']} of {', '.join(build['isas'])}, OpenMP {'yes' if build['openmp'] else 'no'}"
        )
        rows["native CUDA"] = (
            f"CUDA {build['cuda'] / 1000:.1f} for {build['cuda_architectures']}" if build["cuda"] else f"not built: {build['cuda_missing']}"
        )
    rows["autotuning"] = facts["autotuning"]
    for name, value in rows.items():
        console.print(f"{name:<15} {value}", soft_wrap=True)

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
        console.print(f"({backend}) is not available: {reason}", soft_wrap=True)
