"""The command line, ``ddpm-fast``: train, sample, eval, demo, info; each command is a file here."""

from __future__ import annotations

import importlib
from typing import Annotated

import typer

from ddpm_fast._version import __version__
from ddpm_fast.cli._common import app
from ddpm_fast.io.signals import terminable

# In the order in which --help lists them. Importing a command registers it.
for _name in ("train", "sample", "evaluate", "demo", "info"):
    importlib.import_module(f"{__name__}.{_name}")


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point. What the user can mend is one line on stderr and exit code 2; Ctrl-C is exit code 130, SIGTERM 143."""
    with terminable():
        app()
