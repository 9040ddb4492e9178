"""What every command of ``ddpm-fast`` shares: the app, the options that several have, how results are printed."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ddpm_fast.files import make_folder as make_folder  # of every command

app = typer.Typer(name="ddpm-fast", add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Train, sample and evaluate denoising diffusion models.")
console = Console(highlight=False, markup=False)  # folders may have brackets in their names

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for what is written.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda[:i].")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random.")]
Run = Annotated[Path, typer.Argument(help="Folder of a training run, or its checkpoint file.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; by default PyTorch's choice.")]


def bound_rows(bound: Any) -> dict[str, str]:
    parts = bound.summary()
    return {
        "bound (bits/dim)": f"{bound.total:.3f} ± {bound.standard_error:.3f}",
        "  decoder L_0": f"{bound.decoder:.4f} ± {parts['decoder_standard_error']:.4f}",
        "  sum of L_t, t > 0": f"{bound.divergence:.4f} ± {parts['divergence_standard_error']:.4f}",
        "  prior L_T": f"{parts['prior']:.2g} ± {parts['prior_standard_error']:.1g}",
    }


def print_table(rows: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, str(value))
    console.print(table)


def set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
