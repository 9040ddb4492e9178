"""How t are drawn: the published distribution, estimates without bias, and a history that nothing spoils."""

import numpy as np
import pytest
import torch
from numerics import assert_bits_equal
from torch._subclasses.fake_tensor import FakeTensorMode

from ddpm_fast.backends import missing
from ddpm_fast.noise import FOLD_TRAIN_TIMESTEPS, Noise
from ddpm_fast.training.checkpoint import CheckpointError, load_checkpoint, load_into, save_checkpoint
from ddpm_fast.training.timestep_samplers import HISTORY, TIMESTEP_SAMPLERS, UNIFORM_SHARE, LossAwareTimesteps

GRID = 2**-32  # of the uniform numbers, so of every probability


def make(T=20, batch=8, kind="loss_aware", seed=3):
    return TIMESTEP_SAMPLERS[kind](T, batch, Noise(seed))


def warmed(losses, batch=8):
    """A sampler with the last 10 losses of each t, (T, 10)."""
    sampler = make(len(losses), batch)
    for column in losses.T:
        sampler.update(torch.arange(len(losses)), column)
    return sampler


def skewed(T=20):
    """Losses of the bound's shape: orders of magnitude apart, and changing from one to the next."""
    return torch.logspace(0, -4, T)[:, None] * (1.0 + torch.rand(T, HISTORY))


def probabilities(sampler):
    return torch.diff(sampler.cdf(), prepend=torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("kind, expected", [("uniform", [14, 3, 1, 3, 6, 17, 17, 9]), ("stratified", [1, 2, 5, 7, 10, 14, 17, 18])])
def test_uniform_and_stratified_keep_their_bits(kind, expected):
    # What a seed drew in the first version it draws for ever: runs of that version go on with it.
    t, factor = TIMESTEP_SAMPLERS[kind](20, 8, Noise(3).fold_in(FOLD_TRAIN_TIMESTEPS)).draw(5)
    assert t.tolist() == expected and t.dtype == torch.int64 and factor is None


def test_distribution_is_the_published_one():
    losses = skewed()
    root = losses.double().square().mean(1).sqrt()  # eq. 18
    expected = (1 - UNIFORM_SHARE) * root / root.sum() + UNIFORM_SHARE / 20
    assert (probabilities(warmed(losses)) - expected).abs().max() <= GRID


@pytest.mark.parametrize("T", [1, 2, 4000])
def test_cdf_is_a_whole_number_of_grid_points_for_each_t_and_ends_in_one(T):
    losses = torch.full((T, HISTORY), 1e-30)
    losses[T // 2] = 1e30  # all the others have no more than their uniform share
    cdf = warmed(losses).cdf()
    assert cdf[-1] == 1 and torch.equal(cdf * 2**32, (cdf * 2**32).round())
    smallest = probabilities(warmed(losses)).min()
    assert smallest >= (UNIFORM_SHARE / T - GRID if T > 1 else 1)


@pytest.mark.parametrize("batch", [1, 7, 128])  # 7: quotients that are rounded
def test_every_grid_point_of_an_interval_draws_its_t(batch):
    # With this the chance of t is exactly cdf[t] - cdf[t-1], taken over a batch: its points are the multiples of 2^-32 below N, over N.
    sampler = warmed(skewed(), batch)
    edges = torch.cat([torch.zeros(1, dtype=torch.float64), sampler.cdf()]) * batch
    for points in (edges[:-1], edges[1:] - GRID, (edges[:-1] + edges[1:]) / 2):
        assert torch.equal(sampler.invert(points / batch)[0], torch.arange(20))


def test_weighted_loss_estimates_the_mean_over_t_without_bias():
    sampler, values = warmed(skewed()), torch.rand(20, dtype=torch.float64)
    t, factor = sampler.invert(sampler.cdf() - GRID)  # each t once
    expectation = (probabilities(sampler) * factor.double() * values[t]).sum()
    assert expectation == pytest.approx(values.mean().item(), rel=2**-23)  # the factors are fp32
    assert factor.max() <= 1 / UNIFORM_SHARE + 1e-2
    # A loss that is what the history says has hardly any variance left: the factor makes all samples alike.
    root = sampler.losses.double().square().mean(1).sqrt()
    products = factor * root[t]
    assert products[:10].max() < 1.01 * products[:10].min()


def test_batch_is_spread_over_the_distribution():
    # t with probability p comes up N·p times, give or take what the ends of its interval can do.
    sampler = warmed(skewed(), batch=200)
    for step in range(3):
        found = sampler.draw(step)[0].bincount(minlength=20)
        assert ((found - 200 * probabilities(sampler)).abs() < 2).all()


def test_draws_are_a_function_of_seed_step_and_state():
    losses = skewed()
    a, b = warmed(losses), warmed(losses)
    a.draw(3)  # drawing changes nothing
    torch.rand(5)
    for x, y in zip(a.draw(9), b.draw(9)):
        assert_bits_equal(x, y)
    assert not torch.equal(a.draw(9)[0], a.draw(10)[0])
    b.update(torch.arange(8), torch.full((8,), 5.0))
    assert not torch.equal(a.draw(9)[1], b.draw(9)[1])


def test_warm_up_is_uniform_until_every_t_has_ten():
    sampler = make(batch=19)
    for _ in range(HISTORY + 2):
        sampler.update(torch.arange(19), torch.logspace(0, -4, 19))
    assert sampler.seen.tolist() == [HISTORY] * 19 + [0]
    for k in range(HISTORY):
        assert (probabilities(sampler) - 1 / 20).abs().max() <= GRID
        t, factor = sampler.draw(k)
        assert_bits_equal(t, make(batch=19, kind="stratified").draw(k)[0])
        assert (factor - 1).abs().max() <= 20 * GRID + 2**-23
        sampler.update(torch.tensor([19]), torch.tensor([0.1]))
    assert probabilities(sampler)[0] > 0.3


def test_history_holds_the_last_ten_of_each_t_in_order():
    # Against a queue for each t: batches in which t come up often, more than ten times, once, and never; lengths from 1 up.
    sampler, generator = make(T=6), np.random.default_rng(0)
    queues = [[0.0] * HISTORY for _ in range(6)]
    counts = np.zeros(6, dtype=int)
    for size, high in ((1, 6), (5, 6), (40, 2), (64, 6), (3, 1), (30, 1), (7, 6), (10, 1), (11, 1)):
        t = generator.integers(0, high, size)
        losses = generator.random(size).astype(np.float32)
        for index, loss in zip(t, losses):
            queues[index] = [*queues[index][1:], float(loss)]
            counts[index] += 1
        sampler.update(torch.from_numpy(t), torch.from_numpy(losses))
        assert sampler.losses.tolist() == queues
        assert sampler.seen.tolist() == np.minimum(counts, HISTORY).tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_losses_that_are_not_finite_are_passed_over(bad):
    losses = skewed()
    sampler, clean = warmed(losses), warmed(losses)
    t = torch.tensor([4, 0, 4, 19, 4])
    sampler.update(t, torch.tensor([0.5, bad, bad, bad, 0.25]))
    clean.update(t[[0, 4]], torch.tensor([0.5, 0.25]))
    sampler.update(t, torch.full((5,), bad))
    for name, tensor in clean.state_dict().items():
        assert_bits_equal(sampler.state_dict()[name], tensor, name)
    assert sampler.cdf().isfinite().all()


def test_losses_of_zero_leave_every_t_as_likely():
    assert (probabilities(warmed(torch.zeros(20, HISTORY))) - 1 / 20).abs().max() <= GRID


def test_the_largest_and_smallest_losses_neither_overflow_nor_vanish():
    losses = torch.full((3, HISTORY), 1e-45)
    losses[1] = torch.finfo(torch.float32).max
    p = probabilities(warmed(losses))
    assert p[1] == pytest.approx(1 - UNIFORM_SHARE * 2 / 3) and p[0] == pytest.approx(UNIFORM_SHARE / 3, rel=1e-5)


def test_no_gradient_reaches_the_history():
    sampler, losses = make(), torch.rand(8, requires_grad=True)
    sampler.update(torch.arange(8), losses * 2)
    assert not sampler.losses.requires_grad and all(not x.requires_grad for x in sampler.draw(0))


@pytest.mark.parametrize("kind", TIMESTEP_SAMPLERS)
def test_no_value_is_read_back_and_no_shape_depends_on_data(kind):
    # Fake tensors have no values: item(), bool() and masks as indices raise on them.
    with FakeTensorMode():
        sampler = make(kind=kind)
        t, factor = sampler.draw(1)
        sampler.update(t, torch.rand(8))
        assert sampler.draw(2)[0].shape == (8,) and (factor is None or factor.shape == (8,))


@pytest.mark.skipif(bool(missing("cuda")), reason=f"CUDA device: {missing('cuda')}")
@pytest.mark.parametrize("kind", TIMESTEP_SAMPLERS)
def test_a_gpu_neither_waits_nor_adds_up_in_an_order_that_changes(kind):
    sampler = TIMESTEP_SAMPLERS[kind](20, 8, Noise(3), "cuda")
    losses = torch.rand(8, device="cuda")
    torch.use_deterministic_algorithms(True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3):
            sampler.update(sampler.draw(step)[0], losses)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)


def test_state_survives_a_checkpoint(tmp_path):
    sampler = warmed(skewed())
    save_checkpoint(tmp_path, sampler.state_dict(), {})
    other = make()
    load_into(other, load_checkpoint(tmp_path).tensors)
    for x, y in zip(sampler.draw(4), other.draw(4)):
        assert_bits_equal(x, y)
    with pytest.raises(CheckpointError, match=r"of another shape: losses \(20, 10\) for \(30, 10\)"):
        load_into(make(T=30), load_checkpoint(tmp_path).tensors)
    assert make(kind="uniform").state_dict() == {} and isinstance(other, LossAwareTimesteps)
