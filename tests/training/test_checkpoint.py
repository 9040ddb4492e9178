"""Checkpoints: what comes back, what survives a failure, and what is refused."""

import json
import os
import stat
import time

import pytest
import torch
from safetensors.torch import save_file

import ddpm_fast.io.files
from ddpm_fast.io.files import atomic_write
from ddpm_fast.training import checkpoint as module
from ddpm_fast.training.checkpoint import (
    CheckpointError,
    add_prefix,
    load_checkpoint,
    load_into,
    save_checkpoint,
    strip_prefix,
)

META = {"step": 7, "model": {"mult": [1, 2]}, "history": [[0, 1.5], [1, float("inf")]], "note": "ᾱ", "z": None}


def tensors(value=1.0):
    return {"model.w": torch.full((2, 3), value), "step": torch.tensor(5)}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


WHOLE = ["checkpoint.json", "checkpoint.safetensors"]


# int64 beyond 2**53 would not survive a detour through floats.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])
def test_round_trip_keeps_every_bit(tmp_path, dtype):
    x = torch.tensor([0, 1, 2**62 + 1]).to(dtype)
    base = torch.arange(24).to(dtype).view(2, 3, 4)
    # A transpose, a part of a storage, the same storage twice, an expanded view, a scalar, nothing.
    given = {"x": x, "t": base.transpose(0, 2), "part": base[1], "same": base, "wide": x[:1].expand(3)}
    given |= {"scalar": x[2], "empty": x[:0], "channels_last": base[None].contiguous(memory_format=torch.channels_last)}
    path = save_checkpoint(tmp_path / "new" / "folder", given, META)
    found = load_checkpoint(path)
    assert found.tensors.keys() == given.keys() and found.path == path
    for name, tensor in given.items():
        assert found.tensors[name].dtype == dtype
        assert torch.equal(found.tensors[name], tensor), name


def test_meta_and_the_json_beside(tmp_path):
    save_checkpoint(tmp_path, tensors(), META)
    assert load_checkpoint(tmp_path).meta == META
    document = json.loads((tmp_path / "checkpoint.json").read_text("utf-8"))
    assert document["format"] == "ddpm_fast" and document["format_version"] == 1 and document["meta"] == META
    assert names(tmp_path) == WHOLE


def test_nan_in_the_history_is_saved(tmp_path):
    # The checkpoint of a diverged run is the one that somebody wants to look at.
    save_checkpoint(tmp_path, tensors(), {"history": [float("nan")]})
    assert load_checkpoint(tmp_path).meta["history"][0] != load_checkpoint(tmp_path).meta["history"][0]


def test_paths_that_name_a_checkpoint(tmp_path):
    save_checkpoint(tmp_path / "kept", tensors(2), {})
    for name in WHOLE:  # a user keeps a copy
        (tmp_path / "kept" / name).rename(tmp_path / name.replace("checkpoint", "step-0.5"))
    save_checkpoint(tmp_path, tensors(1), {})
    for path, value in (("", 1), ("checkpoint.json", 1), ("checkpoint.safetensors", 1), ("step-0.5.json", 2)):
        assert load_checkpoint(tmp_path / path).tensors["model.w"][0, 0] == value
        assert load_checkpoint(str(tmp_path / path)).tensors["step"] == 5


def test_tensor_file_is_complete_by_itself(tmp_path):
    save_checkpoint(tmp_path, tensors(), META)
    (tmp_path / "checkpoint.json").unlink()
    assert load_checkpoint(tmp_path).meta == META


def test_checkpoint_is_as_readable_as_other_files(tmp_path):
    # The library that writes the tensors makes private files, which a group could not share.
    path = save_checkpoint(tmp_path, tensors(), {})
    plain = tmp_path / "plain"
    plain.write_text("")
    for file in (path, path.with_suffix(".json")):
        assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["write", "sync", "replace", "second replace"])
def test_previous_checkpoint_survives_a_failure(tmp_path, monkeypatch, where, error):
    save_checkpoint(tmp_path, tensors(1), {"step": 1})
    calls, replace = [], os.replace

    def fail(*args, **kwargs):
        calls.append(args)
        if where == "second replace" and len(calls) == 1:
            return replace(*args)
        raise error

    if where == "write":
        monkeypatch.setattr(module, "save_file", fail)
    elif where == "sync":
        monkeypatch.setattr(ddpm_fast.io.files, "_sync", fail)
    else:
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(type(error)):
        save_checkpoint(tmp_path, tensors(2), {"step": 2})
    monkeypatch.undo()
    # Either save, but whole: after the first replacement the new one is there.
    found, expected = load_checkpoint(tmp_path), 2 if where == "second replace" else 1
    assert found.meta == {"step": expected} and found.tensors["model.w"][0, 0] == expected
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]
    save_checkpoint(tmp_path, tensors(3), {"step": 3})
    assert load_checkpoint(tmp_path).meta == {"step": 3} and names(tmp_path) == WHOLE


def test_left_overs_of_killed_processes_are_removed(tmp_path):
    old = time.time() - 2 * ddpm_fast.io.files.STALE_SECONDS
    for name, when in ((".a.png.00.tmp", old), (".a.png.11.tmp", time.time()), (".b.png.00.tmp", old)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("")
        os.utime(tmp_path / name / "part", (when, when))
        os.utime(tmp_path / name, (when, when))
    with atomic_write(tmp_path / "a.png") as temporary:
        temporary.write_text("new")
    # Not the one that may be in use, and not another file's.
    assert names(tmp_path) == [".a.png.11.tmp", ".b.png.00.tmp", "a.png"]


def test_atomic_write_does_not_replace_a_folder(tmp_path):
    with pytest.raises(IsADirectoryError, match="expected a file to write, got a folder"):
        with atomic_write(tmp_path):
            raise AssertionError("must not run")


@pytest.mark.parametrize(
    "given, meta, message",
    [
        ({}, {"x": torch.zeros(1)}, "meta must hold JSON values .*Tensor is not JSON serializable"),
        ({}, {"x": "a" * 40_000_000}, "meta must take at most 40000000 bytes as JSON, got 4"),
        ({"x": 3}, {}, r"tensors\['x'\] must be a tensor, got int; put it into meta"),
        ({"x": torch.zeros(3).to_sparse()}, {}, r"tensors\['x'\] must be dense, got layout torch.sparse_coo"),
        ({"x": torch.zeros(3, dtype=torch.complex128)}, {}, "could not write .*checkpoint.safetensors.*complex128"),
    ],
)
def test_save_errors_leave_nothing(tmp_path, given, meta, message):
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path, given, meta)
    assert names(tmp_path) == []


def test_missing(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at .*nowhere: no such file or folder"):
        load_checkpoint(tmp_path / "nowhere")
    message = r"no checkpoint in .*: expected checkpoint.safetensors \(and checkpoint.json beside it\)"
    for path in (tmp_path, tmp_path / "checkpoint.json", tmp_path / "checkpoint.safetensors"):
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path)
    save_checkpoint(tmp_path, tensors(), {}).unlink()
    with pytest.raises(CheckpointError, match="json is there, but its tensor file checkpoint.safetensors is missing"):
        load_checkpoint(tmp_path)


def test_foreign_files(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    save_file(tensors(), path)
    with pytest.raises(CheckpointError, match="not a checkpoint of ddpm_fast: no 'format' entry .*'ddpm_fast'"):
        load_checkpoint(path)
    save_file(tensors(), path, metadata={"format": "pt"})  # what diffusers and transformers write
    with pytest.raises(CheckpointError, match="not a checkpoint of ddpm_fast: 'format' is 'pt'"):
        load_checkpoint(path)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(CheckpointError, match="expected a folder, a .safetensors or a .json file, got .*a.txt"):
        load_checkpoint(tmp_path / "a.txt")


def test_newer_and_incomplete_headers(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    header = {"format": "ddpm_fast", "format_version": "2", "id": "0", "meta": "{}"}
    save_file(tensors(), path, metadata=header)
    with pytest.raises(CheckpointError, match="a newer ddpm_fast: format_version 2, this one reads up to 1"):
        load_checkpoint(path)
    save_file(tensors(), path, metadata={"format": "ddpm_fast", "format_version": "1"})
    with pytest.raises(CheckpointError, match="is damaged: its header lacks format_version, id, meta or crc32"):
        load_checkpoint(path)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".pkl"])
def test_pickles_are_not_loaded(tmp_path, suffix):
    torch.save(tensors(), tmp_path / f"x{suffix}")
    with pytest.raises(CheckpointError, match="is a pickle.*pickles can run any code and are not loaded"):
        load_checkpoint(tmp_path / f"x{suffix}")


@pytest.mark.parametrize("new_format", [True, False])  # a zip archive, and a bare pickle
def test_renamed_pickle_is_recognised(tmp_path, new_format):
    path = tmp_path / "x.safetensors"
    torch.save(tensors(), path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(CheckpointError, match="is a pickle"):
        load_checkpoint(path)


# Nothing, a part of the header, and all but the last byte.
@pytest.mark.parametrize("length", [0, 20, -1])
def test_truncated(tmp_path, length):
    path = save_checkpoint(tmp_path, tensors(), META)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="checkpoint.safetensors is damaged or cut short"):
        load_checkpoint(tmp_path)


def test_torn_pair(tmp_path):
    save_checkpoint(tmp_path / "a", tensors(1), META)
    save_checkpoint(tmp_path / "b", tensors(2), META)
    path = tmp_path / "b" / "checkpoint.json"
    path.write_bytes((tmp_path / "a" / "checkpoint.json").read_bytes())
    with pytest.raises(CheckpointError, match="come from two different saves: id .* remove checkpoint.json"):
        load_checkpoint(tmp_path / "b")
    path.unlink()
    assert load_checkpoint(tmp_path / "b").tensors["model.w"][0, 0] == 2


def test_edited_json(tmp_path):
    save_checkpoint(tmp_path, tensors(), META)
    path = tmp_path / "checkpoint.json"
    document = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(document, sort_keys=True))  # laid out otherwise, it says the same
    load_checkpoint(tmp_path)
    document["remark"] = document["meta"]["remark"] = "the good one"  # what is added does no harm, nor does it count
    path.write_text(json.dumps(document))
    assert load_checkpoint(tmp_path).meta == META
    document["meta"]["step"] = 8
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="was changed after it was saved, which would have no effect"):
        load_checkpoint(tmp_path)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="checkpoint.json is not readable JSON"):
        load_checkpoint(tmp_path)


def test_prefixes():
    both = {**add_prefix("model", {"w": torch.tensor(1)}), **add_prefix("model_ema", {"w": torch.tensor(2)})}
    assert list(both) == ["model.w", "model_ema.w"]
    assert strip_prefix("model", both) == {"w": torch.tensor(1)} and strip_prefix("mod", both) == {}


def test_load_into_reports_before_it_changes_anything():
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(4)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_into(model, {"0.weight": torch.zeros(2, 2), "0.bias": torch.zeros(3), "x": torch.zeros(1)}, "EMA model")
    assert str(caught.value) == (
        "the checkpoint does not fit the EMA model (8 tensors expected, 3 given); 6 missing: 1.weight, 1.bias, 2.weight, 2.bias, "
        "3.weight and 1 more; 1 unexpected: x; 1 of another shape: 0.bias (3,) for (2,)"
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_load_into_keeps_dtype_and_memory_format():
    model = torch.nn.Conv2d(2, 4, 3).to(torch.bfloat16, memory_format=torch.channels_last)
    load_into(model, {"weight": torch.ones(4, 2, 3, 3), "bias": torch.zeros(4)})
    assert model.weight.dtype == torch.bfloat16 and (model.weight == 1).all()
    assert model.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("meta", ["{", "3", "[" * 100_000])
def test_damaged_meta_is_named(tmp_path, meta):
    path = save_checkpoint(tmp_path, {"x": torch.zeros(1)}, {})
    save_file({"x": torch.zeros(1)}, path, metadata={"format": "ddpm_fast", "format_version": "1", "id": "0", "meta": meta})
    with pytest.raises(CheckpointError, match=f"{path.name}.*damaged"):
        load_checkpoint(path)


def test_run_folder_with_the_suffix_of_a_pickle(tmp_path):
    folder = tmp_path / "run.bin"
    save_checkpoint(folder, {"x": torch.zeros(1)}, {"step": 1})
    assert load_checkpoint(folder).meta == {"step": 1}
