"""The CUDA graph of a step: replayed steps are the steps, for the weights of now, and the loop never waits for the device."""

import contextlib
import weakref

import pytest
import torch
from numerics import assert_bits_equal, assert_close_to_exact
from sampled import DIFFUSION, LABELS, SAMPLERS, SHAPE, captured, model, network, traced
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_fast import Noise, Sampler, sample
from ddpm_fast.backends import missing
from ddpm_fast.sampling.sampler import sample_loop


class NoReading(TorchDispatchMode):
    """Fails on operations that make the host wait for a device."""

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        assert function.overloadpacket._qualified_op_name not in (
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::is_nonzero",
            "aten::equal",
        ), function
        return function(*arguments, **(kwargs or {}))


class Of(torch.nn.Module):
    """A module as a model."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t):
        return self.net(x)


OPTIONS = [{}, {"threshold": 0.9}, {"guidance": 3.0, "null_label": 4}, {"guidance": 3.0, "null_label": 4, "threshold": 0.9}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_replayed_steps_are_the_steps(sampler, options):
    labels = LABELS if "guidance" in options else None
    draw = captured(model, DIFFUSION, sampler, **options)
    plain = Sampler(model, DIFFUSION, sampler, graph=False, **options)
    # Twice, with other seeds and labels: the second batch goes through the same recording.
    for seed, first in ((4, 0), (5, 3)):
        got = draw(SHAPE, seed, first_sample=first, labels=labels)
        assert_bits_equal(got, plain(SHAPE, seed, first_sample=first, labels=labels))
        assert len(draw._graphs) == 1
        labels = None if labels is None else labels.flip(0)
    draw((2, 2, 5), labels=None if labels is None else labels[:2])
    assert len(draw._graphs) == 1  # of the last shape: an old one gives its memory back


def test_replayed_steps_with_callback_inpainting_and_interpolation():
    known = (torch.zeros(SHAPE), torch.rand(SHAPE) < 0.5)
    draw, plain = captured(model, DIFFUSION, "dpmpp_2m", steps=7), Sampler(model, DIFFUSION, "dpmpp_2m", steps=7)
    seen, expected = [], []
    draw(SHAPE, known=known, callback=lambda t, x, x_start: seen.append((x, x_start)))
    plain(SHAPE, known=known, callback=lambda t, x, x_start: expected.append((x, x_start)))
    for (x, x_start), (y, y_start) in zip(seen, expected, strict=True):
        assert_bits_equal(x, y)
        assert_bits_equal(x_start, y_start)
    a, b = torch.zeros(SHAPE), torch.ones(SHAPE)
    assert_bits_equal(draw.interpolate(a, b, [0.3, 0.6], 15), plain.interpolate(a, b, [0.3, 0.6], 15))


def test_a_graph_forgets_what_a_broken_batch_left():
    draw = captured(model, DIFFUSION, "dpmpp_2m", steps=4)
    good = draw(SHAPE)
    graph = next(iter(draw._graphs.values()))
    graph.x_start.fill_(float("nan"))
    assert_bits_equal(draw(SHAPE), good)


def test_a_graph_is_of_the_weights_that_it_was_recorded_with():
    net = torch.nn.Linear(5, 5)
    draw = captured(Of(net), DIFFUSION, steps=3)
    draw(SHAPE)
    for change in (
        lambda: setattr(net, "weight", torch.nn.Parameter(torch.zeros(5, 5))),
        lambda: setattr(net.bias, "data", torch.ones(5)),
        net.eval,
    ):
        change()
        assert_bits_equal(draw(SHAPE), Sampler(Of(net), DIFFUSION, steps=3)(SHAPE))
    with torch.no_grad():
        net.weight.fill_(0.25)  # in place: the graph reads it where it is
    graph = next(iter(draw._graphs.values()))
    assert_bits_equal(draw(SHAPE), Sampler(Of(net), DIFFUSION, steps=3)(SHAPE))
    assert next(iter(draw._graphs.values())) is graph


def test_a_graph_is_of_the_modules_hooks_and_layouts_that_it_was_recorded_with():
    net = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Tanh())
    draw = captured(Of(net), DIFFUSION, steps=3)
    drawn = [draw(SHAPE)]
    handles = []
    for change in (
        lambda: handles.append(net.register_forward_hook(lambda *arguments: 0.5 * arguments[-1])),
        lambda: handles.pop().remove(),
        lambda: net.__setitem__(1, torch.nn.Sigmoid()),
        lambda: setattr(net[0], "weight", torch.nn.Parameter(net[0].weight.detach().t())),  # the same memory
    ):
        change()
        drawn.append(draw(SHAPE))
        assert_bits_equal(drawn[-1], Sampler(Of(net), DIFFUSION, steps=3)(SHAPE))
        assert not torch.equal(drawn[-1], drawn[-2])


class Casts(TorchDispatchMode):
    """Counts the tensors that are cast, by shape."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        if function.overloadpacket._qualified_op_name == "aten::_to_copy":
            self.shapes.append(tuple(arguments[0].shape))
        return function(*arguments, **(kwargs or {}))


def test_under_autocast_a_graph_has_the_casts_of_the_weights_in_it():
    # Autocast keeps them till it ends: a graph without them would read what the warm-up left, of old weights and in memory given back.
    net, casts = torch.nn.Linear(5, 5), Casts()

    def capture(body, device):
        body()  # the warm-up
        with casts:
            body()
        return body

    draw = captured(Of(net), DIFFUSION, steps=3)
    draw._capture = capture
    with torch.autocast("cpu", torch.bfloat16):
        draw(SHAPE)
        assert torch.is_autocast_cache_enabled()
    assert (5, 5) in casts.shapes


def test_the_old_graph_goes_before_the_new_one_is_recorded():
    draw = captured(model, DIFFUSION, steps=3)
    draw(SHAPE)
    old = weakref.ref(next(iter(draw._graphs.values())))

    def capture(body, device):
        assert old() is None
        return traced(body, device)

    draw._capture = capture
    draw((2, 2, 5))


def test_a_model_that_returns_its_input_is_captured_too():
    draw = captured(lambda x, t: x, DIFFUSION)
    assert_bits_equal(draw(SHAPE), sample(lambda x, t: x.clone(), DIFFUSION, SHAPE))


def test_the_unet_is_captured_whole():
    net = network()
    got = captured(net, DIFFUSION, steps=3)((2, 1, 8, 8))
    assert_close_to_exact(got, sample(net, DIFFUSION, (2, 1, 8, 8), steps=3).double(), atol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("graph", [False, True])
def test_the_loop_never_waits_for_the_device(sampler, graph):
    draw = captured(model, DIFFUSION, sampler, threshold=0.9) if graph else Sampler(model, DIFFUSION, sampler, threshold=0.9)
    draw(SHAPE)  # tables are made, and a graph recorded

    with NoReading():
        draw(SHAPE)


def test_capture_runs_warms_up_aside_and_records_once(monkeypatch):
    # The calls to torch.cuda, in their order, with stand-ins.
    from ddpm_fast.sampling import cuda_graph

    log, fail, second = [], [], torch.device("cuda", 1)

    class Stream:
        def __init__(self, device):
            assert device == second  # not the current one

        def wait_stream(self, other):
            log.append("wait")

        def __enter__(self):
            log.append("aside")

        def __exit__(self, *_):
            log.append("back")

    class Graph:
        def replay(self):
            log.append("replay")

    class Capturing:
        def __enter__(self):
            log.append("begin")
            if fail:
                raise RuntimeError("operation not permitted when stream is capturing")

        def __exit__(self, *_):
            log.append("end")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: Capturing())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext(log.append(f"on {device}")))
    replay = cuda_graph.cuda_capture(lambda: log.append("body"), second)
    replay()
    assert log == ["on cuda:1", "wait", "aside", "body", "body", "body", "back", "wait", "begin", "body", "end", "replay"]
    fail.append(True)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph .*not permitted.*; sample with graph=False"):
        cuda_graph.cuda_capture(lambda: None, second)


@pytest.mark.skipif(bool(missing("cuda")), reason=f"a CUDA graph: {missing('cuda')}")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_on_a_device_the_graph_gives_the_steps_without_waiting(sampler):
    net = network().cuda()
    shape, draw, plain = (4, 1, 8, 8), Sampler(net, DIFFUSION, sampler), Sampler(net, DIFFUSION, sampler, graph=False)
    expected = plain(shape)
    draw(shape)  # recorded
    assert len(draw._graphs) == 1
    step, start = next(iter(draw._graphs.values())), torch.randn(shape, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        list(sample_loop(step, start, Noise(0), keep=False))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close_to_exact(draw(shape).cpu(), expected.cpu().double(), atol=1e-4)


@pytest.mark.skipif(bool(missing("cuda")), reason=f"a CUDA graph: {missing('cuda')}")
def test_on_a_device_a_graph_outlives_its_autocast():
    """Recorded in one block, replayed in another: casts of the weights that died with the first must not be read."""
    net, shape = network().cuda(), (4, 1, 8, 8)
    draw, plain = Sampler(net, DIFFUSION, steps=4), Sampler(net, DIFFUSION, steps=4, graph=False)
    for seed in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            got, expected = draw(shape, seed), plain(shape, seed)
        torch.empty(2**24, device="cuda").fill_(torch.nan)  # where given back memory may be
        assert_close_to_exact(got.float().cpu(), expected.double().cpu(), atol=0.05)
    assert len(draw._graphs) == 1


@pytest.mark.skipif(bool(missing("cuda")) or torch.cuda.device_count() < 2, reason="there are not two GPUs")
def test_on_another_device_than_the_current_one():
    net, shape = network().to("cuda:1"), (4, 1, 8, 8)
    draw, plain = Sampler(net, DIFFUSION), Sampler(net, DIFFUSION, graph=False)
    assert torch.cuda.current_device() == 0
    got, expected = draw(shape), plain(shape)
    assert got.device == torch.device("cuda", 1) and len(draw._graphs) == 1 and torch.cuda.current_device() == 0
    assert_close_to_exact(got.cpu(), expected.cpu().double(), atol=1e-4)
