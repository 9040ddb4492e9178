"""Writing many images: what a run leaves when it is stopped, and that nothing but the settings changes an image."""

import errno
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from played_ranks import play

from ddpm_fast import Noise
from ddpm_fast.data.grey_levels import Scale, to_levels
from ddpm_fast.data.readers import read_folder
from ddpm_fast.io import files
from ddpm_fast.io.files import atomic_files, atomic_write
from ddpm_fast.io.image_store import ImageStore
from ddpm_fast.io.sample_writer import write_samples
from ddpm_fast.training import load_data

SETTINGS = {"checkpoint": "abc", "sampler": "ddim", "steps": 50, "eta": 0.0, "seed": 7}
ALL = ("png", "grid", "npz")


@dataclass
class Draw:
    """Stands for a model: image i is a function of (seed, i); remembers what was asked of it, and may stop."""

    shape: tuple = (3, 5, 4)
    stop_at: int | None = None
    drawn: list = field(default_factory=list)

    def __call__(self, first, count):
        if self.stop_at is not None and first + count > self.stop_at:
            raise KeyboardInterrupt
        self.drawn += range(first, first + count)
        return Noise(7, first_sample=first).materialize((count, *self.shape), "cpu")


def write(out, draw, count=11, batch=4, **options):
    return write_samples(draw, out, count=count, batch=batch, **{"settings": SETTINGS, "formats": ALL, **options})


def expected(count=11, levels=256, shape=(3, 5, 4)):
    return to_levels(Draw(shape)(0, count), levels).numpy()


def contents(folder):
    """Every file below the folder, hidden ones too, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_formats_and_what_reads_them_back(tmp_path):
    seen = []
    for left in (".images.0a.tmp", ".samples.npz.1b.tmp"):  # by a run that was killed
        (tmp_path / left).mkdir()
    paths = write(tmp_path, Draw(), report=lambda *now: seen.append(now))
    names = {"png": "images", "grid": "samples.png", "npz": "samples.npz", "settings": "samples.json"}
    assert paths == {format: tmp_path / name for format, name in names.items()}
    assert {p.name for p in tmp_path.iterdir()} == {path.name for path in paths.values()}  # nothing else
    assert seen == [(0, 11), (4, 11), (8, 11), (11, 11)]
    with np.load(paths["npz"]) as file:
        np.testing.assert_array_equal(file["images"], expected())
        assert json.loads(str(file["settings"])) == {**SETTINGS, "levels": 256} == json.loads(paths["settings"].read_text())
    images, classes = read_folder(paths["png"], None, Scale())[:2]
    np.testing.assert_array_equal(images, expected())
    assert classes is None
    assert load_data(paths["npz"]).image_shape == (3, 5, 4)


def test_few_levels_are_spread_over_a_png_and_come_back(tmp_path):
    draw = Draw((1, 8, 8))
    write(tmp_path, draw, levels=17, formats=["png"])
    images = read_folder(tmp_path / "images", None, Scale()).train
    levels = expected(levels=17, shape=(1, 8, 8))
    np.testing.assert_array_equal(images, np.round(levels * (255 / 16)))
    write(tmp_path, draw, levels=17)
    assert draw.drawn == list(range(11))  # the .npz is made of the PNG files
    np.testing.assert_array_equal(np.load(tmp_path / "samples.npz")["images"], levels)
    assert load_data(tmp_path / "samples.npz", levels=17).levels == 17


def test_every_level_survives_a_png(tmp_path):
    for levels in (2, 3, 17, 255, 256):
        store = ImageStore(tmp_path / str(levels), {}, levels)
        images = np.arange(levels, dtype=np.uint8).reshape(1, 1, 1, levels)
        store.save_png(range(1), images)
        np.testing.assert_array_equal(store.read(range(1)), images)


def test_order_of_names_beyond_a_million(tmp_path):
    store = ImageStore(tmp_path, {}, 256)
    images = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1).repeat(8, 2).repeat(8, 3)
    store.save_png(range(999_998, 1_000_002), images)
    store.save_png(range(100_001, 100_002), images[:1] + 9)
    read = read_folder(store.images, None, Scale()).train
    assert read[:, 0, 0, 0].tolist() == [9, 0, 1, 2, 3]
    assert store.without_png(1_000_003, 10**6) == [range(100_001), range(100_002, 999_998), range(1_000_002, 1_000_003)]


@pytest.mark.parametrize("formats", [ALL, ("npz",), ("png",), ("grid",)])
def test_interrupted_and_resumed_with_another_batch(tmp_path, formats):
    write(tmp_path / "whole", Draw(), batch=11, formats=formats)
    draw = Draw(stop_at=9)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "two", draw, formats=formats)
    draw.stop_at = None
    write(tmp_path / "two", draw, batch=2, formats=formats)
    assert sorted(draw.drawn) == list(range(11))  # each once
    left, whole = contents(tmp_path / "two"), contents(tmp_path / "whole")
    if formats == ("grid",):  # which holds no images: they stay in parts
        left, whole = ({name: data for name, data in each.items() if "parts" not in name} for each in (left, whole))
    assert left == whole
    write(tmp_path / "two", draw, formats=formats)
    assert len(draw.drawn) == 11


@pytest.mark.parametrize("formats", [ALL, ("npz",), ("png",)])
def test_more_images_later(tmp_path, formats):
    draw = Draw()
    write(tmp_path / "grown", draw, 5, formats=formats)
    write(tmp_path / "grown", draw, 11, formats=formats)
    assert draw.drawn == list(range(11))
    write(tmp_path / "once", Draw(), formats=formats)
    assert contents(tmp_path / "grown") == contents(tmp_path / "once")
    write(tmp_path / "grown", draw, 3, formats=set(formats) - {"grid"})
    assert contents(tmp_path / "grown") == contents(tmp_path / "once")  # a smaller count takes nothing away


def test_other_formats_later(tmp_path):
    draw = Draw()
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", Draw(stop_at=9), formats=["npz"])
    write(tmp_path / "a", draw, 6, formats=["grid", "png"])
    assert (tmp_path / "a" / "parts").exists()  # two of its images are nowhere else
    write(tmp_path / "a", draw)
    assert draw.drawn == [8, 9, 10]
    write(tmp_path / "b", Draw())
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_other_settings_are_refused_or_replaced(tmp_path):
    out, other = tmp_path / "out", {**SETTINGS, "seed": 8, "eta": 0.5}
    write(out, Draw())
    (out / "images" / "mine.png").write_bytes(b"mine")
    before, draw = contents(out), Draw((1, 3, 3))
    with pytest.raises(ValueError, match=r"other settings \(eta 0.0, not 0.5, seed 7, not 8\); choose another folder, or .*--overwrite"):
        write(out, draw, settings=other)
    assert contents(out) == before and not draw.drawn
    write(out, draw, settings=SETTINGS, overwrite=True)  # the same: nothing to replace
    assert contents(out) == before and not draw.drawn
    write(out, draw, 3, settings=other, overwrite=True)
    assert draw.drawn == [0, 1, 2] and (out / "images" / "mine.png").exists()
    write(tmp_path / "fresh", Draw((1, 3, 3)), 3, settings=other)
    assert contents(out) == {**contents(tmp_path / "fresh"), "images/mine.png": b"mine"}


def test_images_of_unknown_settings_are_refused(tmp_path):
    np.savez(tmp_path / "samples.npz", images=expected())
    with pytest.raises(ValueError, match="unknown settings"):
        write(tmp_path, Draw())
    write(tmp_path / "other", Draw(), formats=["png"])
    os.replace(tmp_path / "samples.npz", tmp_path / "other" / "samples.npz")  # put there by hand
    with pytest.raises(ValueError, match="other settings"):
        write(tmp_path / "other", Draw())
    (tmp_path / "other" / "samples.npz").write_bytes(b"PK\3\4 half")
    with pytest.raises(ValueError, match=r"cannot read .*samples.npz"):
        write(tmp_path / "other", Draw())


def test_an_archive_with_a_damaged_header_is_named(tmp_path):
    write(tmp_path, Draw())
    path = tmp_path / "samples.npz"
    content = path.read_bytes()
    start = content.index(b"{'descr'")
    path.write_bytes(content[:start] + b"(" * 20 + content[start + 20 :])
    with pytest.raises(ValueError, match=r"cannot read .*samples.npz"):
        write(tmp_path, Draw(), 30)


def test_damaged_png_is_named(tmp_path):
    write(tmp_path, Draw(), formats=["png"])
    path = tmp_path / "images" / "00000005.png"
    for content in (path.read_bytes()[:50], b"%!PS-Adobe-3.0 EPSF-3.0\n"):  # for the second Pillow would start Ghostscript
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"00000005.png .* remove it"):
            write(tmp_path, Draw())
    path.unlink()
    write(tmp_path, Draw())
    np.testing.assert_array_equal(np.load(tmp_path / "samples.npz")["images"], expected())


def test_labels(tmp_path):
    write(tmp_path, Draw(), 30, labels=np.arange(30) % 3)
    data = load_data(tmp_path / "samples.npz")
    assert data.num_classes == 3
    for labels in (np.zeros(31), np.zeros(30, int), np.arange(31) - 1):
        with pytest.raises(ValueError, match=r"labels must be \(31,\) integers from 0, got"):
            write(tmp_path, Draw(stop_at=0), 31, labels=labels)


def test_unwritable_folder_is_noticed_before_anything_is_drawn(tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "images").write_text("in the way")
    draw = Draw()
    for out in (tmp_path / "file", tmp_path / "file" / "deeper", tmp_path):
        with pytest.raises(OSError, match=r"file|images"):
            write(out, draw)
    assert not draw.drawn


@pytest.mark.parametrize("formats", [ALL, ("grid", "npz")], ids=["png", "parts"])
def test_disk_full_at_any_point(tmp_path, monkeypatch, formats):
    """The disk is full at the k-th file that is written, for every k; then the same call goes on."""
    write(tmp_path / "whole", Draw(), formats=formats)
    whole = contents(tmp_path / "whole")
    sync, left = files._sync, []

    def full(path):
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        sync(path)

    monkeypatch.setattr(files, "_sync", full)
    failures = []
    for k in range(100):
        left[:], out, draw = [k], tmp_path / str(k), Draw()
        try:
            write(out, draw, formats=formats)
            break
        except OSError as error:
            assert error.errno == errno.ENOSPC
            failures.append(str(error))
        there = contents(out)
        assert not any(".tmp" in name for name in there)
        assert all(there[name] == whole[name] for name in there if "parts" not in name)
        complete = int(failures[-1].split("; ")[1].split()[0]) if "images are complete" in failures[-1] else 0
        left[0] = 10**6
        again = Draw()
        write(out, again, formats=formats)
        assert contents(out) == whole and len(again.drawn) == 11 - complete
    else:
        pytest.fail("never succeeded")
    of_images = ["images/00000005.png"] if "png" in formats else ["parts/settings.json", "parts/4-8.npz"]
    for name in ("samples.json", "samples.png", "samples.npz", *of_images):
        assert any(f"{Path(name)}" in message and "No space left on device" in message for message in failures), failures
    assert any("11 of 11 images are complete, run the same command again" in message for message in failures)


def test_errors_name_the_file_that_was_to_be_written(tmp_path):
    with pytest.raises(OSError) as caught, atomic_write(tmp_path / "a.txt"):
        raise OSError(errno.ENOSPC, "full")
    assert caught.value.filename == str(tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError) as caught, atomic_write(tmp_path / "a.txt"):
        (tmp_path / "another").read_text()
    assert caught.value.filename == str(tmp_path / "another")  # not a file of ours
    with pytest.raises(FileNotFoundError) as caught, atomic_files(tmp_path / "b") as temporary:
        (temporary / "x" / "y").write_text("")
    assert caught.value.filename == str(tmp_path / "b" / "x" / "y")
    with pytest.raises(OSError) as caught, atomic_files(tmp_path / "b"):
        raise OSError(errno.ENOSPC, "full")
    assert caught.value.filename == str(tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("formats", [ALL, ("npz",)])
def test_ranks_share_what_is_missing(tmp_path, formats):
    draws = [Draw() for _ in range(3)]
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "shared", Draw(stop_at=3), batch=3, formats=formats[:1])
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "shared", Draw(stop_at=5), batch=2, formats=formats[-1:])  # what is there lies in PNG files and parts
    there = {int(name) for name in range(11)} - {i for gap in ImageStore(tmp_path / "shared", {}, 256).missing(11, 1) for i in gap}
    assert play(3, lambda ranks: write(tmp_path / "shared", draws[ranks.rank], batch=100, formats=formats, ranks=ranks)) == [None] * 3
    assert all(draw.drawn for draw in draws)  # the batch gives way, so that each has something to do
    assert sorted(i for draw in draws for i in draw.drawn) == sorted({*range(11)} - there) and there
    write(tmp_path / "alone", Draw(), formats=formats)
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


def test_the_first_rank_speaks_for_all(tmp_path):
    write(tmp_path, Draw())
    outcome = play(2, lambda ranks: write(tmp_path, Draw(), settings={"seed": 1}, ranks=ranks))
    assert isinstance(outcome[0], ValueError) and isinstance(outcome[1], SystemExit)


def test_large_images_make_a_smaller_grid(tmp_path):
    for shape, side in (((1, 2, 2), 20), ((1, 2, 1500), 2)):
        out = tmp_path / str(side)
        write(out, Draw(shape), 401, batch=500, formats=["grid"])
        with Image.open(out / "samples.png") as grid:
            assert grid.width >= side * shape[2] and grid.width <= 4200


@pytest.mark.parametrize(
    "options, message",
    [
        ({"formats": ["jpg"]}, "formats must be some of png, grid, npz, got jpg"),
        ({"formats": []}, "got none"),
        ({"count": 0}, "count must be at least 1"),
        ({"count": 10**8 + 1}, "at most 100000000 with png"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"levels": 257}, "levels must be in 2..256"),
        ({"settings": {"seed": torch.tensor(1)}}, "settings must be JSON"),
    ],
)
def test_arguments_out_of_range(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, Draw(), **options)
    assert not contents(tmp_path)


def test_images_that_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match=r"draw must give floats of shape \(4, 1 or 3, H, W\), got torch.float32 \(4, 2, 3, 3\)"):
        write(tmp_path, Draw((2, 3, 3)))
    write(tmp_path / "npz", Draw((2, 3, 3)), formats=["npz"])  # which takes any number of channels

    def broken(first, count):
        x = Draw()(first, count)
        x[(first + torch.arange(count)) == 6] = torch.nan
        return x

    with pytest.raises(ValueError, match="image 6 holds NaN"):
        write(tmp_path, broken)
    assert len(list((tmp_path / "images").iterdir())) == 4  # the batch before
