"""``ddpm-fast demo``."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddpm_fast.cli._common import Device, Out, Seed, Threads, app, bound_rows, one_process, print_table, set_threads


@app.command()
def demo(
    out: Out = Path("demo"),
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; fewer for a quick look.")] = None,
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
) -> None:
    """Train on digits, sample, evaluate, draw: the whole method in about two minutes on two cores."""
    from ddpm_fast.demo import run_demo
    from ddpm_fast.io.lock import exclusive

    one_process("demo")
    set_threads(threads)
    with exclusive(out, "demo"):
        result = run_demo(out, seed=seed, steps=steps, device=device)
    rows = {
        **bound_rows(result.bound),
        "samples in each class 0-9": " ".join(map(str, result.classes)),
        "nearest-neighbour ratio": f"{result.neighbour_ratio:.2f}  (samples' distance to the training set over that of held-out digits)",
        "time": ", ".join(f"{name} {value:.0f} s" for name, value in result.seconds.items()),
    }
    print_table({**rows, **result.paths})
