"""Image data: two built-in sets, folders of images and NumPy files, and the order of training.

Images are stored as integer grey levels (uint8, 0..levels-1), a quarter of the memory of floats,
and become floats in [-1, 1] a batch at a time.

Every random choice (held-out split, order of training) is an argsort of raw Philox words, which
NumPy keeps the same across its versions, unlike the output of its `permutation`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ddpm_fast.training.readers import IMAGE_SUFFIXES, DataError, read_array_file, read_folder, to_levels, to_unit

__all__ = ["BUILT_IN", "IMAGE_SUFFIXES", "Batches", "DataError", "ImageData", "load_data", "to_levels", "to_unit"]

BUILT_IN = ("digits", "photos")
_DIGITS_TEST = 360
_PHOTO_CROP = 32
_PHOTO_TRAIN_WIDTH = 480  # of 640 columns; the rest is for testing
_SPLIT_STREAM = 2**64 - 1  # no epoch has this number


@dataclass(frozen=True)
class ImageData:
    """Images in memory, with a part held out.

    Attributes:
        name: the built-in name, or the name of the folder or file.
        train: (N, C, H, W) uint8, grey levels 0..levels-1, contiguous, on the CPU.
        test: (M, C, H, W) uint8, likewise; never empty.
        levels: number of grey levels, for the decoder's bins: 256, or 17 for digits.
        train_labels: (N,) int64, or None.
        test_labels: (M,) int64, or None.
    """

    name: str
    train: torch.Tensor
    test: torch.Tensor
    levels: int = 256
    train_labels: torch.Tensor | None = None
    test_labels: torch.Tensor | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return tuple(self.train.shape[1:])

    @property
    def num_classes(self) -> int | None:
        """One more than the largest label, or None without labels."""
        if self.train_labels is None:
            return None
        return int(max(self.train_labels.max(), self.test_labels.max())) + 1

    def batch(
        self, split: str, indices: torch.Tensor, device: str | torch.device | None = None
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
    source: str | os.PathLike,
    *,
    image_size: int | None = None,
    test_fraction: float = 0.1,
    seed: int = 0,
    levels: int | None = None,
) -> ImageData:
    """Loads images and holds some of them out for testing.

    `source` is one of:

    - ``"digits"``: scikit-learn's handwritten digits, (1, 8, 8), 17 levels, 10 classes, a fixed
      stratified split of 1437 and 360.
    - ``"photos"``: crops of the two photographs that scikit-learn ships, (3, 32, 32), 2 classes
      (0 china, 1 flower). Training crops lie 8 pixels apart in the left 480 columns (2 x 2850), test
      crops side by side in the other 160 (2 x 65): no pixel is in both.
    - a folder: every image below it (``IMAGE_SUFFIXES``; other and hidden files are passed over),
      sorted by path. If each image is in a first-level sub-folder, and there are two or more, these
      are the classes, in order of name. If all images are grey the data has one channel, else three.
      Transparency is put onto white, EXIF rotation is applied, 16-bit grey is rounded to 8 bits.
    - a ``.npy`` file: (N, H, W), (N, H, W, C) or (N, C, H, W) with C in {1, 3}, integer levels
      0..levels-1 or floats in [-1, 1], which are rounded to the levels. With four dimensions C is
      the one of dimensions 1 and 3 that is 1 or 3; if both are, the file is refused.
    - a ``.npz`` file of such arrays: the first of ``train``, ``x_train``, ``images``, ``x``,
      ``arr_0``; if present ``test`` or ``x_test``; labels, (N,) integers from 0, under
      ``train_labels``, ``y_train``, ``labels``, ``y``, ``arr_1``, and ``test_labels``, ``y_test``.

    A built-in name wins over a folder of that name; write ``./digits`` for the folder.

    Args:
        image_size: folders: every image is cropped to its central square and resized (Lanczos) to
            this size. Elsewhere it may only repeat the size that the data has.
        test_fraction: folders and files without a test part: share held out, in proportion from
            each class; at least one image is held out and one kept.
        seed: of that split, 0..2**64-1. A run must keep it when it resumes.
        levels: files: number of grey levels, 2..256, by default 256. Elsewhere it may only repeat
            what the data has.

    Raises:
        DataError: the source is missing, unreadable, empty, inconsistent or out of range.
    """
    _check_seed(seed)
    if not 0 < test_fraction < 1:
        raise DataError(f"test_fraction must be between 0 and 1, got {test_fraction}")
    if image_size is not None and image_size < 1:
        raise DataError(f"image_size must be at least 1, got {image_size}")
    if levels is not None and not 2 <= levels <= 256:
        raise DataError(f"levels must be in 2..256, got {levels}")

    path = Path(source)
    test = test_labels = None
    if source == "digits":
        train, labels, own_levels = *_digits(), 17
    elif source == "photos":
        train, labels, test, test_labels = _photos()
        own_levels = 256
    elif path.is_dir():
        train, labels = read_folder(path, image_size)
        own_levels = 256
    elif path.is_file():
        own_levels = levels or 256
        train, labels, test, test_labels = read_array_file(path, own_levels)
    else:
        raise DataError(_not_found(source))
    if levels not in (None, own_levels):
        raise DataError(f"{source} has {own_levels} grey levels, got levels={levels}")
    if image_size is not None and train.shape[2:] != (image_size, image_size):
        height, width = train.shape[2:]
        raise DataError(
            f"{source} has images of {width}x{height}, got image_size={image_size}; only folders are resized"
        )
    if test is None:
        if len(train) < 2:
            raise DataError(f"{source} must have at least 2 images, one to train and one to test on, got {len(train)}")
        if source == "digits":
            count, seed = _DIGITS_TEST, 0  # fixed, so that results on digits can be compared
        else:
            count = min(max(round(len(train) * test_fraction), 1), len(train) - 1)
        held_out = _held_out(len(train), count, seed, labels)
        train, test = train[~held_out], train[held_out]
        if labels is not None:
            labels, test_labels = labels[~held_out], labels[held_out]
    arrays = (np.ascontiguousarray(train), np.ascontiguousarray(test))
    targets = (None if y is None else torch.from_numpy(y.astype(np.int64)) for y in (labels, test_labels))
    name = source if source in BUILT_IN else path.resolve().name
    return ImageData(name, *map(torch.from_numpy, arrays), own_levels, *targets)


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


def _not_found(source: str | os.PathLike) -> str:
    text = os.fspath(source)
    if Path(text).suffix or Path(text).name != text:
        return f"no such file or folder: {text}"
    return f"unknown data {text!r}: expected {', '.join(BUILT_IN)}, a folder of images, or a .npy or .npz file"


def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # slow to import

    digits = load_digits()
    return digits.images[:, None].astype(np.uint8), digits.target


def _photos() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    from sklearn.datasets import load_sample_image

    result = []
    for columns, stride in ((slice(0, _PHOTO_TRAIN_WIDTH), 8), (slice(_PHOTO_TRAIN_WIDTH, None), _PHOTO_CROP)):
        crops = []
        for name in ("china.jpg", "flower.jpg"):
            part = load_sample_image(name)[:, columns]
            windows = np.lib.stride_tricks.sliding_window_view(part, (_PHOTO_CROP, _PHOTO_CROP), axis=(0, 1))
            crops.append(windows[::stride, ::stride].reshape(-1, 3, _PHOTO_CROP, _PHOTO_CROP))
        result += [np.concatenate(crops), np.repeat(np.arange(2), len(crops[0]))]
    return tuple(result)
