"""The autotuner: which candidate it chooses, what it remembers where, and that it leaves everything else as it was.

Timings are stand-ins, given by name; only the last section uses the clock.
"""
import gc
import json
import math
import subprocess
import sys
import threading
import time
import warnings
import weakref
from contextlib import contextmanager

import pytest
import torch

import ddpm_fast
from ddpm_fast import _autotune_file, _autotune_measure, autotune, info
from ddpm_fast._autotune_file import MAX_ENTRIES, SCHEMA, ChoiceFile, cache_path
from ddpm_fast.autotune import MARGIN, Autotuner

CPU = torch.device("cpu")
KEY = ((2, 256, 64), torch.float32, False)


class Times:
    """A stand-in for `measure`: the seconds of each name, and which names were asked for, call by call."""

    def __init__(self, **seconds):
        self.seconds = seconds
        self.asked = []

    def __call__(self, candidates, device):
        self.asked.append(list(candidates))
        return {name: self.seconds[name] for name in candidates}


def gives(value, shape=(4,), dtype=torch.float32):
    return lambda: torch.full(shape, float(value)).to(dtype)


def raises(error):
    def function():
        raise error

    return function


EQUAL = {"ours": gives(1), "torch": gives(1)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "autotune.json"


def tuner(path, **seconds):
    return Autotuner(path, Times(**seconds))


def choose(made, candidates=EQUAL, default="ours", op="attention", key=KEY, device=CPU, **options):
    return made.choose(op, key, candidates, default, device=device, **options)


# What is chosen


@pytest.mark.parametrize(
    "ours, theirs, expected",
    [
        (2e-3, 1e-3, "torch"),
        (1e-3, 2e-3, "ours"),
        (1e-3, 1e-3, "ours"),
        (MARGIN * 1e-3, 1e-3, "ours"),  # a tie
        (1.001 * MARGIN * 1e-3, 1e-3, "torch"),
        (1e-3, math.nan, "ours"),
        (1e-3, math.inf, "ours"),
        (1e-3, -math.inf, "ours"),
        (1e-3, 0.0, "ours"),  # no clock has measured anything
        (1e-3, -1.0, "ours"),
        (math.nan, 1e-3, "ours"),  # not known to be slower
        (math.inf, 1e-3, "ours"),
        (math.nan, math.nan, "ours"),
    ],
)
def test_the_faster_is_chosen_and_never_one_without_a_time(path, ours, theirs, expected):
    made = tuner(path, ours=ours, torch=theirs)
    assert choose(made) == choose(made) == expected
    [choice] = made.choices()
    assert choice["chosen"] == expected
    assert choice["seconds"] == {n: s for n, s in (("ours", ours), ("torch", theirs)) if math.isfinite(s) and s > 0}
    for name in choice["ruled_out"]:
        assert choice["ruled_out"][name].startswith("its time was ")
    assert path.exists() == (len(choice["seconds"]) == 2)  # a timing that failed is not for later processes


def test_the_fastest_of_three_in_whatever_order(path):
    candidates = {"a": gives(1), "ours": gives(1), "b": gives(1)}
    for k, (a, b) in enumerate([(2, 1), (1, 2), (4, 5)]):
        assert choose(tuner(path, ours=3.0, a=a, b=b), candidates, key=f"k{k}") == ("b", "a", "ours")[k]


WRONG = [
    (gives(math.nan), "its result is not finite where that of ours is"),
    (gives(math.inf), "its result is not finite where that of ours is"),
    (lambda: torch.tensor([1, 1, 1, math.nan]), "its result is not finite where that of ours is"),
    (lambda: torch.tensor([1, 1, 1, 1.5]), "its result differs from that of ours by 0.5, more than 0.0039"),
    (gives(1, (5,)), r"its result is [((5,), torch.float32)], that of ours is [((4,), torch.float32)]"),
    (gives(1, dtype=torch.float16), r"its result is [((4,), torch.float16)], that of ours is [((4,), torch.float32)]"),
    (lambda: (torch.ones(4), torch.ones(4)), "its result is [((4,), torch.float32), ((4,), torch.float32)], that of ours is"),
]


@pytest.mark.parametrize("function, reason", WRONG)
def test_a_wrong_result_is_ruled_out_with_a_warning(path, function, reason):
    made = tuner(path, ours=2.0, torch=1.0)
    with pytest.warns(RuntimeWarning, match="attention: 'torch' is not used: its result"):
        assert choose(made, {"torch": function, "ours": gives(1)}) == "ours"
    assert made._measure.asked == [["ours"]]
    [choice] = made.choices()
    assert choice["ruled_out"]["torch"].startswith(reason)
    assert not path.exists()  # other values may agree
    assert choose(made, {"torch": function, "ours": gives(1)}) == "ours" and len(made._measure.asked) == 1


def test_every_tensor_of_a_result_is_compared(path):
    made = tuner(path, ours=2.0, torch=1.0)
    pair = lambda second: lambda: (torch.ones(4), [None, torch.full((4,), second)])  # noqa: E731
    with pytest.warns(RuntimeWarning, match="result 1 differs from that of ours by 1, more than"):
        assert choose(made, {"ours": pair(1.0), "torch": pair(2.0)}) == "ours"
    assert choose(made, {"ours": pair(1.0), "torch": pair(1.0)}, key="equal") == "torch"


def test_where_the_baseline_is_not_finite_nothing_is_compared(path):
    values = {"ours": lambda: torch.tensor([math.nan, math.inf, 1.0]), "torch": lambda: torch.tensor([5.0, math.nan, 1.0])}
    assert choose(tuner(path, ours=2.0, torch=1.0), values) == "torch"
    values["torch"] = lambda: torch.tensor([math.nan, math.inf, 2.0])
    with pytest.warns(RuntimeWarning, match="differs"):
        assert choose(tuner(path, ours=2.0, torch=1.0), values, key="the rest is") == "ours"


@pytest.mark.parametrize(
    "dtype, off, tolerance, expected",
    [
        (torch.float32, 0.003, None, "torch"),  # TF32
        (torch.float32, 0.005, None, "ours"),
        (torch.float16, 0.025, None, "torch"),
        (torch.float16, 0.04, None, "ours"),
        (torch.bfloat16, 0.07, None, "torch"),
        (torch.bfloat16, 0.11, None, "ours"),
        (torch.float64, 0.005, None, "ours"),
        (torch.float32, 0.003, 0.001, "ours"),
        (torch.float32, 0.3, 0.5, "torch"),
        (torch.int64, 0, None, "torch"),
        (torch.int64, 1, None, "ours"),
    ],
)
def test_tolerance_is_of_the_largest_value(path, dtype, off, tolerance, expected):
    """The largest is 100, so a difference of 100 * off is allowed, wherever it is."""
    values = lambda x: lambda: torch.tensor([100.0, x]).to(dtype)  # noqa: E731
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        found = choose(tuner(path, ours=2.0, torch=1.0), {"ours": values(1.0), "torch": values(1.0 + 100 * off)}, tolerance=tolerance)
    assert found == expected


def test_empty_results_are_equal(path):
    assert choose(tuner(path, ours=2.0, torch=1.0), {"ours": gives(1, (0, 3)), "torch": gives(1, (0, 3))}) == "torch"


@pytest.mark.parametrize(
    "error, reason, kept",
    [
        (RuntimeError("no kernel\nfor this"), "RuntimeError: no kernel", True),
        (torch.cuda.OutOfMemoryError("tried to allocate"), "OutOfMemoryError: tried to allocate", False),  # next time there may be more
        (MemoryError(), "MemoryError: ", False),
    ],
)
def test_a_candidate_that_raises_is_ruled_out(path, error, reason, kept):
    made = tuner(path, ours=2.0, torch=1.0)
    candidates = {"ours": gives(1), "torch": raises(error)}
    assert choose(made, candidates) == "ours"
    assert made.choices()[0]["ruled_out"] == {"torch": reason}
    assert path.exists() == kept
    later = tuner(path, ours=2.0, torch=1.0)
    assert choose(later, candidates) == "ours"
    assert later._measure.asked == ([] if kept else [["ours"]])


def test_where_the_default_fails_the_fastest_of_the_others_runs_and_a_warning_says_so(path):
    made = tuner(path, a=2.0, b=1.0, ours=0.1)
    candidates = {"ours": raises(RuntimeError("no kernel")), "a": gives(1), "b": gives(1)}
    with pytest.warns(RuntimeWarning, match="attention: 'b' is used, because 'ours' failed: RuntimeError: no kernel"):
        assert choose(made, candidates) == "b"
    with pytest.warns(RuntimeWarning, match="'a' is used, because 'ours' failed"):  # neither has a time
        assert choose(tuner(path, a=math.nan, b=math.inf), candidates, key="no times") == "a"


def test_where_all_fail_the_defaults_error_is_raised_and_the_next_call_tries_again(path):
    made = tuner(path, ours=2.0, torch=1.0)
    with pytest.raises(RuntimeError, match="ours failed"):
        choose(made, {"torch": raises(ValueError("theirs failed")), "ours": raises(RuntimeError("ours failed"))})
    assert not path.exists() and made.choices() == [] and made._measure.asked == []
    assert choose(made) == "torch"


def test_a_timing_that_raises_leaves_the_default(path):
    made = Autotuner(path, lambda candidates, device: 1 / 0)
    assert choose(made) == "ours"
    assert made.choices()[0]["ruled_out"] == dict.fromkeys(EQUAL, "timing failed: ZeroDivisionError: division by zero")
    assert not path.exists()


def test_an_interrupt_is_not_a_failure(path):
    made = tuner(path, ours=2.0, torch=1.0)
    with pytest.raises(KeyboardInterrupt):
        choose(made, EQUAL | {"torch": raises(KeyboardInterrupt())})
    assert choose(made) == "torch"


def test_one_candidate_is_not_timed(path):
    made = tuner(path)
    assert choose(made, {"ours": raises(AssertionError())}) == "ours"


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"default": "theirs"}, ValueError, "default must be one of the candidates ours, torch, got 'theirs'"),
        ({"key": [1, 2]}, TypeError, "key must be a str or a tuple, got list"),
    ],
)
def test_arguments(path, options, error, message):
    with pytest.raises(error, match=message):
        choose(tuner(path, ours=2.0, torch=1.0), **options)


def test_what_is_not_a_tensor_is_ruled_out(path):
    made = tuner(path, ours=2.0, torch=1.0)
    assert choose(made, EQUAL | {"torch": lambda: 1.0}) == "ours"
    assert made.choices()[0]["ruled_out"]["torch"] == "TypeError: a candidate must return a tensor or a tuple or list of them, got float"


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
        name, major, minor = "NVIDIA H100", 9, 0

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
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


# When nothing is timed


@pytest.fixture
def graph_capture(monkeypatch):
    """A context in which the current stream of every CUDA device is being captured; there need not be one."""
    state = {"capturing": False}
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextmanager(lambda: (yield))())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: torch.Stream(CPU))
    monkeypatch.setattr(autotune, "device_name", str)

    @contextmanager
    def capture():
        state["capturing"] = True
        yield
        state["capturing"] = False

    return capture


def test_during_graph_capture_a_remembered_choice_holds_and_else_the_default(path, graph_capture):
    device = torch.device("cuda", 0)
    untouchable = dict.fromkeys(EQUAL, raises(AssertionError("called")))
    made = tuner(path, ours=2.0, torch=1.0)
    with graph_capture():
        assert choose(made, untouchable, device=device) == "ours"
    assert made._measure.asked == [] and made.choices() == [] and not path.exists()
    assert choose(made, device=device) == "torch"
    with graph_capture():
        assert choose(made, untouchable, device=device) == "torch"
        assert choose(tuner(path), untouchable, device=device) == "torch"  # from the file
    assert choose(made, device=CPU) == "torch"  # what is captured is no matter of the CPU's


def test_switched_off_it_is_the_default_whatever_is_remembered(path):
    made = tuner(path, ours=2.0, torch=1.0)
    untouchable = dict.fromkeys(EQUAL, raises(AssertionError("called")))
    for key in ("timed", "new"):
        if key == "timed":
            assert choose(made, key=key) == "torch"
        made.enable(False)
        assert choose(made, untouchable, key=key) == "ours" and made.why_off() == "switched off"
        made.enable()
        with made.disabled():
            with made.disabled():
                assert choose(made, untouchable, key=key) == "ours"
            assert choose(made, untouchable, key=key) == "ours" and made.why_off() == "switched off"
        assert made.why_off() == ""
        torch.use_deterministic_algorithms(True)
        try:
            assert choose(made, untouchable, key=key) == "ours" and made.why_off() == "torch.use_deterministic_algorithms(True)"
        finally:
            torch.use_deterministic_algorithms(False)
    assert len(made._measure.asked) == 1
    with made.disabled():
        made.enable(False)  # not undone by the end of the block
    assert made.why_off()
    made.enable()
    assert choose(made, key="timed") == "torch"


def test_disabled_ends_with_an_exception(path):
    made = tuner(path)
    with pytest.raises(ZeroDivisionError), made.disabled():
        raise ZeroDivisionError
    assert made.why_off() == ""


def test_no_environment_variable_switches_it_off():
    """Which kernel runs changes bits: the environment says where the file is and no more."""
    code = "import ddpm_fast; print(repr(ddpm_fast.autotune.why_off()))"
    names = [f"{prefix}{name}" for prefix in ("", "DDPM_FAST_") for name in ("AUTOTUNE", "NO_AUTOTUNE", "DISABLE_AUTOTUNE")]
    for value in "01":
        found = subprocess.run([sys.executable, "-c", code], env=dict.fromkeys(names, value) | {"PYTHONPATH": ":".join(sys.path)}, capture_output=True)
        assert found.stdout.strip() == b"''", found.stderr


@pytest.mark.parametrize("device", ["meta", "xpu"])
def test_devices_that_cannot_be_timed(path, device):
    made = tuner(path, ours=2.0, torch=1.0)
    assert choose(made, dict.fromkeys(EQUAL, raises(AssertionError())), device=torch.device(device)) == "ours"
    assert not path.exists() and made._measure.asked == []


def test_under_torch_compile_it_is_the_default(path):
    made = tuner(path, ours=2.0, torch=1.0)
    choose(made)

    def scaled(x):
        return x * {"ours": 2, "torch": 3}[made.choose("attention", KEY, {"ours": lambda: x, "torch": lambda: x}, "ours", device=x.device)]

    assert torch.compile(scaled, backend="eager", fullgraph=True)(torch.ones(1)) == 2
    assert scaled(torch.ones(1)) == 3


def test_fake_tensors_are_not_timed(path):
    from torch._subclasses.fake_tensor import FakeTensorMode

    made = tuner(path, ours=2.0, torch=1.0)
    with FakeTensorMode():
        x = torch.ones(4)
        assert choose(made, {"ours": lambda: x + 1, "torch": lambda: x + 1}) == "ours"
    assert made.choices() == [] and not path.exists() and made._measure.asked == []
    assert choose(made) == "torch"


def test_a_candidate_may_choose_in_turn(path):
    """Its own choice is the default meanwhile, in whichever thread, and there is no waiting for itself."""
    made = tuner(path, ours=2.0, torch=1.0)
    inner = []

    def nesting():
        inner.append(choose(made, key="inner"))
        inner.append(choose(made))
        thread = threading.Thread(target=lambda: inner.append(choose(made, key="inner")))  # as autograd's would be
        thread.start()
        thread.join()
        return torch.ones(4)

    start = time.monotonic()
    assert choose(made, EQUAL | {"torch": nesting}) == "torch"
    assert inner == ["ours"] * 3 and time.monotonic() - start < 5
    assert choose(made, key="inner") == "torch"


# Threads


class Slow(Times):
    """Waits in the middle of a measurement until it is let go."""

    def __init__(self, **seconds):
        super().__init__(**seconds)
        self.begun, self.go_on = threading.Event(), threading.Event()

    def __call__(self, candidates, device):
        self.begun.set()
        assert self.go_on.wait(30)
        return super().__call__(candidates, device)


def asking(made, found, **options):
    thread = threading.Thread(target=lambda: found.append(choose(made, **options)))
    thread.start()
    return thread


def test_threads_that_ask_for_the_same_time_it_once(path):
    made, found = Autotuner(path, Slow(ours=2.0, torch=1.0)), []
    threads = [asking(made, found) for _ in range(8)]
    assert made._measure.begun.wait(30)
    assert choose(made, key="another") == "ours"  # not remembered: its turn comes
    time.sleep(0.05)
    assert found == []
    made._measure.go_on.set()
    for thread in threads:
        thread.join(30)
    assert found == ["torch"] * 8 and len(made._measure.asked) == 1
    assert choose(made, key="another") == "torch"


def test_after_a_thread_that_failed_another_one_times(path):
    class First(Slow):
        def __call__(self, candidates, device):
            result = super().__call__(candidates, device)
            if len(self.asked) == 1:
                raise KeyboardInterrupt
            return result

    made, found = Autotuner(path, First(ours=2.0, torch=1.0)), []

    def fails():
        with pytest.raises(KeyboardInterrupt):
            choose(made)

    failing = threading.Thread(target=fails)
    failing.start()
    assert made._measure.begun.wait(30)
    waiting = asking(made, found)
    time.sleep(0.05)
    made._measure.go_on.set()
    failing.join(30)
    waiting.join(30)
    assert found == ["torch"]


def test_a_thread_does_not_wait_for_ever(monkeypatch, path):
    monkeypatch.setattr(autotune, "WAIT_SECONDS", 0.05)
    made, found = Autotuner(path, Slow(ours=2.0, torch=1.0)), []
    first = asking(made, found)
    assert made._measure.begun.wait(30)
    assert choose(made) == "ours" and found == []
    made._measure.go_on.set()
    first.join(30)
    assert found == ["torch"] and choose(made) == "torch"


# What it leaves as it was


def test_no_graph_is_recorded_and_no_state_of_the_callers_changes(path):
    weight = torch.ones(4, requires_grad=True)
    recorded = []

    def function():
        result = weight * 2
        recorded.append((torch.is_grad_enabled(), result.requires_grad))
        return result

    def function_with_backward():
        with torch.enable_grad():
            leaf = weight.detach().requires_grad_()
            return (leaf * 2).detach(), torch.autograd.grad((leaf * 2).sum(), leaf)[0]

    state = torch.get_rng_state()
    for with_grad in (True, False):
        with torch.set_grad_enabled(with_grad):
            made = Autotuner(path)
            choose(made, {"ours": function, "torch": function}, key=f"forward {with_grad}")
            choose(made, {"ours": function_with_backward, "torch": function_with_backward}, key=f"backward {with_grad}")
            assert torch.is_grad_enabled() == with_grad
            assert made.choices()[0]["ruled_out"] == {}
    assert set(recorded) == {(False, False)} and weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_results_are_freed_at_once(path):
    alive, most = [], []

    def function(error=None):
        def call():
            result = torch.ones(4)
            alive.append(weakref.ref(result))
            if error:
                raise error("with the result in its frame")
            return result

        return call

    def measure(candidates, device):
        most.append(sum(ref() is not None for ref in alive))
        return dict.fromkeys(candidates, 1.0)

    gc.collect()
    gc.disable()  # nothing may be left in a cycle
    try:
        made = Autotuner(path, measure)
        choose(made, {"ours": function(), "a": function(), "b": function(RuntimeError), "c": function()})
        assert most == [0] and len(alive) == 4
        alive.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            choose(made, {"ours": function(ValueError), "a": function()}, key="the default fails")
        assert most == [0, 0] and len(alive) == 2
    finally:
        gc.enable()


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


# The clock


def test_measure_tells_a_slow_call_from_a_fast_one():
    """By a factor of some 100, so that no load can turn it round."""
    found = _autotune_measure.measure({"slow": lambda: time.sleep(5e-3), "fast": lambda: None}, CPU)
    assert found["slow"] >= 5e-3 and 0 < found["fast"] < 1e-3


def test_measure_alternates_and_takes_medians(monkeypatch):
    calls, now = [], [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def function(name, seconds):
        def call():
            calls.append(name)
            now[0] += seconds * (1000 if len(calls) == 20 else 1)  # one call is disturbed

        return call

    found = _autotune_measure.measure({"a": function("a", 1.0), "b": function("b", 0.5)}, CPU)
    assert found == {"a": pytest.approx(1.0), "b": pytest.approx(0.5)}
    warm_up = 2 * (_autotune_measure.WARM_UPS + 1)
    assert calls[warm_up : warm_up + 6] == ["a", "b", "b", "a", "a", "b"]
    assert calls.count("a") == calls.count("b") == warm_up // 2 + _autotune_measure.ROUNDS


@pytest.mark.parametrize("seconds, calls", [(1.0, 1), (_autotune_measure.SAMPLE_SECONDS / 8, 8), (1e-9, _autotune_measure.MAX_CALLS), (0.0, 50)])
def test_short_calls_are_timed_together(seconds, calls):
    assert _autotune_measure._calls(seconds) == calls


def test_cuda_is_timed_by_events_on_the_current_stream(monkeypatch):
    """With stand-ins: a device that works off its queue only when it is waited for."""
    queue, now = [], [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            assert stream == "the current stream of cuda:3"
            queue.append(lambda: setattr(self, "time", now[0]))

        def synchronize(self):
            while queue:
                queue.pop(0)()

        def elapsed_time(self, end):
            return 1000 * (end.time - self.time)

    def function(seconds):
        return lambda: queue.append(lambda: now.__setitem__(0, now[0] + seconds))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the current stream of {device}")
    found = _autotune_measure.measure({"a": function(3e-4), "b": function(7e-5)}, torch.device("cuda", 3))
    assert found == {"a": pytest.approx(3e-4), "b": pytest.approx(7e-5)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")
def test_on_a_gpu(path):
    x = torch.randn(1024, 1024, device="cuda")
    candidates = {"ours": lambda: (x.double() @ x.double()).float(), "torch": lambda: x @ x}
    made, replayed = Autotuner(path), []
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed.append(made.choose("mm", "captured", candidates, "ours", device=x.device))
    assert replayed == ["ours"] and made.choices() == []
    state = torch.cuda.get_rng_state()
    assert made.choose("mm", "timed", candidates, "ours", device=x.device) == "torch"
    assert torch.equal(torch.cuda.get_rng_state(), state)
    [choice] = made.choices()
    assert choice["device"].startswith(torch.cuda.get_device_name())
    with torch.cuda.graph(graph):
        replayed.append(Autotuner(path).choose("mm", "timed", candidates, "ours", device=x.device))
    assert replayed[1] == "torch"
