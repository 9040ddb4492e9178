"""The moving average of weights against a loop written out, and what it promises about swapping and restoring."""

import io
import re

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ddpm_fast.models import EMA, UNet


def small_model(seed=0):
    """Parameters of several shapes, float buffers and an integer buffer (BatchNorm's counter)."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 5))


def train_step(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator).to(p.dtype))
        for b in model.buffers():
            b.add_(1)


def snapshot(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999])
def test_update_against_a_loop(decay, warmup):
    model = small_model()
    ema = EMA(model, decay=decay, warmup=warmup)
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    same_arithmetic = {name: p.detach().clone() for name, p in model.named_parameters()}
    for n in range(12):
        train_step(model, n)
        d = min(decay, (1 + n) / (10 + n)) if warmup else decay
        assert ema.current_decay() == d
        for name, p in model.named_parameters():
            expected[name] = d * expected[name] + (1 - d) * p.detach().double()
            same_arithmetic[name] = torch.lerp(same_arithmetic[name], p.detach(), 1 - d)
        ema.update(model)
    state = ema.state_dict()
    assert ema.num_updates == state["num_updates"] == 12
    assert_equal(state["parameters"], same_arithmetic)
    for name, x in state["parameters"].items():
        assert_close(x.double(), expected[name], rtol=1e-5, atol=1e-5)
    assert_equal(state["buffers"], dict(model.named_buffers()))


def test_first_shadow_is_the_model_and_is_not_shared():
    model = small_model()
    before = snapshot(model)
    ema = EMA(model)
    train_step(model, 0)
    ema.copy_to(model)
    assert_equal(snapshot(model), before)


def test_update_leaves_the_model_and_its_gradients_alone():
    model = small_model()
    model(torch.randn(4, 2, 3, 3)).sum().backward()
    before, grads = snapshot(model), [p.grad.clone() for p in model.parameters()]
    EMA(model, decay=0.5).update(model)
    assert_equal(snapshot(model), before)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))


def test_low_precision_parameters_are_averaged_in_float32():
    model = nn.Linear(4, 4).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema = EMA(model, decay=0.9999, warmup=False)
    with torch.no_grad():
        model.weight.fill_(2.0)
    for _ in range(100):
        ema.update(model)
    weight = ema.state_dict()["parameters"]["weight"]
    assert weight.dtype == torch.float32
    assert_close(weight, torch.full((4, 4), 2 - 0.9999**100), rtol=1e-5, atol=0)
    ema.copy_to(model)
    assert model.weight.dtype == torch.bfloat16


def test_unet_in_channels_last_weights():
    model = UNet.from_preset("digits")
    ema = EMA(model, decay=0.5, warmup=False)
    first = snapshot(model)
    train_step(model, 0)
    ema.update(model)
    shadow = ema.state_dict()["parameters"]
    assert_equal(shadow, {name: torch.lerp(first[name], p.detach(), 0.5) for name, p in model.named_parameters()})


def test_applied_swaps_and_restores():
    model = small_model()
    ema = EMA(model)
    averaged = snapshot(model)
    train_step(model, 0)
    own, addresses = snapshot(model), [p.data_ptr() for p in model.parameters()]
    with ema.applied(model) as inside:
        assert inside is model
        assert_equal(snapshot(model), averaged)
        train_step(model, 1)  # what happens inside is lost, as documented
    assert_equal(snapshot(model), own)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert_equal(ema.state_dict()["parameters"], {name: averaged[name] for name, _ in model.named_parameters()})


def test_applied_restores_after_an_exception():
    model = small_model()
    ema = EMA(model)
    train_step(model, 0)
    own = snapshot(model)
    with pytest.raises(RuntimeError, match="inside"), ema.applied(model):
        raise RuntimeError("inside")
    assert_equal(snapshot(model), own)


def test_state_round_trip_through_a_file():
    model = small_model()
    ema = EMA(model, decay=0.99)
    for n in range(5):
        train_step(model, n)
        ema.update(model)
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    other = EMA(small_model(seed=7), decay=0.99)
    other.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(2):  # as loaded, and after one more step of each
        assert other.num_updates == ema.num_updates
        for kind in ("parameters", "buffers"):
            assert_equal(other.state_dict()[kind], ema.state_dict()[kind])
        train_step(model, 5)
        ema.update(model)
        other.update(model)


def test_a_model_without_parameters():
    ema, model = EMA(nn.ReLU()), nn.ReLU()
    ema.update(model)
    ema.copy_to(model)
    with ema.applied(model):
        pass
    assert ema.num_updates == 1


# Errors


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_decay_out_of_range(decay):
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got"):
        EMA(small_model(), decay=decay)


@pytest.mark.parametrize(("other", "message"), [
    (nn.Linear(2, 3, bias=False), "model does not match the EMA: missing parameters ['bias'], unexpected []"),
    (nn.Sequential(nn.Linear(2, 3)), "missing parameters ['bias', 'weight'], unexpected ['0.bias', '0.weight']"),
    (nn.Linear(4, 3), "parameter weight must have shape (3, 2), got (3, 4)"),
    (nn.Linear(2, 3, device="meta"), "parameter weight must be on cpu, where the EMA was created, got meta"),
])
@pytest.mark.parametrize("method", ["update", "copy_to", "applied"])
def test_a_model_that_does_not_match(method, other, message):
    ema = EMA(nn.Linear(2, 3))
    with pytest.raises(ValueError, match=re.escape(message)):
        if method == "applied":
            with ema.applied(other):
                pass
        else:
            getattr(ema, method)(other)
    assert ema.num_updates == 0


def test_a_state_that_does_not_fit_changes_nothing():
    ema = EMA(nn.Linear(2, 3))
    before = {name: x.clone() for name, x in ema.state_dict()["parameters"].items()}
    good = EMA(nn.Linear(2, 3)).state_dict()
    good["num_updates"] = 9
    weight, bias = good["parameters"]["weight"], good["parameters"]["bias"]
    for bad, message in (
        ({"parameters": {}, "buffers": {}}, "EMA state must have the entries"),
        ({**good, "parameters": {"weight": weight}}, "EMA state does not match the EMA: missing parameters ['bias']"),
        ({**good, "parameters": {"weight": weight, "bias": bias[:2]}}, "parameter bias must have shape (3,), got (2,)"),
        ({**good, "parameters": {"weight": weight, "bias": bias.double()}}, "must have dtype torch.float32, got torch.float64"),
        ({**good, "buffers": {"extra": bias}}, "missing buffers [], unexpected ['extra']"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            ema.load_state_dict(bad)
        assert ema.num_updates == 0
        assert_equal(ema.state_dict()["parameters"], before)
