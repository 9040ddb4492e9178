"""Damaged and hostile files: whatever their parsers raise, one sentence that names the file, and nothing large is allocated first."""

import io
import random
import struct
import warnings
import zipfile

import numpy as np
import pytest
from PIL import Image

from ddpm_fast.data.images import DataError, DataWarning, load_data

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 6, 6), dtype=np.uint8)


def saved(save, *arrays, **named):
    buffer = io.BytesIO()
    save(buffer, *arrays, **named)
    return buffer.getvalue()


def with_header(text, version=(1, 0)):
    text = text.encode("latin1") + b"\n"
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", len(text)) + text + IMAGES.tobytes()


def header(descr="'|u1'", shape="(4, 6, 6)", order="False"):
    return with_header(f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}")


# What each made of NumPy's parser, or would make of memory.
HEADERS = {
    "TokenError": with_header("{'descr': '|u1', 'shape': (4, 6,"),
    "SyntaxError": with_header("{'descr': '|u1' 'x': 0 0}"),
    "nested": header(shape="(" * 3000 + "4"),
    "OverflowError": header(shape="(4L, 6L, 6L)", descr="'|V99999999999999999999'"),
    "AttributeError": with_header("[1, 2]"),
    "UnicodeDecodeError": with_header("é", (2, 0))[:12] + b"\xff\xfe",
    "struct.error": with_header("")[:9],
    "version": with_header("", (9, 9)),
    "names": with_header("{'descr': [('é', '<i4')]}", (3, 0)),
    "huge": header(shape=f"({2**40}, 6, 6)"),
    "beyond 64 bits": header(shape=f"({2**70}, 6, 6)"),
    "one too many": header(shape="(5, 6, 6)"),
    "negative": header(shape="(-4, -6, 6)"),
    "many dimensions": header(shape="(" + "1, " * 99 + ")"),
    "no shape": header(shape="None"),
    "not whole": header(shape="(4.0, 6, 6)"),
    "huge text": header(descr="'<U999999999'"),
    "no bytes": header(descr="'|V0'", shape=f"({2**62}, 6, 6)"),
    "structure": header(descr="[('a', '<i4')]"),
    "pickles": header(descr="'|O'"),
    "dates": header(descr="'<M8[s]'"),
}


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_headers(tmp_path, name, suffix):
    path, content = tmp_path / f"x.{suffix}", HEADERS[name]
    path.write_bytes(content)
    if suffix == "npz":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x.npy", content)
    assert "x." + suffix in refusal(path, path)


def refusal(source, path):
    """The one sentence; "" where the data can be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DataWarning)
        try:
            load_data(source)
        except DataError as error:
            text = str(error)
            assert "\n" not in text and str(path) in text and text.isprintable() and len(text) < 600 + len(str(path)), text
            return text
    return ""


def test_declared_sizes_are_compared_with_the_file(tmp_path):
    (tmp_path / "x.npy").write_bytes(HEADERS["huge"])
    assert f"its header tells of uint8 ({2**40}, 6, 6), {36 * 2**40} bytes, of which 144 are there" in refusal(
        tmp_path / "x.npy", tmp_path / "x.npy"
    )


def test_an_archive_of_more_than_the_memory_is_not_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, np.zeros((2**10, 32, 32)))
    assert path.stat().st_size < 2**16
    monkeypatch.setattr("ddpm_fast.data.array_files.available_memory", lambda: 2**22)
    assert "(arr_0) takes 8.0 MiB of memory, of which 4.0 MiB are free" in refusal(path, path)


def mutated(content, draw):
    content = bytearray(content)
    kind = draw.randrange(4)
    if kind == 0:
        del content[draw.randrange(len(content)) :]
    elif kind == 1:
        for _ in range(draw.randrange(1, 8)):
            content[draw.randrange(min(len(content), 128))] = draw.randrange(256)
    elif kind == 2:
        at = draw.randrange(len(content))
        content[at : at + 4] = draw.choice([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\0\x10\0\0", b""])
    else:
        at = draw.randrange(min(len(content), 128))
        content[at:at] = bytes(draw.choices(b"(){}[]'\"\\,:#\n 09eLx\x00\xff", k=draw.randrange(1, 20)))
    return bytes(content)


FLOATS = IMAGES / 127.5 - 1
ARRAY_FILES = [
    saved(np.save, IMAGES), saved(np.save, IMAGES.astype(">u2") * np.uint16(257)), saved(np.save, np.asfortranarray(FLOATS)),
    saved(np.save, np.array(5)), saved(np.save, np.array([{}, {}])), saved(np.save, np.zeros(3, "u1,f4")),
    saved(np.savez, x=IMAGES, y=np.arange(4)), saved(np.savez_compressed, x=FLOATS.astype(">f4"), y=np.array(list("abab"))),
]  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_mutated_array_files(tmp_path, seed):
    draw, path, refused = random.Random(seed), tmp_path / "x.npz", 0
    for _ in range(40):
        path.write_bytes(mutated(ARRAY_FILES[seed], draw))
        refused += bool(refusal(path, path))
    assert refused > 10  # some changes are of values, and make other data


COLOUR = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8))
WIDE = Image.fromarray(np.asarray(COLOUR.convert("L")).astype(np.uint16) * np.uint16(257))
IMAGE_FILES = {
    "png": saved(COLOUR.save, "PNG"), "png of 16 bits": saved(WIDE.save, "PNG"), "jpeg": saved(COLOUR.save, "JPEG"),
    "webp": saved(COLOUR.save, "WEBP"), "gif": saved(COLOUR.save, "GIF"), "bmp": saved(COLOUR.save, "BMP"),
    "tiff": saved(COLOUR.save, "TIFF"), "tiff of 16 bits": saved(WIDE.save, "TIFF"),
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGE_FILES)
def test_mutated_images(tmp_path, name):
    draw, path, refused = random.Random(name), tmp_path / "b.png", 0
    COLOUR.save(tmp_path / "a.png")
    for _ in range(40):
        path.write_bytes(mutated(IMAGE_FILES[name], draw))
        refused += bool(refusal(tmp_path, path))
    assert refused > 10


def test_a_tiff_whose_offsets_are_text(tmp_path):
    """Pillow raises TypeError for it."""
    content = saved(COLOUR.save, "TIFF")
    entry = next(at for kind in (3, 4) if (at := content.find(struct.pack("<HHI", 273, kind, 1))) > 0)
    path = tmp_path / "x.tif"
    path.write_bytes(content[: entry + 2] + struct.pack("<H", 2) + content[entry + 4 :])
    assert refusal(tmp_path, path)
