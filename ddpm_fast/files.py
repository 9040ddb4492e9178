"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# A temporary folder in which nothing changed for this long belongs to a process that was killed:
# a live writer keeps moving its modification times.
STALE_SECONDS = 3600


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary path to write; what is there when the block ends becomes `path`.

    A reader sees the old file or the new one, never a part. If the block raises (KeyboardInterrupt
    and a full disk included), nothing temporary stays and `path` is as it was. Parent folders are
    created, and what killed processes left behind for the same `path` is removed.

    The temporary file has the name of `path`, in a hidden folder beside it: writers that choose a
    format by suffix see the right one, and temporary files of their own vanish with the folder.

    Args:
        path: file to write or to replace.

    Raises:
        OSError: the folder cannot be created or written, or the disk is full.
        IsADirectoryError: `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"expected a file to write, got a folder: {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path)
    folder = path.parent / f".{path.name}.{secrets.token_hex(6)}.tmp"
    folder.mkdir()
    temporary = folder / path.name
    try:
        yield temporary
        # Some writers make private files; the new folder shows what the umask allows.
        temporary.chmod(folder.stat().st_mode & 0o666)
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if os.name == "posix":
        _sync(path.parent)  # the rename itself must reach the disk


def write_json(path: str | os.PathLike, value: Any) -> None:
    """JSON to read and to parse: NaN and infinity, which it has no numbers for, become null."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(_finite(value), indent=1, allow_nan=False) + "\n", "utf-8")


def write_csv(path: str | os.PathLike, columns: Mapping[str, Sequence[Any]]) -> None:
    """A table with a header, one row an entry of the columns, which have one length; NaN is an empty cell."""
    rows = zip(*columns.values(), strict=True)
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_finite(value) for value in row] for row in rows)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _remove_stale(path: Path) -> None:
    oldest_live = time.time() - STALE_SECONDS
    for entry in path.parent.iterdir():
        if entry.name.startswith(f".{path.name}.") and entry.name.endswith(".tmp"):
            # Another process may be removing the same folder.
            with contextlib.suppress(OSError):
                if max(p.stat().st_mtime for p in (entry, *entry.iterdir())) < oldest_live:
                    shutil.rmtree(entry)


def _sync(path: Path) -> None:
    # POSIX opens folders only for reading; Windows flushes only handles opened for writing.
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
