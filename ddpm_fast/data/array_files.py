"""NumPy files as arrays of grey levels and numbered classes; `load_data` says what is accepted.

A header is not trusted: what it declares is compared with the file's size, and with the memory that is left, before anything is
allocated. Whatever fails while a file is taken apart is one sentence that names the file.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, NamedTuple

import numpy as np

from ddpm_fast.data.grey_levels import DataError, Scale

_NPZ_TRAIN = ("train", "x_train", "images", "x", "arr_0")
_NPZ_TEST = ("test", "x_test")
_NPZ_TRAIN_LABELS = ("train_labels", "y_train", "labels", "y", "arr_1")
_NPZ_TEST_LABELS = ("test_labels", "y_test")
_LAYOUTS = "(N, H, W), (N, H, W, C) or (N, C, H, W) with C in {1, 3}"
_PLAIN = {"i": "integers", "u": "integers", "f": "floats", "b": "booleans", "U": "text"}
_LONGEST = 200  # characters that a file's own words take in a message


class Contents(NamedTuple):
    """Contents of a folder or a file: grey levels (N, C, H, W), labels (N,) 0..len(classes)-1, and what was left out."""

    train: np.ndarray
    labels: np.ndarray | None = None
    test: np.ndarray | None = None
    test_labels: np.ndarray | None = None
    classes: tuple[str, ...] | None = None
    skipped: Mapping[str, int] = MappingProxyType({})
    unlabelled: str = ""  # why there are no classes


def read_array_file(path: Path, scale: Scale) -> Contents:
    """The images and labels of a .npy or .npz file."""
    if path.suffix.lower() not in (".npy", ".npz"):
        raise DataError(f"data must be a built-in name, a folder, a .npy or a .npz file, got {path}")
    with contextlib.ExitStack() as stack:
        with reading(str(path)):
            with path.open("rb") as file:
                magic = file.read(6)
            if magic == b"\x93NUMPY":
                return Contents(_images(_npy(path), str(path), scale), unlabelled="a .npy file has none; put both into a .npz file")
            if magic[:2] != b"PK":
                raise DataError(f"cannot read {path}: it is neither a .npy nor a .npz file")
            archive = stack.enter_context(zipfile.ZipFile(path))
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist() if info.filename.endswith(".npy")}

        def first(keys: tuple[str, ...]) -> np.ndarray | None:
            key = next((key for key in keys if key in members), None)
            return None if key is None else _member(archive, members[key], f"{path} ({key})")

        train, test = first(_NPZ_TRAIN), first(_NPZ_TEST)
        if train is None:
            raise DataError(f"{path} must have images under {', '.join(_NPZ_TRAIN)}; got {_line(', '.join(members)) or 'nothing'}")
        labels, test_labels = first(_NPZ_TRAIN_LABELS), first(_NPZ_TEST_LABELS)
    train = _images(train, str(path), scale)
    labels = _labels(labels, len(train), str(path))
    if test is not None:
        test = _images(test, f"{path} (test)", scale)
        if train.shape[1:] != test.shape[1:]:
            raise DataError(f"{path}: test images must be {train.shape[1:]} like the others, got {test.shape[1:]}")
        if (labels is None) != (test_labels is None):
            part = "test" if labels is None else "training"
            raise DataError(f"{path} must have labels for both parts or none, got only {part} labels")
        test_labels = _labels(test_labels, len(test), f"{path} (test)")
    used = set(_NPZ_TRAIN + _NPZ_TRAIN_LABELS + _NPZ_TEST + _NPZ_TEST_LABELS)
    skipped = {"other arrays": count} if (count := sum(name not in used for name in members)) else {}
    if labels is None:
        return Contents(train, test=test, skipped=skipped, unlabelled=f"it has none of {', '.join(_NPZ_TRAIN_LABELS)}")
    parts = [labels] if test is None or test_labels is None else [labels, test_labels]
    if len({part.dtype.kind for part in parts}) > 1:
        raise DataError(f"{path}: labels of both parts must be of one kind, got {' and '.join(str(part.dtype) for part in parts)}")
    classes = np.unique(np.concatenate(parts))
    numbered = [np.searchsorted(classes, part) for part in parts]
    return Contents(train, numbered[0], test, None if test is None else numbered[1], tuple(map(str, classes)), skipped)


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Makes one sentence of whatever goes wrong with a foreign file: its parsers raise a dozen kinds of errors, and warn."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(f"cannot read {what}: it does not fit into memory") from error
    except Exception as error:
        text = getattr(error, "strerror", None) or (error.args[0] if error.args else "")
        reason = _line(text) if isinstance(text, str) else ""
        raise DataError(f"cannot read {what}: {reason or f'it is damaged ({type(error).__name__})'}") from error


def check_memory(needed: int, what: str, advice: str) -> None:
    """Refuses what would not fit, before it is tried: the system grants the memory and ends the process when it is used."""
    left = available_memory()
    if left is not None and needed > left:
        raise DataError(f"{what} takes {_size(needed)} of memory, of which {_size(left)} are free; {advice}")


def available_memory() -> int | None:
    """Bytes that can be used without swapping, within the limit of the container; None where the system does not say."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
        found.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        cached = next(
            (int(line.split()[1]) for line in (group / "memory.stat").read_text().splitlines() if line.startswith("inactive_file")), 0
        )
        found.append(limit - int((group / "memory.current").read_text()) + cached)
    return min(found, default=None)


def _line(text: str) -> str:
    """A message that a foreign file has a part in, as a part of one line."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:_LONGEST]


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


class _Header(NamedTuple):
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype
    bytes: int  # of the array
    start: int  # where they begin


def _header(file: IO[bytes], size: int, what: str) -> _Header:
    """The header of a .npy file of `size` bytes, refused where its array is no plain one or not in the file."""
    version = np.lib.format.read_magic(file)
    parse: dict[tuple[int, int], Callable[[IO[bytes]], tuple[tuple[int, ...], bool, np.dtype]]] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in parse:  # 3.0 is 2.0 with other names for the fields of structures
        raise DataError(f"cannot read {what}: it must be a .npy of version 1.0 or 2.0, got {version[0]}.{version[1]}")
    shape, fortran, dtype = parse[version](file)
    if dtype.hasobject:
        raise DataError(f"cannot read {what}: it holds Python objects (pickles); expected plain numbers")
    if dtype.kind not in _PLAIN or dtype.itemsize == 0:
        raise DataError(f"{what} must hold integers or floats (labels: integers or text), got {_line(str(dtype))}")
    if any(side < 0 for side in shape):
        raise DataError(f"cannot read {what}: its shape is {shape}")
    header = _Header(shape, fortran, dtype, math.prod(shape) * dtype.itemsize, file.tell())
    if size - header.start < header.bytes:
        raise DataError(
            f"cannot read {what}: its header tells of {dtype} {shape}, {header.bytes} bytes, of which {size - header.start} are there"
        )
    return header


def _npy(path: Path) -> np.ndarray:
    """Mapped, not read: only the grey levels made of it need memory."""
    with path.open("rb") as file:
        header = _header(file, os.fstat(file.fileno()).st_size, str(path))
    _check_images(header.shape, header.dtype, str(path))
    return np.memmap(path, header.dtype, "r", header.start, header.shape, "F" if header.fortran else "C")


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, what: str) -> np.ndarray:
    with reading(what):
        with archive.open(info) as file:
            header = _header(file, info.file_size, what)
        check_memory(header.bytes, what, "save it in parts, or as uint8")
        with archive.open(info) as file:
            return np.lib.format.read_array(file, allow_pickle=False)


def _check_images(shape: tuple[int, ...], dtype: np.dtype, where: str) -> None:
    if math.prod(shape) == 0:
        raise DataError(f"{where} must hold images, got an empty array of shape {shape}")
    if len(shape) not in (3, 4) or (len(shape) == 3 and shape[2] in (1, 3)):
        raise DataError(f"{where} must have shape {_LAYOUTS}, got {shape if len(shape) < 8 else f'{len(shape)} dimensions'}")
    if len(shape) == 4 and (shape[1] in (1, 3)) == (shape[3] in (1, 3)):
        which = "both dimensions 1 and 3" if shape[1] in (1, 3) else "neither dimension 1 nor 3"
        raise DataError(f"{where} must have shape {_LAYOUTS}, got {shape}: {which} could be channels")
    if dtype.kind not in "iuf":
        raise DataError(f"{where} must hold integers or floats, got {dtype}")
    # The levels, and the two parts that they are divided into.
    check_memory(2 * math.prod(shape), f"{where} with {shape[0]} images of {shape[1:]}", "train on fewer or smaller images")


def _images(array: np.ndarray, where: str, scale: Scale) -> np.ndarray:
    """(N, C, H, W) uint8 from any array that `load_data` takes."""
    _check_images(array.shape, array.dtype, where)
    levels = scale(array, where)
    if levels.ndim == 3:
        return levels[:, None]
    return levels.transpose(0, 3, 1, 2) if levels.shape[3] in (1, 3) else levels


def _labels(labels: np.ndarray | None, n: int, where: str) -> np.ndarray | None:
    """(n,) int64, or text."""
    if labels is None:
        return None
    if labels.shape != (n,) or labels.dtype.kind not in "iuU":
        raise DataError(f"{where}: labels must be ({n},) integers from 0, or names, got {labels.shape} {labels.dtype}")
    if labels.dtype.kind == "U":
        return labels
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= 2**63:
        raise DataError(f"{where}: labels must be integers from 0 to 2**63-1, got {least if least < 0 else most}")
    return labels.astype(np.int64)
