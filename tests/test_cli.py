"""The command line as a user types it. One test starts a process; the others call the entry point in this one."""
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import ddpm_fast
from ddpm_fast.cli import app

TRAIN = ["train", "--data", "digits", "--steps", "3", "--batch", "8", "--log-every", "1"]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def test_train_writes_a_whole_run(run):
    assert sorted(p.name for p in run.iterdir()) == ["checkpoint.json", "checkpoint.safetensors", "loss.png", "metrics.jsonl"]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    meta = json.loads((run / "checkpoint.json").read_text())
    assert "digits" in json.dumps(meta)


def test_sample_does_not_depend_on_the_batch(run, tmp_path):
    outputs = []
    for name, batch in (("one", 5), ("two", 2)):
        result = invoke("sample", run, "--out", tmp_path / name, "-n", 5, "--batch", batch, "--seed", 7, "--gif")
        assert result.exit_code == 0, result.output
        outputs.append(np.load(tmp_path / name / "samples.npz")["images"])
    assert outputs[0].shape == (5, 1, 8, 8) and outputs[0].dtype == np.uint8 and outputs[0].max() <= 16
    assert np.abs(outputs[0].astype(int) - outputs[1]).max() <= 1  # a value on the edge of a level may round either way
    with Image.open(tmp_path / "one" / "reverse.gif") as gif:
        assert gif.n_frames > 10
    with Image.open(tmp_path / "one" / "samples.png") as grid:
        assert grid.width > 100


def test_sample_of_a_class(tmp_path, command):
    assert command(*TRAIN, "-T", 30, "--class-conditional", "--out", tmp_path / "run")[0] == 0
    images = []
    for label in (0, 7):
        assert command("sample", tmp_path / "run", "-n", 2, "--class", label, "--out", tmp_path)[0] == 0
        images.append(np.load(tmp_path / "samples.npz")["images"])
    assert images[0].shape == (2, 1, 8, 8)
    code, _, error = command("sample", tmp_path / "run", "--class", 10, "--out", tmp_path)
    assert code == 2 and "--class must be in 0..9, got 10" in error


def test_class_of_an_unconditional_model(run, tmp_path, command):
    code, _, error = command("sample", run, "--class", 1, "--out", tmp_path)
    assert code == 2 and "not class-conditional" in error


def test_short_chain_is_pointed_out(tmp_path, command):
    code, text, _ = command(*TRAIN, "--schedule", "linear", "-T", 30, "--lr", 1e-3, "--out", tmp_path / "a")
    assert code == 0 and "note:" not in text  # betas scale with the chain's length
    code, text, _ = command(*TRAIN, "--schedule", "constant", "-T", 30, "--out", tmp_path / "b")
    assert code == 0 and "the chain leaves 0.74 of the data's variance" in text


def test_sample_with_ddim(run, tmp_path):
    result = invoke("sample", run, "--out", tmp_path, "-n", 2, "--sampler", "ddim", "--steps", 5)
    assert result.exit_code == 0 and (tmp_path / "samples.png").exists()


def test_eval_writes_table_and_picture(run, tmp_path):
    for terms, count in (([], 30), (["--terms", 6], 6)):
        result = invoke("eval", run, "--out", tmp_path, "--limit", 10, *terms)
        assert result.exit_code == 0, result.output
        table = json.loads((tmp_path / "bound.json").read_text())
        assert len(table["mean_term"]) == count and table["images"] == 10
        assert table["bits_per_dim"] == pytest.approx(np.dot(table["mean_term"], table["count_t"]) + table["prior"])
        assert (tmp_path / "bound.png").stat().st_size > 5000


def test_info():
    facts = json.loads(invoke("info", "--json").output)
    assert facts["ddpm_fast"] == ddpm_fast.__version__
    assert facts["ops"]["q_sample"]["backends"]["reference"] == "available"
    assert "q_sample" in invoke("info").output


def test_version():
    assert invoke("--version").output.strip() == ddpm_fast.__version__


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "--data", "nothing"], "unknown data 'nothing'"),
        (["train", "--schedule", "straight"], "schedule must be one of"),
        (["train", "--loss", "hybrid", "--variance", "fixed_small"], "hybrid"),
        (["sample", "nowhere"], "nowhere"),
        (["eval", "nowhere"], "nowhere"),
    ],
)
def test_errors_are_one_line_with_exit_code_2_and_leave_nothing(arguments, message, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    code, _, error = command(*arguments)
    assert code == 2
    assert message in error and len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_module_is_the_command(tmp_path):
    result = subprocess.run([sys.executable, "-m", "ddpm_fast", "sample", "nowhere"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and result.stderr.startswith("ddpm-fast: ") and "nowhere" in result.stderr


def test_a_run_is_not_overwritten_unasked(run, command):
    before = (run / "checkpoint.safetensors").read_bytes()
    code, _, error = command(*TRAIN, "--out", run)
    assert code == 2 and "already holds a run" in error
    assert (run / "checkpoint.safetensors").read_bytes() == before


def test_interrupted_training_keeps_what_it_has(tmp_path, monkeypatch, command):
    from ddpm_fast.training import Trainer

    step = Trainer.train_step

    def interrupted(self):
        if self.step == 2:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    code, text, _ = command(*TRAIN, "-T", 30, "--out", tmp_path)
    assert code == 130 and "stopped after step 2 of 3" in text
    assert (tmp_path / "checkpoint.safetensors").exists()


def test_data_of_another_shape_is_refused(run, tmp_path, command):
    np.save(tmp_path / "x.npy", np.zeros((8, 16, 16), np.uint8))
    code, _, error = command("eval", run, "--data", tmp_path / "x.npy")
    assert code == 2 and "trained on (1, 8, 8) with 17 levels" in error


def test_folder_with_an_unreadable_image_names_it(tmp_path, command):
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.fromarray(np.full((8, 8), 40 * i, np.uint8)).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"not a picture")
    code, _, error = command("train", "--data", tmp_path / "images", "--out", tmp_path / "run")
    assert code == 2 and "broken.png" in error
    assert not (tmp_path / "run").exists()


def test_unwritable_output_is_noticed_before_any_work(run, tmp_path, command):
    (tmp_path / "file").write_text("in the way")
    code, _, error = command("sample", run, "--out", tmp_path / "file" / "deeper")
    assert code == 2 and "file" in error and "sampling" not in error
