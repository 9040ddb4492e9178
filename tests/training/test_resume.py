"""A run that was stopped goes on as if it never had been, to the last bit, or says why it cannot."""

import itertools
import json
import os
import shutil
import signal
import time

import pytest
from numerics import assert_bits_equal
from tiny_training import TINY, config, images, rewrite

from ddpm_fast.io.signals import Terminated
from ddpm_fast.training import Trainer, load_data, load_trained
from ddpm_fast.training.checkpoint import CheckpointError, load_checkpoint

RUNS = {
    # Three t and 15 images: the warm-up ends within two steps, so that the history is at work on both sides of the stop.
    "vlb": dict(variance="learned_range", loss="vlb", timestep_sampler="loss_aware", timesteps=3, batch=15),
    "hybrid": dict(variance="learned_range", loss="hybrid", weight="p2", timestep_sampler="stratified", decay="cosine"),
    "everything random": dict(network={**TINY["network"], "dropout": 0.3}, flip=True, class_conditional=True, label_dropout=0.4),
    "bf16": dict(precision="bf16", timestep_sampler="loss_aware"),
}


def stop_after(step, error=KeyboardInterrupt):
    def report(progress):
        if progress.step == step:
            raise error

    return report


def assert_same_checkpoint(a, b):
    a, b = load_checkpoint(a), load_checkpoint(b)
    assert a.meta == b.meta and a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        assert_bits_equal(b.tensors[name], tensor, name)


@pytest.fixture
def stopped(tmp_path):
    """The folder of a run that was stopped after step 3 of 6, and a function that makes others like it."""

    def make(name="run", **changes):
        with pytest.raises(KeyboardInterrupt):
            Trainer(config(steps=6, **changes), images()).run(tmp_path / name, log_every=1, report=stop_after(3))
        return tmp_path / name

    return make


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_resumed_run_is_the_uninterrupted_one(stopped, tmp_path, changes):
    straight = Trainer(config(steps=6, **changes), images()).run(tmp_path / "straight", log_every=1)
    out = stopped(**changes)
    trainer = Trainer.restore(out, images())
    assert trainer.step == 3 and trainer.config == config(steps=6, **changes)
    if changes is RUNS["vlb"]:
        assert (trainer.timestep_sampler.seen == 10).all()
    lines = trainer.run(out, log_every=1)
    assert_same_checkpoint(tmp_path / "straight", out)
    for a, b in zip(straight, lines, strict=True):
        assert all(a[name] == b[name] for name in ("step", "loss", "grad_norm", "lr"))
    assert [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] == lines
    assert all(a["elapsed_s"] <= b["elapsed_s"] for a, b in itertools.pairwise(lines))


def test_finished_run_can_be_extended_where_the_learning_rate_allows_it(tmp_path):
    Trainer(config(steps=6), images()).run(tmp_path / "straight")
    Trainer(config(steps=3), images()).run(tmp_path / "run")
    finished = Trainer.restore(tmp_path / "run", images())
    assert finished.step == 3 and len(finished.run()) == 0
    Trainer.restore(tmp_path / "run", images(), steps=6).run(tmp_path / "run")
    assert_same_checkpoint(tmp_path / "straight", tmp_path / "run")


def test_lines_after_the_checkpoint_are_dropped_and_a_cut_one_too(tmp_path):
    with pytest.raises(OSError):  # a run that was killed after step 5, with the checkpoint of step 2
        Trainer(config(steps=6), images()).run(tmp_path, log_every=1, save_every=2, report=stop_after(3, OSError))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0.')
    lines = Trainer.restore(tmp_path, images()).run(tmp_path, log_every=2)
    assert [line["step"] for line in lines] == [1, 2, 4, 6]
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == lines
    # A new run into the folder begins a new file.
    assert [line["step"] for line in Trainer(config(steps=1), images()).run(tmp_path)] == [1]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_metrics_that_are_not_the_trainers_are_refused_before_any_step(stopped):
    out = stopped()
    text = "nothing\n" + (out / "metrics.jsonl").read_text()
    (out / "metrics.jsonl").write_text(text)
    trainer = Trainer.restore(out, images())
    with pytest.raises(ValueError, match="must have a step, a loss and elapsed_s in each line, got 'nothing' in line 1"):
        trainer.run(out)
    assert trainer.step == 3 and (out / "metrics.jsonl").read_text() == text


@pytest.fixture
def listening():
    """Ctrl-C interrupts, also where the tests were started in the background, whose processes ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listening")
def test_interruption_within_a_step_keeps_whole_steps(tmp_path):
    trainer = Trainer(config(steps=6, timestep_sampler="loss_aware"), images())
    update = trainer.ema.update

    def pressed(model):
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C between the optimiser's part of the step and the average's
        update(model)

    trainer.ema.update = pressed
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(tmp_path / "run")
    assert trainer.step == 3 and signal.getsignal(signal.SIGINT) is handler
    Trainer.restore(tmp_path / "run", images()).run(tmp_path / "run")
    Trainer(config(steps=6, timestep_sampler="loss_aware"), images()).run(tmp_path / "straight")
    assert_same_checkpoint(tmp_path / "straight", tmp_path / "run")


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves: a list of the time in seconds."""
    now = [0.0]

    def tick():
        now[0] += 1e-3
        return now[0]

    monkeypatch.setattr(time, "perf_counter", tick)
    return now


def minutes_a_step(clock, minutes, out, seen):
    def report(progress):
        clock[0] += 60 * minutes
        seen.append(load_checkpoint(out).meta["step"] if (out / "checkpoint.safetensors").exists() else 0)

    return report


@pytest.mark.parametrize(
    "options, seen",
    [
        ({}, [0, 0, 0, 4, 4, 6]),  # every ten minutes, at four between two steps; the last step always saves
        (dict(save_minutes=3), [0, 2, 3, 4, 5, 6]),
        (dict(save_minutes=None), [0, 0, 0, 0, 0, 6]),
        (dict(save_every=2), [0, 2, 2, 4, 4, 6]),
        (dict(save_every=4, save_minutes=None), [0, 0, 0, 4, 4, 6]),
    ],
    ids=str,
)
def test_checkpoints_by_time_and_by_number(tmp_path, clock, options, seen):
    steps = []
    Trainer(config(steps=6), images()).run(tmp_path, report=minutes_a_step(clock, 4, tmp_path, steps), **options)
    assert steps == seen


def test_a_killed_run_goes_on_from_the_last_checkpoint_by_time(tmp_path, clock):
    def killed(progress):  # the folder as kill -9 leaves it
        clock[0] += 240
        if progress.step == 5:
            shutil.copytree(tmp_path / "run", tmp_path / "killed")

    Trainer(config(steps=6), images()).run(tmp_path / "run", log_every=1, report=killed)
    trainer = Trainer.restore(tmp_path / "killed", images())
    assert trainer.step == 4
    trainer.run(tmp_path / "killed", log_every=1)
    assert_same_checkpoint(tmp_path / "run", tmp_path / "killed")


@pytest.mark.parametrize("name", ["log_every", "save_every", "save_minutes"])
def test_intervals_that_are_none(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        Trainer(config(), images()).run(tmp_path / "run", **{name: 0})
    assert not (tmp_path / "run").exists()


def test_sigterm_keeps_whole_steps_as_ctrl_c_does(tmp_path):
    trainer = Trainer(config(steps=6), images())
    update = trainer.ema.update

    def ended(model):
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        update(model)

    trainer.ema.update = ended
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated):
        trainer.run(tmp_path / "run")
    assert signal.getsignal(signal.SIGTERM) is before and load_trained(tmp_path / "run").step == 3
    Trainer.restore(tmp_path / "run", images()).run(tmp_path / "run")
    Trainer(config(steps=6), images()).run(tmp_path / "straight")
    assert_same_checkpoint(tmp_path / "straight", tmp_path / "run")


@pytest.mark.usefixtures("listening")
def test_a_second_signal_does_not_break_the_save(tmp_path, monkeypatch):
    trainer = Trainer(config(steps=6), images())
    save = trainer.save

    def pressed_again(out):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        return save(out)

    monkeypatch.setattr(trainer, "save", pressed_again)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(tmp_path, report=stop_after(3))
    assert load_trained(tmp_path).step == 3


def test_moved_data_are_recognised_by_the_images(tmp_path):
    import numpy as np

    pixels = images(40).train.numpy()
    for name in ("a", "moved"):
        np.save(tmp_path / f"{name}.npy", pixels)
    np.save(tmp_path / "others.npy", pixels[::-1].copy())
    options = dict(data=str(tmp_path / "a.npy"), levels=17, steps=4)
    Trainer(config(**options), load_data(tmp_path / "a.npy", levels=17)).run(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        Trainer(config(**options), load_data(tmp_path / "a.npy", levels=17)).run(tmp_path / "run", report=stop_after(2))
    (tmp_path / "a.npy").unlink()
    with pytest.raises(ValueError, match="images are no longer in .*a.npy; if they have moved, say where to"):
        Trainer.restore(tmp_path / "run")
    with pytest.raises(ValueError, match="others.npy must be the images that .* was trained on, got as many, but others"):
        Trainer.restore(tmp_path / "run", data=str(tmp_path / "others.npy"))
    trainer = Trainer.restore(tmp_path / "run", data=str(tmp_path / "moved.npy"))
    assert trainer.config.data == str(tmp_path / "moved.npy")
    trainer.run(tmp_path / "run")
    a, b = (load_checkpoint(tmp_path / name) for name in ("straight", "run"))
    for name, tensor in a.tensors.items():
        assert_bits_equal(b.tensors[name], tensor, name)


def test_labels_are_of_the_images_where_the_network_is_given_them(tmp_path):
    data = images()
    other = type(data)("tiny", data.train, data.test, 17, data.train_labels.flip(0), data.test_labels)
    for conditional in (False, True):
        Trainer(config(class_conditional=conditional), data).save(tmp_path)
        assert Trainer.restore(tmp_path, data).step == 0
        if conditional:
            with pytest.raises(ValueError, match="got as many, but others"):
                Trainer.restore(tmp_path, other)
        else:
            Trainer.restore(tmp_path, other)


def test_interruption_after_the_last_step_keeps_it(tmp_path, monkeypatch):
    trainer = Trainer(config(steps=2), images())

    def pressed(*_):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "save", pressed)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(tmp_path)
    assert load_trained(tmp_path).step == 2


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folder of one run, which stands at step 3 of 6."""
    trainer = Trainer(config(steps=6, timestep_sampler="loss_aware"), images())
    for _ in range(3):
        trainer.train_step()
    out = tmp_path_factory.mktemp("kept")
    trainer.save(out)
    return out


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors, meta: tensors.pop("timesteps.losses"), "the checkpoint does not fit the timestep_sampler 'loss_aware'"),
        (
            lambda tensors, meta: [tensors.pop(f"timesteps.{name}") for name in ("losses", "seen")],
            "has no state of its timestep_sampler 'loss_aware' and cannot be resumed",
        ),
        (lambda tensors, meta: meta.pop("optimizer"), "can be sampled from but not resumed: it has no optimizer"),
        (lambda tensors, meta: tensors.pop("optimizer.3.exp_avg"), "optimizer's state must be that of .* parameters, got other"),
        (
            lambda tensors, meta: meta["optimizer"].update(groups=[]),
            "cannot rebuild: its optimizer must be Adam with betas .* in one parameter group, got betas",
        ),
        (lambda tensors, meta: tensors.pop("ema.conv_in.weight"), r"does not fit the network \(ema weights .* 1 missing: conv_in.weight"),
        (lambda tensors, meta: tensors.pop("model.conv_in.weight"), "does not fit the network"),
        (lambda tensors, meta: meta["network"].update(dropout=0.5), "its network must have dropout 0.5, got 0.1"),
    ],
)
def test_incomplete_checkpoint(kept, tmp_path, change, message):
    rewrite(kept, tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        Trainer.restore(tmp_path, images())


@pytest.mark.parametrize(
    "changes, data, message",
    [
        (dict(steps=2), images(), "steps must be at least the 3 that are done, got 2"),
        (dict(batch=32, seed=7), images(), "a run goes on as it began: batch must be 8, got 32, seed must be 0, got 7"),
        (dict(network={"dropout": 0.5}), images(), "network dropout must be 0.1, got 0.5"),
        ({}, images(channels=3), r"must be the 24 images of \(1, 8, 8\) with 17 levels that .*, got 24 images of \(3, 8, 8\)"),
        ({}, images(n=30), "got 30 images of"),
        ({}, images(levels=5), "got 24 images of .* with 5"),
        (dict(device="cuda:99"), images(), "device 'cuda:99' is not there"),
    ],
)
def test_what_a_resumed_run_may_not_change(kept, changes, data, message):
    with pytest.raises(ValueError, match=message):
        Trainer.restore(kept, data, **changes)


def test_decayed_learning_rate_does_not_go_on_beyond_its_end(stopped):
    out = stopped(decay="cosine")
    with pytest.raises(ValueError, match="steps must be 6, got 9: the learning rate follows a cosine to zero at step 6"):
        Trainer.restore(out, images(), steps=9)
    same = Trainer.restore(out, images(), steps=6, batch=8, network={"dropout": 0.1}, device="cpu")
    assert same.config.steps == 6 and same.config.device == "cpu"


def test_data_are_loaded_as_the_configuration_says(tmp_path):
    Trainer(config(steps=1, data="digits"), load_data("digits")).save(tmp_path)
    assert Trainer.restore(tmp_path).data.name == "digits"


def test_optimizer_state_is_laid_out_like_its_parameters(kept):
    # The fused kernel walks both in memory order: rows of a file beside channels_last weights would be mixed up.
    trainer = Trainer.restore(kept, images())
    for parameter, state in trainer.optimizer.state.items():
        assert state["exp_avg"].stride() == parameter.stride() == state["exp_avg_sq"].stride()
    assert any(not p.is_contiguous() for p in trainer.model.parameters())
