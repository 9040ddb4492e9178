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
from ddpm_fast.training import TrainConfig
from ddpm_fast.training.trained import load_run

TRAIN = ["train", "--data", "digits", "--steps", "3", "--batch", "8", "--log-every", "1"]


def unwrapped(text):
    """Without the line breaks of an 80-column console."""
    return " ".join(text.split())


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def test_train_writes_a_whole_run(run):
    assert sorted(p.name for p in run.iterdir()) == ["checkpoint.json", "checkpoint.safetensors", "loss.png", "metrics.jsonl"]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    meta = json.loads((run / "checkpoint.json").read_text())
    assert "digits" in json.dumps(meta)


def test_samples_in_bf16_are_near_those_in_fp32(run, tmp_path, command):
    images = {}
    for precision in ("fp32", "bf16"):
        arguments = ("--count", 4, "--steps", 3, "--formats", "npz", "--precision", precision)
        assert command("sample", run, "--out", tmp_path / precision, *arguments)[0] == 0
        with np.load(tmp_path / precision / "samples.npz") as file:
            images[precision] = file["images"].astype(int)
    difference = abs(images["fp32"] - images["bf16"])
    assert difference.max() > 0 and difference.mean() < 17 / 4
    code, _, error = command("sample", run, "--out", tmp_path / "fp32", *arguments)
    assert code == 2 and "holds images of other settings (--precision 'fp32', not 'bf16')" in error


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
    for name, options in (("a", ["--class", 0]), ("b", ["--class", "each", "--guidance", 2])):
        assert command("sample", tmp_path / "run", "-n", 12, *options, "--steps", 3, "--out", tmp_path / name)[0] == 0
        images.append(np.load(tmp_path / name / "samples.npz"))
    assert images[0]["images"].shape == (12, 1, 8, 8)
    assert images[0]["labels"].tolist() == [0] * 12 and images[1]["labels"].tolist() == [*range(10), 0, 1]
    for options, message in (
        (["--class", 10], "--class must be 'each' or in 0..9, got 10"),
        (["--guidance", 2], "--guidance needs --class"),
    ):
        code, _, error = command("sample", tmp_path / "run", *options, "--out", tmp_path / "c")
        assert code == 2 and message in error and not (tmp_path / "c").exists()


def test_class_of_an_unconditional_model(run, tmp_path, command):
    code, _, error = command("sample", run, "--class", 1, "--out", tmp_path)
    assert code == 2 and "not class-conditional" in error


def test_short_chain_is_pointed_out(tmp_path, command):
    code, text, _ = command(*TRAIN, "--schedule", "linear", "-T", 30, "--lr", 1e-3, "--out", tmp_path / "a")
    assert code == 0 and "note:" not in text  # betas scale with the chain's length
    code, text, _ = command(*TRAIN, "--schedule", "constant", "-T", 30, "--out", tmp_path / "b")
    assert code == 0 and "the chain leaves 0.74 of the data's variance" in text


@pytest.mark.parametrize(
    "options",
    [
        ["--sampler", "ddim", "--steps", 5],
        ["--sampler", "dpmpp_2m", "--steps", 5, "--spacing", "logsnr"],
        ["--steps", "0,7,29", "--threshold", 0.9],
    ],
    ids=str,
)
def test_sample_with_few_steps(options, run, tmp_path):
    result = invoke("sample", run, "--out", tmp_path, "-n", 3, "--progressive", "--formats", "png, grid", *options)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "progressive.png", "samples.json", "samples.png"]
    assert [path.name for path in sorted((tmp_path / "images").iterdir())] == [f"{i:08}.png" for i in range(3)]


def test_more_samples_of_the_same_command_are_added(run, tmp_path, command, monkeypatch):
    options = ["sample", run, "--steps", 3, "--out", tmp_path / "a", "--batch", 2]
    assert command(*options, "-n", 4)[0] == 0
    assert command(*options, "-n", 5)[0] == 0
    assert command("sample", run, "--steps", 3, "--out", tmp_path / "b", "-n", 5)[0] == 0
    a, b = (np.load(tmp_path / name / "samples.npz")["images"].astype(int) for name in "ab")
    assert a.shape == b.shape and np.abs(a - b).max() <= 1
    code, _, error = command(*options, "-n", 5, "--seed", 1)
    assert code == 2 and "holds images of other settings (seed 0, not 1)" in error and len(error.strip().splitlines()) == 1
    assert command(*options, "-n", 5, "--seed", 1, "--overwrite")[0] == 0
    assert (np.load(tmp_path / "a" / "samples.npz")["images"] != a).any()


def test_interrupted_sampling_goes_on(run, tmp_path, command, monkeypatch):
    from ddpm_fast.sampling import Sampler

    call, calls = Sampler.__call__, []

    def interrupted(self, *arguments, **options):
        calls.append(options["first_sample"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return call(self, *arguments, **options)

    monkeypatch.setattr(Sampler, "__call__", interrupted)
    options = ["sample", run, "--steps", 3, "--out", tmp_path, "--batch", 2, "-n", 4]
    code, text, _ = command(*options)
    assert code == 130 and "the same command goes on from there" in text
    assert command(*options)[0] == 0
    assert calls == [0, 2, 2] and len(np.load(tmp_path / "samples.npz")["images"]) == 4


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
    assert facts["autotuning"] == "on"
    with ddpm_fast.autotune.disabled():
        assert "autotuning      off: switched off" in invoke("info").output


def test_version():
    assert invoke("--version").output.strip() == ddpm_fast.__version__


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "--data", "nothing"], "unknown --data 'nothing'"),
        (["train", "--schedule", "straight"], "schedule must be one of"),
        (["train", "--loss", "hybrid", "--variance", "fixed_small"], "hybrid"),
        (["train", "--timestep-sampler", "importance"], "--timestep-sampler must be one of uniform, stratified, loss_aware, got"),
        (["sample", "nowhere"], "nowhere"),
        (["sample", "nowhere", "--steps", "few"], "--steps must be a number or a list such as 0,10,50, got 'few'"),
        (["eval", "nowhere"], "nowhere"),
    ],
)
def test_errors_are_one_line_with_exit_code_2_and_leave_nothing(arguments, message, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    code, _, error = command(*arguments)
    assert code == 2
    assert message in error and len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_module_is_the_command(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "ddpm_fast", "sample", "nowhere"], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 2 and result.stderr.startswith("ddpm-fast: ") and "nowhere" in result.stderr


def test_a_run_is_not_overwritten_unasked(run, command):
    before = (run / "checkpoint.safetensors").read_bytes()
    code, _, error = command(*TRAIN, "--out", run)
    assert code == 2 and "already holds a run" in error
    assert (run / "checkpoint.safetensors").read_bytes() == before


@pytest.mark.parametrize("loss", ["hybrid", "vlb"])
@pytest.mark.parametrize("data", ["digits", "photos", "folder"])
def test_learned_variance_trains_on_any_data(data, loss, tmp_path, command):
    if data == "folder":
        data = tmp_path / "images"
        data.mkdir()
        for i in range(4):
            Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(data / f"{i}.png")
    small = ["--steps", 1, "--batch", 2, "--preset", "digits"]  # a small network: 35 million parameters take a while to initialise
    code, _, error = command("train", "--data", data, "--variance", "learned_range", "--loss", loss, *small, "--out", tmp_path / "run")
    assert code == 0, error
    config = json.loads((tmp_path / "run" / "checkpoint.json").read_text())["meta"]["train"]
    usual = "stratified" if data == "digits" else "uniform"
    assert config["loss"] == loss and config["timestep_sampler"] == ("loss_aware" if loss == "vlb" else usual)


@pytest.mark.parametrize("data", ["digits", "photos"])
def test_the_library_s_recipe_is_the_command_s(data, tmp_path, command):
    options = ["--variance", "fixed_large", "--steps", 1, "--batch", 2, "--preset", "digits", "--device", "cpu"]
    code, _, error = command("train", "--data", data, *options, "--out", tmp_path)
    assert code == 0, error
    same = TrainConfig.for_data(data, variance="fixed_large", steps=1, batch=2, preset="digits", device="cpu")
    assert load_run(tmp_path)[1] == same and same.loss == "simple"


@pytest.fixture
def stopped(tmp_path, monkeypatch, command):
    """Stops the run of these further options after step 2 of 4, and gives its folder."""
    from ddpm_fast.training import Trainer

    def make(*options):
        step = Trainer.train_step

        def interrupted(self):
            if self.step == 2:
                raise KeyboardInterrupt
            return step(self)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train_step", interrupted)
            code, text, _ = command(*TRAIN, "-T", 30, "--steps", 4, *options, "--out", tmp_path / "run")
        assert code == 130 and "--resume goes on from there" in unwrapped(text)
        return tmp_path / "run"

    return make


def test_resume_goes_on_with_the_run_and_says_when_it_is_finished(stopped, command):
    out = stopped("--timestep-sampler", "loss_aware", "--dropout", 0.2)
    assert not (out / "loss.png").exists()
    # From the folder alone; repeating an option as it was is no contradiction.
    code, text, error = command("train", "--resume", "--out", out, "--log-every", 1, "--batch", 8, "--dropout", 0.2, "--data", "digits")
    assert code == 0 and "going on after step 2 of 4" in text, error
    lines = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4] and (out / "loss.png").exists()
    before = (out / "checkpoint.safetensors").read_bytes()
    code, text, _ = command("train", "--resume", "--out", out)
    assert code == 0 and unwrapped(text).endswith("is finished: 4 of 4 steps are done")  # no --steps: its cosine ends here
    assert (out / "checkpoint.safetensors").read_bytes() == before


def test_resume_refuses_what_contradicts_the_run(stopped, tmp_path, command):
    out = stopped()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for options, message in (
        (["--batch", 32], "batch must be 8, got 32"),
        (["--seed", 1], "seed must be 0, got 1"),
        (["--data", "photos", "--no-flip", "--lr", 0.5], "a run goes on as it began: --lr must be 0.003, got 0.5"),
        (["--data", "photos"], "photos must be the 1437 images of (1, 8, 8) with 17 levels that"),
        (["--dropout", 0.5], "--dropout must be 0.0, got 0.5"),
        (["--timestep-sampler", "uniform"], "--timestep-sampler must be 'stratified', got 'uniform'"),
        (["--steps", 9], "--steps must be 4, got 9: the learning rate follows a cosine"),
        (["--overwrite"], "--resume goes on with a run and --overwrite removes it; give one of them"),
    ):
        code, _, error = command("train", "--resume", "--out", out, *options)
        assert code == 2 and message in error and len(error.strip().splitlines()) == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    code, _, error = command("train", "--resume", "--out", tmp_path / "nowhere")
    assert code == 2 and "no checkpoint at" in error and not (tmp_path / "nowhere").exists()


def test_resume_extends_a_run_of_constant_learning_rate(tmp_path, command):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (8, 8, 8), dtype=np.uint8))
    small = ["--data", tmp_path / "x.npy", "--preset", "digits", "--batch", 2, "--log-every", 1]
    assert command("train", *small, "--steps", 1, "--out", tmp_path / "run")[0] == 0
    text = command("train", "--resume", "--out", tmp_path / "run")[1]
    assert "is finished: 1 of 1 steps are done; --steps goes further" in unwrapped(text)
    code, text, error = command("train", "--resume", "--steps", 2, "--out", tmp_path / "run")
    assert code == 0 and "going on after step 1 of 2" in text, error
    meta = json.loads((tmp_path / "run" / "checkpoint.json").read_text())["meta"]
    assert meta["step"] == 2 and meta["train"]["steps"] == 2


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
