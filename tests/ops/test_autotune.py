"""The chooser between kernels: which candidate it takes, when it does not time, and that it leaves everything else as it was."""

import gc
import math
import threading
import warnings
import weakref

import pytest
import torch

from ddpm_fast import autotune
from ddpm_fast.autotune import LEAST_TOLERANCE, MARGIN, choose

CPU = torch.device("cpu")
KEY = ((2, 256, 64), torch.float32, "forward")


class Clock:
    """Time that passes in the calls of candidates alone, by as much as each is said to take."""

    def __init__(self):
        self.now, self.called = 0.0, []

    def __call__(self):
        return self.now

    def candidate(self, name, seconds, *result):
        def call():
            self.called.append(name)
            self.now += seconds
            return tuple(x() if callable(x) else x for x in result or (torch.ones(4),))

        return call

    def pair(self, ours=2.0, theirs=1.0):
        return {"ours": self.candidate("ours", ours), "torch": self.candidate("torch", theirs)}


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(autotune.time, "perf_counter", made)
    autotune.clear()
    yield made
    autotune.clear()


def chosen(candidates, key=KEY, device=CPU):
    return choose("attention", key, candidates, "ours", device)


def raises(error):
    def call():
        raise error

    return call


UNTOUCHABLE = dict.fromkeys(("ours", "torch"), raises(AssertionError("called")))


@pytest.mark.parametrize(
    "ours, theirs, expected",
    [
        (2.0, 1.0, "torch"),
        (1.0, 2.0, "ours"),
        (1.0, 1.0, "ours"),
        (0.5 * (1 + MARGIN), 1.0, "ours"),
        (2 * MARGIN - 1, 1.0, "torch"),
        (1e-5, 2e-5, "ours"),
    ],
)
def test_the_faster_is_chosen_once_and_a_tie_is_the_default(clock, ours, theirs, expected):
    assert chosen(clock.pair(ours, theirs)) == expected
    assert clock.called[:2] == ["ours", "torch"]  # the default's result is what the other is compared with
    assert chosen(UNTOUCHABLE) == expected
    [choice] = autotune.choices()
    assert choice == dict(
        device="cpu", op="attention", key=["(2, 256, 64)", "torch.float32", "forward"], chosen=expected,
        seconds={"ours": pytest.approx(ours), "torch": pytest.approx(theirs)}, ruled_out={},
    )  # fmt: skip


def test_each_shape_dtype_and_device_is_a_choice_of_its_own(clock):
    assert chosen(clock.pair()) == "torch"
    for k, other in enumerate([((2, 64, 64), *KEY[1:]), (KEY[0], torch.float16, KEY[2]), (*KEY[:2], "with gradient")]):
        assert chosen(clock.pair(1.0, 2.0), other) == "ours" and len(autotune.choices()) == k + 2
    assert chosen(clock.pair(1.0, 2.0), device=torch.device("cpu", 0)) == "ours"
    autotune.clear()
    assert autotune.choices() == [] and chosen(clock.pair(1.0, 2.0)) == "ours"


def test_candidates_alternate_and_one_disturbed_call_does_not_matter(clock):
    pair, calls = clock.pair(1.0, 0.5), clock.called

    def disturbed():
        clock.now += 1000 * (len(calls) == 21)
        return pair["torch"]()

    assert autotune.measure(pair | {"torch": disturbed}, CPU) == {"ours": pytest.approx(1.0), "torch": pytest.approx(0.5)}
    begins = len(calls) - 2 * autotune.ROUNDS
    assert calls[begins : begins + 6] == ["ours", "torch", "torch", "ours", "ours", "torch"]


def test_short_calls_are_timed_together(clock):
    autotune.measure({"ours": clock.candidate("ours", autotune.SAMPLE_SECONDS / 7.5)}, CPU)
    assert len(clock.called) == 3 + 8 * autotune.ROUNDS
    clock.called.clear()
    autotune.measure({"ours": clock.candidate("ours", 0.0)}, CPU)
    assert len(clock.called) == 3 + autotune.MAX_CALLS * autotune.ROUNDS


WRONG = [
    (torch.full((4,), math.nan), "its result is not finite where that of ours is"),
    (torch.tensor([1, 1, 1, math.inf]), "its result is not finite where that of ours is"),
    (torch.tensor([1, 1, 1, 1.5]), "its result differs from that of ours by 0.5, more than 0.0039"),
    (torch.ones(5), r"its result is [((5,), torch.float32)], that of ours is [((4,), torch.float32)]"),
    (torch.ones(4).half(), r"its result is [((4,), torch.float16)], that of ours is [((4,), torch.float32)]"),
]


@pytest.mark.parametrize("result, reason", WRONG)
def test_a_wrong_result_is_ruled_out_with_a_warning(clock, result, reason):
    with pytest.warns(RuntimeWarning, match="attention: 'torch' is not used: its result"):
        assert chosen({"torch": clock.candidate("torch", 1.0, result), "ours": clock.candidate("ours", 2.0)}) == "ours"
    assert clock.called.count("torch") == 1
    assert autotune.choices()[0]["ruled_out"] == {"torch": reason} and autotune.choices()[0]["seconds"].keys() == {"ours"}
    assert chosen(UNTOUCHABLE) == "ours"


def test_the_gradient_is_compared_too(clock):
    candidates = {name: clock.candidate(name, 1.0, torch.ones(4), torch.full((4,), grad)) for name, grad in (("ours", 1.0), ("torch", 2.0))}
    with pytest.warns(RuntimeWarning, match="its result differs from that of ours by 1, more than"):
        assert chosen(candidates) == "ours"


def test_where_the_default_is_not_finite_nothing_is_compared(clock):
    ours = torch.tensor([math.nan, math.inf, 1.0])
    for value, expected in ((1.0, "torch"), (2.0, "ours")):
        candidates = {"ours": clock.candidate("ours", 2.0, ours), "torch": clock.candidate("torch", 1.0, torch.tensor([5.0, 5.0, value]))}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert chosen(candidates, (value,)) == expected
        assert len(caught) == (expected == "ours")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_of_the_digits_of_the_largest_value_are_allowed(clock, dtype):
    allowed = max(torch.finfo(dtype).eps ** 0.5, LEAST_TOLERANCE) * 128
    for share, expected in ((0.9, "torch"), (1.1, "ours")):
        values = [torch.tensor([128.0, x]).to(dtype) for x in (0.0, share * allowed)]
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            assert (
                chosen({n: clock.candidate(n, s, x) for n, s, x in zip(("ours", "torch"), (2.0, 1.0), values)}, (dtype, share)) == expected
            )


def test_a_candidate_that_fails_is_ruled_out_and_the_default_s_failure_is_told(clock):
    assert chosen(clock.pair() | {"torch": raises(torch.cuda.OutOfMemoryError("tried to allocate\n2 GiB"))}) == "ours"
    assert autotune.choices()[0]["ruled_out"] == {"torch": "OutOfMemoryError: tried to allocate"}
    with pytest.warns(RuntimeWarning, match="attention: 'torch' is used, because 'ours' failed: RuntimeError: no kernel"):
        assert chosen(clock.pair() | {"ours": raises(RuntimeError("no kernel"))}, ("another",)) == "torch"


def test_where_all_fail_the_default_s_error_is_raised_and_the_next_call_tries_again(clock):
    for last in (ValueError("theirs"), KeyboardInterrupt()):
        with pytest.raises((RuntimeError, KeyboardInterrupt), match="ours|^$"):
            chosen({"torch": raises(last), "ours": raises(RuntimeError("ours"))})
        assert autotune.choices() == []
    assert chosen(clock.pair()) == "torch"


def test_switched_off_it_is_the_default_whatever_is_remembered(clock):
    assert chosen(clock.pair()) == "torch"
    try:
        autotune.enable(False)
        assert chosen(UNTOUCHABLE) == chosen(UNTOUCHABLE, ("new",)) == "ours" and autotune.why_off() == "switched off"
        autotune.enable()
        with pytest.raises(ZeroDivisionError), autotune.disabled():
            with autotune.disabled():
                pass
            assert chosen(UNTOUCHABLE) == chosen(UNTOUCHABLE, ("new",)) == "ours" and autotune.why_off() == "switched off"
            raise ZeroDivisionError
        torch.use_deterministic_algorithms(True)
        assert (
            chosen(UNTOUCHABLE) == chosen(UNTOUCHABLE, ("new",)) == "ours"
            and autotune.why_off() == "torch.use_deterministic_algorithms(True)"
        )
    finally:
        autotune.enable()
        torch.use_deterministic_algorithms(False)
    assert chosen(UNTOUCHABLE) == "torch" and autotune.why_off() == "" and len(autotune.choices()) == 1


def test_while_a_graph_is_captured_a_remembered_choice_holds_and_else_the_default(clock, monkeypatch):
    monkeypatch.setattr(autotune, "_capturing", lambda device: True)
    assert chosen(UNTOUCHABLE) == "ours" and autotune.choices() == []
    monkeypatch.undo()
    monkeypatch.setattr(autotune.time, "perf_counter", clock)
    assert chosen(clock.pair()) == "torch"
    monkeypatch.setattr(autotune, "_capturing", lambda device: True)
    assert chosen(UNTOUCHABLE) == "torch"


def test_under_torch_compile_it_is_the_default(clock):
    assert chosen(clock.pair()) == "torch"

    def scaled(x):
        return x * {"ours": 2, "torch": 3}[chosen({"ours": lambda: (x,), "torch": lambda: (x,)})]

    assert torch.compile(scaled, backend="eager", fullgraph=True)(torch.ones(1)) == 2
    assert scaled(torch.ones(1)) == 3


def test_while_something_is_timed_another_new_kind_takes_the_default(clock):
    """In a candidate itself and in another thread, as autograd's would be; nobody waits."""
    inner = []

    def nesting():
        inner.append(chosen(UNTOUCHABLE, ("inner",)))
        thread = threading.Thread(target=lambda: inner.append(chosen(UNTOUCHABLE)))
        thread.start()
        thread.join()
        return clock.pair()["torch"]()

    assert chosen(clock.pair() | {"torch": nesting}) == "torch"
    assert set(inner) == {"ours"} and len(autotune.choices()) == 1
    assert chosen(clock.pair(), ("inner",)) == "torch"


def test_no_graph_is_recorded_no_state_changes_and_results_are_freed(clock):
    x, alive = torch.ones(4, requires_grad=True), []

    def call():
        assert not torch.is_grad_enabled()
        result = x * 2
        alive.append(weakref.ref(result))
        return (result,)

    def fails():
        result = call()
        raise RuntimeError(len(result))

    state = torch.get_rng_state()
    gc.collect()
    gc.disable()  # freed by the end of the call, not by the collector
    try:
        assert chosen({"ours": call, "torch": call}) == "ours"
        assert chosen({"ours": call, "torch": fails}, ("fails",)) == "ours"
        assert not any(reference() is not None for reference in alive)
    finally:
        gc.enable()
    assert torch.is_grad_enabled() and x.grad is None and torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")
def test_on_a_gpu():
    autotune.clear()
    x = torch.randn(1024, 1024, device="cuda")
    candidates = {"ours": lambda: ((x.double() @ x.double()).float(),), "torch": lambda: (x @ x,)}
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert chosen(candidates, device=x.device) == "ours"
    assert autotune.choices() == []
    assert chosen(candidates, device=x.device) == "torch"
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert chosen(candidates, device=x.device) == "torch"
    autotune.clear()
