"""The command line on one's own data: what was found is printed, options mend what is doubtful, classes have names."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from ddpm_fast.cli import app
from ddpm_fast.cli.sample import parse_label
from ddpm_fast.cli.train import parse_size

TRAIN = ["train", "--preset", "digits", "--steps", 1, "--batch", 2, "-T", 4, "--schedule", "cosine", "--device", "cpu", "--threads", 1]


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@pytest.fixture
def folder(tmp_path):
    """12 bits in PNG files of 16, wider than high, of two classes."""
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for index in range(3):
            pixels = np.linspace(0, 4095, 8 * 16).reshape(8, 16).astype(np.uint16)
            Image.fromarray(np.roll(pixels, index)).save(tmp_path / "set" / name / f"{index}.png")
        (tmp_path / "set" / name / "list.txt").write_text("no image")
    return tmp_path / "set"


@pytest.mark.slow
def test_from_a_folder_to_a_sample_of_a_class(folder, tmp_path):
    out = tmp_path / "run"
    code, text = run(*TRAIN, "--data", folder, "--out", out)
    assert code == 2 and "--range 0 4095" in text and "\n" not in text.strip()
    options = ("--range", 0, 4095, "--image-size", "8x12")
    code, text = run(*TRAIN, "--data", folder, *options, "--class-conditional", "--out", out)
    assert code == 0
    assert (
        "set: 5 images to train on and 1 held out, 1x8x12 (channels x height x width), 256 grey levels (values found: 0..4095 in 0..4095)\n"
        in text
    )
    assert "\n2 classes: cat 3, dog 3\npassed over: 2 .txt\n" in text
    meta = json.loads((out / "checkpoint.json").read_text())
    meta = meta.get("meta", meta)
    assert meta["classes"] == ["cat", "dog"] and meta["train"]["value_range"] == [0, 4095] and meta["train"]["image_size"] == [8, 12]
    for name in ("dog", "1"):
        code, text = run("sample", out, "--class", name, "-n", 1, "--out", tmp_path / name)
        assert code == 0 and np.load(tmp_path / name / "samples.npz")["labels"].tolist() == [1]
    assert (np.load(tmp_path / "dog/samples.npz")["images"] == np.load(tmp_path / "1/samples.npz")["images"]).all()
    code, text = run("sample", out, "--class", "horse", "--out", tmp_path / "x")
    assert code == 2 and "--class must be 'each' or one of cat, dog, got horse" in text
    assert run(*TRAIN[:1], "--resume", "--out", out, *options, "--steps", 2)[0] == 0
    assert run("eval", out, "--terms", 2)[0] == 0


def test_notes_are_printed_once(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(8, dtype=np.uint8).repeat(64).reshape(8, 8, 8))
    code, text = run(*TRAIN, "--data", tmp_path / "x.npy", "--out", tmp_path / "run")
    assert code == 0 and text.count("values 0..7, a part of 0..255") == 1 and "note: " in text
    code, text = run(*TRAIN, "--data", tmp_path / "x.npy", "--range", 0, 7, "--out", tmp_path / "other")
    assert code == 0 and "8 grey levels (values found: 0..7 in 0..7)" in text and "note: " not in text


@pytest.mark.slow
def test_a_run_is_evaluated_on_data_read_as_those_of_training(tmp_path):
    """16 bits are not taken for levels because the model has 256 of them."""
    for name in ("x", "y"):
        np.save(tmp_path / f"{name}.npy", np.linspace(0, 65535, 8 * 64).reshape(8, 8, 8).astype(np.uint16))
    assert run(*TRAIN, "--data", tmp_path / "x.npy", "--out", tmp_path / "run")[0] == 0
    for options in ((), ("--data", tmp_path / "y.npy")):
        assert run("eval", tmp_path / "run", "--terms", 2, *options)[0] == 0


@pytest.mark.parametrize("text, size", [(None, None), ("32", 32), ("32x48", (32, 48)), ("8X4", (8, 4))])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "0", "4x", "4x4x4", "-4", "4,4", "four"])
def test_wrong_sizes(text):
    with pytest.raises(ValueError, match="--image-size must be a side such as 32, or a height and a width such as 32x48, got "):
        parse_size(text)


@pytest.mark.parametrize("text, classes, labels", [
    ("cat", ["ant", "cat"], [1]), ("0", ["ant", "cat"], [0]), ("each", ["ant", "cat"], [0, 1]),
    ("3", ["1", "2", "3"], [2]), ("7", list("0123456789"), [7]), ("10", ["1", "10", "2"], [1]),
])  # fmt: skip
def test_classes_by_name_and_number(text, classes, labels):
    assert parse_label(text, classes) == labels


@pytest.mark.parametrize("text, classes, message", [
    ("0", ["1", "2", "3"], "'each' or one of 1, 2, 3, got 0"),  # a number that is no name would be another's
    ("2", ["ant", "cat"], "one of ant, cat, got 2"),
    ("10", list("0123456789"), "in 0..9, got 10"),
    ("x", [f"n{index}" for index in range(1000)], r"n0, .*, n19, ... \(1000 of them\), got x"),
])  # fmt: skip
def test_wrong_classes(text, classes, message):
    with pytest.raises(ValueError, match=message):
        parse_label(text, classes)


@pytest.mark.slow
def test_held_out_data_of_another_range_and_size_can_be_evaluated(folder, tmp_path):
    """The advice that is given for them can be followed."""
    images = np.random.default_rng(0).random((6, 8, 8))
    np.save(tmp_path / "x.npy", (images * 255).astype(np.uint8))
    np.save(tmp_path / "unit.npy", images)
    assert run(*TRAIN, "--data", tmp_path / "x.npy", "--out", tmp_path / "run")[0] == 0
    evaluate = ["eval", tmp_path / "run", "--terms", 2, "--out", tmp_path / "out"]
    code, text = run(*evaluate, "--data", tmp_path / "unit.npy")
    assert code == 2 and "--range 0 1" in text
    assert run(*evaluate, "--data", tmp_path / "unit.npy", "--range", 0, 1)[0] == 0
    code, text = run(*evaluate, "--data", folder, "--range", 0, 4095, "--image-size", 8)
    assert code == 0 and "evaluating 6 of all 6 images" in text
    code, text = run(*evaluate, "--data", tmp_path / "x.npy", "--range", 0, 255)
    assert code == 2 and "those of the run are read as in training" in text
