"""A run that was stopped goes on as if it never had been, to the last bit, or says why it cannot."""
import itertools
import json
import os
import signal

import pytest
from numerics import assert_bits_equal
from test_trainer import TINY, config, images

from ddpm_fast.training import Trainer, load_data, load_trained
from ddpm_fast.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

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


def test_interruption_after_the_last_step_keeps_it(tmp_path, monkeypatch):
    trainer = Trainer(config(steps=2), images())

    def pressed(*_):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "save", pressed)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(tmp_path)
    assert load_trained(tmp_path).step == 2


def rewrite(run, out, change):
    """Into another folder, the checkpoint of a run with something in it changed: change(tensors, meta)."""
    checkpoint = load_checkpoint(run)
    change(checkpoint.tensors, checkpoint.meta)
    save_checkpoint(out, checkpoint.tensors, checkpoint.meta)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folder of one run, which stands at step 3 of 6."""
    trainer = Trainer(config(steps=6, timestep_sampler="loss_aware"), images())
    for _ in range(3):
        trainer.train_step()
    out = tmp_path_factory.mktemp("kept")
    trainer.save(out)
    return out


def test_checkpoint_of_the_first_version_goes_on(stopped, tmp_path):
    changes = dict(timestep_sampler="stratified")
    out = stopped(**changes)

    def as_it_was(tensors, meta):
        del meta["train"]["timestep_sampler"], meta["images"]
        meta["train"]["stratified"] = True

    rewrite(out, out, as_it_was)
    assert load_trained(out).config.timestep_sampler == "stratified"
    Trainer.restore(out, images()).run(out)
    Trainer(config(steps=6, **changes), images()).run(tmp_path / "straight")
    assert_same_checkpoint(tmp_path / "straight", out)


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
        (lambda tensors, meta: meta["optimizer"].update(groups=[]), "cannot rebuild: its optimizer must be Adam with betas .* in one parameter group, got betas"),
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
