"""``ddpm-fast info``."""
from __future__ import annotations

import json
from typing import Annotated

import typer

from ddpm_fast.cli._common import app


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False) -> None:
    """Versions, the native build, and which backend each op uses, or why not."""
    from ddpm_fast.info import print_report, report

    if as_json:
        print(json.dumps(report(), indent=2))
    else:
        print_report()
