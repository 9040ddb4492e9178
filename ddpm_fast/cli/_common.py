"""Parts that every command of ``ddpm-fast`` shares: the app, the options that several have, how results are printed."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from ddpm_fast.cli.errors import explain, options_of
from ddpm_fast.io.signals import exit_status


class Commands(TyperGroup):
    """The commands of the app. An error that the user can mend is printed in one line, and Ctrl-C ends without a traceback."""

    def invoke(self, ctx: Any) -> Any:  # click's Context, or that of the copy which newer versions of typer bring
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise typer.Exit(exit_status(stop)) from None
        except Exception as error:
            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            batch: Any = next((p.default for p in command.params if p.name == "batch"), None) if command else None
            text = explain(error, options_of(command) if command else {}, batch)
            if text is None:
                raise
            print(f"ddpm-fast: {text}", file=sys.stderr)
            raise typer.Exit(2) from error


app = typer.Typer(
    name="ddpm-fast",
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train, sample and evaluate denoising diffusion models.",
)
console = Console(highlight=False, markup=False)  # folders may have brackets in their names

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for what is written.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda[:i].")]
Seed = Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Of everything random.")]
Run = Annotated[Path, typer.Argument(help="Folder of a training run, or its checkpoint file.")]
PrecisionOption = Annotated[str, typer.Option("--precision", help="Of the network: fp32, or bf16 by autocast, whatever it was trained in.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; by default PyTorch's choice.")]


def bound_rows(bound: Any) -> dict[str, str]:
    parts = bound.summary()
    return {
        "bound (bits/dim)": with_error(f"{bound.total:.3f}", bound.standard_error, ".3f"),
        "  decoder L_0": with_error(f"{bound.decoder:.4f}", parts["decoder_standard_error"], ".4f"),
        "  sum of L_t, t > 0": with_error(f"{bound.divergence:.4f}", parts["divergence_standard_error"], ".4f"),
        "  prior L_T": with_error(f"{parts['prior']:.2g}", parts["prior_standard_error"], ".1g"),
    }


def with_error(value: str, error: float, digits: str) -> str:
    return f"{value}, with an error that one image cannot tell" if math.isnan(error) else f"{value} ± {error:{digits}}"


def one_process(command: str) -> None:
    """Raises if torchrun has started several processes: each of them would do the whole command."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        text = f"{command} runs in one process, and torchrun has started {size} that would each do the same; start it without"
        if os.environ.get("RANK", "0") == "0":
            raise ValueError(text)
        raise typer.Exit(2)  # the first one says why


def parse_size(text: str | None) -> int | tuple[int, int] | None:
    """ "32", or "32x48": a side, or height and width."""
    sides = [] if text is None else text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise ValueError(f"--image-size must be a side such as 32, or a height and a width such as 32x48, got {text!r}")
    return None if text is None else int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


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
