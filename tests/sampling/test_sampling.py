"""Sampling: what a sample depends on, the order of the steps, the tables by name, what is refused."""

import pytest
import torch
from numerics import assert_bits_equal, assert_close_to_exact

from ddpm_fast import GaussianDiffusion, Noise, NoiseSchedule, sample
from ddpm_fast.diffusion.samplers import ddim_table, ddpm_table, spaced_timesteps
from ddpm_fast.noise import FOLD_SAMPLE_START, FOLD_SAMPLE_STEPS
from ddpm_fast.ops._p_step import COLUMNS
from ddpm_fast.sampling.sampler import sample_loop
from ddpm_fast.sampling.step import ReverseStep

T = 20
SCHEDULE = NoiseSchedule.linear(T, 1e-3, 0.3)
DIFFUSION = GaussianDiffusion(SCHEDULE)
SAMPLERS = [
    {},
    {"sampler": "ddim"},
    {"sampler": "ddim", "eta": 0.5},
    {"steps": 6},
    {"sampler": "ddim", "steps": 1},
    {"sampler": "dpmpp_2m", "steps": 6},
]


def walk(model, table, x, noise, **options):
    return sample_loop(ReverseStep(model, table, x), x, noise, **options)


def model(x, t):
    """Elementwise, so that a sample's output cannot depend on its neighbours."""
    return torch.tanh(x) * (0.5 + 0.02 * t.view(-1, *[1] * (x.ndim - 1)))


@pytest.mark.parametrize("options", SAMPLERS, ids=str)
def test_sample_depends_on_seed_and_index_alone(options):
    # PyTorch's elementwise kernels round the ends of a tensor differently: T steps of an ulp or two, damped by the chain.
    whole = sample(model, DIFFUSION, (8, 3, 5), seed=4, **options)
    for i in (0, 5, 7):
        alone = sample(model, DIFFUSION, (1, 3, 5), seed=4, first_sample=i, **options)
        assert_close_to_exact(alone, whole[i : i + 1].double(), atol=1e-5)
    half = sample(model, DIFFUSION, (4, 3, 5), seed=4, first_sample=4, **options)
    assert_close_to_exact(half, whole[4:].double(), atol=1e-5)


def test_noise_of_a_sample_has_the_same_bits_in_any_batch():
    whole = Noise(4).fold_in(FOLD_SAMPLE_STEPS).at(stream=7).materialize((8, 3, 5))
    for i in (0, 3, 7):
        alone = Noise(4, first_sample=i).fold_in(FOLD_SAMPLE_STEPS).at(stream=7).materialize((1, 3, 5))
        assert_bits_equal(alone, whole[i : i + 1])


@pytest.mark.parametrize("options", SAMPLERS, ids=str)
def test_seed_reproduces_and_another_seed_differs(options):
    a, b, c = (sample(model, DIFFUSION, (2, 3, 5), seed=seed, **options) for seed in (4, 4, 5))
    assert_bits_equal(a, b)
    assert (a != c)[a.abs() < 1].all()  # the others are clipped
    assert a.isfinite().all() and a.dtype == torch.float32 and not a.requires_grad


def test_global_random_state_is_not_touched():
    before = torch.get_rng_state()
    sample(model, DIFFUSION, (2, 3, 5))
    assert_bits_equal(torch.get_rng_state(), before)


def test_ancestral_sampling_is_the_loop_of_algorithm_2():
    key = Noise(4, first_sample=2)
    x = key.fold_in(FOLD_SAMPLE_START).materialize((2, 3, 5))
    for step in range(T - 1, -1, -1):
        t = torch.full((2,), step)
        x = DIFFUSION.p_step(x, model(x, t), t, key.fold_in(FOLD_SAMPLE_STEPS).at(stream=step))
    assert_bits_equal(sample(model, DIFFUSION, (2, 3, 5), seed=4, first_sample=2), x)


def test_start_and_steps_never_share_noise():
    # An independent key for each purpose: the start equals no step's draw, not even that of stream 0.
    start = Noise(4).fold_in(FOLD_SAMPLE_START).materialize((1, 64))
    for stream in (0, T - 1):
        assert (start != Noise(4).fold_in(FOLD_SAMPLE_STEPS).at(stream=stream).materialize((1, 64))).all()


@pytest.mark.parametrize("options", [{}, {"sampler": "ddim"}, {"sampler": "dpmpp_2m"}], ids=["ddpm", "ddim", "dpmpp_2m"])
@pytest.mark.parametrize("steps", [None, 1, 2, 7, T])
def test_steps_run_backwards_and_the_model_is_told_its_own_time(steps, options):
    told, seen = [], []

    def spy(x, t):
        assert t.dtype == torch.int64 and t.shape == (2,) and (t == t[0]).all()
        told.append(int(t[0]))
        return model(x, t)

    def callback(t, x, x_start):
        seen.append((t, x.clone(), x_start.clone()))

    x = sample(spy, DIFFUSION, (2, 3, 5), steps=steps, callback=callback, **options)
    expected = list(range(T)) if steps is None else spaced_timesteps(T, steps).tolist()
    assert told == [t for t, _, _ in seen] == expected[::-1]
    assert_bits_equal(seen[-1][1], x)


def test_each_x_start_is_clipped_unless_told_otherwise():
    def loud(x, t):
        return -2.0 * x

    starts = []
    x = sample(loud, DIFFUSION, (2, 3, 5), callback=lambda t, x, x_start: starts.append(x_start))
    assert all(s.abs().max() <= 1 for s in starts) and any(s.abs().max() == 1 for s in starts)
    # The last step returns the mean, which at t = 0 is x̂0 itself, up to the rounding of its weight.
    assert_close_to_exact(x, starts[-1].double(), ulps=2)
    starts.clear()
    sample(loud, DIFFUSION, (2, 3, 5), clip=False, callback=lambda t, x, x_start: starts.append(x_start))
    assert max(s.abs().max() for s in starts) > 1


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_a_perfect_model_returns_the_data_from_any_number_of_steps(sampler):
    # If x̂0 is always the same, each step stays on the line from x_0 to the start and the last one ends in x_0.
    target = torch.linspace(-1, 1, 15).view(1, 3, 5).expand(2, 3, 5).contiguous()
    diffusion = GaussianDiffusion(SCHEDULE, "x_start")
    for steps in (1, 2, 7, None):
        assert_close_to_exact(sample(lambda x, t: target, diffusion, (2, 3, 5), sampler=sampler, steps=steps), target.double(), ulps=4)


def test_ddim_without_noise_is_a_function_of_its_start():
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    ends = [list(walk(model, ddim_table(DIFFUSION), x, Noise(seed)))[-1][1] for seed in (0, 1)]
    assert_bits_equal(ends[0], ends[1])
    noisy = [list(walk(model, ddim_table(DIFFUSION, eta=1.0), x, Noise(seed)))[-1][1] for seed in (0, 1)]
    assert (noisy[0] != noisy[1]).any()


@pytest.mark.parametrize("multistep", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_steps_written_over_each_other_are_the_same(multistep, dtype):
    table = ddpm_table(DIFFUSION)
    if multistep:
        table.table[1:, COLUMNS.index("previous")] = 0.25
    start = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    kept = [(x, x_start) for _, x, x_start in walk(model, table, start.clone(), Noise(0))]
    assert len({x.data_ptr() for x, _ in kept}) == T
    written, places = start.clone(), set()
    over = []
    for _, x, x_start in walk(model, table, written, Noise(0), keep=False):
        over.append((x.clone(), x_start.clone()))
        places.add(x.data_ptr())
    assert places == {written.data_ptr()}
    for (x, x_start), (other, other_start) in zip(kept, over, strict=True):
        assert_bits_equal(x, other)
        assert_bits_equal(x_start, other_start)


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.view(x.shape)], ids=["itself", "a view"])
def test_a_model_may_return_its_input(view):
    start = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    expected = [x for _, x, _ in walk(lambda x, t: x.clone(), ddpm_table(DIFFUSION), start.clone(), Noise(0))][-1]
    got = [x for _, x, _ in walk(lambda x, t: view(x), ddpm_table(DIFFUSION), start.clone(), Noise(0), keep=False)][-1]
    assert_bits_equal(got, expected)


def test_a_callback_gets_new_tensors_unless_told_otherwise():
    for keep in (True, False):
        seen = []
        x = sample(model, DIFFUSION, (2, 3, 5), callback=lambda t, x, _, seen=seen: seen.append(x), keep=keep)
        assert len({state.data_ptr() for state in seen}) == (T if keep else 1)
        assert_bits_equal(x, sample(model, DIFFUSION, (2, 3, 5)))


def test_loop_keeps_float64():
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert all(state.dtype == torch.float64 for _, state, _ in walk(model, ddpm_table(DIFFUSION), x, Noise(0)))


def test_learned_variance_samples():
    def doubled(x, t):
        return torch.cat([model(x, t), torch.zeros_like(x)], 1)

    for variance in ("learned", "learned_range"):
        diffusion = GaussianDiffusion(SCHEDULE, "epsilon", variance)
        assert sample(doubled, diffusion, (2, 3, 5), steps=5).isfinite().all()
        assert sample(doubled, diffusion, (2, 3, 5), sampler="ddim").shape == (2, 3, 5)  # it reads the prediction alone


def test_a_module_is_sampled_where_its_parameters_are_and_without_gradients():
    module = torch.nn.Linear(5, 5)
    x = sample(lambda x, t: module(x), DIFFUSION, (2, 5), steps=3)
    assert not x.requires_grad and module.weight.grad is None

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x, t):
            return self.inner(x)

    assert_bits_equal(sample(Wrapped(), DIFFUSION, (2, 5), steps=3), x)


# What is refused.


@pytest.mark.parametrize("steps", [0, -1, T + 1, 2.0, True])
def test_steps_out_of_range_are_refused(steps):
    with pytest.raises(ValueError, match=r"steps must be an integer in 1\.\.20, got "):
        sample(model, DIFFUSION, (2, 3), steps=steps)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_eta_out_of_range_is_refused(eta):
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\], got "):
        sample(model, DIFFUSION, (2, 3), sampler="ddim", eta=eta)


def test_unknown_sampler_is_refused():
    with pytest.raises(ValueError, match="sampler must be one of ddpm, ddim, dpmpp_2m, got 'euler'"):
        sample(model, DIFFUSION, (2, 3), sampler="euler")


@pytest.mark.parametrize("shape", [(3,), (), (0, 3), (2, 0)])
def test_shape_out_of_range_is_refused(shape):
    with pytest.raises(ValueError, match=r"shape must be \(N, C, \.\.\.\) with sizes of at least 1, got "):
        sample(model, DIFFUSION, shape)


def test_seed_out_of_range_is_refused():
    with pytest.raises(ValueError, match="seed must lie in"):
        sample(model, DIFFUSION, (2, 3), seed=-1)


def test_output_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match="the model output must have shape"):
        sample(lambda x, t: x[:, :1], DIFFUSION, (2, 3))
