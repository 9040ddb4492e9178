"""What the autotuner remembers, in the process and in its file, and what `info` says of it."""
import json
import math
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager

import pytest
import torch
from autotuning import CPU, EQUAL, KEY, choose, gives, raises, tuner

import ddpm_fast
from ddpm_fast import _autotune_file, autotune, info
from ddpm_fast._autotune_file import MAX_ENTRIES, SCHEMA, ChoiceFile, cache_path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "autotune.json"


# What is remembered


@pytest.mark.parametrize("faster", EQUAL)
def test_the_second_call_does_not_time(path, faster):
    made = tuner(path, **{name: 1.0 if name == faster else 2.0 for name in EQUAL})
    calls = []
    candidates = {name: lambda name=name: calls.append(name) or torch.ones(4) for name in EQUAL}
    assert [choose(made, candidates) for _ in range(3)] == [faster] * 3
    assert len(made._measure.asked) == 1 and calls == ["ours", "torch"]


@pytest.mark.parametrize("faster", EQUAL)
def test_another_process_does_not_time(path, faster):
    assert choose(tuner(path, **{name: 1.0 if name == faster else 2.0 for name in EQUAL})) == faster
    other = "import sys, torch; from pathlib import Path; from ddpm_fast.autotune import Autotuner\n" \
        "fail = lambda *arguments: 1 / 0\n" \
        f"key = ((2, 256, 64), torch.float32, False); device = torch.device('cpu'); found = Autotuner(Path({str(path)!r}), fail)\n" \
        "print(found.choose('attention', key, {'ours': fail, 'torch': fail}, 'ours', device=device))"
    assert subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, check=True).stdout.strip() == faster


OTHERS = [
    {"op": "group_norm"},
    {"key": ((2, 64, 256), *KEY[1:])},
    {"key": (KEY[0], torch.bfloat16, KEY[2])},
    {"key": (*KEY[:2], True)},
    {"device": torch.device("cuda", 0)},
    {"candidates": EQUAL | {"another": gives(1)}},  # it has not been compared with that one
    {"candidates": {"ours": gives(1), "theirs": gives(1)}},
]


@pytest.mark.parametrize("through_file", [False, True])
@pytest.mark.parametrize("options", OTHERS, ids=[next(iter(o)) for o in OTHERS])
def test_what_a_choice_holds_for(monkeypatch, path, options, through_file):
    monkeypatch.setattr(autotune, "device_name", str)
    monkeypatch.setattr(autotune, "_capturing", lambda device: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: torch.Stream(CPU))
    times = {"ours": 2.0, "torch": 1.0, "another": 3.0, "theirs": 1.5}
    made = tuner(path, **times)
    choose(made)
    if through_file:
        made = tuner(path, **times)
    before = len(made._measure.asked)
    assert choose(made, **options) == ("theirs" if "theirs" in options.get("candidates", ()) else "torch")
    assert len(made._measure.asked) == before + 1


@pytest.mark.parametrize("module, name", [(torch, "torch"), (ddpm_fast, "ddpm_fast")])
def test_another_version_times_again(monkeypatch, path, module, name):
    choose(tuner(path, ours=2.0, torch=1.0))
    monkeypatch.setattr(module, "__version__", "99.0")
    made = tuner(path, ours=1.0, torch=2.0)
    assert made.choices() == []
    assert choose(made) == "ours" and len(made._measure.asked) == 1
    assert made.choices()[0][name] == "99.0"
    assert len(json.loads(path.read_text())["choices"]) == 2


def test_two_gpus_of_a_model_share_a_choice(monkeypatch, path):
    class Properties:
        major, minor = 9, 0

        def __init__(self, device):
            self.name = ("NVIDIA H100", "NVIDIA H100", "another")[device.index]

    monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: torch.Stream(CPU))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(autotune, "_capturing", lambda device: False)
    autotune.device_name.cache_clear()
    try:
        made = tuner(path, ours=2.0, torch=1.0)
        for device in ("cuda:0", "cuda:1", "cuda"):
            assert choose(made, device=torch.device(device)) == "torch"
        assert [choice["device"] for choice in made.choices()] == ["NVIDIA H100, compute capability 9.0"]
        assert len(made._measure.asked) == 1
    finally:
        autotune.device_name.cache_clear()


def test_clear_forgets_here_and_in_the_file(path):
    made = tuner(path, ours=2.0, torch=1.0)
    choose(made)
    made.clear()
    assert not path.exists() and made.choices() == []
    made.clear()  # nothing to remove
    choose(made, key="another")
    assert len(made._measure.asked) == 2
    assert [choice["key"] for choice in made.choices()] == ["another"]  # what was cleared does not come back


def test_what_hung_on_the_moment_is_not_written_later_either(path):
    made = tuner(path, ours=2.0, torch=1.0)
    choose(made, EQUAL | {"torch": raises(MemoryError())}, key="out of memory")
    choose(made)
    assert {choice["key"] for choice in made.choices()} == {"out of memory", "2x256x64, float32, False"}
    assert {choice["key"] for choice in tuner(path).choices()} == {"2x256x64, float32, False"}


def test_a_comparison_that_fails_is_not_the_candidates_for_good(monkeypatch, path):
    def fails(*arguments):
        raise RuntimeError("no memory for the difference")

    monkeypatch.setattr(autotune, "difference", fails)
    made = tuner(path, ours=2.0, torch=1.0)
    assert choose(made) == "ours" and made.choices()[0]["ruled_out"] == {"torch": "RuntimeError: no memory for the difference"}
    assert not path.exists()


# The file


def test_what_the_file_says(path):
    before = time.time()
    choose(tuner(path, ours=2.0, torch=1.0))
    content = json.loads(path.read_text())
    [entry] = content["choices"]
    assert content["schema"] == SCHEMA and before <= entry.pop("time") <= time.time()
    assert entry == {
        "device": autotune.device_name(CPU),
        "torch": torch.__version__,
        "ddpm_fast": ddpm_fast.__version__,
        "op": "attention",
        "key": "2x256x64, float32, False",
        "chosen": "torch",
        "seconds": {"ours": 2.0, "torch": 1.0},
        "ruled_out": {},
    }
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # nothing temporary stays


@contextmanager
def warns_once(verb):
    with pytest.warns(RuntimeWarning) as found:
        yield
    assert [str(w.message).split(" (")[0] for w in found] == [f"ddpm_fast.autotune cannot {verb}"]


CORRUPT = [b"", b"{", b"[]", b"null", b'"text"', b"{}", b'{"schema": 1}', b'{"schema": 1, "choices": 3}', b"\xff\xfe\x00", b"[" * 100_000]


@pytest.mark.parametrize("content", CORRUPT, ids=[repr(c[:30]) for c in CORRUPT])
def test_a_corrupt_file_is_replaced_after_one_warning(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    made = tuner(path, ours=2.0, torch=1.0)
    with warns_once(f"read {path}"):
        assert choose(made) == "torch" and choose(made, key="another") == "torch"
    assert len(made._measure.asked) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        later = tuner(path, ours=2.0, torch=1.0)
        assert choose(later) == "torch" and later._measure.asked == []


@pytest.mark.parametrize(
    "change",
    [
        {"chosen": "another"},
        {"chosen": 3},
        {"chosen": None},
        {"seconds": {"ours": "2", "torch": 1.0}},
        {"seconds": {"ours": -2.0, "torch": 1.0}},
        {"seconds": {"ours": math.nan, "torch": 1.0}},
        {"seconds": [1.0]},
        {"seconds": {"torch": 1.0}, "ruled_out": {"ours": 3}},
        {"ruled_out": []},
        {"time": "today"},
        {"time": None},
        {"more": 1},
        {"op": ["attention"]},
    ],
    ids=str,
)
def test_an_entry_that_makes_no_sense_is_passed_over(path, change):
    choose(tuner(path, ours=2.0, torch=1.0), key="good")
    choose(tuner(path, ours=2.0, torch=1.0))
    content = json.loads(path.read_text())
    content["choices"][1] |= change
    content["choices"] += [None, 3, [], {}]
    path.write_text(json.dumps(content))
    made = tuner(path, ours=1.0, torch=2.0)
    assert choose(made) == "ours" and choose(made, key="good") == "torch"
    assert len(made._measure.asked) == 1


def test_a_file_of_another_schema_is_ignored_in_silence(path):
    choose(tuner(path, ours=2.0, torch=1.0))
    path.write_text(path.read_text().replace(f'"schema": {SCHEMA}', '"schema": 0'))
    made = tuner(path, ours=1.0, torch=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(made) == "ours"


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    made = tuner(tmp_path / "file" / "autotune.json", ours=2.0, torch=1.0)
    with pytest.warns(RuntimeWarning, match="autotune.json .*; its choices are kept for this process only") as found:
        for key in ("a", "b", "a"):
            assert choose(made, key=key) == "torch"
        made.clear()
    assert len(found) == 1 and len(made._measure.asked) == 2


def test_a_disk_that_is_full(monkeypatch, path):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_autotune_file, "atomic_write", full)
    made = tuner(path, ours=2.0, torch=1.0)
    with warns_once(f"write {path}"):
        assert [choose(made, key=key) for key in ("a", "b", "a")] == ["torch"] * 3
    assert len(made._measure.asked) == 2


def test_a_folder_in_the_files_place(path):
    path.mkdir(parents=True)
    made = tuner(path, ours=2.0, torch=1.0)
    with warns_once(f"read {path}"):
        assert choose(made) == "torch"
        made.clear()


def test_processes_that_write_in_turn_keep_each_others_choices(path):
    first, second = tuner(path, ours=2.0, torch=1.0), tuner(path, ours=1.0, torch=2.0)
    for k in range(4):  # each has read the file before the other wrote
        assert choose((first, second)[k % 2], key=f"k{k}") == ("torch", "ours")[k % 2]
    assert {c["key"]: c["chosen"] for c in tuner(path).choices()} == {"k0": "torch", "k1": "ours", "k2": "torch", "k3": "ours"}
    assert choose(first, key="k1") == "ours" and len(first._measure.asked) == 2  # from the file, though it had read that before


def test_what_a_concurrent_writer_lost_is_written_again(path):
    made = tuner(path, ours=2.0, torch=1.0)
    choose(made, key="lost")
    path.unlink()
    choose(made, key="next")
    assert {c["key"] for c in tuner(path).choices()} == {"lost", "next"}


def test_processes_at_the_same_time_leave_a_whole_file(path):
    code = "import sys, torch; from pathlib import Path; from ddpm_fast.autotune import Autotuner\n" \
        f"found = Autotuner(Path({str(path)!r}), lambda candidates, device: {{'ours': 2.0, 'torch': 1.0}})\n" \
        "one = lambda: torch.ones(1)\n" \
        "for k in range(30): found.choose('op', f'{sys.argv[1]} {k}', {'ours': one, 'torch': one}, 'ours', device=torch.device('cpu'))"
    started = [subprocess.Popen([sys.executable, "-W", "error", "-c", code, name]) for name in "ab"]
    assert [process.wait() for process in started] == [0, 0]
    found = [choice["key"] for choice in tuner(path).choices()]
    assert any(all(f"{name} {k}" in found for k in range(30)) for name in "ab")  # the last to write has all of its own


def test_the_newest_entries_stay(monkeypatch, path):
    monkeypatch.setattr(_autotune_file, "MAX_ENTRIES", 5)
    for k in range(8):
        choose(tuner(path, ours=2.0, torch=1.0), key=f"k{k}")
    assert sorted(c["key"] for c in tuner(path).choices()) == ["k3", "k4", "k5", "k6", "k7"]
    assert MAX_ENTRIES * path.stat().st_size / 5 < 1e6


@pytest.mark.parametrize(
    "platform, xdg, expected",
    [
        ("linux", "/caches", "/caches/ddpm_fast/autotune.json"),
        ("linux", None, "/home/someone/.cache/ddpm_fast/autotune.json"),
        ("linux", "", "/home/someone/.cache/ddpm_fast/autotune.json"),
        ("linux", "relative", "/home/someone/.cache/ddpm_fast/autotune.json"),
        ("darwin", None, "/home/someone/Library/Caches/ddpm_fast/autotune.json"),
        ("darwin", "/caches", "/caches/ddpm_fast/autotune.json"),
    ],
)
def test_where_the_file_is(monkeypatch, platform, xdg, expected):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if xdg is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert str(cache_path()) == str(ChoiceFile().path) == expected


def test_without_a_home_choices_are_in_memory(monkeypatch):
    monkeypatch.setattr(_autotune_file, "cache_path", lambda: None)
    made = tuner(None, ours=2.0, torch=1.0)
    assert choose(made) == choose(made) == "torch"
    assert len(made._measure.asked) == len(made.choices()) == 1
    made.clear()
    assert made.choices() == []


# info


@pytest.fixture
def installed(monkeypatch, path):
    """The process's own autotuner, with a file of its own."""
    made = tuner(path, ours=2.5e-3, torch=1e-3)
    for name in ("choose", "enable", "disabled", "why_off", "clear", "choices"):
        assert getattr(autotune, name) == getattr(autotune._autotuner, name)
        monkeypatch.setattr(autotune, name, getattr(made, name))
    return made


def test_info_lists_the_choices(installed, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert info.report()["autotuned"] == [] and info.report()["autotuning"] == "on"
    info.print_report()
    assert "autotun" not in capsys.readouterr().out
    choose(installed, EQUAL | {"[bad]": raises(RuntimeError("no [red]kernel"))})
    facts = json.loads(json.dumps(info.report()))
    assert facts["autotuned"] == installed.choices()
    assert facts["autotuned"][0]["seconds"] == {"ours": 2.5e-3, "torch": 1e-3}
    info.print_report()
    printed = capsys.readouterr().out
    for text in ("2x256x64, float32, False", "ours 2500.0", "torch 1000.0", "([bad]: RuntimeError: no [red]kernel)", "autotuned"):
        assert text in printed
    assert "autotuning is" not in printed


def test_info_says_where_it_is_off(installed, capsys):
    with autotune.disabled():
        assert info.report()["autotuning"] == "off: switched off"
        info.print_report()
    assert "autotuning is off: switched off" in capsys.readouterr().out
