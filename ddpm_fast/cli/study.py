"""``ddpm-fast study``."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ddpm_fast.cli._common import Device, Out, Seed, Threads, app, console, one_process, print_table, set_threads


@app.command()
def study(
    out: Out = Path("study"),
    train_steps: Annotated[int, typer.Option(min=1, help="Training steps of each of the two models.")] = 1500,
    count: Annotated[int, typer.Option("--count", "-n", min=8, help="Samples of each sampler at each number of steps.")] = 300,
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
) -> None:
    """Learned against fixed variance, and three samplers at 1000 to 10 steps, on digits: about ten minutes on two cores.

    Stopped, the same command goes on.
    """
    from ddpm_fast.io.lock import exclusive
    from ddpm_fast.study import run_study, table

    one_process("study")
    set_threads(threads)
    try:
        with exclusive(out, "study"):
            result = run_study(out, train_steps=train_steps, count=count, device=device, seed=seed)
    except KeyboardInterrupt:
        console.print(f"stopped; what is complete is in {out}, and the same command goes on from there", soft_wrap=True)
        raise
    heading, *rows = table(result.bounds, result.quality)
    shown = Table(*(column.replace(": ", "\n") for column in heading), box=None, pad_edge=False)
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    real = next(row for row in result.quality if row["sampler"] is None)
    print_table({
        "FID": f"of {result.quality[-1]['images']} samples to the training digits; {real['fid']:.2f} for {real['images']} held-out digits",
        "time": ", ".join(f"{name} {value:.0f} s" for name, value in result.seconds.items()),
        **result.paths,
    })  # fmt: skip
