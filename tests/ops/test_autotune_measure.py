"""How the autotuner compares and times: tolerances, the clock, and what a measurement leaves behind."""
import gc
import math
import time
import warnings
import weakref

import pytest
import torch
from autotuning import CPU, choose, gives, tuner

from ddpm_fast import _autotune_measure
from ddpm_fast.autotune import Autotuner


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "autotune.json"


# Results


def test_every_tensor_of_a_result_is_compared(path):
    made = tuner(path, ours=2.0, torch=1.0)
    pair = lambda second: lambda: (torch.ones(4), [None, torch.full((4,), second)])  # noqa: E731
    with pytest.warns(RuntimeWarning, match="result 1 differs from that of ours by 1, more than"):
        assert choose(made, {"ours": pair(1.0), "torch": pair(2.0)}) == "ours"
    assert choose(made, {"ours": pair(1.0), "torch": pair(1.0)}, key="equal") == "torch"


def test_where_the_baseline_is_not_finite_nothing_is_compared(path):
    values = {"ours": lambda: torch.tensor([math.nan, math.inf, 1.0]), "torch": lambda: torch.tensor([5.0, 5.0, 1.0])}
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


# The clock


def test_measure_counts_in_seconds():
    """A sleep takes at least as long as it is told to, under any load."""
    found = _autotune_measure.measure({"slow": lambda: time.sleep(5e-3), "fast": lambda: None}, CPU)
    assert found["slow"] >= 5e-3 and found["fast"] >= 0


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
