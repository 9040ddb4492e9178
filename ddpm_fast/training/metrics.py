"""metrics.jsonl: what a run tells of itself, a JSON object a line."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddpm_fast.io.files import atomic_write

METRICS = "metrics.jsonl"


def read_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl up to a step; none where there is no file, or nothing done.

    Raises:
        ValueError: for a line that is not the trainer's. The last one may be cut short, as a killed process leaves it.
    """
    if step == 0 or not path.exists():
        return []
    kept = []
    texts = path.read_text("utf-8").splitlines()
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            if line["step"] <= step:
                float(line["loss"]), float(line["elapsed_s"])
                kept.append(line)
        except (KeyError, TypeError, ValueError):
            if number < len(texts):
                message = f"{path} must have a step, a loss and elapsed_s in each line, got {text[:80]!r} in line {number}"
                raise ValueError(message) from None
    return kept


@contextlib.contextmanager
def open_metrics(path: Path, lines: list[dict[str, Any]]) -> Iterator[Any]:
    """metrics.jsonl with the lines that are kept, to write more. Opened before any work: an unwritable folder is noticed at once."""
    with atomic_write(path) as temporary:
        temporary.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with path.open("a") as file:
        yield file
