"""Ctrl-C and SIGTERM: held where something must stay whole, and leaving nothing behind wherever else they fall."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import ddpm_fast.io.files
from ddpm_fast.io.files import atomic_files, atomic_write
from ddpm_fast.io.signals import Terminated, exit_status, terminable, uninterrupted
from ddpm_fast.training.checkpoint import load_checkpoint, save_checkpoint

BOTH = pytest.mark.parametrize(
    "number, kind", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)], ids=["Ctrl-C", "SIGTERM"]
)


@pytest.fixture(autouse=True)
def listening():
    """Ctrl-C interrupts, also where the tests were started in the background, whose processes ignore it; and so does SIGTERM."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with terminable():
        yield
    signal.signal(signal.SIGINT, before)


@BOTH
def test_held_to_the_end_of_the_block(number, kind):
    handlers, reached = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], []
    with pytest.raises(kind):
        with uninterrupted():
            with uninterrupted():
                signal.raise_signal(number)
            reached.append("end of the inner block")
            signal.raise_signal(number)
            reached.append("end of the outer block")
        reached.append("beyond")
    assert reached == ["end of the inner block", "end of the outer block"]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_program_s_own_handler_stays_and_is_what_a_held_signal_goes_to():
    got, own = [], lambda number, frame: got.append(number)
    before = signal.signal(signal.SIGTERM, own)
    try:
        with terminable(), uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            assert got == []
        assert got == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_thread_leaves_the_handlers_alone():
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    found = []

    def act():
        with terminable(), uninterrupted():
            found.extend(signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM))

    thread = threading.Thread(target=act)
    thread.start()
    thread.join()
    assert found == handlers


def test_exit_statuses():
    assert exit_status(KeyboardInterrupt()) == 130 and exit_status(Terminated()) == 143


def write_one(folder):
    with atomic_write(folder / "a.txt") as temporary:
        temporary.write_text("whole")


def write_many(folder):
    with atomic_files(folder) as temporary:
        for name in "ab":
            (temporary / f"{name}.txt").write_text("whole")


def write_checkpoint(folder):
    save_checkpoint(folder, {"x": torch.ones(2)}, {"step": 2})


def interrupted_at(event, number, act):
    """Runs act with a signal at the event-th line of Python that this executes in the files that write, or in the libraries that they call.
    Whether it was reached, and what came of it."""
    sources = ("ddpm_fast/io/files.py", "training/checkpoint.py", "contextlib.py", "shutil.py")
    seen = 0

    def trace(frame, kind, _):
        nonlocal seen
        if not frame.f_code.co_filename.endswith(sources):
            return None
        if kind == "line":
            seen += 1
            if seen == event:
                signal.raise_signal(number)
        return trace

    outcome = None
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    except KeyboardInterrupt:
        outcome = KeyboardInterrupt
    finally:
        sys.settrace(before)
    return seen >= event, outcome


@pytest.mark.parametrize("write", [write_one, write_many, write_checkpoint])
def test_an_interruption_at_any_line_leaves_no_temporary_file(tmp_path, monkeypatch, write):
    monkeypatch.setattr(ddpm_fast.io.files, "_sync", lambda path: None)  # for time: nothing depends on the disk here
    event, interruptions = 0, 0
    while True:
        event += 1
        folder = tmp_path / str(event) / "out"
        folder.mkdir(parents=True)
        if write is write_checkpoint:
            save_checkpoint(folder, {"x": torch.zeros(2)}, {"step": 1})
        reached, outcome = interrupted_at(event, (signal.SIGINT, signal.SIGTERM)[event % 2], lambda folder=folder: write(folder))
        if not reached:
            break
        gc.collect(0)  # a block that was left between its end and its cleaning up is cleaned up with its frame
        interruptions += outcome is not None
        names = sorted(os.listdir(folder))
        assert not [name for name in [*names, *os.listdir(folder.parent)] if name.endswith(".tmp")], (event, names)
        for name in names:
            if name.endswith(".txt"):
                assert (folder / name).read_text() == "whole"
        if write is write_checkpoint:
            found = load_checkpoint(folder)
            assert found.tensors["x"].tolist() == [found.meta["step"] - 1] * 2
    assert interruptions > 20 and names == (["checkpoint.json", "checkpoint.safetensors"] if write is write_checkpoint else names)


def test_ctrl_c_while_the_command_imports_is_quiet(tmp_path):
    # In place of torch, which takes the longest: the user's finger.
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    root = Path(ddpm_fast.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])}
    code = "from ddpm_fast_command import main; main()"
    result = subprocess.run([sys.executable, "-c", code, "info"], env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


def test_the_installed_command_is_the_quiet_one():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((Path(ddpm_fast.__file__).parents[1] / "pyproject.toml").read_text())
    assert project["project"]["scripts"]["ddpm-fast"] == "ddpm_fast_command:main"
    assert "ddpm_fast_command" in project["tool"]["setuptools"]["py-modules"]


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_ends_with_the_signal_s_status(command, monkeypatch, number, status):
    from ddpm_fast.cli import info

    monkeypatch.setattr(info, "print_report", lambda: signal.raise_signal(number))
    with contextlib.suppress(SystemExit):
        code, _, error = command("info")
    assert code == status and "Traceback" not in error
