"""Folders of images and NumPy files as arrays of grey levels; `load_data` says what is accepted.

`to_unit` and `to_levels` are the one place for the mapping between levels and floats in [-1, 1].
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

_FLOAT_TOLERANCE = 1e-3
_NPZ_TRAIN = ("train", "x_train", "images", "x", "arr_0")
_NPZ_TEST = ("test", "x_test")
_NPZ_TRAIN_LABELS = ("train_labels", "y_train", "labels", "y", "arr_1")
_NPZ_TEST_LABELS = ("test_labels", "y_test")
_NPZ_KEYS = _NPZ_TRAIN + _NPZ_TEST + _NPZ_TRAIN_LABELS + _NPZ_TEST_LABELS
_GREY_MODES = ("1", "L", "LA", "I;16", "I;16B", "I;16L")
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class DataError(ValueError):
    """Data that cannot be used; says what was expected and what came."""


def to_unit(x: torch.Tensor, levels: int = 256) -> torch.Tensor:
    """Grey levels 0..levels-1 (any shape, integer) to float32 in [-1, 1], both ends exact."""
    return x.to(torch.float32) * 2 / (levels - 1) - 1


def to_levels(x: torch.Tensor, levels: int = 256) -> torch.Tensor:
    """Floats to the nearest of the grey levels 0..levels-1, as uint8; values outside [-1, 1] are clamped.

    Raises:
        ValueError: `x` holds NaN, for which there is no level.
    """
    if torch.isnan(x).any():
        raise ValueError(f"x must hold no NaN, got {int(torch.isnan(x).sum())} of {x.numel()} values")
    return ((x.to(torch.float32) + 1) * ((levels - 1) / 2)).round().clamp(0, levels - 1).to(torch.uint8)


def read_folder(folder: Path, image_size: int | None) -> tuple[np.ndarray, np.ndarray | None]:
    """(N, C, H, W) uint8 in order of path, and (N,) class numbers or None."""
    relative = sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    )
    relative = [path for path in relative if not any(part.startswith(".") for part in path.parts)]
    if not relative:
        raise DataError(f"{folder} must hold images ({', '.join(IMAGE_SUFFIXES)}), got none")
    paths = [folder / path for path in relative]
    # Only headers are read here, so that a wrong file is found before the long part.
    sizes, grey = zip(*map(_inspect, paths))
    size = sizes[0] if image_size is None else (image_size, image_size)
    if image_size is None:
        for path, other in zip(paths, sizes):
            if other != size:
                raise DataError(
                    f"images must have one size, got {paths[0]} of {size[0]}x{size[1]} and {path} of "
                    f"{other[0]}x{other[1]}; image_size=N (--image-size N) crops and resizes all of them"
                )
    mode = "L" if all(grey) else "RGB"
    result = np.empty((len(paths), len(mode), size[1], size[0]), dtype=np.uint8)
    for row, path in zip(result, paths):
        row[:] = _decode(path, mode, image_size)
    names = sorted({path.parts[0] for path in relative})
    if any(len(path.parts) == 1 for path in relative) or len(names) < 2:
        return result, None
    return result, np.array([names.index(path.parts[0]) for path in relative])


def _inspect(path: Path) -> tuple[tuple[int, int], bool]:
    """(width, height) as seen, and whether the image is grey; reads the header only."""
    try:
        with Image.open(path) as image:
            mode, size = image.mode, image.size
            turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5..8 swap the sides
    except _UNREADABLE as error:
        raise DataError(f"cannot read image {path}: {error}") from error
    if mode in ("I", "F"):
        raise DataError(f"cannot read image {path}: 32-bit pixels (mode {mode}) have no known range; save 8 bits")
    return (size[1], size[0]) if turned else size, mode in _GREY_MODES


def _decode(path: Path, mode: str, image_size: int | None) -> np.ndarray:
    """(C, H, W) uint8; the first frame of an animation."""
    try:
        with Image.open(path) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):
                # Pillow's own conversion would clip, not scale.
                wide = np.asarray(image).astype(np.uint32)
                image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert(mode)
            if image_size is not None:
                # Cropped before resizing: ImageOps.fit would let pixels outside the square bleed in.
                side = min(image.size)
                left, top = (image.width - side) // 2, (image.height - side) // 2
                image = image.crop((left, top, left + side, top + side))
                image = image.resize((image_size, image_size), Image.Resampling.LANCZOS)
            pixels = np.asarray(image)
    except _UNREADABLE as error:
        raise DataError(f"cannot read image {path}: {error}") from error
    return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)


def read_array_file(path: Path, levels: int) -> tuple[np.ndarray, ...]:
    """Training images and labels, test images and labels; None for what is not there."""
    if path.suffix.lower() not in (".npy", ".npz"):
        raise DataError(f"data must be a built-in name, a folder, a .npy or a .npz file, got {path}")
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            with loaded:
                arrays = {key: loaded[key] for key in loaded.files if key in _NPZ_KEYS}
        else:
            arrays = {"train": loaded}
    # The last three: damaged, unknown and encrypted compression.
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        if "object" in str(error).lower():
            error = "it holds Python objects (pickles), or is no NumPy file; expected plain numbers"
        raise DataError(f"cannot read {path}: {error}") from None

    def first(keys: tuple[str, ...]) -> np.ndarray | None:
        return next((arrays[key] for key in keys if key in arrays), None)

    train, test = first(_NPZ_TRAIN), first(_NPZ_TEST)
    if train is None:
        raise DataError(f"{path} must have images under {', '.join(_NPZ_TRAIN)}; got {', '.join(getattr(loaded, 'files', ())) or 'nothing'}")
    labels, test_labels = first(_NPZ_TRAIN_LABELS), first(_NPZ_TEST_LABELS)
    train = _images(train, str(path), levels)
    labels = _labels(labels, len(train), str(path))
    if test is None:
        return train, labels, None, None
    test = _images(test, f"{path} (test)", levels)
    if train.shape[1:] != test.shape[1:]:
        raise DataError(f"{path}: test images must be {train.shape[1:]} like the others, got {test.shape[1:]}")
    if (labels is None) != (test_labels is None):
        part = "test" if labels is None else "training"
        raise DataError(f"{path} must have labels for both parts or none, got only {part} labels")
    return train, labels, test, _labels(test_labels, len(test), f"{path} (test)")


def _images(array: np.ndarray, where: str, levels: int) -> np.ndarray:
    """(N, C, H, W) uint8 from any array that `load_data` takes."""
    wanted = "(N, H, W), (N, H, W, C) or (N, C, H, W) with C in {1, 3}"
    shape = array.shape
    if array.size == 0:
        raise DataError(f"{where} must hold images, got an empty array of shape {shape}")
    if array.ndim == 3 and shape[2] not in (1, 3):
        array = array[:, None]
    elif array.ndim != 4:
        raise DataError(f"{where} must have shape {wanted}, got {shape}")
    elif (shape[1] in (1, 3)) == (shape[3] in (1, 3)):
        which = "both dimensions 1 and 3" if shape[1] in (1, 3) else "neither dimension 1 nor 3"
        raise DataError(f"{where} must have shape {wanted}, got {shape}: {which} could be channels")
    elif shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.dtype.kind in "iu":
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= levels:
            raise DataError(f"{where} must hold integers in 0..{levels - 1}, got {low}..{high}")
        return array.astype(np.uint8)
    if array.dtype.kind != "f":
        raise DataError(f"{where} must hold integers or floats, got {array.dtype}")
    if not np.isfinite(array).all():
        count = int((~np.isfinite(array)).sum())
        raise DataError(f"{where} must be finite, got {count} NaN or infinite of {array.size} values")
    low, high = float(array.min()), float(array.max())
    if max(-low, high) > 1 + _FLOAT_TOLERANCE:
        raise DataError(f"{where} must hold floats in [-1, 1], got {low:.6g}..{high:.6g}")
    if low >= 0:
        # Taken at its word, such data would train on the bright half of the range without a sign.
        raise DataError(
            f"{where} must hold floats in [-1, 1], got {low:.6g}..{high:.6g}, none below 0: for 0 as black save 2x - 1"
        )
    return to_levels(torch.from_numpy(array.astype(np.float32)), levels).numpy()


def _labels(labels: np.ndarray | None, n: int, where: str) -> np.ndarray | None:
    if labels is None:
        return None
    if labels.shape != (n,) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise DataError(f"{where}: labels must be ({n},) integers from 0, got {labels.shape} {labels.dtype}")
    return labels
