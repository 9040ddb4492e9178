"""Image data: what is loaded and how it is split, the mapping to floats, the order of training."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.data.images import Batches, DataError, ImageData, load_data, to_levels, to_unit

pytestmark = pytest.mark.filterwarnings(
    "ignore::ddpm_fast.data.images.DataWarning"
)  # of images that say where they come from by their values


def sha256(x: torch.Tensor) -> str:
    return hashlib.sha256(x.numpy().tobytes()).hexdigest()


def save_image(path, value=128, size=(6, 4), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.broadcast_to(np.asarray(value, dtype=np.uint8), (size[1], size[0], *channels))
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, **options)
    return path


def all_images(data: ImageData) -> torch.Tensor:
    return torch.cat([data.train, data.test])


# 2 and 17 (digits) have steps that are not exact in binary, 256 is the usual case.
@pytest.mark.parametrize("levels", [2, 3, 17, 255, 256])
def test_levels_round_trip_and_ends_are_exact(levels):
    x = torch.arange(levels, dtype=torch.uint8)
    unit = to_unit(x, levels)
    assert unit.dtype == torch.float32
    assert unit[0] == -1 and unit[-1] == 1
    torch.testing.assert_close(unit.double(), torch.linspace(-1, 1, levels, dtype=torch.float64), rtol=0, atol=2e-7)
    assert torch.equal(to_levels(unit, levels), x)


def test_to_levels_clamps_and_rounds_to_nearest():
    # Samples overshoot the range; 0.49 of a step is rounded back.
    x = torch.tensor([-7.0, 1.5, torch.inf, -1 + 0.49 * 2 / 255, -1 + 0.51 * 2 / 255])
    assert to_levels(x).tolist() == [0, 255, 255, 0, 1]


def test_to_levels_rejects_nan():
    with pytest.raises(ValueError, match="x must hold no NaN, got 1 of 2 values"):
        to_levels(torch.tensor([0.0, torch.nan]))


def test_digits_are_pinned():
    data = load_data("digits")
    assert data.train.shape == (1437, 1, 8, 8) and data.test.shape == (360, 1, 8, 8)
    assert (data.levels, data.num_classes, data.image_shape, data.name) == (17, 10, (1, 8, 8), "digits")
    assert data.train.dtype == torch.uint8 and data.train.max() == 16
    assert data.train.is_contiguous() and data.test.is_contiguous()
    # Stratified: each class within one image of its share.
    share = 360 / 1797 * torch.bincount(torch.cat([data.train_labels, data.test_labels]))
    assert (torch.bincount(data.test_labels) - share).abs().max() < 1
    # Results on digits are compared between machines and years: the split must never move.
    assert sha256(data.test) == "ae40060bdae73896186bebfb904bdb3bbc0cca63b20eea341bfcc10915192bc9"


def test_digits_split_ignores_seed():
    assert torch.equal(load_data("digits", seed=5, test_fraction=0.5).test, load_data("digits").test)


def test_photos_share_no_pixel_between_the_parts():
    from sklearn.datasets import load_sample_image

    data = load_data("photos")
    assert data.train.shape == (5700, 3, 32, 32) and data.test.shape == (130, 3, 32, 32)
    assert (data.levels, data.num_classes) == (256, 2)
    flower = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)
    # The corners of the two parts, which shows both the order of the crops and where they end.
    assert torch.equal(data.train[2850], flower[:, :32, :32])
    assert torch.equal(data.train[-1], flower[:, 392:424, 448:480])
    assert torch.equal(data.test[65], flower[:, :32, 480:512])
    assert data.train_labels.tolist() == [0] * 2850 + [1] * 2850


def test_batch_gives_floats_and_labels():
    data = load_data("digits")
    indices = torch.tensor([3, 0, 3])
    x, labels = data.batch("train", indices)
    assert x.dtype == torch.float32 and x.shape == (3, 1, 8, 8)
    assert torch.equal(to_levels(x, 17), data.train[indices])
    assert torch.equal(labels, data.train_labels[indices]) and labels.dtype == torch.int64
    assert data.batch("test", slice(0, 2))[0].shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'valid'"):
        data.batch("valid", indices)


def test_folder_with_classes(tmp_path):
    for index in range(4):
        save_image(tmp_path / "cat" / f"{index}.png", 10 + index)
        save_image(tmp_path / "ant" / "deep" / f"{index}.PNG", 100 + index)
    save_image(tmp_path / "ant" / ".hidden.png", size=(1, 1))
    (tmp_path / "readme.txt").write_text("no image")
    data = load_data(tmp_path, test_fraction=0.25)
    assert data.image_shape == (3, 4, 6) and data.name == tmp_path.name and data.levels == 256
    assert sorted(all_images(data)[:, 0, 0, 0].tolist()) == [10, 11, 12, 13, 100, 101, 102, 103]
    # ant is 0: in order of name. One of each is held out.
    assert torch.equal(data.train_labels, (data.train[:, 0, 0, 0] < 50).long())
    assert sorted(data.test_labels.tolist()) == [0, 1]


# One sub-folder is no classification, nor is one that leaves images out.
@pytest.mark.parametrize("names", [("a/1.png", "a/2.png"), ("a/1.png", "b/2.png", "3.png")])
def test_folder_without_classes(tmp_path, names):
    for name in names:
        save_image(tmp_path / name)
    data = load_data(tmp_path)
    assert data.train_labels is None and data.num_classes is None
    assert data.batch("train", torch.tensor([0]))[1] is None


def test_grey_folder_has_one_channel_until_a_colour_image_comes(tmp_path):
    save_image(tmp_path / "a.png", 7, mode="L")
    wide = np.full((4, 6), 65535, dtype=np.uint16)
    wide[0, 0] = 9 * 257 + 100  # rounds to 9; clipped to 8 bits it would be 255
    Image.fromarray(wide).save(tmp_path / "b.png")
    data = load_data(tmp_path)
    assert data.image_shape == (1, 4, 6)
    assert sorted(all_images(data)[:, 0, 0, 0].tolist()) == [7, 9] and all_images(data).max() == 255
    save_image(tmp_path / "c.png", (1, 2, 3))
    assert load_data(tmp_path).image_shape == (3, 4, 6)


def test_transparency_is_put_onto_white(tmp_path):
    save_image(tmp_path / "a.png", (200, 0, 0, 0), mode="RGBA")
    save_image(tmp_path / "b.png", (200, 0, 0, 255), mode="RGBA")
    assert sorted(all_images(load_data(tmp_path))[:, :, 0, 0].tolist()) == [[200, 0, 0], [255, 255, 255]]


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    save_image(tmp_path / "a.jpg", size=(8, 4), exif=exif)
    save_image(tmp_path / "b.jpg", size=(4, 8))
    assert load_data(tmp_path).image_shape == (3, 8, 4)


def test_image_size_crops_the_centre_and_resizes(tmp_path):
    pixels = np.zeros((8, 24), dtype=np.uint8)
    pixels[:, 8:16] = 200  # the central square
    Image.fromarray(pixels).save(tmp_path / "a.png")
    save_image(tmp_path / "b.png", 200, size=(5, 9), mode="L")
    data = load_data(tmp_path, image_size=4)
    assert data.image_shape == (1, 4, 4) and (all_images(data) == 200).all()


@pytest.mark.parametrize("shape", [(5, 4, 6), (5, 1, 4, 6), (5, 3, 4, 6), (5, 4, 6, 3), (5, 4, 6, 1)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float16, np.float64])
def test_npy_layouts_and_types(tmp_path, shape, dtype):
    # 0, 51, ..., 255 are exact in float16 too, once rounded to levels.
    levels = (np.arange(np.prod(shape)).reshape(shape) % 6 * 51).astype(np.uint8)
    array = levels if np.issubdtype(dtype, np.integer) else levels / 127.5 - 1
    np.save(tmp_path / "x.npy", array.astype(dtype))
    data = load_data(tmp_path / "x.npy")
    expected = levels[:, None] if levels.ndim == 3 else levels
    expected = expected.transpose(0, 3, 1, 2) if shape[-1] in (1, 3) else expected
    assert data.train.shape == (4, *expected.shape[1:]) and data.test.shape == (1, *expected.shape[1:])
    found = sorted(image.numpy().tobytes() for image in all_images(data))
    assert found == sorted(image.tobytes() for image in expected)


def test_npz_with_test_part_labels_and_levels(tmp_path):
    x = np.random.default_rng(0).integers(0, 4, (7, 5, 5))
    np.savez(tmp_path / "x.npz", x_train=x[:5], y_train=np.arange(5) % 3, x_test=x[5:], y_test=[3, 0])
    data = load_data(str(tmp_path / "x.npz"), levels=4)
    assert (data.levels, data.num_classes, data.name) == (4, 4, "x.npz")
    assert np.array_equal(data.train[:, 0], x[:5]) and np.array_equal(data.test[:, 0], x[5:])
    assert data.test_labels.tolist() == [3, 0]


def test_held_out_split_is_a_function_of_the_seed(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(20, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2))
    first, again, other = (load_data(tmp_path / "x.npy", seed=seed).test[:, 0, 0, 0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and len(first) == 2
    # The smallest and the largest fraction still leave one image on each side.
    for fraction, count in ((1e-9, 1), (0.999, 19)):
        assert len(load_data(tmp_path / "x.npy", test_fraction=fraction).test) == count


FLOATS = np.linspace(-1, 1, 32, dtype=np.float32).reshape(2, 4, 4)


def with_value(value):
    array = FLOATS.copy()
    array[0, 0, :3] = value
    return array


ARRAY_ERRORS = {
    "NaN": (with_value(np.nan), "must be finite, got 3 NaN or infinite of 32 values"),
    "infinity": (with_value(-np.inf), "must be finite, got 3 NaN or infinite of 32 values"),
    "float range": (with_value(1.01), r"must hold floats in \[-1, 1\], got -0.806452..1.01"),
    "float from 0": (FLOATS / 2 + 0.5, r"that reach both ends, got 0..1; value_range=\(0, 1\) \(--range 0 1\) says what they"),
    "integer range": (np.full((2, 4, 4), 256), r"must hold integers in 0..255, got 256..256"),
    "negative": (np.full((2, 4, 4), -1), r"must hold integers in 0..255, got -1..-1"),
    "two dimensions": (FLOATS[0], r"must have shape \(N, H, W\), .* got \(4, 4\)"),
    "one colour image": (np.zeros((8, 8, 3), np.uint8), r"must have shape .* got \(8, 8, 3\)"),
    "no channels": (np.zeros((2, 4, 4, 2), np.uint8), "neither dimension 1 nor 3 could be channels"),
    "either layout": (np.zeros((2, 3, 4, 3), np.uint8), "both dimensions 1 and 3 could be channels"),
    "empty": (np.zeros((0, 4, 4), np.uint8), r"must hold images, got an empty array of shape \(0, 4, 4\)"),
    "booleans": (np.zeros((2, 4, 4), bool), "must hold integers or floats, got bool"),
    "objects": (np.array([{}, {}]), "it holds Python objects"),
    "one image": (np.zeros((1, 4, 4), np.uint8), "must have at least 2 images, .* got 1"),
}


@pytest.mark.parametrize("name", ARRAY_ERRORS)
def test_array_errors(tmp_path, name):
    array, message = ARRAY_ERRORS[name]
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        load_data(tmp_path / "x.npy")


def test_float_tolerance_covers_rounding(tmp_path):
    np.save(tmp_path / "x.npy", with_value(1.0005))
    assert all_images(load_data(tmp_path / "x.npy")).max() == 255


ONE = np.zeros((4, 5, 5), np.uint8)
NPZ_ERRORS = {
    "no images": ({"picture": ONE}, "must have images under train, x_train, .* got picture"),
    "shapes": ({"x": ONE, "test": ONE[:, :4]}, r"test images must be \(1, 5, 5\) like the others, got \(1, 4, 5\)"),
    "test labels": ({"x": ONE, "y": np.arange(4), "test": ONE}, "labels for both parts or none, got only training"),
    "label count": ({"x": ONE, "y": np.arange(3)}, r"labels must be \(4,\) integers from 0, or names, got \(3,\) int64"),
    "negative label": ({"x": ONE, "y": np.arange(4) - 1}, r"labels must be integers from 0 to 2\*\*63-1, got -1"),
    "label without a sign": (
        {"x": ONE, "y": np.full(4, 2**64 - 1, np.uint64)},
        r"labels must be integers from 0 to 2\*\*63-1, got 1844674407370955",
    ),
    "labels of two kinds": ({"x": ONE, "y": np.arange(4), "test": ONE, "test_labels": list("abcd")}, "of one kind, got int64 and <U1"),
    "label type": ({"x": ONE, "y": np.ones(4)}, r"labels must be \(4,\) integers from 0, or names, got \(4,\) float64"),
}


@pytest.mark.parametrize("name", NPZ_ERRORS)
def test_npz_errors(tmp_path, name):
    arrays, message = NPZ_ERRORS[name]
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_data(tmp_path / "x.npz")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"text", b"\x93NUMPY\x01\x00"])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_damaged_array_file(tmp_path, content, suffix):
    (tmp_path / f"x{suffix}").write_bytes(content)
    with pytest.raises(DataError, match=f"cannot read .*x{suffix}"):
        load_data(tmp_path / f"x{suffix}")


def test_folder_errors(tmp_path):
    with pytest.raises(DataError, match=r"must hold images \(.png, .*\), got none"):
        load_data(tmp_path)
    save_image(tmp_path / "a.png", size=(6, 4))
    with pytest.raises(DataError, match="at least 2 images"):
        load_data(tmp_path)
    save_image(tmp_path / "b.png", size=(5, 4))
    with pytest.raises(DataError, match=r"got .*a.png of 4x6 and .*b.png of 4x5 \(height x width\); image_size=N \(--image-size N,"):
        load_data(tmp_path)


def test_unreadable_image_is_named(tmp_path):
    save_image(tmp_path / "a.png", size=(64, 64))
    whole = save_image(tmp_path / "b.png", np.random.default_rng(0).integers(0, 255, (64, 64, 3)), (64, 64))
    # Nothing of an image, and an image that ends before its pixels do.
    for content in (b"hello", whole.read_bytes()[:2000]):
        whole.write_bytes(content)
        with pytest.raises(DataError, match="cannot read image .*b.png"):
            load_data(tmp_path)
    whole.unlink()
    Image.fromarray(np.zeros((64, 64), np.float32)).save(tmp_path / "c.tif")
    with pytest.raises(DataError, match=r"cannot read image .*c.tif: 32-bit pixels \(mode F\)"):
        load_data(tmp_path)


def test_source_errors(tmp_path):
    with pytest.raises(DataError, match="unknown data 'digit': expected digits, photos, a folder of images, or"):
        load_data("digit")
    with pytest.raises(DataError, match="no such file or folder: nowhere/at-all"):
        load_data("nowhere/at-all")
    with pytest.raises(DataError, match="data must be a built-in name, a folder, a .npy or a .npz file, got .*a.png"):
        load_data(save_image(tmp_path / "a.png"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"test_fraction": 0.0}, "test_fraction must be between 0 and 1, got 0.0"),
        ({"image_size": 0}, r"image_size must be a side of at least 1, or \(height, width\), got 0"),
        ({"levels": 1}, r"levels must be in 2..256, got 1"),
        ({"levels": 256}, "digits has 17 grey levels, got levels=256"),
        ({"image_size": 32}, "digits has images of 8x8, got image_size=32; only folders are resized"),
        ({"seed": -1}, r"seed must be in 0..2\*\*64-1, got -1"),
    ],
)
def test_option_errors(options, message):
    with pytest.raises(ValueError, match=message):
        load_data("digits", **options)


# A divisor, one that crosses epochs, all at once, more than there are (several epochs a batch), one.
@pytest.mark.parametrize("n, batch_size", [(12, 4), (13, 5), (8, 8), (3, 10), (1, 4)])
def test_batches_visit_each_image_once_an_epoch(n, batch_size):
    batches = Batches(n, batch_size, seed=3)
    stream = torch.cat([batches.indices(step) for step in range(3 * n)])
    assert stream.dtype == torch.int64
    epochs = stream[: len(stream) // n * n].view(-1, n)
    assert torch.equal(epochs.sort().values, torch.arange(n).expand_as(epochs))
    # Any step, in any order, from a new object: what resuming does.
    for step in (2 * n, 0, n + 1):
        expected = stream[step * batch_size : (step + 1) * batch_size]
        assert torch.equal(Batches(n, batch_size, seed=3).indices(step), expected)
        assert torch.equal(batches.indices(step), expected)


def test_batches_differ_by_epoch_and_seed_and_are_pinned():
    assert not torch.equal(Batches(50, 50).indices(0), Batches(50, 50).indices(1))
    assert not torch.equal(Batches(50, 50).indices(0), Batches(50, 50, seed=1).indices(0))
    # A run resumed with other library versions must go on with the same images.
    assert Batches(10, 10, seed=3).indices(0).tolist() == [6, 1, 8, 5, 2, 7, 9, 4, 3, 0]
    assert len(Batches(10, 2, seed=2**64 - 1).indices(10**12)) == 2


def test_batches_errors():
    with pytest.raises(ValueError, match="n and batch_size must be at least 1, got 0 and 4"):
        Batches(0, 4)
    with pytest.raises(ValueError, match=r"seed must be in 0..2\*\*64-1"):
        Batches(4, 4, seed=2**64)
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        Batches(4, 4).indices(-1)


def test_damaged_archive_is_named(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, x=np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8))
    content = bytearray(path.read_bytes())
    start = content.index(b".npy") + 40
    for i in range(start, start + 60):
        content[i] ^= 0x5A
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot read .*x.npz"):
        load_data(str(path))
