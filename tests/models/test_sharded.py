"""The UNet and its average in two processes of torch.distributed (gloo): FSDP2, and DistributedDataParallel, beside one that is alone."""

import contextlib
import copy

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from ddpm_fast import EMA, GaussianDiffusion, NoiseSchedule, UNet, sample

pytestmark = pytest.mark.skipif(not distributed.is_available() or not distributed.is_gloo_available(), reason="PyTorch has no gloo")
DIFFUSION = GaussianDiffusion(NoiseSchedule.linear(20, 1e-3, 0.3))


def network():
    torch.manual_seed(0)
    net = UNet(
        in_channels=2,
        base_channels=8,
        norm_groups=4,
        image_size=8,
        channel_mult=(1, 2),
        num_blocks=1,
        attention_resolutions=(4,),
        dropout=0.0,
    )
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return net


def step(model, ema, optimizer):
    optimizer.zero_grad()
    model(torch.linspace(-1, 1, 4 * 2 * 64).view(4, 2, 8, 8), torch.arange(4)).square().mean().backward()
    optimizer.step()
    ema.update(model)


def drawn(model, ema=None):
    with contextlib.nullcontext() if ema is None else ema.applied(model):
        return sample(model.eval(), DIFFUSION, (2, 2, 8, 8), steps=3)


def whole(tensors):
    return {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in tensors.items()}


def assert_same(model, ema, alone, ema_alone):
    """Up to the rounding of gradients' sums over processes."""
    for ours, theirs in ((ema, ema_alone), (model, alone)):
        ours, theirs = (whole(x.state_dict()["parameters"] if isinstance(x, EMA) else dict(x.named_parameters())) for x in (ours, theirs))
        assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def sharded():
    from torch.distributed.fsdp import FSDPModule, fully_shard

    alone = network()
    model = network().to(memory_format=torch.contiguous_format)
    for block in (model.mid.block1, model.mid.block2, model):
        fully_shard(block)
    assert isinstance(model, FSDPModule) and all(hasattr(p, "placements") for p in model.parameters())
    with pytest.raises(ValueError, match=r"parameter .* must be sharded as when the EMA was created, None, got .*Shard\(dim=0\)"):
        EMA(alone).update(model)
    sides = [(m, EMA(m, decay=0.5, warmup=False), torch.optim.SGD(m.parameters(), lr=0.1)) for m in (model, alone)]
    for _ in range(2):
        for side in sides:
            step(*side)
    (model, ema, _), (alone, ema_alone, _) = sides
    assert_same(model, ema, alone, ema_alone)
    before = drawn(model)  # after a pass without backward the outermost module's weights are still gathered
    for side in sides:
        side[1].update(side[0])
    assert_same(model, ema, alone, ema_alone)
    averaged = drawn(model, ema)
    assert_close(averaged, drawn(alone, ema_alone), rtol=1e-4, atol=1e-4)
    assert (averaged - before).abs().max() > 0.01
    assert torch.equal(drawn(model), before)  # the weights are back, the gathered ones too
    ema.copy_to(model)
    assert torch.equal(drawn(model), averaged)
    other = EMA(model, decay=0.5)
    other.load_state_dict(copy.deepcopy(ema.state_dict()))
    assert other.num_updates == 3


def replicated():
    alone = network()
    inside = network()
    model = DistributedDataParallel(inside)
    sides = [(m, EMA(of, decay=0.5, warmup=False), torch.optim.SGD(m.parameters(), lr=0.1)) for m, of in ((model, inside), (alone, alone))]
    for _ in range(2):
        for side in sides:
            step(*side)
    (_, ema, _), (_, ema_alone, _) = sides
    assert_same(inside, ema, alone, ema_alone)
    assert_close(drawn(model, ema), drawn(inside, ema), rtol=1e-4, atol=1e-4)
    of_wrapper = EMA(model)
    of_wrapper.update(inside)
    assert of_wrapper.state_dict()["parameters"].keys() == dict(inside.named_parameters()).keys()


def _process(rank, store):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        sharded()
        replicated()
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_in_two_processes(tmp_path):
    torch.multiprocessing.spawn(_process, (tmp_path / "store",), nprocs=2)  # which raises what a process raised
