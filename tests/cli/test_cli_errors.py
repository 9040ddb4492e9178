"""What the command line says: of missing memory, in the words of its options, and what then can be done."""

import json
import math

import numpy as np
import pytest
import torch
import typer
from PIL import Image

from ddpm_fast.cli import app
from ddpm_fast.cli.errors import in_options, options_of
from ddpm_fast.models import EMA, UNet
from ddpm_fast.training import TrainConfig, Trainer, load_data, load_trained

COMMANDS = typer.main.get_command(app).commands
SMALL = ["--preset", "digits", "--batch", 2, "--log-every", 1, "-T", 30]


def one_line(error):
    return len(error.strip().splitlines()) == 1


def out_of_memory(kind):
    """As PyTorch and NumPy raise it."""
    if kind == "host":
        return RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
            "you tried to allocate 8000000000 bytes. Error code 12 (Cannot allocate memory)"
        )
    if kind == "device":
        return torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB\nSee documentation"
        )
    return MemoryError("Unable to allocate 7.45 GiB for an array with shape (1000000000,) and data type float64")


AMOUNTS = {"host": "8000000000 bytes", "device": "2.00 GiB", "array": "7.45 GiB"}


@pytest.mark.parametrize("kind", AMOUNTS)
@pytest.mark.parametrize(
    "arguments, batch",
    [
        (["train", "--steps", 2, "--batch", 4], ""),
        (["sample", "{run}", "--steps", 2, "-n", 2], ", now 256"),
        (["eval", "{run}", "--limit", 2], ", now 256"),
    ],
    ids=["train", "sample", "eval"],
)
def test_out_of_memory_is_a_line_that_names_the_batch(run, tmp_path, monkeypatch, command, kind, arguments, batch):
    def full(*_, **__):
        raise out_of_memory(kind)

    monkeypatch.setattr(UNet, "forward", full)
    monkeypatch.setattr("ddpm_fast.sampling.sampler.Sampler.__call__", full)
    code, _, error = command(*(str(a).format(run=run) for a in arguments), "--out", tmp_path / "out")
    assert code == 2 and one_line(error)
    assert error == f"ddpm-fast: out of memory, asking for {AMOUNTS[kind]}; fewer images at a time need less: --batch{batch}\n"


@pytest.mark.parametrize("name", ["train", "eval"])
def test_memory_that_is_missing_for_the_data_names_them(run, tmp_path, monkeypatch, command, name):
    def full(*_, **__):
        raise out_of_memory("array")

    np.save(tmp_path / "x.npy", np.zeros((4, 8, 8), np.uint8))
    monkeypatch.setattr("ddpm_fast.data.images.read_array_file", full)
    code, _, error = command(*(["train"] if name == "train" else ["eval", run]), "--data", tmp_path / "x.npy", "--out", tmp_path / "out")
    assert code == 2 and one_line(error) and "--batch" not in error
    assert f"out of memory, asking for 7.45 GiB while reading {tmp_path / 'x.npy'}: its images are held in memory, a byte a value" in error
    assert name == "eval" or "--image-size shrinks" in error


def test_other_runtime_errors_are_faults_of_the_program(run, tmp_path, monkeypatch, command):
    monkeypatch.setattr(UNet, "forward", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("mat1 and mat2 shapes cannot be multiplied")))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        command("eval", run, "--limit", 2, "--out", tmp_path)


@pytest.mark.parametrize(
    "command_name, text, told",
    [
        ("train", "learning_rate must be positive, got -1.0", "--lr must be positive, got -1.0"),
        ("train", "timesteps must be at least 1", "--timesteps must be at least 1"),
        (
            "train",
            "a run goes on as it began: batch must be 8, got 32, seed must be 0, got 7",
            "a run goes on as it began: --batch must be 8, got 32, --seed must be 0, got 7",
        ),
        ("train", "network dropout must be 0.0, got 0.5", "--dropout must be 0.0, got 0.5"),
        ("train", "x has images of 8x8, got image_size=32; only folders", "x has images of 8x8, got --image-size 32; only folders"),
        ("train", "class_conditional needs labels", "--class-conditional needs labels"),
        ("sample", "eta must be in [0, 1]", "--eta must be in [0, 1]"),
        ("sample", "eta is a part of sampler 'ddim', got 0.5 for 'ddpm'", "--eta is a part of --sampler 'ddim', got 0.5 for 'ddpm'"),
        ("train", "weight is of the simple loss", "--weight is of the simple loss"),
        (
            "train",
            "loss 'hybrid' trains a learned variance, got variance 'fixed_large'",
            "--loss 'hybrid' trains a learned variance, got --variance 'fixed_large'",
        ),
        # Words and paths that only look like arguments.
        ("train", "lower the learning rate or check the data", "lower the learning rate or check the data"),
        ("train", "no such file: /a/image_size/b and image_size.png must be", "no such file: /a/image_size/b and image_size.png must be"),
        ("train", "--levels must be in 2..256", "--levels must be in 2..256"),
        ("sample", "levels must be in 2..256", "levels must be in 2..256"),
    ],
)
def test_arguments_become_options(command_name, text, told):
    assert in_options(text, options_of(COMMANDS[command_name])) == told


@pytest.mark.parametrize(
    "options, message",
    [
        (["--lr", -1], "--lr must be positive, got -1.0"),
        (["--ema", 2], "--ema must lie in [0, 1), got 2.0"),
        (["--image-size", 32], "got --image-size 32; only folders are resized"),
        (["--data", "{tall}"], "needs sides divisible by 2, got 7x8; crop or resize them (--image-size does it for a folder)"),
        (["--data", "{tall}", "--class-conditional", "--preset", "digits"], "got 7x8"),
        (
            ["-T", 19],
            "--timesteps must be more than 19.5 for --schedule 'linear', whose last beta is 19.5 / timesteps, got 19; "
            "--schedule 'cosine' takes fewer",
        ),
    ],
)
def test_messages_name_what_was_typed(tmp_path, command, options, message):
    np.save(tmp_path / "tall.npy", np.random.default_rng(0).integers(0, 256, (4, 7, 8), dtype=np.uint8))
    preset = ["--preset", "digits"] if "--preset" not in options else []
    code, _, error = command("train", *preset, *(str(o).format(tall=tmp_path / "tall.npy") for o in options), "--out", tmp_path / "run")
    assert code == 2 and message in error and one_line(error), error
    assert not (tmp_path / "run").exists()


def test_a_list_of_steps_is_named_as_typed(run, tmp_path, command):
    for steps, message in (
        ("0,5,30", "--steps must ascend strictly within 0..29, got [0, 5, 30]"),
        ("5,3", "--steps must ascend"),
        ("99", "--steps must"),
    ):
        code, _, error = command("sample", run, "--steps", steps, "--out", tmp_path)
        assert code == 2 and f"ddpm-fast: {message}" in error and one_line(error), error


@pytest.mark.slow
def test_short_runs_get_a_recipe_of_their_length_and_say_so(tmp_path, command):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (8, 8, 8), dtype=np.uint8))
    small = ["train", "--data", tmp_path / "x.npy", *SMALL, "--steps", 16]
    code, text, error = command(*small, "--out", tmp_path / "a")
    assert (
        code == 0
        and "16 steps of 2 images, learning rate 0.0002 after a warm-up of 2; in the end the weights of the last 3 or so are averaged"
        in " ".join(text.split())
    ), error
    code, text, error = command(*small, "--warmup", 3, "--ema", 0.5, "--out", tmp_path / "b")
    assert code == 0 and "a warm-up of 3; in the end the weights of the last 2 or so are averaged" in " ".join(text.split()), error
    for name, expected in (("a", (2, 0.9999)), ("b", (3, 0.5))):
        kept = load_trained(tmp_path / name).config
        assert (kept.warmup, kept.ema) == expected
    # A run that is extended keeps what it began with: it stays the run that had never stopped.
    assert command("train", "--resume", "--steps", 40, "--out", tmp_path / "a")[0] == 0
    assert load_trained(tmp_path / "a").config.warmup == 2


@pytest.mark.parametrize(
    "data, steps, warmup",
    [
        ("digits", None, 50), ("digits", 1500, 50), ("digits", 100, 12), ("photos", None, 500),
        ("a folder", None, 5000), ("a folder", 40_000, 5000), ("a folder", 500, 62), ("a folder", 3, 0),
    ],
)  # fmt: skip
def test_recipes_of_their_own_length_are_as_they_were_and_shorter_ones_warm_up_faster(data, steps, warmup):
    assert TrainConfig.for_data(data, steps=steps).warmup == warmup
    assert TrainConfig(steps=500).warmup == 5000  # the class itself takes nothing away


def test_a_short_run_comes_to_its_learning_rate_and_forgets_its_first_weights():
    found = TrainConfig.for_data("a folder", steps=500)
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    average = EMA(model, found.ema)
    torch.nn.init.ones_(model.weight)
    for _ in range(found.steps // 4):
        average.update(model)
    # After a quarter of the run the first weights' share is prod (1 + k) / (10 + k) = 1 / C(n + 9, 9).
    assert 1 - average.state_dict()["parameters"]["weight"].item() == pytest.approx(1 / math.comb(125 + 9, 9), abs=1e-6)
    assert found.warmup <= found.steps / 8


def test_a_folder_that_has_no_checkpoint_yet_is_started_again(tmp_path, command):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 1.0, "elapsed_s": 2.0}\n')  # killed within the first ten minutes
    code, _, error = command("train", "--resume", "--out", tmp_path)
    assert code == 2 and f"no checkpoint at {tmp_path} to go on from; the same command without --resume starts the run" in error
    code, _, error = command("train", "--steps", 1, *SMALL, "--out", tmp_path)
    assert code == 0, error
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1]
    (tmp_path / "checkpoint.safetensors").unlink()  # the JSON alone says that there was something
    assert "already holds a run" in command("train", "--steps", 1, *SMALL, "--out", tmp_path)[2]
    assert "tensor file checkpoint.safetensors is missing" in command("train", "--resume", "--out", tmp_path)[2]


@pytest.fixture
def folder(tmp_path):
    """20 images in a folder."""
    (tmp_path / "images").mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)):
        Image.fromarray(image).save(tmp_path / "images" / f"{i}.png")
    return tmp_path / "images"


def bound(out):
    return json.loads((out / "bound.json").read_text())


@pytest.mark.slow
def test_data_that_move_change_and_are_ones_own(folder, tmp_path, command, monkeypatch):
    out, small = tmp_path / "run", ["--terms", 2, "--out", tmp_path / "eval"]
    assert command("train", "--data", folder, *SMALL, "--steps", 1, "--out", out)[0] == 0
    assert command("eval", out, *small)[0] == 0
    first = bound(tmp_path / "eval")
    assert (first["images"], first["part"]) == (2, "held-out")

    moved = folder.rename(tmp_path / "moved")
    for arguments in (["train", "--resume", "--out", out], ["eval", out, *small]):
        code, _, error = command(*arguments)
        assert (
            code == 2
            and one_line(error)
            and f"no longer in {folder}; if they have moved, say where to (data, on the command line --data)" in error
        )
    code, text, error = command("train", "--resume", "--data", moved, "--steps", 2, "--out", out)
    assert code == 0 and "going on after step 1 of 2" in text, error
    assert command("eval", out, *small)[0] == 0 and bound(tmp_path / "eval")["images"] == 2

    # Ten files: more held out, and others; all the more so as the model has seen some of them.
    for i in range(10):
        Image.fromarray(np.full((8, 8), 9 * i, np.uint8)).save(moved / f"more{i}.png")
    for arguments in ([], ["--data", moved]):
        code, _, error = command("eval", out, *arguments, *small)
        assert (
            code == 2 and one_line(error) and f"{moved} has changed since the model was trained on it" in error and "with --data" in error
        )
    code, _, error = command("train", "--resume", "--steps", 3, "--out", out)
    assert code == 2 and "moved must be the 18 images of (1, 8, 8) with 256 levels that" in error

    # A folder of one's own is evaluated whole; a single image has no error.
    for count in (8, 1):
        own = tmp_path / f"own{count}"
        own.mkdir()
        for i in range(count):
            Image.fromarray(np.full((8, 8), 20 * i, np.uint8)).save(own / f"{i}.png")
        code, text, error = command("eval", out, "--data", own, *small)
        assert code == 0 and f"evaluating {count} of all {count} images of {own}" in " ".join(text.split()), error
        assert (bound(tmp_path / "eval")["images"], bound(tmp_path / "eval")["part"]) == (count, "all") and "nan" not in text
        assert ("with an error that one image cannot tell" in text) == (count == 1)


def test_the_data_of_training_elsewhere_are_not_taken_for_unseen_ones(folder, tmp_path, command):
    import shutil

    assert command("train", "--data", folder, *SMALL, "--steps", 1, "--out", tmp_path / "run")[0] == 0
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert command("eval", tmp_path / "run", "--data", copy, "--terms", 2)[0] == 0
    assert (bound(tmp_path / "run")["images"], bound(tmp_path / "run")["part"]) == (2, "held-out")


def test_images_that_are_not_square_train_sample_and_are_evaluated(tmp_path, command):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (8, 8, 16), dtype=np.uint8))
    out = tmp_path / "run"
    assert command("train", "--data", tmp_path / "x.npy", *SMALL, "--steps", 2, "--out", out)[0] == 0
    assert command("sample", out, "-n", 3, "--steps", 3, "--gif", "--progressive", "--out", tmp_path / "samples")[0] == 0
    assert np.load(tmp_path / "samples" / "samples.npz")["images"].shape == (3, 1, 8, 16)
    assert command("eval", out, "--terms", 3)[0] == 0
    Trainer.restore(out, load_data(tmp_path / "x.npy"))


@pytest.mark.parametrize("value", [np.int64(5), torch.tensor(5)])
def test_numbers_of_numpy_are_numbers(value):
    found = TrainConfig(steps=value, learning_rate=np.float32(0.5), network={"dropout": 0.0})
    assert type(found.steps) is int and found.steps == 5 and type(found.learning_rate) is float
    json.dumps(found.__dict__)
    for wrong, message in (
        (dict(steps=1.5), "steps must be int, got 1.5"),
        (dict(steps=True), "steps must be int, got True"),
        (dict(flip=1), "flip must be bool, got 1"),
        (dict(network={"dropout": np.float32(0.5)}), "network must hold JSON values"),
    ):
        with pytest.raises(TypeError, match=message):
            TrainConfig(**wrong)


def test_a_folder_that_is_a_file_is_told_without_numbers_of_errors(run, tmp_path, command):
    (tmp_path / "x").write_text("")
    code, _, error = command("sample", run, "-n", 1, "--out", tmp_path / "x")
    assert code == 2 and error.endswith(f"ddpm-fast: {tmp_path / 'x'}: file exists\n")


@pytest.mark.parametrize("arguments", [["train"], ["sample", "{run}"]], ids=["train", "sample"])
def test_a_seed_of_more_than_64_bits_leaves_nothing(run, tmp_path, command, arguments):
    code, _, error = command(*(a.format(run=run) for a in arguments), "--seed", 2**64, "--out", tmp_path / "out")
    assert code == 2 and "--seed" in error and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=f"seed must be at most {2**64 - 1}"):
        TrainConfig(seed=2**64)


def test_too_few_samples_are_noticed_before_the_bound(run, tmp_path, command):
    np.savez(tmp_path / "few.npz", images=np.zeros((3, 8, 8), np.uint8))
    code, _, error = command("eval", run, "--samples", tmp_path / "few.npz", "--out", tmp_path / "out")
    assert code == 2 and error == "ddpm-fast: --samples must be at least 4 images, got 3\n"
    assert not (tmp_path / "out").exists()
