"""A long computation over items 0..count-1 in parts that are files: it resumes where it was stopped, and ranks share it.

A part is the results of a range of items, ``<first>-<last>.npz`` in a folder of its own, whole or not there. Where an item's result does
not depend on the others, as with noise that is a function of (seed, item), any set of parts that covers the items gives the same.
"""
from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_fast.files import atomic_write

SETTINGS = "settings.json"
_NAME = re.compile(r"(\d+)-(\d+)\.npz")


class Parts:
    """The parts in one folder.

    Args:
        folder: of their files and of nothing else.
        settings: JSON values of everything that the results depend on; they are kept beside the parts.

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
            try:
                found = dict(json.loads(path.read_text("utf-8")))
            except (ValueError, TypeError):
                raise ValueError(f"{path} is damaged; remove the folder") from None
            other = sorted(name for name in {*found, *self.settings} if found.get(name) != self.settings.get(name))
            if other:
                changes = ", ".join(f"{name} {found.get(name)!r}, not {self.settings.get(name)!r}" for name in other)
                raise ValueError(f"{self.folder} holds the unfinished parts of another run ({changes}); finish that one, or remove the folder")
            return
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(self.settings, indent=1) + "\n", "utf-8")

    def present(self) -> list[range]:
        """The ranges that are there, in order."""
        names = [_NAME.fullmatch(path.name) for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted((range(int(name[1]), int(name[2])) for name in names if name), key=lambda part: (part.start, -part.stop))

    def missing(self, count: int, size: int) -> list[range]:
        """What is not there of 0..count-1, in ranges of at most ``size`` items."""
        left, position = [], 0
        for part in [*self.present(), range(count, count)]:
            left += [range(at, min(at + size, part.start, count)) for at in range(position, min(part.start, count), size)]
            position = max(position, part.stop)
        return left

    def save(self, part: range, **arrays: np.ndarray) -> None:
        """Writes the results of a range: arrays with one entry an item."""
        with atomic_write(self.folder / f"{part.start}-{part.stop}.npz") as temporary:
            np.savez(temporary, **arrays)

    def load(self, count: int) -> dict[str, np.ndarray]:
        """The results of items 0..count-1, which must all be there, by name."""
        found: dict[str, list[np.ndarray]] = {}
        position = 0
        for part in self.present():
            if part.start > position or position >= count:
                break
            if part.stop > position:  # else inside an earlier one, of a run with larger parts
                with np.load(self.folder / f"{part.start}-{part.stop}.npz") as file:
                    for name in file.files:
                        found.setdefault(name, []).append(file[name][position - part.start : count - part.start])
                position = part.stop
        if position < count:
            raise FileNotFoundError(f"{self.folder} has no part with item {position} of {count}")
        return {name: np.concatenate(pieces) for name, pieces in found.items()}

    def remove(self) -> None:
        """The folder and all that is in it, once the results are elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)
