"""Image data: two built-in sets, folders of images and NumPy files, and the order of training.

Images are stored as integer grey levels (uint8, 0..levels-1), a quarter of the memory of floats,
and become floats in [-1, 1] a batch at a time.

Every random choice (held-out split, order of training) is an argsort of raw Philox words, which
NumPy keeps the same across its versions, unlike the output of its `permutation`.
"""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ddpm_fast.data.array_files import Contents, read_array_file
from ddpm_fast.data.grey_levels import DataError, Scale, bounds, to_levels, to_unit
from ddpm_fast.data.readers import IMAGE_SUFFIXES, read_folder
from ddpm_fast.types import Split

__all__ = [
    "BUILT_IN", "IMAGE_SUFFIXES", "Batches", "DataError", "DataWarning", "ImageData", "Origin", "load_data", "to_levels", "to_unit",
]  # fmt: skip

BUILT_IN = ("digits", "photos")
_DIGITS_TEST = 360
_PHOTO_CROP = 32
_PHOTO_TRAIN_WIDTH = 480  # of 640 columns; the rest is for testing
_SPLIT_STREAM = 2**64 - 1  # no epoch has this number
_LISTED = 12  # classes named in a line


class DataWarning(UserWarning):
    """Data that can be used, but were probably read with a wrong range or number of levels."""


@dataclass(frozen=True)
class Origin:
    """Source of images, and what was found there.

    Attributes:
        kind: ``"built-in"``, ``"folder"``, ``"file"``, or ``"tensors"``, of which nothing else is known.
        found: by the range that was taken for black to white, the least and the greatest value that were read with it.
        skipped: how many files were passed over, by suffix or reason.
        unlabelled: why there are no classes.
        notes: what is doubtful.
    """

    kind: str = "tensors"
    found: Mapping[tuple[float, float], tuple[float, float]] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    unlabelled: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageData:
    """Images in memory, with a part held out.

    Attributes:
        name: the built-in name, or the name of the folder or file.
        train: (N, C, H, W) uint8, grey levels 0..levels-1, contiguous, on the CPU; empty where all were to be held out.
        test: (M, C, H, W) uint8, likewise; never empty.
        levels: number of grey levels, for the decoder's bins: 256, or 17 for digits.
        train_labels: (N,) int64, 0..num_classes-1, or None.
        test_labels: (M,) int64, or None.
        classes: the classes' names in order of their numbers, or None for labels that are only numbers.
        origin: where the images come from, what was found there and how it was read.

    Raises:
        ValueError: labels that are not one for each image of both parts, or outside 0..num_classes-1.
    """

    name: str
    train: torch.Tensor
    test: torch.Tensor
    levels: int = 256
    train_labels: torch.Tensor | None = None
    test_labels: torch.Tensor | None = None
    classes: tuple[str, ...] | None = None
    origin: Origin = Origin()

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            images, labels = getattr(self, part), getattr(self, f"{part}_labels")
            if labels is None and self.train_labels is None and self.test_labels is None:
                continue
            if labels is None or labels.shape != images.shape[:1] or labels.dtype != torch.int64:
                got = None if labels is None else f"{tuple(labels.shape)} {labels.dtype}"
                raise ValueError(f"{part}_labels must be ({len(images)},) int64, or None in both parts, got {got}")
            if len(labels) and (labels.min() < 0 or (self.classes is not None and labels.max() >= len(self.classes))):
                top = "" if self.classes is None else len(self.classes) - 1
                raise ValueError(f"{part}_labels must lie in 0..{top}, got {labels.min()}..{labels.max()}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.train.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int | None:
        """Number of classes (without names one more than the largest label), or None without labels."""
        labels = self._labels()
        if labels is None:
            return None
        return len(self.classes) if self.classes is not None else int(labels.max()) + 1

    def _labels(self) -> torch.Tensor | None:
        """Labels of both parts."""
        if self.train_labels is None or self.test_labels is None:
            return None
        return torch.cat([self.train_labels, self.test_labels])

    @property
    def summary(self) -> list[str]:
        """Description of the data and of how they were read, a line for each of: images, classes, files passed over, what is doubtful."""
        size = "x".join(map(str, self.image_shape))
        read = ", ".join(f"{bounds(*found)} in {bounds(*span)}" for span, found in self.origin.found.items())
        lines = [
            f"{self.name}: {len(self.train)} images to train on and {len(self.test)} held out, {size} (channels x height x width), "
            f"{self.levels} grey levels" + (f" (values found: {read})" if read else "")
        ]
        labels = self._labels()
        if labels is not None:
            counts = torch.bincount(labels, minlength=self.num_classes or 0).tolist()
            names = self.classes or tuple(map(str, range(len(counts))))
            listed = ", ".join(f"{name} {count}" for name, count in list(zip(names, counts))[:_LISTED])
            lines.append(
                f"{len(counts)} class{'es' * (len(counts) != 1)}: {listed}"
                + (f" and {len(counts) - _LISTED} more" if len(counts) > _LISTED else "")
            )
        if self.origin.skipped:
            lines.append(f"passed over: {', '.join(f'{count} {what}' for what, count in self.origin.skipped.items())}")
        return lines + [f"note: {note}" for note in self.origin.notes]

    def batch(
        self, split: Split, indices: torch.Tensor | slice, device: str | torch.device | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Some images, as the model wants them.

        Args:
            split: ``"train"`` or ``"test"``.
            indices: (B,) int64, CPU, or a slice.
            device: where the batch goes; it travels as uint8.

        Returns:
            (B, C, H, W) float32 in [-1, 1], and (B,) int64 labels or None.
        """
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {split!r}")
        labels = getattr(self, f"{split}_labels")
        return (
            to_unit(getattr(self, split)[indices].to(device or "cpu"), self.levels),
            None if labels is None else labels[indices].to(device or "cpu"),
        )


class Batches:
    """Endless reproducible order of training: batch `step` is a function of (n, batch_size, seed, step).

    Each epoch visits every image once, in an order of its own; a batch that crosses the end of an
    epoch is filled from the next. So a run resumes at any step without a saved state.

    Args:
        n: number of images.
        batch_size: images a batch, over all ranks; may exceed `n`.
        seed: 0..2**64-1.
    """

    def __init__(self, n: int, batch_size: int, seed: int = 0):
        if n < 1 or batch_size < 1:
            raise ValueError(f"n and batch_size must be at least 1, got {n} and {batch_size}")
        _check_seed(seed)
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64, device="cpu")

    def indices(self, step: int) -> torch.Tensor:
        """(batch_size,) int64 in 0..n-1, CPU."""
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        position, end = step * self.batch_size, (step + 1) * self.batch_size
        parts = []
        while position < end:
            epoch, offset = divmod(position, self.n)
            if epoch != self._epoch:
                # Sorting a large set takes longer than a step: keep it for the rest of the epoch.
                self._epoch, self._order = epoch, torch.from_numpy(_permutation(self.n, self.seed, epoch))
            parts.append(self._order[offset : offset + end - position])
            position += len(parts[-1])
        return torch.cat(parts)


def load_data(
    source: str | os.PathLike[str],
    *,
    image_size: int | Sequence[int] | None = None,
    test_fraction: float = 0.1,
    seed: int = 0,
    levels: int | None = None,
    value_range: Sequence[float] | None = None,
) -> ImageData:
    """Loads images and holds some of them out for testing. docs/data.md tells it at length.

    `source` is one of:

    - ``"digits"``: scikit-learn's handwritten digits, (1, 8, 8), 17 levels, 10 classes, a fixed
      stratified split of 1437 and 360.
    - ``"photos"``: crops of the two photographs that scikit-learn ships, (3, 32, 32), 2 classes
      (0 china, 1 flower). Training crops lie 8 pixels apart in the left 480 columns (2 x 2850), test
      crops side by side in the other 160 (2 x 65): no pixel is in both.
    - a folder: every image below it (``IMAGE_SUFFIXES``; other and hidden files are passed over and
      counted, links followed, each folder read once), sorted by path. If each image is in a first-level
      sub-folder, and there are two or more, these are the classes, in order of name. If all images are
      grey the data has one channel, else three. Transparency is put onto white, EXIF rotation is applied.
    - a ``.npy`` file: (N, H, W), (N, H, W, C) or (N, C, H, W) with C in {1, 3}, integers or floats.
      With four dimensions C is the one of dimensions 1 and 3 that is 1 or 3; if both are, the file is refused.
    - a ``.npz`` file of such arrays: the first of ``train``, ``x_train``, ``images``, ``x``,
      ``arr_0``; if present ``test`` or ``x_test``; labels, (N,) integers from 0 or names, under
      ``train_labels``, ``y_train``, ``labels``, ``y``, ``arr_1``, and ``test_labels``, ``y_test``. The
      sorted distinct labels are the classes, and their names.

    A built-in name wins over a folder of that name; write ``./digits`` for the folder.

    Values become grey levels by one rule, in image files as in arrays (:class:`grey_levels.Scale`): without a range, 0..255
    for integers, 0..65535 for those of 16 bits, -1..1 for floats. Data that use less than half of an assumed range get a
    note, or are refused where they would lose what they hold.

    Args:
        image_size: folders: every image is cropped to its central part of this form (a side, or (H, W))
            and resized (Lanczos). Elsewhere it may only repeat the size that the data has.
        test_fraction: folders and files without a test part: share held out, in proportion from
            each class; at least one image is held out and, below 1, one kept.
        seed: of that split, 0..2**64-1. A run must keep it when it resumes.
        levels: folders and files: number of grey levels, 2..256, by default 256, or one for each integer of a smaller
            `value_range`. Without `value_range` integers are the levels themselves, 0..levels-1. For built-in data it may only
            repeat what they have.
        value_range: folders and files: (low, high), the values that are black and white.

    Raises:
        DataError: the source is missing, unreadable, empty, inconsistent, out of range or larger than the memory.

    Warns:
        DataWarning: for each of the notes in ``origin.notes``.
    """
    _check_seed(seed)
    if not 0 < test_fraction <= 1:
        raise DataError(f"test_fraction must be between 0 and 1, got {test_fraction}")
    size = None if image_size is None else _size(image_size)
    scale, path = Scale(value_range, levels), Path(source)
    if source in BUILT_IN:
        if value_range is not None:
            raise DataError(f"{source} has a range of its own, got value_range (--range)")
        kind, contents = "built-in", _digits() if source == "digits" else _photos()
        own_levels = 17 if source == "digits" else 256
        if levels not in (None, own_levels):
            raise DataError(f"{source} has {own_levels} grey levels, got levels={levels}")
    elif path.is_dir() or path.is_file():
        kind, contents = ("folder", read_folder(path, size, scale)) if path.is_dir() else ("file", read_array_file(path, scale))
        own_levels = scale.levels
    else:
        raise DataError(_not_found(source))
    train, labels, test, test_labels = contents[:4]
    if size is not None and train.shape[2:] != size:
        raise DataError(f"{source} has images of {train.shape[2]}x{train.shape[3]}, got image_size={image_size}; only folders are resized")
    notes = tuple(scale.notes(str(source)))
    if test is None:
        if len(train) < 2 and test_fraction < 1:
            raise DataError(f"{source} must have at least 2 images, one to train and one to test on, got {len(train)}")
        if source == "digits":
            count, seed = _DIGITS_TEST, 0  # fixed, so that results on digits can be compared
        else:
            count = min(max(round(len(train) * test_fraction), 1), len(train) - (test_fraction < 1))
        held_out = _held_out(len(train), count, seed, labels)
        train, test = train[~held_out], train[held_out]
        if labels is not None:
            labels, test_labels = labels[~held_out], labels[held_out]
    classes = contents.classes or ()
    if labels is not None and len(train) and (untrained := np.setdiff1d(np.arange(len(classes)), labels)).size:
        names = ", ".join(classes[index] for index in untrained[:_LISTED])
        notes += (f"{source} has no image to train on of {names}{', ...' if len(untrained) > _LISTED else ''}",)
    for note in notes:
        warnings.warn(note, DataWarning, stacklevel=2)
    images, held_out_images = (torch.from_numpy(np.ascontiguousarray(part)) for part in (train, test))
    targets, held_out_targets = (None if y is None else torch.from_numpy(y.astype(np.int64)) for y in (labels, test_labels))
    name = source if source in BUILT_IN else path.resolve().name
    origin = Origin(kind, scale.seen, contents.skipped, contents.unlabelled, notes)
    return ImageData(str(name), images, held_out_images, own_levels, targets, held_out_targets, contents.classes, origin)


def _size(image_size: int | Sequence[int]) -> tuple[int, int]:
    sides = tuple(image_size) if isinstance(image_size, Sequence) else (image_size, image_size)
    try:
        height, width = map(operator.index, sides)  # NumPy's integers too
    except (TypeError, ValueError):
        height = width = 0
    if height < 1 or width < 1:
        raise DataError(f"image_size must be a side of at least 1, or (height, width), got {image_size}")
    return height, width


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in 0..2**64-1, got {seed}")


def _permutation(n: int, seed: int, stream: int) -> np.ndarray:
    words = np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)).random_raw(n)
    return np.argsort(words, kind="stable")


def _held_out(n: int, count: int, seed: int, labels: np.ndarray | None) -> np.ndarray:
    """(n,) bool with `count` true, shared among the classes in proportion (largest remainders)."""
    order = _permutation(n, seed, _SPLIT_STREAM)
    classes = np.zeros(n, dtype=np.int64) if labels is None else np.unique(labels, return_inverse=True)[1]
    # In integers, so that no rounding decides a tie.
    quotas, remainders = np.divmod(np.bincount(classes) * count, n)
    quotas[np.argsort(-remainders, kind="stable")[: count - quotas.sum()]] += 1
    result = np.zeros(n, dtype=bool)
    for index, quota in enumerate(quotas):
        result[order[classes[order] == index][:quota]] = True
    return result


def _not_found(source: str | os.PathLike[str]) -> str:
    text = os.fspath(source)
    if Path(text).suffix or Path(text).name != text:
        return f"no such file or folder: {text}"
    return f"unknown data {text!r}: expected {', '.join(BUILT_IN)}, a folder of images, or a .npy or .npz file"


def _digits() -> Contents:
    from sklearn.datasets import load_digits  # slow to import

    digits = load_digits()
    return Contents(digits.images[:, None].astype(np.uint8), digits.target, classes=tuple("0123456789"))


def _photos() -> Contents:
    from sklearn.datasets import load_sample_image

    names = ("china", "flower")
    result: list[np.ndarray] = []
    for columns, stride in ((slice(0, _PHOTO_TRAIN_WIDTH), 8), (slice(_PHOTO_TRAIN_WIDTH, None), _PHOTO_CROP)):
        crops = []
        for name in names:
            part = load_sample_image(f"{name}.jpg")[:, columns]
            windows = np.lib.stride_tricks.sliding_window_view(part, (_PHOTO_CROP, _PHOTO_CROP), axis=(0, 1))
            crops.append(windows[::stride, ::stride].reshape(-1, 3, _PHOTO_CROP, _PHOTO_CROP))
        result += [np.concatenate(crops), np.repeat(np.arange(2), len(crops[0]))]
    train, labels, test, test_labels = result
    return Contents(train, labels, test, test_labels, classes=names)
