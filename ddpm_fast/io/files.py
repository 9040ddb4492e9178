"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import secrets
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddpm_fast.io.signals import uninterrupted

# A temporary folder in which nothing changed for this long belongs to a process that was killed: a live writer moves its times on.
STALE_SECONDS = 3600


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path to write; what is there when the block ends becomes `path`.

    A reader sees the old file or the new one, never a part. If the block raises (KeyboardInterrupt and a full disk included), nothing
    temporary stays and `path` is as it was. Parent folders are created, and what killed processes left for the same `path` more than an
    hour ago is removed (`remove_leftovers` does so at once).

    The temporary file has the name of `path`, in a hidden folder beside it: writers that choose a format by suffix see the right one, and
    temporary files of their own vanish with the folder.

    Args:
        path: file to write or to replace.

    Raises:
        OSError: the folder cannot be created or written, or the disk is full; its `filename` is `path`.
        IsADirectoryError: `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"expected a file to write, got a folder: {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _hidden_folder(path, path.parent) as hidden:
        yield hidden / path.name
        _publish([hidden / path.name], path.parent)


@contextlib.contextmanager
def atomic_files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary folder to fill with files; when the block ends they are moved into `folder`, one after the other.

    For many small files: as safe as `atomic_write` for each of them, and much cheaper. If the block raises, none is moved;
    a process killed while they move leaves some of them, whole.

    Args:
        folder: created if missing; files of the same names are replaced.

    Raises:
        OSError: `folder` cannot be created or written, or the disk is full.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Beside `folder`, not in it: what is stale is searched for each time, among few entries.
    with _hidden_folder(folder, folder) as hidden:
        yield hidden
        _publish(sorted(hidden.iterdir()), folder)


@contextlib.contextmanager
def named_in_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Gives an OSError that has none the name of the file that the block writes: the system names files when it opens them only."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


@contextlib.contextmanager
def named_if_damaged(path: str | os.PathLike[str], remedy: str) -> Iterator[None]:
    """Makes a ValueError of whatever a library raises over a damaged file (a dozen kinds): it names the file and says what to do."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise ValueError(f"cannot read {path} ({error or type(error).__name__}); {remedy}") from error


def make_folder(folder: str | os.PathLike[str]) -> None:
    """Creates an output folder, and notices before any work that it cannot be written.

    Raises:
        OSError: it cannot be created or written.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=os.fspath(folder)):
        pass


@contextlib.contextmanager
def _hidden_folder(path: Path, destination: Path) -> Iterator[Path]:
    """A folder beside `path` for what will be moved to `destination`; errors name the file as it would be called there."""
    remove_leftovers(path, STALE_SECONDS)
    hidden = path.parent / f".{path.name}.{secrets.token_hex(6)}.tmp"
    # Ctrl-C may fall anywhere, between an `except` and its `finally` too. So the removal is arranged before the folder is made: it comes
    # at the end of the block, else with the end of this frame, else with the end of the process.
    owner = _Owner()
    remove = weakref.finalize(owner, _remove, hidden)
    try:
        hidden.mkdir()
        with named_in_errors(path):
            yield hidden
    except OSError as error:
        _rename_in_error(error, hidden, path, destination)
        raise
    finally:
        with uninterrupted():
            remove()


class _Owner:
    """An object whose end triggers the finalizer of its folder."""


def _remove(folder: Path) -> None:
    with uninterrupted():
        shutil.rmtree(folder, ignore_errors=True)


def _rename_in_error(error: OSError, hidden: Path, path: Path, destination: Path) -> None:
    # The name of a temporary file would mean nothing to a reader.
    if not isinstance(error.filename, (str, os.PathLike)):
        return
    name = Path(error.filename)
    if name == hidden:
        error.filename = str(path)
    elif hidden in name.parents:
        error.filename = str(destination / name.relative_to(hidden))
        if error.filename2 is not None:
            del error.filename2  # of a rename


def _publish(files: Sequence[Path], folder: Path) -> None:
    for file in files:
        # Some writers make private files; the new folder shows what the umask allows.
        file.chmod(file.parent.stat().st_mode & 0o666)
        with named_in_errors(file):
            _sync(file)
    for file in files:
        os.replace(file, folder / file.name)
    if os.name == "posix":
        _sync(folder)  # the renames themselves must reach the disk


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """JSON to read and to parse: NaN and infinity, which it has no numbers for, become null."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(_finite(value), indent=1, allow_nan=False) + "\n", "utf-8")


def write_csv(path: str | os.PathLike[str], columns: Mapping[str, Sequence[Any]]) -> None:
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


def remove_leftovers(path: Path, age: float = -math.inf) -> None:
    """Removes the temporary files that killed writers of ``path`` have left.

    Args:
        age: only files that have not changed for so many seconds. By default all of them, which is right only for a caller that
            nobody else may write beside.
    """
    for name in os.listdir(path.parent):
        if name.startswith(f".{path.name}.") and name.endswith(".tmp"):
            entry = path.parent / name
            # Another process may be removing the same folder.
            with contextlib.suppress(OSError):
                if time.time() - max(p.stat().st_mtime for p in (entry, *entry.iterdir())) > age:
                    shutil.rmtree(entry)


def _sync(path: Path) -> None:
    # POSIX opens folders only for reading; Windows flushes only handles opened for writing.
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
