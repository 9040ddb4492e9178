"""One writer a folder: who is refused, and that no lock outlives its process."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tiny_training import config, images

import ddpm_fast
from ddpm_fast.io import lock
from ddpm_fast.io.lock import exclusive
from ddpm_fast.training import Trainer

# Without PyTorch, whose import takes seconds: holds the lock of a folder until it is killed.
HOLDER = """
import sys, types
package = sys.modules["ddpm_fast"] = types.ModuleType("ddpm_fast")
package.__path__ = [sys.argv[1]]
from ddpm_fast.io.lock import exclusive
with exclusive(sys.argv[2], "training"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that trains, or seems to, into tmp_path."""
    arguments = [sys.executable, "-c", HOLDER, str(Path(ddpm_fast.__file__).parent), str(tmp_path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_another_process_is_named_and_a_killed_one_forgotten(tmp_path, holder):
    message = rf"{tmp_path} is in use by another training \(process {holder.pid} on .*\); let it end, or choose another folder"
    with pytest.raises(BlockingIOError, match=message):
        with exclusive(tmp_path, "training"):
            raise AssertionError("must not run")
    with exclusive(tmp_path, "evaluation"):  # writes other files
        pass
    holder.kill()
    holder.wait()
    assert os.listdir(tmp_path) == [".training.lock"]
    with exclusive(tmp_path, "training"):
        assert f"process {os.getpid()} on" in (tmp_path / ".training.lock").read_text()
    assert os.listdir(tmp_path) == []


def test_what_a_killed_writer_left_goes_at_the_restart(run, tmp_path, monkeypatch):
    """Not after an hour: whoever holds the lock knows that nobody is writing. What others may be writing stays."""

    def leave(*names):
        for name in names:
            (tmp_path / name).mkdir()
            (tmp_path / name / "half").write_bytes(b"half")

    mine, others = (
        (".checkpoint.safetensors.0a.tmp", ".checkpoint.json.1b.tmp", ".metrics.jsonl.2c.tmp"),
        (".bound.json.3d.tmp", ".loss.png.4e.tmp"),
    )
    leave(*mine, *others)
    with exclusive(tmp_path, "training"):  # as the command does before it makes a trainer
        Trainer(config(steps=1), images()).run(tmp_path)
    assert {name for name in os.listdir(tmp_path) if name.endswith(".tmp")} == set(others)
    leave(*mine)
    monkeypatch.setattr(lock, "_lock", lambda handle: None)  # a file system without locks: another one may be at it
    Trainer(config(steps=1), images()).run(tmp_path)
    assert {name for name in os.listdir(tmp_path) if name.endswith(".tmp")} == {*mine, *others}


def test_every_writer_is_refused(run, tmp_path, holder, command):
    before = os.listdir(tmp_path)
    with pytest.raises(BlockingIOError, match="is in use by another training"):
        Trainer(config(), images()).run(tmp_path)
    for options in ([], ["--resume"], ["--overwrite"]):
        code, _, error = command("train", "--steps", 1, "--batch", 2, *options, "--out", tmp_path)
        assert code == 2 and f"{tmp_path} is in use by another training (process {holder.pid}" in error and len(error.splitlines()) == 1
    assert os.listdir(tmp_path) == before


@pytest.mark.parametrize(
    "arguments, activity",
    [(["sample", "{run}", "-n", 2, "--steps", 2], "sampling"), (["eval", "{run}", "--limit", 2, "--terms", 2], "evaluation")],
)
def test_sampling_and_evaluating_into_one_folder(run, tmp_path, command, arguments, activity):
    arguments = [str(argument).format(run=run) for argument in arguments]
    held, done = threading.Event(), threading.Event()
    holding = threading.Thread(target=_hold, args=(tmp_path, activity, held, done))  # another thread stands for another process
    holding.start()
    held.wait()
    code, _, error = command(*arguments, "--out", tmp_path)
    done.set()
    holding.join()
    assert code == 2 and f"{tmp_path} is in use by another {activity} (process {os.getpid()} on" in error and os.listdir(tmp_path) == []
    assert command(*arguments, "--out", tmp_path)[0] == 0 and not [name for name in os.listdir(tmp_path) if name.endswith(".lock")]


def _hold(folder, activity, held, done):
    with exclusive(folder, activity):
        held.set()
        done.wait()


def test_the_same_thread_gets_past_its_own_lock(tmp_path):
    with exclusive(tmp_path / "a", "training"):
        with exclusive(tmp_path / "a", "training"):
            pass
        assert os.listdir(tmp_path / "a") == [".training.lock"]
    assert not (tmp_path / "a").exists()  # which was made for nothing
    with pytest.raises(ZeroDivisionError), exclusive(tmp_path / "a", "training"):
        raise ZeroDivisionError
    with exclusive(tmp_path / "a", "training"):
        pass


def test_a_lock_file_that_was_removed_meanwhile_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    real, calls = lock._lock, []

    def late(handle):
        calls.append(handle)
        if len(calls) == 1:  # the one before removes its file between our opening and our locking, and a third makes a new one
            (tmp_path / ".training.lock").unlink()
            (tmp_path / ".training.lock").write_text("")
        return real(handle)

    monkeypatch.setattr(lock, "_lock", late)
    with exclusive(tmp_path, "training"):
        assert len(calls) == 2 and "process" in (tmp_path / ".training.lock").read_text()


def test_a_file_system_without_locks_lets_the_work_go_on(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    if lock.fcntl is None:
        pytest.skip("no fcntl here")
    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with exclusive(tmp_path, "training"):
        pass
    monkeypatch.setattr(lock.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error"), exclusive(tmp_path, "training"):
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "hidden name")

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(PermissionError) as caught, exclusive(tmp_path, "training"):
        pass
    assert caught.value.filename == str(tmp_path)


@pytest.mark.parametrize("name", ["train", "demo"])
def test_torchrun_of_what_runs_in_one_process(tmp_path, monkeypatch, command, name):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        code, _, error = command(name, "--out", tmp_path / "run")
        assert code == 2 and len(error.splitlines()) == lines and not (tmp_path / "run").exists()
        assert rank != "0" or f"{name} runs in one process, and torchrun has started 2" in error
