"""Pictures: the pixels of the grids, what is written, and what is refused; how they look is for eyes."""

import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.io import plots
from ddpm_fast.io.plots import (
    image_grid,
    write_bound_plot,
    write_forward_strip,
    write_grid,
    write_loss_curve,
    write_rate_distortion_plot,
    write_reverse_gif,
)

X = torch.linspace(-1, 1, 5 * 3 * 8 * 8).view(5, 3, 8, 8)


def test_grid_places_and_values():
    x = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 1, 2, 3)
    grid = image_grid(x, columns=2, padding=1, max_pixels=1)  # too small to scale: one to one
    W = 255
    assert grid.dtype == np.uint8
    assert grid[..., 0].tolist() == [
        [W, W, W, W, W, W, W, W, W],
        [W, 0, 0, 0, W, 128, 128, 128, W],
        [W, 0, 0, 0, W, 128, 128, 128, W],
        [W, W, W, W, W, W, W, W, W],
        [W, 255, 255, 255, W, W, W, W, W],
        [W, 255, 255, 255, W, W, W, W, W],
        [W, W, W, W, W, W, W, W, W],
    ]


def test_every_level_of_a_sample_is_kept():
    levels = torch.arange(256.0)
    grid = image_grid((levels / 127.5 - 1).view(1, 1, 16, 16), padding=0, max_pixels=16)
    assert np.array_equal(grid.ravel(), levels.numpy())


def test_grid_clamps_and_takes_any_float():
    x = torch.tensor([-9.0, 9.0]).view(2, 1, 1, 1)
    for dtype in (torch.bfloat16, torch.float64):
        assert image_grid(x.to(dtype), columns=2, padding=0, max_pixels=2).ravel().tolist() == [0, 255]


# One tiny image, digits, photos, a wide row, a tall column, and images larger than the limit.
@pytest.mark.parametrize("n, size, columns", [(1, 8, None), (64, 8, None), (16, 32, 8), (40, 8, 40), (40, 8, 1), (4, 600, 2)])
def test_grid_is_scaled_by_whole_pixels_to_a_size_for_eyes(n, size, columns):
    x = torch.rand(n, 1, size, size) * 2 - 1
    grid = image_grid(x, columns)
    small = image_grid(x, columns, max_pixels=1)
    longer = max(grid.shape)
    assert 400 <= longer <= 800 or (grid.shape == small.shape and longer > 800)
    # The first pixel of the first image, as a block.
    factor = (grid.shape[1] - 2) // (columns or round(n**0.5)) - 2
    factor //= size
    assert (grid[2 : 2 + factor, 2 : 2 + factor] == small[2, 2]).all()


def test_columns_default_to_a_square_and_never_exceed_the_images():
    assert image_grid(X, padding=0, max_pixels=1).shape == (16, 24, 3)
    assert image_grid(X, columns=9, padding=0, max_pixels=1).shape == (8, 40, 3)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("channels", [1, 3])
def test_write_grid(tmp_path, channels, suffix):
    path = tmp_path / "new" / f"grid{suffix}"
    write_grid(path, X[:, :channels], columns=3)
    with Image.open(path) as image:
        assert image.mode == ("L" if channels == 1 else "RGB")
        if suffix == ".png":
            grid = image_grid(X[:, :channels], columns=3)
            assert np.array_equal(np.asarray(image).reshape(grid.shape), grid)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("channels", [1, 3])
def test_forward_strip(tmp_path, channels):
    frames = X[:, :channels].expand(4, 5, channels, 8, 8)
    write_forward_strip(tmp_path / "a.png", frames, ["data", "a", "b", "noise"])
    write_forward_strip(tmp_path / "b.png", frames, torch.tensor([0, 10, 100, 999]), alphas_bar=[1, 0.5, 0.1, 4e-5])
    sizes = [Image.open(tmp_path / name).size for name in ("a.png", "b.png")]
    assert sizes[0][0] == sizes[1][0] and sizes[0][1] < sizes[1][1]  # the second line of the heads
    # A row an image and a column a level: the whole picture is 4 columns by 5 rows.
    assert sizes[0][0] < sizes[0][1]


# One frame, few, and more than are shown.
@pytest.mark.parametrize("count", [1, 5, 1000])
@pytest.mark.parametrize("channels", [1, 3])
def test_reverse_gif(tmp_path, count, channels):
    # Frames that differ: equal neighbours would be merged.
    frames = torch.rand(count, 2, channels, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    frames[-1] = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
    write_reverse_gif(tmp_path / "a.gif", frames)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == min(count, 40)
        durations = []
        for index in range(image.n_frames):
            image.seek(index)
            durations.append(image.info["duration"])
        assert image.info["loop"] == 0 or count == 1
        # The last frame shown is the last frame given, and its colours are right.
        last = np.asarray(image.convert("RGB")).astype(int)
        expected = image_grid(frames[-1], max_pixels=400).astype(int)
        assert np.abs(last - expected).max() <= 8
    if count > 1:
        assert sum(durations) == pytest.approx(6000, rel=0.1) and durations[-1] >= 2000 + durations[0]
        assert min(durations) >= 20  # below it viewers slow down to ten frames a second


def drawn(monkeypatch):
    """Keeps the figures that are written, to ask what is in them."""
    figures, figure = [], plots._figure
    monkeypatch.setattr(plots, "_figure", lambda *size: figures.append(figure(*size)) or figures[-1])
    return figures


def legend(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_bound_plot_of_single_images(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    terms = torch.rand(8, 50, generator=torch.Generator().manual_seed(0)) + 0.1
    terms[:, 20] = 0  # a KL that is exactly 0 has no logarithm
    write_bound_plot(tmp_path / "a.png", terms, torch.full((8,), 0.25), title="digits")
    axes = figures[0].axes[0]
    assert axes.get_yscale() == "log" and "bits/dim" in axes.get_ylabel() and axes.get_xlabel() == "time step t"
    total = float(terms.mean(0).sum()) + 0.25
    assert axes.get_title(loc="left") == f"digits\ntotal {total:.4g} bits/dim, of which prior 0.25"
    assert legend(figures[0]) == [
        "± 2 standard errors, 8 images",
        "$L_t$, mean",
        f"decoder, t = 0: {float(terms[:, 0].mean()):.4g}",
        "1 of 50 terms are not above 0: not drawn",
    ]
    y = axes.lines[0].get_ydata()
    assert np.isnan(y[20]) and np.isfinite(np.delete(y, 20)).all()
    assert (tmp_path / "a.png").stat().st_size > 0


def test_bound_plot_of_means_at_chosen_steps(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    write_bound_plot(tmp_path / "a.png", torch.tensor([0.1, 0.2, 2.0]), 0.0, timesteps=torch.tensor([999, 500, 0]))
    line = figures[0].axes[0].lines[0]
    assert line.get_xdata().tolist() == [0, 500, 999] and line.get_ydata().tolist() == pytest.approx([2, 0.2, 0.1])
    assert legend(figures[0]) == ["$L_t$", "decoder, t = 0: 2"]


# Nothing to take a logarithm of, and one step of one image, which has no standard error.
@pytest.mark.parametrize("terms", [torch.zeros(2, 4), torch.ones(1, 1)])
def test_bound_plot_of_degenerate_terms(tmp_path, terms):
    write_bound_plot(tmp_path / "a.png", terms, 0.0)


def test_rate_distortion_plot(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    t, rates, errors = torch.tensor([0, 9, 4]), torch.tensor([2.0, 0.1, 1.0]), torch.tensor([3.0, 80.0, 20.0])
    write_rate_distortion_plot(tmp_path / "a.png", t, rates, errors, title="digits")
    curve, distortion, rate = figures[0].axes
    assert curve.lines[0].get_xdata().tolist() == pytest.approx([0.1, 1, 2]) and curve.lines[0].get_ydata().tolist() == [80, 20, 3]
    assert legend(figures[0]) == ["t = 0: 2 bits/dim, 3"] and "bits/dim" in curve.get_xlabel() and "255" in curve.get_ylabel()
    for axes in (distortion, rate):  # from noise to the image
        assert axes.lines[0].get_xdata().tolist() == [9, 4, 0] and axes.get_xlim()[0] > axes.get_xlim()[1]
    assert rate.lines[0].get_ydata().tolist() == pytest.approx([0.1, 1, 2]) and figures[0].get_suptitle() == "digits"
    write_rate_distortion_plot(tmp_path / "one.png", [0], [1.0], [0.0])  # a chain of one step must not fail


def test_loss_curve(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    losses = np.ones(500)
    losses[[3, 4]] = np.nan, np.inf
    write_loss_curve(tmp_path / "many.png", range(0, 5000, 10), losses)
    write_loss_curve(tmp_path / "few.png", [1, 2], [0.5, -0.5], ylabel="loss (bits/dim)")
    write_loss_curve(tmp_path / "none.png", [1], [float("nan")])  # must not fail
    assert legend(figures[0]) == ["loss", "mean of 10 points", "2 of 500 are not finite: not drawn"]
    raw, mean = figures[0].axes[0].lines[:2]
    assert len(raw.get_ydata()) == 500 and np.isnan(raw.get_ydata()).sum() == 2
    # A mean of the values that are there: ones, without a gap and without a dip.
    np.testing.assert_allclose(mean.get_ydata(), 1)
    assert [figure.axes[0].get_yscale() for figure in figures[:2]] == ["log", "linear"]
    assert figures[1].axes[0].get_ylabel() == "loss (bits/dim)" and figures[1].axes[0].get_xlabel() == "training step"


def test_pyplot_stays_out(tmp_path):
    # Importing it would choose a backend for the whole process.
    had = "matplotlib.pyplot" in sys.modules
    write_loss_curve(tmp_path / "a.png", [1, 2], [1, 2])
    assert ("matplotlib.pyplot" in sys.modules) == had


def test_failure_keeps_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    write_grid(path, X)
    before = path.read_bytes()

    def save(self, file, **options):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OSError, match="No space left"):
        write_grid(path, -X)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["a.png"]


NAN = torch.full((2, 1, 4, 4), float("nan"))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p: image_grid(X[0]), r"x must be floats of shape \(N, C, H, W\).*got torch.float32 \(3, 8, 8\)"),
        (lambda p: image_grid(X[:0]), r"not empty.*got torch.float32 \(0, 3, 8, 8\)"),
        (lambda p: image_grid(X[:, :2]), r"C in \{1, 3\}, got torch.float32 \(5, 2, 8, 8\)"),
        (lambda p: image_grid(X.byte()), r"must be floats.*got torch.uint8"),
        (lambda p: image_grid(NAN), "x must be finite, got 32 NaN or infinite of 32 values"),
        (lambda p: image_grid(X, columns=0), "columns must be at least 1 and padding at least 0, got 0 and 2"),
        (lambda p: write_reverse_gif(p, X), r"frames must be floats of shape \(K, N, C, H, W\)"),
        (lambda p: write_reverse_gif(p, NAN[None]), "frames must be finite, got 32"),
        (lambda p: write_forward_strip(p, X, [0]), r"frames must be floats of shape \(K, N, C, H, W\)"),
        (lambda p: write_forward_strip(p, X[None], [0, 1]), "labels must have one entry for each of the 1 noise"),
        (lambda p: write_forward_strip(p, X[None], [0], [1, 2]), "alphas_bar must have one entry .* got 2"),
        (lambda p: write_bound_plot(p, torch.zeros(2, 2, 2), 0), r"terms must have shape \(T,\) or \(N, T\)"),
        (lambda p: write_bound_plot(p, NAN[0, 0, 0], 0), "terms must be finite, got 4"),
        (lambda p: write_bound_plot(p, torch.ones(3), float("inf")), "prior must be finite, got 1"),
        (lambda p: write_bound_plot(p, torch.ones(3), 0, torch.arange(2)), r"timesteps must have shape \(3,\), got"),
        (lambda p: write_rate_distortion_plot(p, [0, 1], [1.0], [1.0]), r"must have one shape \(K,\), K >= 1, got \(2,\), \(1,\), \(1,\)"),
        (lambda p: write_rate_distortion_plot(p, [], [], []), r"K >= 1, got \(0,\)"),
        (lambda p: write_rate_distortion_plot(p, [0], [math.nan], [1.0]), "rate must be finite, got 1"),
        (lambda p: write_loss_curve(p, [1], [1, 2]), r"steps and losses must have one shape \(K,\)"),
        (lambda p: write_loss_curve(p, [], []), r"K >= 1, got \(0,\) and \(0,\)"),
    ],
)
def test_errors_write_nothing(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []
