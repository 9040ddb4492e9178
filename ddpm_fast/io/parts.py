"""A long computation over items 0..count-1, kept in files: it resumes where it was stopped, and several processes can share it.

A part is a file ``<first>-<stop>.npz`` with the results of items first..stop-1, complete or absent. If an item's result does not depend
on the other items, as with noise that is a function of (seed, item), any set of parts that covers all items gives the same result.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_fast.io.files import atomic_write, named_if_damaged, write_json

SETTINGS = "settings.json"
_NAME = re.compile(r"(\d+)-(\d+)\.npz")


def _name(part: range) -> str:
    return f"{part.start}-{part.stop}.npz"


def cover(present: Iterable[range], wanted: range) -> Iterator[tuple[range, range | None]]:
    """Splits ``wanted`` into pieces, in order: each with the range of ``present`` that holds the whole piece, or None if none does."""
    position = wanted.start
    for part in sorted(present, key=lambda part: (part.start, -part.stop)):
        if max(part.start, position) >= wanted.stop:
            break
        if part.stop <= position:  # inside an earlier one, of a run with larger parts
            continue
        if part.start > position:
            yield range(position, part.start), None
            position = part.start
        yield range(position, min(part.stop, wanted.stop)), part
        position = part.stop
    if position < wanted.stop:
        yield range(position, wanted.stop), None


def gaps(present: Iterable[range], wanted: range, size: int) -> list[range]:
    """Ranges of at most ``size`` items that are in ``wanted`` but in none of ``present``."""
    return [piece for gap, part in cover(present, wanted) if part is None for piece in pieces(gap, size)]


def pieces(whole: range, size: int) -> list[range]:
    """Splits a range into ranges of at most ``size`` items."""
    return [whole[at : at + size] for at in range(0, len(whole), size)]


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Text that lists the settings that differ; empty if none does."""
    other = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    return ", ".join(f"{name} {found.get(name)!r}, not {wanted.get(name)!r}" for name in other)


class Parts:
    """The parts in one folder.

    Args:
        folder: for the files of the parts and nothing else.
        settings: JSON values of everything that the results depend on; they are written into the folder too.

    Raises:
        ValueError: from :meth:`open`, where the folder holds parts of other settings, or damaged ones.
        OSError: where the folder cannot be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder, json.loads(json.dumps(settings))

    def open(self) -> None:
        """Creates the folder, or makes sure that the parts in it are of the same computation. For one rank; the others wait."""
        path = self.folder / SETTINGS
        if path.exists():
            with named_if_damaged(path, "remove the folder"):
                found = dict(json.loads(path.read_text("utf-8")))
            if other := differences(found, self.settings):
                raise ValueError(
                    f"{self.folder} holds the unfinished parts of another run ({other}); finish that one, or remove the folder"
                )
        else:
            write_json(path, self.settings)

    def present(self) -> list[range]:
        """The ranges of the parts in the folder, in order."""
        names = [_NAME.fullmatch(path.name) for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted((range(int(name[1]), int(name[2])) for name in names if name), key=lambda part: (part.start, -part.stop))

    def missing(self, count: int, size: int) -> list[range]:
        """Ranges of at most ``size`` items of 0..count-1 that are in no part yet."""
        return gaps(self.present(), range(count), size)

    def save(self, part: range, **arrays: np.ndarray) -> None:
        """Writes the results of a range: arrays with one entry an item."""
        named: dict[str, Any] = dict(arrays)  # NumPy's own types take every name for that of its option
        with atomic_write(self.folder / _name(part)) as temporary:
            np.savez(temporary, **named)

    def load(self, count: int) -> dict[str, np.ndarray]:
        """Reads the results of items 0..count-1: arrays by name, with one entry an item.

        Raises:
            FileNotFoundError: an item is in no part.
            ValueError: a part is damaged.
        """
        found: dict[str, list[np.ndarray]] = {}
        for items, part in cover(self.present(), range(count)):
            if part is None:
                raise FileNotFoundError(f"{self.folder} has no part with item {items.start} of {count}")
            for name, array in self.read(part, items).items():
                found.setdefault(name, []).append(array)
        return {name: np.concatenate(arrays) for name, arrays in found.items()}

    def read(self, part: range, items: range) -> dict[str, np.ndarray]:
        """Reads the results of some items of a part: arrays by name."""
        path = self.folder / _name(part)
        with named_if_damaged(path, "remove it to have it computed again"), np.load(path) as file:
            return {name: file[name][items.start - part.start : items.stop - part.start] for name in file.files}

    def remove(self) -> None:
        """Removes the folder and everything in it. To be called when the results are safe elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)
