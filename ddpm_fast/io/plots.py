"""Pictures of what a diffusion model does: sample grids, noising, denoising, the bound, the loss.

matplotlib is used through `Figure`, which draws without a display and leaves the global state of
pyplot alone; it is imported when a plot is asked for. Every file is whole or not there, and parent
folders are created.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ddpm_fast.io.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GRID_PIXELS = 800  # longer side that small images are scaled up to, at most
_GIF_PIXELS = 400
_GIF_FRAMES = 40
_GIF_NOISE_COLOURS = 32
_GIF_SECONDS = 4.0
_GIF_HOLD_SECONDS = 2.0
_BACKGROUND = 255
_INK, _ACCENT, _PALE = "#333333", "#1f5f99", "#9dbcd9"


def image_grid(x: torch.Tensor, columns: int | None = None, padding: int = 2, *, max_pixels: int = _GRID_PIXELS) -> np.ndarray:
    """Images side by side, row by row, on white.

    Args:
        x: (N, C, H, W), C in {1, 3}, float in [-1, 1] (values outside are clamped), any device.
        columns: images in a row; by default about as many as rows.
        padding: white pixels between images and around them, after scaling.
        max_pixels: images are repeated by the largest integer factor with which the longer side
            of the grid stays within this, so that 8x8 digits can be seen.

    Returns:
        (height, width, C) uint8.

    Raises:
        ValueError: another shape, no images, NaN or infinity, or `columns` < 1.
    """
    _check_images("x", x, 4)
    if columns is None:
        columns = math.ceil(math.sqrt(len(x)))
    if columns < 1 or padding < 0:
        raise ValueError(f"columns must be at least 1 and padding at least 0, got {columns} and {padding}")
    columns = min(columns, len(x))
    rows = math.ceil(len(x) / columns)
    images = x.detach().to("cpu", torch.float32)
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    height, width, channels = pixels.shape[1:]
    room_x = (max_pixels - (columns + 1) * padding) // (columns * width)
    room_y = (max_pixels - (rows + 1) * padding) // (rows * height)
    factor = max(1, min(room_x, room_y))
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    step_y, step_x = height * factor + padding, width * factor + padding
    grid = np.full((rows * step_y + padding, columns * step_x + padding, channels), _BACKGROUND, np.uint8)
    for index, image in enumerate(pixels):
        top, left = (padding + place * step for place, step in zip(divmod(index, columns), (step_y, step_x)))
        grid[top : top + height * factor, left : left + width * factor] = image
    return grid


def write_grid(path: str | os.PathLike[str], x: torch.Tensor, columns: int | None = None, padding: int = 2) -> None:
    """Writes `image_grid` of (N, C, H, W) floats in [-1, 1] as an image; the suffix gives the format."""
    grid = image_grid(x, columns, padding)
    with atomic_write(path) as temporary:
        _picture(grid).save(temporary)


def write_forward_strip(
    path: str | os.PathLike[str],
    frames: torch.Tensor,
    labels: Sequence[int | str],
    alphas_bar: Sequence[float] | None = None,
) -> None:
    """Noising as a table of images: a row an image, a column a noise level.

    Args:
        frames: (K, N, C, H, W) float in [-1, 1] (clamped): K noise levels of the same N images.
        labels: (K,) time indices t, or texts, that head the columns.
        alphas_bar: (K,) share of the signal's variance that is left, a second line of the heads.

    Raises:
        ValueError: as `image_grid`, or lengths that differ.
    """
    _check_images("frames", frames, 5)
    count, rows = frames.shape[:2]
    for name, values in (("labels", labels), ("alphas_bar", alphas_bar)):
        if values is not None and len(values) != count:
            raise ValueError(f"{name} must have one entry for each of the {count} noise levels, got {len(values)}")
    heads = [label if isinstance(label, str) else f"t = {int(label)}" for label in labels]
    if alphas_bar is not None:
        heads = [f"{head}\nᾱ = {float(value):.3g}" for head, value in zip(heads, alphas_bar)]

    grid = image_grid(frames.transpose(0, 1).flatten(0, 1), columns=count, padding=2)
    cell = 0.9  # inches: the widest head still fits over its column
    head_height = 0.25 if alphas_bar is None else 0.4
    figure = _figure(cell * count, cell * rows * frames.shape[3] / frames.shape[4] + head_height)
    axes = figure.add_subplot()
    axes.imshow(grid if grid.shape[2] == 3 else grid[..., 0], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_xticks((np.arange(count) + 0.5) * (grid.shape[1] / count), heads)
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0, labelsize=9, colors=_INK)
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    _save(figure, path)


def write_reverse_gif(path: str | os.PathLike[str], frames: torch.Tensor, columns: int | None = None) -> None:
    """Denoising as an animated GIF, about 4 seconds and 2 more on the last frame, in a loop.

    Args:
        frames: (K, N, C, H, W) float in [-1, 1] (clamped), from noise to images. Of more than 40
            frames, 40 evenly spaced ones are shown, the first and the last among them.
        columns: images in a row, as in `image_grid`.

    Raises:
        ValueError: as `image_grid`.
    """
    _check_images("frames", frames, 5)
    chosen = np.unique(np.linspace(0, len(frames) - 1, _GIF_FRAMES).round().astype(int))
    grids = [_picture(image_grid(frames[int(index)], columns, max_pixels=_GIF_PIXELS)) for index in chosen]
    # Noise hardly compresses: few colours keep the file small, and the result has all it can have.
    # Without dithering, which would be noise that the model did not make.
    colours = [_GIF_NOISE_COLOURS] * (len(grids) - 1) + [256]
    grids = [grid.quantize(count, dither=Image.Dither.NONE) for grid, count in zip(grids, colours)]
    # GIF counts in hundredths, and viewers slow down what is shorter than two of them.
    each = max(20, round(_GIF_SECONDS * 100 / len(grids)) * 10)
    durations = [each] * (len(grids) - 1) + [each + int(_GIF_HOLD_SECONDS * 1000)]
    with atomic_write(path) as temporary:
        grids[0].save(temporary, format="GIF", save_all=True, append_images=grids[1:], duration=durations, loop=0, optimize=True)


def write_bound_plot(
    path: str | os.PathLike[str],
    terms: torch.Tensor,
    prior: torch.Tensor | float,
    timesteps: torch.Tensor | None = None,
    *,
    weights: torch.Tensor | None = None,
    title: str | None = None,
) -> None:
    """The variational bound, term by term, in bits/dim against t on a logarithmic axis.

    Args:
        terms: (T,) means over a data set, or (N, T) of single images, whose mean is drawn with a
            band of two standard errors. Entry t = 0 is the decoder's term.
        prior: L_T, a number or (N,), bits/dim; it is in the total.
        timesteps: (T,) time index of each term; by default 0..T-1.
        weights: (T,) how many terms of the bound each one stands for in the total; by default one. An estimate draws
            one term for each interval of t.
        title: a line above the one with the total.

    Raises:
        ValueError: another shape, NaN or infinity.
    """
    terms = torch.as_tensor(terms, dtype=torch.float64, device="cpu").detach()
    prior = torch.as_tensor(prior, dtype=torch.float64, device="cpu").detach()
    if terms.ndim not in (1, 2) or terms.numel() == 0:
        raise ValueError(f"terms must have shape (T,) or (N, T), got {tuple(terms.shape)}")
    t = torch.arange(terms.shape[-1], device="cpu") if timesteps is None else torch.as_tensor(timesteps, device="cpu")
    weights = (
        torch.ones(len(t), dtype=torch.float64, device="cpu")
        if weights is None
        else torch.as_tensor(weights, dtype=torch.float64, device="cpu")
    )
    for name, values in (("timesteps", t), ("weights", weights)):
        if values.shape != terms.shape[-1:]:
            raise ValueError(f"{name} must have shape ({terms.shape[-1]},), got {tuple(values.shape)}")
    _check_finite("terms", terms)
    _check_finite("prior", prior)

    figure = _figure(7.2, 4.2)
    axes = figure.add_subplot()
    means = terms if terms.ndim == 1 else terms.mean(0)
    total = float((weights * means).sum() + prior.mean())
    order = t.argsort()
    times, mean = t[order].numpy(), means[order].numpy()
    # No logarithm shows these. NaN leaves a gap in the line, where a clipped value would lie.
    shown = np.where(mean > 0, mean, np.nan)
    if terms.ndim == 2 and len(terms) > 1:
        error = 2 * (terms.std(0) / math.sqrt(len(terms)))[order].numpy()
        floor = np.nanmin(shown) / 10 if (mean > 0).any() else 0
        axes.fill_between(
            times, np.maximum(mean - error, floor), shown + error, color=_PALE, alpha=0.6, lw=0,
            label=f"± 2 standard errors, {len(terms)} images",
        )  # fmt: skip
    axes.plot(times, shown, color=_ACCENT, lw=1.3, label="$L_t$, mean" if terms.ndim == 2 else "$L_t$")
    if times[0] == 0 and mean[0] > 0:
        axes.plot(0, mean[0], "o", color=_INK, ms=5, label=f"decoder, t = 0: {mean[0]:.4g}", zorder=3, clip_on=False)
    hidden = int((mean <= 0).sum())
    if hidden:
        axes.plot([], [], " ", label=f"{hidden} of {len(mean)} terms are not above 0: not drawn")
    if hidden < len(mean):
        axes.set_yscale("log")
    _label(axes, "time step t", "term of the bound (bits/dim)")
    summary = f"total {total:.4g} bits/dim, of which prior {float(prior.mean()):.3g}"
    axes.set_title(summary if title is None else f"{title}\n{summary}", fontsize=10, color=_INK, loc="left")
    axes.legend(edgecolor="none", fontsize=9, labelcolor=_INK)
    _save(figure, path)


def write_rate_distortion_plot(
    path: str | os.PathLike[str],
    t: torch.Tensor,
    rate: torch.Tensor,
    distortion: torch.Tensor,
    *,
    title: str | None = None,
) -> None:
    """The progressive code of a model, as fig. 5 of Ho et al. 2020: distortion against rate, and both against t.

    Args:
        t: (K,) the step whose state the receiver has; in any order.
        rate: (K,) bits/dim received by then.
        distortion: (K,) root mean squared error of the image shown by then, on a scale of [0, 255].
        title: a line above.

    Raises:
        ValueError: another shape, no points, NaN or infinity.
    """
    columns = [torch.as_tensor(column, dtype=torch.float64, device="cpu").detach() for column in (t, rate, distortion)]
    if columns[0].ndim != 1 or not len(columns[0]) or any(column.shape != columns[0].shape for column in columns):
        raise ValueError(f"t, rate and distortion must have one shape (K,), K >= 1, got {', '.join(str(tuple(c.shape)) for c in columns)}")
    for name, column in zip(("t", "rate", "distortion"), columns):
        _check_finite(name, column)
    order = columns[0].argsort(descending=True)
    times, rates, distortions = (column[order].numpy() for column in columns)
    figure = _figure(9.6, 3.4)
    # Over t the steps run as the code does, from noise to the image.
    panels = (
        (rates, "rate (bits/dim)", distortions, "distortion (RMSE of 255)"),
        (times, "time step t", distortions, "distortion (RMSE of 255)"),
        (times, "time step t", rates, "rate (bits/dim)"),
    )
    marker = "o" if len(times) < 60 else None
    for axes, (x, x_label, y, y_label) in zip(figure.subplots(1, 3), panels):
        axes.plot(x, y, color=_ACCENT, lw=1.3, marker=marker, ms=3)
        _label(axes, x_label, y_label, integers=x is times)
        axes.set_ylim(bottom=0)
        if x is times:
            axes.invert_xaxis()
        else:
            label = f"t = {times[-1]:.0f}: {x[-1]:.3g} bits/dim, {y[-1]:.3g}"
            axes.plot(x[-1], y[-1], "o", color=_INK, ms=5, zorder=3, clip_on=False, label=label)
            axes.legend(edgecolor="none", fontsize=9, labelcolor=_INK)
    if title is not None:
        figure.suptitle(title, fontsize=10, color=_INK)
    _save(figure, path)


def write_loss_curve(
    path: str | os.PathLike[str], steps: Sequence[int], losses: Sequence[float], *, ylabel: str = "loss (mean squared error)"
) -> None:
    """Training loss against step, logarithmic where all losses are positive.

    Many points are drawn pale under their running mean. Losses that are not finite leave a gap,
    and the legend counts them.

    Args:
        steps: (K,) increasing.
        losses: (K,).
        ylabel: name and unit of the loss.

    Raises:
        ValueError: no points, or lengths that differ.
    """
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1 or x.size == 0:
        raise ValueError(f"steps and losses must have one shape (K,), K >= 1, got {x.shape} and {y.shape}")
    finite = np.isfinite(y)
    y = np.where(finite, y, np.nan)
    figure = _figure(7.2, 3.6)
    axes = figure.add_subplot()
    window = len(y) // 50
    if window > 1:
        axes.plot(x, y, color=_PALE, lw=0.8, label="loss")
        kernel = np.ones(window)
        weights = np.convolve(finite, kernel, "valid")
        with np.errstate(invalid="ignore"):
            smooth = np.convolve(np.where(finite, y, 0), kernel, "valid") / np.where(weights > 0, weights, np.nan)
        # At the middle of its points: at their end it would lag behind a steep fall.
        middle = x[window // 2 :][: len(smooth)]
        axes.plot(middle, smooth, color=_ACCENT, lw=1.5, label=f"mean of {window} points")
    else:
        axes.plot(x, y, color=_ACCENT, lw=1.3, marker="o" if len(y) < 20 else None, ms=3, label="loss")
    if not finite.all():
        axes.plot([], [], " ", label=f"{int((~finite).sum())} of {len(y)} are not finite: not drawn")
    if finite.any() and np.nanmin(y) > 0:
        axes.set_yscale("log")
    _label(axes, "training step", ylabel)
    axes.legend(edgecolor="none", fontsize=9, labelcolor=_INK)
    _save(figure, path)


def _check_images(name: str, x: torch.Tensor, dims: int) -> None:
    shape = "(N, C, H, W)" if dims == 4 else "(K, N, C, H, W)"
    if x.ndim != dims or x.numel() == 0 or x.shape[-3] not in (1, 3) or not x.is_floating_point():
        raise ValueError(f"{name} must be floats of shape {shape}, not empty, C in {{1, 3}}, got {x.dtype} {tuple(x.shape)}")
    _check_finite(name, x)


def _check_finite(name: str, x: torch.Tensor) -> None:
    count = int((~torch.isfinite(x)).sum())
    if count:
        raise ValueError(f"{name} must be finite, got {count} NaN or infinite of {x.numel()} values")


def _picture(grid: np.ndarray) -> Image.Image:
    return Image.fromarray(grid[..., 0] if grid.shape[2] == 1 else grid)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # slow to import

    return Figure(figsize=(width, height), layout="constrained")


def _label(axes: Axes, x: str, y: str, *, integers: bool = True) -> None:
    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel(y, color=_INK)
    axes.grid(axis="y", which="major", color="#e5e5e5", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=_INK, labelsize=9)
    locator: Any = axes.xaxis.get_major_locator()  # a linear axis' own, which has this option
    locator.set_params(integer=integers)
    axes.margins(x=0.01)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150)
