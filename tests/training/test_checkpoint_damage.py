"""Damaged and doctored checkpoints: a sentence, or no effect on what is loaded; and nothing large is made before sizes are compared."""

import json
import random
import shutil

import pytest
import torch
from numerics import assert_bits_equal
from tiny_training import config, images, rewrite

from ddpm_fast.diffusion.schedules import NoiseSchedule
from ddpm_fast.training import Trainer, load_trained
from ddpm_fast.training.checkpoint import CheckpointError, load_checkpoint

FLIPS = 200


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run at step 2 of 6."""
    trainer = Trainer(config(steps=6, timestep_sampler="loss_aware"), images())
    for _ in range(2):
        trainer.train_step()
    out = tmp_path_factory.mktemp("run")
    trainer.save(out)
    return out


def regions(run):
    """(file, first byte, last byte) of all that a checkpoint is."""
    path = run / "checkpoint.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found = {
        "length": (path, 0, 8),
        "header": (path, 8, start),
        "json": (run / "checkpoint.json", 0, (run / "checkpoint.json").stat().st_size),
    }
    entries = json.loads(data[8:start])
    for part in ("model", "ema", "optimizer", "timesteps"):
        offsets = [entry["data_offsets"] for name, entry in entries.items() if name.startswith(f"{part}.")]
        found[part] = path, start + min(first for first, _ in offsets), start + max(last for _, last in offsets)
    return found


@pytest.mark.slow
def test_a_flipped_bit_is_noticed_or_has_no_effect(run, tmp_path):
    random_, places, whole = random.Random(0), regions(run), load_checkpoint(run)
    files = {path.name: path.read_bytes() for path in run.iterdir()}
    kinds, refused = list(places), dict.fromkeys(places, 0)
    for flip in range(FLIPS):
        kind = kinds[flip % len(kinds)]
        path, first, last = places[kind]
        at, bit = random_.randrange(first, last), 1 << random_.randrange(8)
        damaged = bytearray(files[path.name])
        damaged[at] ^= bit
        for name, content in files.items():
            (tmp_path / name).write_bytes(damaged if name == path.name else content)
        try:
            found = load_checkpoint(tmp_path)
        except CheckpointError as error:
            assert len(str(error).splitlines()) == 1 and path.name in str(error)
            refused[kind] += 1
        else:
            assert found.meta == whole.meta and found.tensors.keys() == whole.tensors.keys(), (kind, at, bit)
            for name, tensor in whole.tensors.items():
                assert_bits_equal(found.tensors[name], tensor, (kind, at, bit, name))
    for kind in ("model", "ema", "optimizer", "timesteps", "length"):
        assert refused[kind] == sum(kinds[flip % len(kinds)] == kind for flip in range(FLIPS)), refused


@pytest.mark.parametrize("kind", ["model", "ema", "optimizer", "timesteps"])
def test_without_the_json_too(run, tmp_path, kind):
    path, first, last = regions(run)[kind]
    damaged = bytearray(path.read_bytes())
    damaged[(first + last) // 2] ^= 1
    (tmp_path / path.name).write_bytes(damaged)
    for load in (load_trained, lambda folder: Trainer.restore(folder, images())):
        with pytest.raises(CheckpointError, match="checkpoint.safetensors is damaged: its checksum must be [0-9a-f]{8}, got [0-9a-f]{8}"):
            load(tmp_path)


HUGE = 10**9


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda meta: meta["network"].update(base_channels=HUGE), "cannot rebuild|of another shape"),
        (lambda meta: meta["network"].update(num_blocks=HUGE), "its network has 1000000000 blocks, but 70 weights"),
        (lambda meta: meta["network"].update(channel_mult=[1] * 10**6), "its network has 1000000 blocks, but 70 weights"),
        (lambda meta: meta["network"].update(channel_mult=[HUGE]), "cannot rebuild|of another shape"),
        (lambda meta: meta["network"].update(in_channels=HUGE), "cannot rebuild|of another shape"),
        (lambda meta: meta["network"].update(num_classes=HUGE), "1 missing: label_embedding.weight"),
        (lambda meta: meta["network"].update(num_heads=HUGE), "cannot rebuild"),
        (lambda meta: meta["network"].update(base_channels=None), "cannot rebuild"),
        (lambda meta: meta["network"].pop("channel_mult"), "cannot rebuild"),
        (lambda meta: meta.update(network=[]), "cannot rebuild"),
        (lambda meta: meta.update(image_shape=[1, HUGE, HUGE]), "image_shape must be three sizes, got"),
        (lambda meta: meta.update(image_shape=[3, 8, 8]), "its network does not take images of shape"),
        (lambda meta: meta.update(image_shape=8), "image_shape must be three sizes, got 8"),
        (lambda meta: meta.update(levels=HUGE), "levels must be in 2..256, got 1000000000"),
        (lambda meta: meta.update(step="3"), "step must be an integer from 0, got '3'"),
        (lambda meta: meta["train"].update(timesteps=HUGE), "timesteps must be at most 1000000, got 1000000000"),
        (lambda meta: meta["train"].update(batch=HUGE), "batch must be at most 1000000, got 1000000000"),
        (lambda meta: meta["train"].update(steps="many"), "steps must be int, got 'many'"),
        (lambda meta: meta["train"].update(data=None), "data must be str, got None"),
        (lambda meta: meta["train"].update(schedule_options=[1]), r"schedule_options must be dict, got \(1,\)"),
        (lambda meta: meta.update(train=None), "cannot rebuild"),
        (lambda meta: meta.update(fingerprints=7), "images and fingerprints must be a number and two hashes, got 24 and 7"),
        (lambda meta: meta.update(images=None), "images and fingerprints must be a number and two hashes, got None"),
        (lambda meta: meta.pop("fingerprints"), "is a ddpm_fast checkpoint but not of a training run: it has no fingerprints"),
    ],
)
def test_sizes_and_types_are_compared_before_anything_is_built(run, tmp_path, monkeypatch, change, message):
    rewrite(run, tmp_path, lambda tensors, meta: change(meta))
    monkeypatch.setattr(torch.nn.Module, "to_empty", None)
    monkeypatch.setattr(NoiseSchedule, "from_name", None)
    for load in (load_trained, lambda folder: Trainer.restore(folder, images())):
        with pytest.raises(CheckpointError, match=message) as caught:
            load(tmp_path)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda tensors, meta: meta["train"]["network"].update(base_channels=HUGE),
            "its network must have base_channels 8, got 1000000000",
        ),
        (lambda tensors, meta: meta["train"]["network"].update(num_blocks=HUGE), "its network must have num_blocks 1, got 1000000000"),
        (lambda tensors, meta: meta.update(optimizer="adam"), "cannot rebuild"),
        (lambda tensors, meta: meta.update(optimizer=[1]), "cannot rebuild"),
        (lambda tensors, meta: meta.update(optimizer=None), "cannot rebuild"),
        (lambda tensors, meta: meta["optimizer"].update(groups=[1]), "cannot rebuild"),
        (lambda tensors, meta: meta["optimizer"]["groups"][0].update(betas=0.9), "its optimizer must be Adam with betas .*, got betas 0.9"),
        (
            lambda tensors, meta: meta["optimizer"]["groups"][0].update(amsgrad=True),
            "its optimizer must be Adam with amsgrad False in .*, got amsgrad True",
        ),
        (
            lambda tensors, meta: tensors.update({"optimizer.0.exp_avg": tensors["optimizer.0.exp_avg"].long()}),
            "state must be float32, got torch.int64",
        ),
        (lambda tensors, meta: tensors.update({"optimizer.x.exp_avg": torch.zeros(1)}), "got other tensors"),
        (lambda tensors, meta: tensors.update({"optimizer.0.max_exp_avg_sq": tensors["optimizer.0.exp_avg"]}), "got other tensors"),
        (lambda tensors, meta: meta.update(ema_updates="few"), "cannot rebuild"),
        (lambda tensors, meta: meta["fingerprints"].update(test="0"), "must be the images that"),
    ],
)
def test_a_state_of_another_kind_cannot_be_resumed(run, tmp_path, change, message):
    rewrite(run, tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        Trainer.restore(tmp_path, images())
    assert len(str(caught.value).splitlines()) == 1


def test_state_of_another_optimizer_cannot_be_resumed(tmp_path):
    # Saved by a trainer whose optimiser the user has replaced.
    for make in (
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.1),
        lambda p: torch.optim.Adam(p, amsgrad=True),
    ):
        trainer = Trainer(config(), images())
        trainer.optimizer = make(trainer.model.parameters())
        trainer.train_step()
        trainer.save(tmp_path)
        with pytest.raises(ValueError, match="optimizer"):
            Trainer.restore(tmp_path, images())
        shutil.rmtree(tmp_path)
