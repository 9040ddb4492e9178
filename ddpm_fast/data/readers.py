"""Images in a folder as arrays of grey levels; `load_data` says what is accepted."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ddpm_fast.data.array_files import Contents, check_memory, reading
from ddpm_fast.data.grey_levels import DataError, Scale

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

# Pillow finds out what a file is by its content, whatever its name, and knows formats that start other programs (EPS).
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_GREY_MODES = ("1", "L", "LA", "I;16", "I;16B", "I;16L")
# Of 16-bit colour Pillow keeps the high bytes; read as of the other byte order, these are the low ones. "N" is the machine's.
_HIGH_TO_LOW = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}
_TRAINING = {"train", "training"}
_OTHER_PARTS = {"test", "testing", "val", "valid", "validation", "eval", "evaluation", "dev"}


def open_image(path: Path, formats: tuple[str, ...] = _FORMATS) -> Image.Image:
    """An image file that is one of the formats by its content. The only place that opens one.

    Raises:
        OSError, and whatever else Pillow raises for a damaged file.
    """
    try:
        return Image.open(path, formats=formats)
    except UnidentifiedImageError:
        raise OSError(f"by its content it is no {' or '.join(formats)}, or a damaged one") from None


def read_folder(folder: Path, image_size: tuple[int, int] | None, scale: Scale) -> Contents:
    """All images below the folder, in order of path; `image_size` is (H, W)."""
    relative, skipped = _find(folder)
    if not relative:
        others = f" but {', '.join(f'{count} {what}' for what, count in skipped.items())}" if skipped else ""
        raise DataError(f"{folder} must hold images ({', '.join(IMAGE_SUFFIXES)}), got none{others}")
    classes, unlabelled = _classes(folder, relative)
    paths = [folder / path for path in relative]
    # Only headers are read here, so that a wrong file is found before the long part.
    sizes, grey = zip(*(_inspect(path, scale) for path in paths))
    height, width = image_size or sizes[0]
    if image_size is None:
        for path, other in zip(paths, sizes):
            if other != sizes[0]:
                raise DataError(
                    f"images must have one size, got {paths[0]} of {height}x{width} and {path} of {other[0]}x{other[1]} (height x width); "
                    "image_size=N (--image-size N, or HEIGHTxWIDTH) crops and resizes all of them"
                )
    mode = "L" if all(grey) else "RGB"
    shape = len(paths), len(mode), height, width
    # Of two: the parts that they are divided into are copies.
    check_memory(
        2 * len(paths) * len(mode) * height * width, f"{folder} with {len(paths)} images of {shape[1:]}", "train on fewer or smaller images"
    )
    result = np.empty(shape, dtype=np.uint8)
    for row, path in zip(result, paths):
        row[:] = _decode(path, mode, image_size, scale)
    labels = None if classes is None else np.array([classes.index(path.parts[0]) for path in relative])
    return Contents(result, labels, classes=classes, skipped=skipped, unlabelled=unlabelled)


def _find(folder: Path) -> tuple[list[Path], dict[str, int]]:
    """Paths of images relative to the folder, sorted, and how many other files there are by suffix.

    Links to folders are followed once all that is really there is read. Each folder is read once, so that neither a circle nor
    two names for one folder make images that are held out and trained on.
    """
    images: list[Path] = []
    skipped: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()
    folders, links = [folder], list[Path]()
    while folders or links:
        current = folders.pop() if folders else links.pop(0)
        status = current.stat()
        if (status.st_dev, status.st_ino) in seen:
            skipped["folder linked twice"] += 1
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in sorted(os.scandir(current), key=lambda entry: entry.name):
            path = current / entry.name
            if entry.name.startswith("."):
                skipped["hidden"] += 1
            elif entry.is_dir():
                (links if entry.is_symlink() else folders).append(path)
            elif path.suffix.lower() not in IMAGE_SUFFIXES:
                skipped[path.suffix.lower() or "without a suffix"] += 1
            elif not entry.is_file():
                skipped["broken link" if entry.is_symlink() else "no file"] += 1
            else:
                images.append(path.relative_to(folder))
    return sorted(images), dict(skipped.most_common())


def _classes(folder: Path, relative: list[Path]) -> tuple[tuple[str, ...] | None, str]:
    """Names of the classes in order, or None and why there are none."""
    names = tuple(sorted({path.parts[0] for path in relative if len(path.parts) > 1}))
    parts = [[name for name in names if name.lower() in some] for some in (_TRAINING, _OTHER_PARTS)]
    if all(parts):
        raise DataError(
            f"{folder} is divided into {', '.join(parts[0] + parts[1])}, which are parts of a data set and not classes; give one of "
            f"them, {folder / parts[0][0]}, of which a share is held out"
        )
    outside = sum(len(path.parts) == 1 for path in relative)
    if not names:
        return None, "its images are in no sub-folders, which would be the classes"
    if outside:
        return None, f"{outside} of its {len(relative)} images are in none of its sub-folders, which would be the classes"
    if len(names) > 1:
        return names, ""
    below = sorted({path.parts[1] for path in relative if len(path.parts) > 2})
    inner = (
        f"; to take {', '.join(below[:3])}{', ...' if len(below) > 3 else ''} as classes give {folder / names[0]}" if len(below) > 1 else ""
    )
    return None, f"all its images are in one sub-folder, {names[0]}{inner}"


def _inspect(path: Path, scale: Scale) -> tuple[tuple[int, int], bool]:
    """(height, width) as seen, and whether the image is grey; reads the header only."""
    with reading(f"image {path}"), open_image(path) as image:
        if image.mode in ("I", "F") and scale.value_range is None:
            raise DataError(
                f"cannot read image {path}: 32-bit pixels (mode {image.mode}) have no known range; save 8 bits, or give the range by "
                "value_range (--range)"
            )
        turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5..8 swap the sides
        return image.size if turned else image.size[::-1], image.mode in (*_GREY_MODES, "I", "F")


def _decode(path: Path, mode: str, image_size: tuple[int, int] | None, scale: Scale) -> np.ndarray:
    """(C, H, W) uint8; the first frame of an animation."""
    with reading(f"image {path}"), open_image(path) as image:
        values = _wide_values(path, image)
        if values is None:
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            values = np.asarray(image.convert(mode))
        levels = scale(values[None], str(path))[0]
        if image_size is not None:
            image = Image.fromarray(levels)
            # Cropped before resizing: ImageOps.fit would let pixels outside the part bleed in.
            height, width = image_size
            across = min(image.width, _rounded(image.height * width, height))
            down = min(image.height, _rounded(image.width * height, width))
            left, top = (image.width - across) // 2, (image.height - down) // 2
            image = image.crop((left, top, left + across, top + down))
            image = image.resize((width, height), Image.Resampling.LANCZOS)
            levels = np.minimum(np.asarray(image), scale.levels - 1)  # Lanczos overshoots
    return levels[None] if levels.ndim == 2 else levels.transpose(2, 0, 1)  # grey goes into three channels as into one


def _wide_values(path: Path, image: Image.Image) -> np.ndarray | None:
    """(H, W) or (H, W, 3) of the pixels that have more than eight bits; None for all others."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return np.asarray(ImageOps.exif_transpose(image))
    colour, _, kept = _raw_mode(image).partition(";")
    bits = getattr(image, "tag_v2", {}).get(258, 8)  # TIFF's BitsPerSample
    if (not kept.startswith("16") and np.max(bits) <= 8) or image.format == "BMP":  # whose BGR;16 is 5 + 6 + 5 bits
        return None
    if colour not in ("RGB", "RGBA") or kept not in _HIGH_TO_LOW:
        raise DataError(f"cannot read image {path}: {_raw_mode(image)} pixels of more than 8 bits; save 8 bits, or 16 in RGB or grey")
    with open_image(path) as again:
        mode = f"{colour};{_HIGH_TO_LOW[kept]}"
        file: Any = again  # with tiles, as all that are opened have
        file.tile = [(*tile[:3], mode if isinstance(tile[3], str) else (mode, *tile[3][1:])) for tile in file.tile]
        high, low = (np.asarray(ImageOps.exif_transpose(part)).astype(np.uint16) for part in (image, again))
    values = high << 8 | low
    if colour == "RGBA":  # onto white, as eight bits are
        alpha = values[..., 3:].astype(np.uint32)
        values = ((values[..., :3] * alpha + 65535 * (65535 - alpha) + 32767) // 65535).astype(np.uint16)
    return values


def _raw_mode(image: Image.Image) -> str:
    """Form in which the file holds the pixels, which tells of bits that the mode does not have."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _rounded(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)
