"""Which values are black and white: PNG files and arrays of the same values are the same data, and what is assumed is said."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.data.images import DataError, DataWarning, load_data

RNG = np.random.default_rng(0)


def save_png16(path, pixels):
    """16-bit colour, which Pillow does not write: (H, W, 3) or (H, W, 4), each row as differences to the left (filter 1)."""
    height, width, channels = pixels.shape
    rows = np.frombuffer(pixels.astype(">u2").tobytes(), np.uint8).reshape(height, -1).copy()
    rows[:, 2 * channels :] -= rows[:, : -2 * channels].copy()
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"".join(b"\1" + row.tobytes() for row in rows))), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    path.write_bytes(content)


def save_both(tmp_path, array):
    """A folder of PNG files and a .npy file of the same (N, H, W) or (N, H, W, 3)."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for index, pixels in enumerate(array):
        path = folder / f"{index:02}.png"
        if pixels.ndim == 3 and pixels.dtype == np.uint16:
            save_png16(path, pixels)
        else:
            Image.fromarray(pixels).save(path)
    np.save(tmp_path / "array.npy", array)
    return folder, tmp_path / "array.npy"


def integers(dtype, low, high, *shape):
    array = RNG.integers(low, high + 1, (6, 5, 4, *shape)).astype(dtype)
    array[0, 0, :2] = np.array([low, high]).reshape(2, *[1] * len(shape))
    return array


ALIKE = {
    "eight bits": (integers(np.uint8, 0, 255), {}, 256, lambda v: v),
    "eight bits, colour": (integers(np.uint8, 0, 255, 3), {}, 256, lambda v: v),
    "a range of 17": (integers(np.uint8, 0, 16), {"value_range": (0, 16)}, 17, lambda v: v),
    "bits": (integers(np.uint8, 0, 1, 3), {"value_range": (0, 1)}, 2, lambda v: v),
    "levels": (integers(np.uint8, 0, 16), {"levels": 17}, 17, lambda v: v),
    "spread levels": (integers(np.uint8, 0, 1) * np.uint8(255), {"value_range": (0, 255), "levels": 2}, 2, lambda v: v // 255),
    "not from 0": (integers(np.uint8, 100, 110), {"value_range": (100, 110)}, 11, lambda v: v - 100),
    "16 bits": (integers(np.uint16, 0, 65535), {}, 256, lambda v: np.rint(v / 257)),
    "16 bits, colour": (integers(np.uint16, 0, 65535, 3), {}, 256, lambda v: np.rint(v / 257)),
    "12 of 16 bits": (integers(np.uint16, 0, 4095), {"value_range": (0, 4095)}, 256, lambda v: np.rint(v * 255 / 4095)),
    "12 of 16 bits, colour": (integers(np.uint16, 0, 4095, 3), {"value_range": (0, 4095)}, 256, lambda v: np.rint(v * 255 / 4095)),
    "16 bits of 17 levels": (integers(np.uint16, 0, 16, 3), {"value_range": (0, 16)}, 17, lambda v: v),
}


@pytest.mark.parametrize("name", ALIKE)
def test_files_of_images_and_arrays_are_alike(tmp_path, name):
    array, options, levels, expected = ALIKE[name]
    folder, file = (load_data(path, **options) for path in save_both(tmp_path, array))
    assert folder.levels == file.levels == levels
    assert torch.equal(folder.train, file.train) and torch.equal(folder.test, file.test)
    assert folder.origin.found == file.origin.found
    # Rows of the two parts are in order: together they are all images.
    both = torch.cat([file.train, file.test]).numpy()
    wanted = expected(array.astype(np.float64)).astype(np.uint8)
    wanted = wanted[:, None] if wanted.ndim == 3 else wanted.transpose(0, 3, 1, 2)
    assert sorted(image.tobytes() for image in both) == sorted(image.tobytes() for image in wanted)


@pytest.mark.parametrize("which", [0, 1])
def test_eight_bits_of_a_part_of_the_range_get_a_note(tmp_path, which):
    path = save_both(tmp_path, integers(np.uint8, 0, 16))[which]
    with pytest.warns(
        DataWarning, match=r"values 0..16, a part of 0..255, .* give value_range=\(0, 16\) \(--range 0 16\), else value_range=\(0, 255\)"
    ):
        data = load_data(path)
    assert data.levels == 256 and len(data.origin.notes) == 1 and data.summary[-1] == f"note: {data.origin.notes[0]}"
    assert "(values found: 0..16 in 0..255)" in data.summary[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({"value_range": (0, 16)}, {"value_range": (0, 255)}, {"levels": 17}):
            assert not load_data(path, **options).origin.notes


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("channels", [(), (3,)])
def test_sixteen_bits_of_a_part_of_the_range_are_refused(tmp_path, which, channels):
    path = save_both(tmp_path, integers(np.uint16, 3, 4000, *channels))[which]
    message = r"values 3..4000, a part of 0..65535, of which 256 grey levels would keep 17; value_range=\(0, 4095\) \(--range 0 4095\) says"
    with pytest.raises(DataError, match=message):
        load_data(path)
    assert load_data(path, value_range=(0, 65535)).levels == 256


def test_values_outside_a_given_range_are_named(tmp_path):
    folder, file = save_both(tmp_path, integers(np.uint8, 0, 20))
    for path, where in ((folder, "folder/00.png"), (file, "array.npy")):
        with pytest.raises(DataError, match=rf"{where} must hold integers in 0..16, got 0..20$"):
            load_data(path, value_range=(0, 16))


FLOATS = np.linspace(0, 1, 64, dtype=np.float32).reshape(4, 4, 4)


# From 0 to 1, with rounding or an undershoot below it; around 0, but half as wide; dark.
@pytest.mark.parametrize("array, low, high", [
    (FLOATS, 0, 1), (FLOATS - np.float32(1e-4), 0, 1), (FLOATS * 1.05 - 0.05, -0.05, 1), (FLOATS - 0.5, -0.5, 0.5), (FLOATS - 1, -1, 0),
])  # fmt: skip
def test_floats_that_do_not_reach_both_ends(tmp_path, array, low, high):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(
        DataError, match=rf"floats in \[-1, 1\] that reach both ends, got .*\(--range {low} {high}\) says what they can span"
    ):
        load_data(tmp_path / "x.npy")
    data = load_data(tmp_path / "x.npy", value_range=(low, high))
    levels = torch.cat([data.train, data.test])
    assert data.levels == 256 and levels.min() == 0 and levels.max() == 255
    assert load_data(tmp_path / "x.npy", value_range=(-1, 1)).levels == 256


def test_a_range_of_floats_is_the_default_ones_twin(tmp_path):
    np.save(tmp_path / "x.npy", FLOATS * 2 - 1)
    np.save(tmp_path / "y.npy", FLOATS.astype(np.float64) * 510 - 200)
    a, b = load_data(tmp_path / "x.npy"), load_data(tmp_path / "y.npy", value_range=(-200, 310))
    assert torch.equal(a.train, b.train)
    assert load_data(tmp_path / "x.npy", levels=17).levels == 17


@pytest.mark.parametrize("value_range, message", [
    ((1, 1), "must be two numbers, the smaller first, got 1 1"),
    ((0, np.inf), "got 0 inf"), ((0, np.nan), "got 0 nan"), ((1, 2, 3), "got 1 2 3"),
    ((0, 0.5), "of integers must be two integers of at most .* got 0 0.5"), ((0, 2**33), "got 0 8589934592"),
])  # fmt: skip
def test_range_errors(tmp_path, value_range, message):
    np.save(tmp_path / "x.npy", np.zeros((4, 4, 4), np.uint8))
    with pytest.raises(DataError, match=rf"value_range \(--range\) {message}" if message.startswith(("must", "of")) else message):
        load_data(tmp_path / "x.npy", value_range=value_range)
    with pytest.raises(DataError, match="digits has a range of its own"):
        load_data("digits", value_range=(0, 16))


def test_32_bits_are_read_with_a_range(tmp_path):
    for index in range(3):
        Image.fromarray(np.full((4, 4), 1000 * index, np.int32)).save(tmp_path / f"{index}.tif")
    with pytest.raises(
        DataError, match=r"0.tif: 32-bit pixels \(mode I\) have no known range; save 8 bits, or give the range by value_range \(--range\)"
    ):
        load_data(tmp_path)
    data = load_data(tmp_path, value_range=(0, 2000))
    assert sorted(torch.cat([data.train, data.test])[:, 0, 0, 0].tolist()) == [0, 128, 255]
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match="x.tif must hold integers like the others, got floats"):
        load_data(tmp_path, value_range=(0, 2000))


def test_colour_of_16_bits_keeps_its_low_bytes_and_puts_transparency_onto_white(tmp_path):
    for index, alpha in enumerate((65535, 0, 32768)):
        save_png16(tmp_path / f"{index}.png", np.tile(np.array([0x0102, 0x0384, 0xFFFF, alpha], np.uint16), (2, 2, 1)))
    data = load_data(tmp_path, levels=256, value_range=(0, 65535))
    found = sorted(torch.cat([data.train, data.test])[:, :, 0, 0].tolist())
    # 0x0384 is 900, or 3.502 levels, of which the high byte alone would make 3.
    assert found == [[1, 4, 255], [128, 129, 255], [255, 255, 255]]


def test_tiff_of_16_bit_colour(tmp_path):
    # Uncompressed, little endian, one strip: the smallest such file, which Pillow does not write.
    pixels = integers(np.uint16, 0, 4095, 3)
    for index, image in enumerate(pixels):
        height, width, _ = image.shape
        tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 8 + 2 + 12 * 10 + 4), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 160),
                (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, image.nbytes), (284, 3, 1, 1)]  # fmt: skip
        content = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
        content += struct.pack("<IHHH", 0, 16, 16, 16)
        (tmp_path / f"{index}.tif").write_bytes(content.ljust(160, b"\0") + image.astype("<u2").tobytes())
    data = load_data(tmp_path, value_range=(0, 4095))
    expected = np.rint(pixels * 255.0 / 4095).astype(np.uint8).transpose(0, 3, 1, 2)
    found = torch.cat([data.train, data.test]).numpy()
    assert sorted(image.tobytes() for image in found) == sorted(image.tobytes() for image in expected)


def test_resizing_stays_within_the_levels(tmp_path):
    # Lanczos overshoots beside an edge: level 17 of 0..16, without care.
    edge = np.zeros((16, 16), np.uint8)
    edge[:, 8:] = 16
    for index in range(2):
        Image.fromarray(edge).save(tmp_path / f"{index}.png")
    data = load_data(tmp_path, image_size=11, value_range=(0, 16))
    assert data.levels == 17 and data.train.max() == 16 and data.image_shape == (1, 11, 11)


def test_saved_floats_and_png_of_one_sample_set_agree(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, FLOATS * 2 - 1)
    (tmp_path / "x.npy").write_bytes(buffer.getvalue())
    folder = tmp_path / "png"
    folder.mkdir()
    for index, image in enumerate(np.rint(FLOATS * 255).astype(np.uint8)):
        Image.fromarray(image).save(folder / f"{index}.png")
    assert torch.equal(load_data(folder).train, load_data(tmp_path / "x.npy").train)


@pytest.mark.parametrize(
    "values, told",
    [
        (np.linspace(0.4, 254.7, 256), "value_range=(0, 255) (--range 0 255) says what they can span"),
        (np.linspace(-3, 255, 256), "value_range=(-3, 255) (--range -3 255) says what they can span"),
        (np.full(256, 2**64 - 1, np.uint64), None),  # no range that could be given holds them
    ],
    ids=["like grey levels", "floats", "too wide"],
)
def test_the_range_that_is_offered_can_be_given(tmp_path, values, told):
    np.save(tmp_path / "x.npy", values.reshape(4, 8, 8))
    with pytest.raises(DataError) as error:
        load_data(tmp_path / "x.npy")
    assert str(error.value).endswith(told) if told else "--range" not in str(error.value)
