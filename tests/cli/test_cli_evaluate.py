"""``ddpm-fast eval`` as a user types it: its files, an interruption, samples, and what it refuses."""

import contextlib
import csv
import json
import threading

import numpy as np
import pytest
import torch
from played_ranks import play

from ddpm_fast.models import UNet
from ddpm_fast.training import load_data, load_trained
from ddpm_fast.training.checkpoint import load_checkpoint, save_checkpoint

FILES = ["bound.csv", "bound.json", "bound.png", "rate_distortion.csv", "rate_distortion.png"]


@pytest.fixture(autouse=True)
def own_threads():
    """--threads is of the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_bound_as_table_and_picture(run, tmp_path, command):
    (tmp_path / ".bound.png.0a.tmp").mkdir()  # left by a run that was killed
    code, text, error = command("eval", run, "--out", tmp_path, "--limit", 10, "--terms", 6)
    assert code == 0 and error.startswith("evaluating: 6 in")
    assert names(tmp_path) == FILES
    summary = json.loads((tmp_path / "bound.json").read_text())
    assert f"{summary['bits_per_dim']:.3f} ± {summary['standard_error']:.3f}" in text
    for part, digits in (("decoder", 4), ("divergence", 4)):
        assert f"{summary[part]:.{digits}f} ± {summary[part + '_standard_error']:.{digits}f}" in text
    with (tmp_path / "bound.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["count_t"]) for row in rows) == 30 and summary["estimated"] is True and summary["images"] == 10
    total = sum(int(row["count_t"]) * float(row["mean_term"]) for row in rows) + summary["prior"]
    assert total == pytest.approx(summary["bits_per_dim"])


def test_bf16_is_near_fp32_and_a_computation_of_its_own(run, tmp_path, monkeypatch, command):
    """The network ran in it, and what one precision has left the other does not go on with."""
    seen, forward = [], UNet.forward

    def watched(self, x, *arguments, **options):
        out = forward(self, x, *arguments, **options)
        seen.append(out.dtype)
        return out

    monkeypatch.setattr(UNet, "forward", watched)
    bounds = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        seen.clear()
        arguments = ("--out", tmp_path / precision, "--limit", 4, "--terms", 4, "--precision", precision)
        assert command("eval", run, *arguments)[0] == 0
        assert set(seen) == {dtype}
        bounds[precision] = json.loads((tmp_path / precision / "bound.json").read_text())["bits_per_dim"]
    # bf16 has 8 bits: an output is off by some of its 256ths, and a term by twice as much of itself.
    assert bounds["fp32"] != bounds["bf16"] == pytest.approx(bounds["fp32"], rel=0.1)
    code, _, error = command("eval", run, "--out", tmp_path / "bad", "--precision", "fp64")
    assert code == 2 and error.strip() == "ddpm-fast: --precision must be one of fp32, bf16, got 'fp64'"


def test_as_many_terms_as_there_are_is_no_estimate(run, tmp_path, command):
    assert command("eval", run, "--out", tmp_path, "--limit", 2, "--terms", 99)[0] == 0
    assert json.loads((tmp_path / "bound.json").read_text())["estimated"] is False


@pytest.mark.parametrize(
    "change, told",
    [(dict(prediction="v"), "prediction 'epsilon', not 'v'"), (dict(schedule_options=dict(beta_start=0.02, beta_end=0.6)), "betas '")],
)
def test_the_same_weights_of_another_chain_are_another_computation(run, tmp_path, monkeypatch, command, change, told):
    """Half of a bound and of the samples is there; what would go on with it was trained for another diffusion."""
    checkpoint = load_checkpoint(run)
    checkpoint.meta["train"].update(change)
    save_checkpoint(tmp_path / "other", checkpoint.tensors, checkpoint.meta)
    assert command("sample", run, "-n", 2, "--steps", 2, "--out", tmp_path / "samples")[0] == 0
    code, _, error = command("sample", tmp_path / "other", "-n", 4, "--steps", 2, "--out", tmp_path / "samples")
    assert code == 2 and f"other settings ({told}" in error
    settings = load_trained(run).settings
    assert json.loads(json.dumps(settings)).keys() == {"checkpoint", "network", "betas", "prediction", "variance", "levels", "cdf"}
    changed = load_trained(tmp_path / "other").settings
    assert [name for name in settings if settings[name] != changed[name]] == [told.split()[0]]


@pytest.mark.slow
def test_interrupted_it_goes_on_to_the_same_files(run, tmp_path, monkeypatch, command):
    arguments = ["eval", run, "--limit", 10, "--terms", 5, "--batch", 4]
    forward, calls = UNet.forward, []

    def interrupted(self, *inputs):
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return forward(self, *inputs)

    with monkeypatch.context() as patch:
        patch.setattr(UNet, "forward", interrupted)
        code, text, _ = command(*arguments, "--out", tmp_path / "a")
    folder = tmp_path / "a" / "bound.parts"
    assert code == 130 and text == f"stopped with 8 of 10 images done, which are in {folder}; the same command goes on from there\n"
    assert names(tmp_path / "a") == ["bound.parts"]
    code, _, error = command(*arguments, "--out", tmp_path / "a", "--seed", 1)
    assert code == 2 and "another run (seed 0, not 1)" in error and len(error.splitlines()) == 1
    code, text, error = command(*arguments, "--out", tmp_path / "a")
    assert code == 0 and text.startswith(f"8 of 10 images are done already, in {folder}\n") and "evaluating: 5 in" in error
    assert command(*arguments, "--out", tmp_path / "b")[0] == 0
    assert names(tmp_path / "a") == FILES
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.slow
def test_ranks_write_the_same_and_only_the_first_speaks(run, tmp_path, monkeypatch, command, capfd):
    from ddpm_fast.cli.evaluate import evaluate
    from ddpm_fast.io import ranks

    options = dict(
        data=None, no_bound=False, terms=3, limit=10, batch=5, clip=True, samples=None, features=None, inception_weights=None,
        reference="train", device="cpu", threads=None, seed=0,
    )  # fmt: skip
    mine = threading.local()
    mine.ranks = ranks.Ranks()  # of this thread, which is alone
    monkeypatch.setattr(ranks, "launched_ranks", lambda: contextlib.nullcontext(mine.ranks))

    def act(played):
        mine.ranks = played
        evaluate(run, out=tmp_path / "two", **options)

    outcome = play(2, act)
    written = capfd.readouterr()
    assert outcome == [None, None] and written.out.count("bound (bits/dim)") == 1 and written.err.count("evaluating") == 1
    code, _, _ = command("eval", run, "--out", tmp_path / "one", "--limit", 10, "--terms", 3, "--batch", 5)
    assert code == 0 and names(tmp_path / "two") == FILES
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_samples_beside_real_images(run, tmp_path, command):
    np.savez(tmp_path / "samples.npz", images=load_data("digits").test[:30].numpy())
    code, text, _ = command("eval", run, "--out", tmp_path / "out", "--no-bound", "--samples", tmp_path / "samples.npz", "--threads", 1)
    assert code == 0 and names(tmp_path / "out") == ["quality.json"]
    assert "digits features, against the 1437 images for training" in text and "precision" in text and "real (test)" in text
    found = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert found["reference_images"] == 1437 and found["features"] == "digits" and [row["images"] for row in found["rows"]] == [30, 30]
    assert f"{found['rows'][0]['fid']:.4g}" in text


def test_both_at_once_on_features_of_ones_own(run, tmp_path, monkeypatch, command):
    (tmp_path / "own_features_for_eval.py").write_text("def rows(images):\n    return images.flatten(1)[:, :5]\n")
    np.savez(tmp_path / "x.npz", images=load_data("digits").test[:8].numpy())
    monkeypatch.chdir(tmp_path)
    code, text, _ = command(
        "eval", run, "--out", "out", "--limit", 4, "--terms", 2, "--threads", 1,
        "--samples", "x.npz", "--features", "own_features_for_eval:rows", "--reference", "test",
    )  # fmt: skip
    assert code == 0 and names(tmp_path / "out") == sorted([*FILES, "quality.json"])
    assert "against the 360 images for testing" in text and "bound (bits/dim)" in text and "real (train)" in text


def test_quality_of_a_small_set_does_not_blame_the_samples(run, tmp_path, command):
    pixels = np.random.default_rng(0).integers(0, 17, (20, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "samples.npz", images=pixels)
    for name, count, options, message in (
        ("few", 20, [], "few.npy has too few other images to show what real ones would get"),  # 2 of 20 for testing
        (
            "fewer",
            3,
            ["--reference", "test"],
            "fewer.npy must have at least 4 images for test to compare samples with, got 3",
        ),  # all of them
    ):
        np.save(tmp_path / f"{name}.npy", pixels[:count])
        arguments = ["--data", tmp_path / f"{name}.npy", "--features", "digits", "--no-bound", "--threads", 1, *options]
        code, text, error = command("eval", run, "--samples", tmp_path / "samples.npz", *arguments, "--out", tmp_path / "out")
        assert (code == 0) == (not options) and message in " ".join((text + error).split()), error
    assert [row["name"] for row in json.loads((tmp_path / "out" / "quality.json").read_text())["rows"]] == ["samples"]
    np.savez(tmp_path / "samples.npz", images=pixels[:3])
    code, _, error = command("eval", run, "--no-bound", "--samples", tmp_path / "samples.npz", "--out", tmp_path / "out")
    assert code == 2 and "--samples must be at least 4 images, got 3" in error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--no-bound"], "go with --samples, which is missing"),
        (["--features", "digits"], "go with --samples, which is missing"),
        (["--samples", "nowhere.npz"], "no such file or folder: nowhere.npz"),
        (["--samples", "{run}/loss.png"], "--samples must be a folder of images, a .npz or a .npy file, got "),
        (["--samples", "{samples}", "--features", "nothing"], "must be digits, inception or package.module:attribute, got 'nothing'"),
        (["--samples", "{samples}", "--reference", "all"], "--reference must be one of train, test, got 'all'"),
        (["--samples", "{samples}", "--inception-weights", "w.pth"], "Inception's weights go with the --features 'inception'"),
    ],
)
def test_what_cannot_be_done_is_one_line_before_any_work(run, tmp_path, command, monkeypatch, arguments, message):
    monkeypatch.setattr(UNet, "forward", None)
    np.savez(tmp_path / "samples.npz", images=load_data("digits").test[:8].numpy())
    filled = [argument.format(run=run, samples=tmp_path / "samples.npz") for argument in arguments]
    code, _, error = command("eval", run, "--out", tmp_path / "out", *filled)
    assert code == 2 and message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists() or names(tmp_path / "out") == []
