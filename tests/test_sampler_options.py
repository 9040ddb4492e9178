"""What can be asked of a sampler: guidance, dynamic thresholding, inpainting, interpolation, and the CUDA graph of a step."""
import math
import weakref

import pytest
import torch
from numerics import assert_bits_equal, assert_close_to_exact
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_fast import GaussianDiffusion, Noise, NoiseSchedule, Sampler, UNet, sample
from ddpm_fast.noise import FOLD_SAMPLE_KNOWN
from ddpm_fast.reverse_step import dynamic_threshold

T = 20
DIFFUSION = GaussianDiffusion(NoiseSchedule.linear(T, 1e-3, 0.3))
SAMPLERS = ["ddpm", "ddim", "dpmpp_2m"]
SHAPE = (3, 2, 5)


def model(x, t, labels=None):
    """Elementwise; label 4 stands for no class."""
    shift = 0.0 if labels is None else 0.1 * labels.view(-1, 1, 1)
    return torch.tanh(x) * (0.5 + 0.02 * t.view(-1, 1, 1)) + shift


def network(**overrides):
    """A small UNet, with noise where a new one has zeros that would hide its inputs."""
    torch.manual_seed(0)
    net = UNet.from_preset("digits", **overrides).eval()
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return net


LABELS = torch.tensor([0, 3, 1])


# Guidance.


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guided_sampling_is_sampling_of_the_guided_prediction(sampler):
    def guided(x, t):
        without = model(x, t, torch.full((3,), 4))
        return without + 2.5 * (model(x, t, LABELS) - without)

    got = sample(model, DIFFUSION, SHAPE, 4, sampler=sampler, labels=LABELS, guidance=2.5, null_label=4)
    assert_close_to_exact(got, sample(guided, DIFFUSION, SHAPE, 4, sampler=sampler).double(), atol=1e-5)


def test_guidance_of_one_asks_the_model_once_a_step():
    sizes = []

    def spy(x, t, labels):
        sizes.append(len(x))
        assert torch.equal(labels[:3], LABELS) and (labels[3:] == 4).all() and t.shape == labels.shape
        return model(x, t, labels)

    sample(spy, DIFFUSION, SHAPE, labels=LABELS)
    assert sizes == [3] * T
    sample(spy, DIFFUSION, SHAPE, labels=LABELS, guidance=0.5, null_label=4, steps=2)
    assert sizes[T:] == [6, 6]


def test_a_guided_sample_does_not_depend_on_its_batch():
    whole = sample(model, DIFFUSION, SHAPE, 4, labels=LABELS, guidance=2.0, null_label=4)
    alone = sample(model, DIFFUSION, (1, 2, 5), 4, labels=LABELS[1:2], guidance=2.0, null_label=4, first_sample=1)
    assert_close_to_exact(alone, whole[1:2].double(), atol=1e-5)


def test_the_unet_says_itself_what_no_class_is():
    net = network(num_classes=10, learned_variance=True)
    diffusion = GaussianDiffusion(NoiseSchedule.linear(T, 1e-3, 0.3), variance="learned_range")
    draw = lambda scale: sample(net, diffusion, (2, 1, 8, 8), labels=torch.tensor([1, 7]), guidance=scale, steps=3, sampler="ddim")  # noqa: E731
    assert draw(3.0).isfinite().all() and (draw(3.0) != draw(1.0)).any()
    assert_close_to_exact(draw(0.0), sample(net, diffusion, (2, 1, 8, 8), steps=3, sampler="ddim").double(), atol=1e-4)


# Dynamic thresholding.


def test_threshold_scales_what_is_loud_and_leaves_what_is_not():
    x = torch.stack([torch.linspace(-0.9, 0.5, 11), torch.linspace(-4, 4, 11)]).view(2, 1, 11)
    got = dynamic_threshold(x, 0.75)
    assert_bits_equal(got[0], x[0])
    s = x[1].abs().quantile(0.75)
    assert_close_to_exact(got[1], (x[1].clamp(-s, s) / s).double(), ulps=4)
    assert_bits_equal(dynamic_threshold(x, 1.0)[1], x[1] / 4)


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_thresholded_step_is_the_step_of_the_thresholded_guess(sampler, variance):
    # A model that predicts x̂0 thresholded already is sampled the same way. Loud, so that the threshold matters.
    schedule = NoiseSchedule.linear(T, 1e-3, 0.3)
    loud = lambda x, t: 3.0 * x + 0.1  # noqa: E731
    raw = lambda x: [] if variance == "fixed_small" else [torch.sin(x)]  # noqa: E731
    starts = []
    got = sample(
        lambda x, t: torch.cat([loud(x, t), *raw(x)], 1), GaussianDiffusion(schedule, "x_start", variance), SHAPE, 4,
        sampler=sampler, threshold=0.8, callback=lambda t, x, x_start: starts.append(x_start),
    )  # fmt: skip
    expected = sample(lambda x, t: torch.cat([dynamic_threshold(loud(x, t), 0.8), *raw(x)], 1), GaussianDiffusion(schedule, "x_start", variance), SHAPE, 4, sampler=sampler)
    assert_close_to_exact(got, expected.double(), atol=1e-5)
    assert all(s.abs().max() <= 1 for s in starts)


def test_guidance_comes_before_the_threshold():
    options = dict(labels=LABELS, guidance=6.0, null_label=4, sampler="ddim", steps=5)
    assert sample(model, DIFFUSION, SHAPE, 4, threshold=0.9, **options).abs().max() <= 1
    assert (sample(model, DIFFUSION, SHAPE, 4, threshold=0.9, **options) != sample(model, DIFFUSION, SHAPE, 4, **options)).any()


# Inpainting.


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [None, 4])
def test_the_known_part_is_kept_and_noised_on_the_way(sampler, steps):
    x_start, mask = torch.linspace(-1, 1, 10).view(1, 2, 5), torch.zeros(2, 5, dtype=torch.bool)
    mask[:, :2] = True
    seen = []

    def spy(x, t):
        seen.append((int(t[0]), x.clone()))
        return model(x, t)

    x = sample(spy, DIFFUSION, SHAPE, 4, sampler=sampler, steps=steps, known=(x_start, mask), first_sample=7)
    assert_bits_equal(x[:, :, :2], x_start.expand(SHAPE)[:, :, :2])
    assert (x[0] != x[1])[:, 2:].any()
    key = Noise(4, first_sample=7).fold_in(FOLD_SAMPLE_KNOWN)
    for t, state in seen:
        noised = DIFFUSION.q_sample(x_start.expand(SHAPE).contiguous(), torch.full((3,), t), key.at(stream=t))
        assert_bits_equal(state[:, :, :2], noised[:, :, :2])


def test_inpainting_draws_what_fits():
    # Two correlated values, of which one is known: the exact model of that Gaussian moves the other one to its side.
    rho, schedule, n = 0.95, NoiseSchedule.linear(200, 1e-3, 0.1), 2**12
    covariance = torch.tensor([[1.0, rho], [rho, 1.0]]) * 0.09

    def best(x, t):
        a = schedule.alphas_bar[t].float().view(-1, 1, 1)
        inverse = torch.linalg.inv(a * covariance + (1 - a) * torch.eye(2))
        return (x[:, None, :] @ inverse @ covariance).squeeze(1) * a.view(-1, 1).sqrt()

    known = (torch.tensor([0.5, 0.0]), torch.tensor([True, False]))
    x = sample(best, GaussianDiffusion(schedule, "x_start", "fixed_small"), (n, 2), known=known, clip=False)[:, 1]
    # Masked noising is an approximation: it pulls the rest to the right side, and not all the way (Lugmayr et al. 2022).
    assert 0.5 * rho * 0.5 < x.mean() < rho * 0.5 and x.std() < 0.3


# Interpolation.


def test_ends_of_an_interpolation_are_the_images_noised_and_sampled_back():
    a, b = torch.full(SHAPE, 0.5), torch.linspace(-1, 1, 30).view(SHAPE)
    draw = Sampler(model, DIFFUSION, "ddim", steps=[0, 4, 9, 19])
    mixed = draw.interpolate(a, b, [0.0, 0.5, 1.0], t=12, seed=3)
    assert mixed.shape == (3, *SHAPE) and mixed.isfinite().all()
    key, time = Noise(3).fold_in(FOLD_SAMPLE_KNOWN), torch.full((3,), 9)  # the last step that is not after 12
    for k, image in ((0, a), (1, b)):
        x = DIFFUSION.q_sample(image, time, key.at(stream=k))
        for t, before in ((9, 4), (4, 0), (0, None)):
            out = model(x, torch.full((3,), t))
            signal, sigma = DIFFUSION.schedule.sqrt_alphas_bar, DIFFUSION.schedule.sqrt_one_minus_alphas_bar
            guess = ((x - sigma[t] * out) / signal[t]).clamp(-1, 1)
            x = guess if before is None else signal[before] * guess + sigma[before] * (x - signal[t] * guess) / sigma[t]
        assert_close_to_exact(mixed[2 * k], x.double(), atol=1e-5)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_an_interpolation_of_a_perfect_model_ends_in_its_image(sampler, graph):
    # A solver with a history has none where an interpolation starts, in the middle of its table: that step is of first order.
    target = torch.linspace(-1, 1, 30).view(SHAPE)
    draw = (captured if graph else Sampler)(lambda x, t: target.clone(), GaussianDiffusion(DIFFUSION.schedule, "x_start"), sampler, steps=8)
    signal, sigma = DIFFUSION.schedule.sqrt_alphas_bar, DIFFUSION.schedule.sqrt_one_minus_alphas_bar
    key, t = Noise(3).fold_in(FOLD_SAMPLE_KNOWN), int(draw.table.chain_times[5])
    seen = []
    draw.model = lambda x, t: seen.append(x.clone()) or target.clone()
    mixed = draw.interpolate(target, target, [0.0], t=t, seed=3)
    assert_close_to_exact(mixed[0], target.double(), ulps=4)
    if not graph:  # on the line between the image and its noise all the way
        noise = key.at(stream=0).materialize(SHAPE)
        for x, time in zip(seen, reversed(draw.table.chain_times[:6].tolist()), strict=True):
            assert_close_to_exact(x, (signal[time] * target + sigma[time] * noise).double(), atol=1e-6)


def test_mixture_has_the_variance_of_its_noise_level():
    # Of images that are zero only the noise is left, and one step of DDIM of a model that says 0 only scales it.
    zero = torch.zeros(64, 64)
    mixed = Sampler(lambda x, t: torch.zeros_like(x), DIFFUSION, "ddim", steps=[12], clip=False).interpolate(zero, zero, [0.0, 0.25, 0.5, 1.0], t=12)
    assert (mixed.std((1, 2)) / mixed[0].std() - 1).abs().max() < 0.05


# The CUDA graph. There is no device here: the step is recorded by tracing its operations on fixed tensors, which like a capture
# fails on whatever the host would have to read, and keeps whatever Python knew while recording.


def traced(body):
    body()  # as the warm-up: kernels are chosen
    nothing = torch.zeros(())
    module = make_fx(lambda _: body())(nothing)
    return lambda: module(nothing)


class NoReading(TorchDispatchMode):
    """Fails on operations that make the host wait for a device."""

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        assert function.overloadpacket._qualified_op_name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"), function
        return function(*arguments, **(kwargs or {}))


def captured(*arguments, **options):
    found = Sampler(*arguments, graph=True, **options)
    found._capture = traced
    return found


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
    for change in (lambda: setattr(net, "weight", torch.nn.Parameter(torch.zeros(5, 5))), lambda: setattr(net.bias, "data", torch.ones(5)), net.eval):
        change()
        assert_bits_equal(draw(SHAPE), Sampler(Of(net), DIFFUSION, steps=3)(SHAPE))
    with torch.no_grad():
        net.weight.fill_(0.25)  # in place: the graph reads it where it is
    graph = next(iter(draw._graphs.values()))
    assert_bits_equal(draw(SHAPE), Sampler(Of(net), DIFFUSION, steps=3)(SHAPE))
    assert next(iter(draw._graphs.values())) is graph


def test_the_old_graph_goes_before_the_new_one_is_recorded():
    draw = captured(model, DIFFUSION, steps=3)
    draw(SHAPE)
    old = weakref.ref(next(iter(draw._graphs.values())))

    def capture(body):
        assert old() is None
        return traced(body)

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
    from ddpm_fast import step_graph

    log, fail = [], []

    class Stream:
        def wait_stream(self, other):
            log.append("wait")

        def __enter__(self):
            log.append("aside")

        def __exit__(self, *_):
            log.append("back")

    class Graph:
        def replay(self):
            log.append("replay")

    class Capturing(Stream):
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
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: Capturing())
    replay = step_graph.cuda_capture(lambda: log.append("body"))
    replay()
    assert log == ["wait", "aside", "body", "body", "body", "back", "wait", "begin", "body", "end", "replay"]
    fail.append(True)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph .*not permitted.*; sample with graph=False"):
        step_graph.cuda_capture(lambda: None)


# What is refused.


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(threshold=0.0), r"threshold must lie in \(0, 1\], got 0.0"),
        (dict(guidance=math.nan, null_label=4), "guidance must be a finite number, got nan"),
        (dict(guidance=2.0, labels=LABELS), "guidance 2.0 needs to know what the model takes for no class; give null_label"),
        (dict(guidance=2.0, null_label=4), "guidance 2.0 needs labels, got none"),
        (dict(labels=LABELS[:2]), r"labels must be int64 of shape \(3,\), got torch.int64 \(2,\)"),
        (dict(labels=LABELS.float()), r"labels must be int64 of shape \(3,\), got torch.float32 \(3,\)"),
        (dict(known=(torch.zeros(7), torch.ones(7, dtype=torch.bool))), r"must broadcast to \(3, 2, 5\), got \(7,\) and \(7,\)"),
        (dict(known=(torch.full((5,), 3.0), torch.ones(5, dtype=torch.bool))), r"the known image must be finite and lie in \[-1, 1\]"),
    ],
)
def test_bad_options_are_named_before_the_model_runs(options, message):
    def never(x, t, labels=None):
        raise AssertionError("the model ran")

    with pytest.raises(ValueError, match=message):
        sample(never, DIFFUSION, SHAPE, **options)


def test_a_mask_of_numbers_is_refused():
    with pytest.raises(TypeError, match="the mask must be bool, True where the image is known, got torch.float32"):
        sample(model, DIFFUSION, SHAPE, known=(torch.zeros(5), torch.ones(5)))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(2, 3), torch.zeros(3, 3), [0.5], 5), r"a and b must have one shape \(N, C, \.\.\.\), got \(2, 3\) and \(3, 3\)"),
        ((torch.zeros(2, 3), torch.full((2, 3), 2.0), [0.5], 5), r"b must be finite and lie in \[-1, 1\]"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), [], 5), r"weights must be one or more numbers in \[0, 1\], got \[\]"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), [1.5], 5), r"weights must be one or more numbers in \[0, 1\], got \[1.5\]"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), [0.5], -1), r"t must lie in 0\.\.19, got -1"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), [0.5], 20), r"t must lie in 0\.\.19, got 20"),
        ((torch.zeros(0, 3), torch.zeros(0, 3), [0.5], 5), "a and b must have at least one image, got none"),
    ],
)
def test_bad_interpolations_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampler(model, DIFFUSION).interpolate(*arguments)
