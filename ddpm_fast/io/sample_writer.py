"""Many images, drawn in batches by one process or by the ranks of a torchrun, into files; a run that was stopped goes on from there."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.data.grey_levels import to_levels
from ddpm_fast.io.image_store import GRID_IMAGES, MAX_PNGS, OUTPUTS, ImageStore
from ddpm_fast.io.lock import exclusive
from ddpm_fast.io.ranks import Ranks

FORMATS = ("png", "grid", "npz")


def write_samples(
    draw: Callable[[int, int], Tensor],
    out: str | Path,
    *,
    count: int,
    batch: int = 256,
    formats: Collection[str] = ("grid", "npz"),
    levels: int = 256,
    settings: Mapping[str, Any],
    labels: np.ndarray | None = None,
    overwrite: bool = False,
    ranks: Ranks | None = None,
    report: Callable[[int, int], object] = lambda done, of: None,
) -> dict[str, Path]:
    """Draws images 0..count-1 and writes them; those that the folder already has are not drawn again.

    Whatever stops it (Ctrl-C, a kill, a full disk), there are only complete files, and the same call goes on from there. It may then have
    another ``count``, ``batch``, number of ranks or other ``formats``: none of them changes an image. A larger ``count`` extends what is
    there; a smaller one takes nothing away from PNG files and ``samples.npz``. A kill may also leave a hidden folder ``.*.tmp`` with what
    was being written, which the next run removes.

    In memory: one batch, whatever ``count`` is. On disk: each image once as a PNG file, and uncompressed once in ``samples.npz`` and, until
    that is complete, once in the old ``samples.npz`` or in ``parts/``, where PNG files are not wanted.

    Args:
        draw: called as draw(first, count), gives images first..first+count-1 as (count, C, H, W) float in [-1, 1] (clamped), on the CPU.
            Image i must depend on i and ``settings`` alone.
        out: folder, created if missing. Beside the images it gets ``samples.json``, the settings.
        count: at least 1; at most 10^8 with "png".
        batch: images that are drawn at a time, at most; fewer where ranks would else have nothing to do.
        formats: some of "png": ``images/00000000.png`` and so on, 8 bits, levels spread over 0..255, C in {1, 3}; "grid": ``samples.png``
            of at most the first 400; "npz": ``samples.npz`` with ``images`` (count, C, H, W) uint8 levels, ``settings`` (as JSON) and, with
            ``labels``, ``labels`` (count,) int64. With "grid" alone no more than 400 images are drawn, and ``parts/`` stays to keep them.
        levels: 2..256 grey levels, to which the images are rounded.
        settings: JSON values of all that the images depend on: checkpoint, sampler, steps, seed, ... Levels are added.
        labels: (count,) integers from 0, which ``draw`` conditions on.
        overwrite: replace images of other settings; those of the same settings always stay.
        ranks: the processes that share the drawing, all with the same arguments and folder; by default this one alone.
        report: called as report(done, count), in images, after each batch of this process; its fellows are taken to be as fast.

    Returns:
        The paths of what was asked for, by format, and "settings"; complete for every rank.

    Raises:
        ValueError: an argument out of range; images of another shape, or NaN; the folder holds images of other settings.
        BlockingIOError: another process draws into the folder.
        OSError: the folder cannot be written, which is noticed before anything is drawn; or the disk is full: the message names the
            file and tells how many images are complete.
        SystemExit: in ranks other than the first where the first one has raised.
    """
    ranks = ranks or Ranks()
    wanted = _check(count, batch, formats, levels, labels)
    if wanted == {"grid"}:
        count = min(count, GRID_IMAGES)
    try:
        store = ImageStore(Path(out), {**settings, "levels": levels}, levels)
    except TypeError as error:
        raise ValueError(f"settings must be JSON values: {error}") from error
    with contextlib.ExitStack() as held:

        def prepare() -> None:
            held.enter_context(exclusive(out, "sampling", *OUTPUTS))
            store.open("png" in wanted, overwrite)

        ranks.lead(prepare)
        _write(store, draw, count, batch, wanted, labels, ranks, report)
    paths = {"png": store.images, "grid": store.grid, "npz": store.npz}
    return {name: paths[name] for name in FORMATS if name in wanted} | {"settings": store.record}


def _write(
    store: ImageStore,
    draw: Callable[[int, int], Tensor],
    count: int,
    batch: int,
    wanted: set[str],
    labels: np.ndarray | None,
    ranks: Ranks,
    report: Callable[[int, int], object],
) -> None:
    png = "png" in wanted
    share = ranks.share_missing(partial(store.missing, count), batch)
    left = sum(map(len, share)) * ranks.size
    report(max(0, count - left), count)
    save = store.save_png if png else store.save_part
    for part in share:
        images = _draw(draw, part, store.levels, wanted)
        with _progress_in_errors(store, count):
            save(part, images)
        left -= len(part) * ranks.size
        report(max(0, count - left), count)
    with _progress_in_errors(store, count):
        ranks.wait()
        if png:  # those that an earlier run without PNG files has drawn
            store.add_png(ranks.share_missing(partial(store.without_png, count), batch))
        ranks.wait()
        ranks.lead(partial(_finish, store, count, batch, wanted, labels))


def _check(count: int, batch: int, formats: Collection[str], levels: int, labels: np.ndarray | None) -> set[str]:
    wanted = {formats} if isinstance(formats, str) else set(formats)
    if not wanted or not wanted <= set(FORMATS):
        raise ValueError(f"formats must be some of {', '.join(FORMATS)}, got {', '.join(sorted(wanted)) or 'none'}")
    for name, value, most in (("count", count, MAX_PNGS if "png" in wanted else math.inf), ("batch", batch, math.inf)):
        if not 1 <= value <= most:
            raise ValueError(f"{name} must be at least 1{'' if most == math.inf else f' and at most {most} with png'}, got {value}")
    if not 2 <= levels <= 256:
        raise ValueError(f"levels must be in 2..256, got {levels}")
    if labels is not None and (labels.shape != (count,) or labels.dtype.kind not in "iu" or labels.min() < 0):
        raise ValueError(f"labels must be ({count},) integers from 0, got {labels.dtype} {labels.shape}")
    return wanted


def _draw(draw: Callable[[int, int], Tensor], part: range, levels: int, wanted: set[str]) -> np.ndarray:
    """(len(part), C, H, W) uint8 levels."""
    x = draw(part.start, len(part))
    channels = "C" if wanted == {"npz"} else "1 or 3"
    if x.ndim != 4 or len(x) != len(part) or not x.is_floating_point() or (wanted != {"npz"} and x.shape[1] not in (1, 3)):
        raise ValueError(f"draw must give floats of shape ({len(part)}, {channels}, H, W), got {x.dtype} {tuple(x.shape)}")
    broken = torch.isnan(x).flatten(1).any(1).nonzero()
    if len(broken):
        raise ValueError(f"image {part.start + int(broken[0])} holds NaN: the model's output is not finite")
    return to_levels(x, levels).numpy()


def _finish(store: ImageStore, count: int, batch: int, wanted: set[str], labels: np.ndarray | None) -> None:
    if "grid" in wanted:
        store.write_grid(count)
    if "npz" in wanted:
        store.write_npz(count, batch, None if labels is None else labels.astype(np.int64))
    store.drop_parts()


@contextlib.contextmanager
def _progress_in_errors(store: ImageStore, count: int) -> Iterator[None]:
    """Adds to an error of the file system how far the run has come."""
    try:
        yield
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        complete = count - sum(map(len, store.missing(count, count)))
        told = OSError(f"{what}; {complete} of {count} images are complete, run the same command again to go on")
        told.errno = error.errno
        raise told from error
