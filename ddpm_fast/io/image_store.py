"""A folder of generated images: PNG files, ``samples.npz``, and ``parts/`` for images that are in neither of them yet.

Images are grey levels 0..levels-1 in uint8, numbered from 0, all drawn with the same settings. Image i is there if any of the three
places holds it. Every file is complete or absent, so a run can always go on from what an earlier one has left.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from ddpm_fast.data.grey_levels import to_unit
from ddpm_fast.data.readers import open_image
from ddpm_fast.io.files import atomic_files, atomic_write, make_folder, named_if_damaged, named_in_errors, write_json
from ddpm_fast.io.parts import Parts, cover, differences, gaps, pieces
from ddpm_fast.io.plots import write_grid

# Of fixed width, whatever the number of images: sorted by name they are in order, and more can be added.
_DIGITS = 8
MAX_PNGS = 10**_DIGITS
_PNG = re.compile(rf"(\d{{{_DIGITS}}})\.png")
OUTPUTS = ("samples.json", "images", "samples.npz", "samples.png")
REMEDY = "remove it to have it written again"
GRID_IMAGES = 400
_GRID_SIDE = 4096  # pixels; larger images make a grid of fewer, so that it can be looked at, and drawn in memory
_LOCAL_HEADER = 30  # bytes of a zip member's header before its name (APPNOTE.TXT, 4.3.7)

_Read: TypeAlias = Callable[[range], np.ndarray]
_Sources: TypeAlias = dict[range, _Read]


class ImageStore:
    """The images in one folder.

    Args:
        folder: for ``samples.json`` (the settings), ``images/``, ``samples.npz``, ``samples.png`` and, of an unfinished run, ``parts/``.
        settings: JSON values of everything that the images depend on, ``levels`` included.
        levels: 2..256 grey levels. PNG files spread them over 0..255.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], levels: int) -> None:
        self.folder, self.levels, self.settings = folder, levels, json.loads(json.dumps(settings))
        self.record, self.images, self.npz, self.grid = (folder / name for name in OUTPUTS)
        self.parts = Parts(folder / "parts", self.settings)
        self._to_png = np.round(np.arange(levels) * (255 / (levels - 1))).astype(np.uint8)
        self._from_png = np.round(np.arange(256) * ((levels - 1) / 255)).astype(np.uint8)

    def open(self, png: bool, overwrite: bool) -> None:
        """Makes sure that the folder can be written and that what it holds has these settings. For one rank; the others wait.

        Args:
            png: save images as PNG files; else as parts.
            overwrite: remove images of other settings instead of refusing them. Those of the same settings always stay.

        Raises:
            ValueError: the folder holds images of other settings, or of unknown ones.
            OSError: it cannot be written.
        """
        make_folder(self.folder)
        other = self._conflict()
        if other and not overwrite:
            raise ValueError(f"{self.folder} holds images of {other}; choose another folder, or replace them with --overwrite")
        if other:
            self._clear()
        if not self.record.exists():
            write_json(self.record, self.settings)
        if png:
            make_folder(self.images)
        else:
            make_folder(self.parts.folder)
            self.parts.open()

    def missing(self, count: int, size: int) -> list[range]:
        """The images of 0..count-1 that are nowhere yet, in ranges of at most ``size``."""
        return gaps(self._sources(), range(count), size)

    def without_png(self, count: int, size: int) -> list[range]:
        """The images of 0..count-1 that are no PNG files yet, in ranges of at most ``size``."""
        return gaps(self._runs(), range(count), size)

    def read(self, wanted: range) -> np.ndarray:
        """Reads images as (len(wanted), C, H, W) uint8.

        Raises:
            FileNotFoundError: one of them is not there.
        """
        return self._gather(self._sources(), wanted)

    def save_part(self, part: range, images: np.ndarray) -> None:
        """Writes images (len(part), C, H, W) uint8 into ``parts/``, where they stay until they are in a file of the result."""
        self.parts.save(part, images=images)

    def save_png(self, part: range, images: np.ndarray) -> None:
        """Writes (len(part), C, H, W) uint8, C in {1, 3}, as one file each."""
        pixels = self._to_png[images].transpose(0, 2, 3, 1)
        with atomic_files(self.images) as temporary:
            for index, image in zip(part, pixels):
                path = temporary / _png_name(index)
                with named_in_errors(path):
                    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path)

    def add_png(self, parts: list[range]) -> None:
        """Writes images that are elsewhere as PNG files too, a range at a time."""
        sources = self._sources()  # once: a folder of many files is slow to list
        for part in parts:
            self.save_png(part, self._gather(sources, part))

    def write_npz(self, count: int, size: int, labels: np.ndarray | None) -> None:
        """Writes images 0..count-1 into ``samples.npz``, ``size`` at a time, unless it has as many already.

        The bytes of the file depend on its content alone. The old one stays until the new one is whole.
        """
        if count <= self.in_npz:
            return
        sources = self._sources()
        shape = self.read(range(1)).shape[1:]
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
        with atomic_write(self.npz) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            with _member(archive, "images") as member:
                np.lib.format.write_array_header_1_0(member, header)
                for items, read in self._readers(sources, range(count)):
                    for piece in pieces(items, size):
                        images = read(piece)
                        if images.shape[1:] != shape:
                            found = f"{shape} and, at image {piece.start}, {images.shape[1:]}"
                            raise ValueError(f"{self.folder} must hold images of one shape, got {found}")
                        member.write(np.ascontiguousarray(images).data)
            extra = {"settings": np.array(json.dumps(self.settings))}
            for name, array in (extra if labels is None else {**extra, "labels": labels}).items():
                with _member(archive, name) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)

    def write_grid(self, count: int) -> None:
        """Writes ``samples.png``, a grid of the first images: at most GRID_IMAGES, and no more than fit a square of _GRID_SIDE pixels."""
        height, width = self.read(range(1)).shape[2:]
        room = max(1, _GRID_SIDE // max(height, width)) ** 2
        images = self.read(range(min(count, GRID_IMAGES, room)))
        write_grid(self.grid, to_unit(torch.from_numpy(images), self.levels))

    def drop_parts(self) -> None:
        """Removes the parts if all that is in them is in ``samples.npz`` or in PNG files."""
        kept = [range(self.in_npz), *self._runs()]
        if not any(gaps(kept, part, len(part)) for part in self.parts.present()):
            self.parts.remove()

    @property
    def in_npz(self) -> int:
        """Number of images in ``samples.npz``, which holds 0..in_npz-1; 0 if there is no such file."""
        return self._stored()[0][0]

    def _stored(self) -> tuple[tuple[int, ...], int]:
        """Shape of the images in ``samples.npz``, and the position of their first byte; (0,) and 0 if there is no such file.

        They are not compressed, so that pieces can be read.
        """
        if not self.npz.exists():
            return (0,), 0
        with named_if_damaged(self.npz, REMEDY), zipfile.ZipFile(self.npz) as archive, self.npz.open("rb") as raw:
            info = archive.getinfo("images.npy")
            with archive.open(info) as member:
                np.lib.format.read_magic(member)
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
                header = member.tell()
            if info.compress_type != zipfile.ZIP_STORED or fortran or dtype != np.uint8 or len(shape) != 4:
                raise ValueError("it must be as it was written, uncompressed, with images (N, C, H, W) in uint8")
            raw.seek(info.header_offset + _LOCAL_HEADER - 4)
            return shape, info.header_offset + _LOCAL_HEADER + sum(struct.unpack("<HH", raw.read(4))) + header

    def _sources(self) -> _Sources:
        """Ranges of images that are there, each with the function that reads a range within it."""
        sources: _Sources = {run: self._read_png for run in self._runs()}
        sources |= {part: partial(self._read_part, part) for part in self.parts.present()}
        shape, start = self._stored()
        return {**sources, range(shape[0]): partial(self._read_npz, shape[1:], start)} if shape[0] else sources

    def _readers(self, sources: _Sources, wanted: range) -> Iterator[tuple[range, _Read]]:
        """Splits ``wanted`` into ranges that one source holds, each with the function that reads it."""
        for items, source in cover(sources, wanted):
            if source is None:
                raise FileNotFoundError(f"{self.folder} has no image {items.start}")
            yield items, sources[source]

    def _gather(self, sources: _Sources, wanted: range) -> np.ndarray:
        return np.concatenate([read(items) for items, read in self._readers(sources, wanted)])

    def _runs(self) -> list[range]:
        """The numbers of the PNG files that are there, as ranges."""
        numbers = np.sort(np.fromiter(self._png_numbers(), np.int64))
        edges = np.flatnonzero(np.diff(numbers) != 1) + 1
        return [range(int(run[0]), int(run[-1]) + 1) for run in np.split(numbers, edges) if len(run)]

    def _png_numbers(self) -> Iterator[int]:
        names = os.listdir(self.images) if self.images.is_dir() else []
        return (int(match[1]) for match in map(_PNG.fullmatch, names) if match)

    def _read_part(self, part: range, items: range) -> np.ndarray:
        return self.parts.read(part, items)["images"]

    def _read_png(self, items: range) -> np.ndarray:
        arrays = []
        for index in items:
            path = self.images / _png_name(index)
            with named_if_damaged(path, "remove it to have it drawn again"), open_image(path, ("PNG",)) as image:
                array = np.asarray(image)
            arrays.append(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))
        return self._from_png[np.stack(arrays)]

    def _read_npz(self, shape: tuple[int, ...], start: int, items: range) -> np.ndarray:
        each = math.prod(shape)
        with self.npz.open("rb") as file:
            file.seek(start + items.start * each)
            return np.frombuffer(file.read(len(items) * each), np.uint8).reshape(len(items), *shape)

    def _conflict(self) -> str:
        """Text that says how the settings of the folder's images differ from these; empty if they are the same or there are no images."""
        if self.record.exists():
            with named_if_damaged(self.record, "choose another folder"):
                other = differences(dict(json.loads(self.record.read_text("utf-8"))), self.settings)
        elif any(path.exists() for path in (self.npz, self.grid, self.parts.folder)) or any(True for _ in self._png_numbers()):
            return f"unknown settings (there is no {self.record.name})"
        else:
            return ""
        if not other and self.npz.exists():  # it may have been put there by hand
            with named_if_damaged(self.npz, REMEDY), np.load(self.npz, allow_pickle=False) as file:
                other = differences(dict(json.loads(str(file["settings"]) if "settings" in file.files else "{}")), self.settings)
        return f"other settings ({other})" if other else ""

    def _clear(self) -> None:
        """Removes the files that this class writes and no others. The settings go last: until then they say what the other files are."""
        for path in (self.npz, self.grid, *(self.images / _png_name(index) for index in list(self._png_numbers()))):
            path.unlink(missing_ok=True)
        if self.parts.folder.exists():
            shutil.rmtree(self.parts.folder)
        self.record.unlink(missing_ok=True)


def _png_name(index: int) -> str:
    return f"{index:0{_DIGITS}}.png"


def _member(archive: zipfile.ZipFile, name: str) -> Any:
    # A ZipInfo has a fixed date. Sizes are not known beforehand: zip64 from the start.
    return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)
