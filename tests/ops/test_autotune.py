"""The autotuner: which candidate it chooses, when it does not time, and that it leaves everything else as it was."""
import math
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
import torch
from autotuning import CPU, EQUAL, KEY, Times, choose, gives, raises, tuner

from ddpm_fast import autotune
from ddpm_fast.autotune import MARGIN, Autotuner


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "autotune.json"


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

    made._changed.wait_for = lambda *_: pytest.fail("a choice waits for itself")
    assert choose(made, EQUAL | {"torch": nesting}) == "torch"
    assert inner == ["ours"] * 3
    assert choose(made, key="inner") == "torch"


# Threads

HANGS = 600  # seconds after which a thread is given up: a guard, which no load reaches


class Slow(Times):
    """Waits in the middle of a measurement until it is let go."""

    def __init__(self, **seconds):
        super().__init__(**seconds)
        self.begun, self.go_on = threading.Event(), threading.Event()

    def __call__(self, candidates, device):
        self.begun.set()
        assert self.go_on.wait(HANGS)
        return super().__call__(candidates, device)


@pytest.fixture
def patient(monkeypatch):
    """Threads wait as long as it takes. Gives a function that returns when a number of threads wait, whatever the machine's load."""
    monkeypatch.setattr(autotune, "WAIT_SECONDS", HANGS)

    def watch(made):
        waiting, wait = threading.Semaphore(0), made._changed.wait_for
        made._changed.wait_for = lambda *arguments: waiting.release() or wait(*arguments)
        return lambda count: all(waiting.acquire(timeout=HANGS) for _ in range(count))

    return watch


def asking(made, found, **options):
    thread = threading.Thread(target=lambda: found.append(choose(made, **options)))
    thread.start()
    return thread


def test_threads_that_ask_for_the_same_time_it_once(path, patient):
    made, found = Autotuner(path, Slow(ours=2.0, torch=1.0)), []
    wait_until = patient(made)
    threads = [asking(made, found) for _ in range(8)]
    assert made._measure.begun.wait(HANGS)
    assert choose(made, key="another") == "ours"  # not remembered: its turn comes
    assert wait_until(7)
    assert found == []
    made._measure.go_on.set()
    for thread in threads:
        thread.join(HANGS)
    assert found == ["torch"] * 8 and len(made._measure.asked) == 1  # woken: their patience has no end
    assert choose(made, key="another") == "torch"


def test_after_a_thread_that_failed_another_one_times(path, patient):
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
    assert made._measure.begun.wait(HANGS)
    wait_until, waiting = patient(made), asking(made, found)
    assert wait_until(1)
    made._measure.go_on.set()
    failing.join(HANGS)
    waiting.join(HANGS)
    assert found == ["torch"]


def test_a_thread_does_not_wait_for_ever(monkeypatch, path):
    monkeypatch.setattr(autotune, "WAIT_SECONDS", 0.05)
    made, found = Autotuner(path, Slow(ours=2.0, torch=1.0)), []
    first = asking(made, found)
    assert made._measure.begun.wait(HANGS)
    assert choose(made) == "ours" and found == []  # comes back though nobody has let the first go on
    made._measure.go_on.set()
    first.join(HANGS)
    assert found == ["torch"] and choose(made) == "torch"
