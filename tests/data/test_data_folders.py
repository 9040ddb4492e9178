"""Folders as people have them: classes and their names, parts of a data set, links, files that are no images."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.data.images import DataError, ImageData, load_data


@pytest.fixture
def images(tmp_path):
    """Writes small full-range images, each another, at paths below tmp_path / "set"."""
    made = iter(range(1000))

    def write(*paths, size=(4, 4), **options):
        for path in paths:
            pixels = np.full(size, next(made), np.uint8)
            pixels[0, :2] = 0, 255
            file = tmp_path / "set" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file, **options)
        return tmp_path / "set"

    return write


def several(*folders, n=4):
    return [f"{folder}/{index}.png" for folder in folders for index in range(n)]


def test_classes_have_the_names_of_their_folders(images):
    data = load_data(images(*several("dog", "cat")))
    assert data.classes == ("cat", "dog") and data.num_classes == 2
    assert data.summary[1] == "2 classes: cat 4, dog 4"


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "TEST"), ("train", "test", "valid")])
@pytest.mark.parametrize("below", ["", "/cat"])
def test_parts_of_a_data_set_are_not_classes(images, names, below):
    folder = images(*several(*(name + below for name in names)))
    with pytest.raises(
        DataError, match=rf"set is divided into {names[0]}, .*not classes; give one of them, .*set/{names[0]}, of which a share"
    ):
        load_data(folder)
    assert load_data(folder / names[0]).train_labels is None


def test_one_such_name_is_a_class(images):
    assert load_data(images(*several("train", "car"))).classes == ("car", "train")


@pytest.mark.parametrize("paths, why", [
    (several("images/cat", "images/dog"), "all its images are in one sub-folder, images; to take cat, dog as classes give .*set/images"),
    (several("cat"), "all its images are in one sub-folder, cat$"),
    (["a.png", "b.png"], "its images are in no sub-folders, which would be the classes"),
    (["a.png", *several("cat", "dog")], "1 of its 9 images are in none of its sub-folders, which would be the classes"),
])  # fmt: skip
def test_a_folder_without_classes_says_why(images, paths, why):
    from ddpm_fast.training import TrainConfig

    data = load_data(images(*paths))
    assert data.classes is None and data.num_classes is None
    with pytest.raises(ValueError, match=f"class_conditional needs labels, and set has none: {why}"):
        TrainConfig(preset="digits", class_conditional=True).make_network(data)


def test_links_are_followed_and_no_image_comes_twice(images, tmp_path):
    folder = images(*several("cat", "dog"))
    elsewhere = tmp_path / "elsewhere"
    os.rename(folder / "dog", elsewhere)
    os.symlink(elsewhere, folder / "dog")
    assert load_data(folder).classes == ("cat", "dog")
    os.symlink(folder, elsewhere / "round")  # a circle
    os.symlink(folder / "cat", folder / "alias")  # a second name, before the first in order
    os.symlink(tmp_path / "nowhere", folder / "cat" / "broken.png")
    os.symlink(elsewhere / "0.png", folder / "cat" / "linked.png")
    data = load_data(folder)
    assert data.classes == ("cat", "dog") and len(data.train) + len(data.test) == 9
    assert data.origin.skipped == {"folder linked twice": 2, "broken link": 1}


def test_what_is_passed_over_is_counted(images):
    folder = images(*several("cat", "dog"))
    for name in ("a.heic", "cat/b.HEIC", "cat/notes.txt", "README", "dog/.DS_Store"):
        (folder / name).write_bytes(b"")
    data = load_data(folder)
    assert data.origin.skipped == {".heic": 2, ".txt": 1, "without a suffix": 1, "hidden": 1}
    assert data.summary[2] == f"passed over: {', '.join(f'{count} {what}' for what, count in data.origin.skipped.items())}"
    assert (
        data.summary[0]
        == "set: 7 images to train on and 1 held out, 1x4x4 (channels x height x width), 256 grey levels (values found: 0..255 in 0..255)"
    )
    for path in folder.rglob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match=r"must hold images .* got none but 2 .heic, 1 "):
        load_data(folder)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n0 0 4 4 rectfill\nshowpage\n%%EOF\n"


def test_the_content_says_what_a_file_is(images, monkeypatch):
    from PIL import EpsImagePlugin, PpmImagePlugin  # noqa: F401  what a program that imports them would make Image.open accept

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    folder = images(*several("a"))
    os.rename(folder / "a" / "0.png", folder / "a" / "0.jpg")
    assert len(load_data(folder).train) == 3
    for content in (EPS, b"P5 4 4 255 " + bytes(16)):
        (folder / "a" / "1.png").write_bytes(content)
        with pytest.raises(
            DataError, match="cannot read image .*1.png: by its content it is no PNG or JPEG or WEBP or BMP or GIF or TIFF,"
        ):
            load_data(folder)


def test_images_are_opened_in_one_place():
    """So that the list of formats holds for all of them."""
    from pathlib import Path

    import ddpm_fast

    root = Path(ddpm_fast.__file__).parent
    assert [path.name for path in root.rglob("*.py") if "Image.open(" in path.read_text("utf-8")] == ["readers.py"]


@pytest.mark.parametrize("size, shape", [((4, 6), (4, 6)), ((3, 12), (3, 12)), ([5, 5], (5, 5)), (7, 7)])
def test_image_size_may_be_a_rectangle(images, size, shape):
    wanted = (size, size) if isinstance(size, int) else size
    assert load_data(images(*several("a"), size=(8, 12)), image_size=size).image_shape == (1, *wanted)


def test_the_central_part_has_the_wanted_form(tmp_path):
    # 24 x 9, of which 8:3 is kept whole, and of 1:3 the middle.
    pixels = np.zeros((9, 24), np.uint8)
    pixels[:, 10:13] = 255
    for index in range(2):
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    assert torch.equal(load_data(tmp_path, image_size=(9, 24)).train[0, 0], torch.from_numpy(pixels))
    assert torch.equal(load_data(tmp_path, image_size=(9, 3)).train[0, 0], torch.full((9, 3), 255, dtype=torch.uint8))


@pytest.mark.parametrize("size", [(4,), (4, 4, 4), (0, 4), (4.0, 4)])
def test_image_size_errors(images, size):
    with pytest.raises(DataError, match=r"image_size must be a side of at least 1, or \(height, width\), got "):
        load_data(images(*several("a")), image_size=size)


def test_rectangles_train(images):
    from ddpm_fast.training import TrainConfig, Trainer

    data = load_data(images(*several("a", "b"), size=(8, 16)))
    trainer = Trainer(
        TrainConfig(preset="digits", timesteps=10, schedule="cosine", steps=1, batch=2, ema=0.5, class_conditional=True), data
    )
    assert trainer.batch(0)[0].shape == (2, 1, 8, 16) and torch.isfinite(trainer.train_step()[0])


# Labels keep their values as names; a gap makes no class that nothing trains.
@pytest.mark.parametrize(
    "labels, classes", [([1, 2, 3, 1], "123"), ([7, 0, 7, 0], "07"), (["dog", "cat", "dog", "ant"], ["ant", "cat", "dog"])]
)
def test_labels_are_numbered_and_keep_their_names(tmp_path, labels, classes):
    images = np.arange(4, dtype=np.uint8).repeat(16).reshape(4, 4, 4) * np.uint8(85)
    np.savez(tmp_path / "x.npz", x=images, y=np.array(labels), note=np.zeros(3))
    data = load_data(tmp_path / "x.npz")
    assert data.classes == tuple(classes) and data.num_classes == len(classes)
    found = {
        int(image[0, 0, 0]) // 85: int(label)
        for part in ("train", "test")
        for image, label in zip(getattr(data, part), getattr(data, f"{part}_labels"))
    }
    assert [data.classes[found[index]] for index in range(4)] == [str(label) for label in labels]
    assert data.origin.skipped == {"other arrays": 1}


def test_a_class_that_nothing_trains_is_noted(tmp_path):
    x = np.arange(4, dtype=np.uint8).repeat(16).reshape(4, 4, 4) * np.uint8(85)
    np.savez(tmp_path / "x.npz", x=x, y=[0, 1, 1, 0], test=x, test_labels=[0, 1, 5, 5])
    with pytest.warns(UserWarning, match="x.npz has no image to train on of 5"):
        assert load_data(tmp_path / "x.npz").num_classes == 3


X = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)


@pytest.mark.parametrize("train, test, message", [
    ([0, 1], [0, 1, 1], r"train_labels must be \(3,\) int64, or None in both parts, got \(2,\) torch.int64"),
    ([0, 1, 1], None, r"test_labels must be \(3,\) int64, or None in both parts, got None"),
    ([0, 1, 2], [0, 1, 1], r"train_labels must lie in 0..1, got 0..2"),
    ([0, 1, 1], [0, -1, 1], r"test_labels must lie in 0..1, got -1..1"),
])  # fmt: skip
def test_image_data_checks_its_labels(train, test, message):
    with pytest.raises(ValueError, match=message):
        ImageData("x", X, X, 256, torch.tensor(train), None if test is None else torch.tensor(test), ("a", "b"))


@pytest.mark.parametrize("free", [0, 7 * 16 * 2 - 1])
def test_data_larger_than_the_memory_are_refused_before_they_are_read(images, tmp_path, monkeypatch, free):
    folder = images(*several("a", n=7))
    np.save(tmp_path / "x.npy", np.zeros((7, 4, 4), np.uint8))
    np.savez(tmp_path / "x.npz", np.zeros((7, 4, 4), np.uint8))
    monkeypatch.setattr("ddpm_fast.data.array_files.available_memory", lambda: free)
    for source in (folder, tmp_path / "x.npy", tmp_path / "x.npz"):
        with pytest.raises(DataError, match=r"x?.* takes 0.0 MiB of memory, of which 0.0 MiB are free; "):
            load_data(source)
    monkeypatch.undo()
    assert len(load_data(folder, test_fraction=1.0).train) == 0
