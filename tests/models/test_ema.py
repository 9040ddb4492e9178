"""The moving average of weights against a loop written out, and what it promises about swapping and restoring."""

import io
import re

import numpy as np
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


class Mixed(nn.Module):
    """Integer parameters between the others, as of a quantised layer or a list of codes; buffers of two kinds."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.ones(3))
        self.codes = nn.Parameter(torch.arange(4), requires_grad=False)
        self.mask = nn.Parameter(torch.tensor([True, False]), requires_grad=False)
        self.spectrum = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        self.last = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("scale", torch.ones(2))


@torch.no_grad()
def test_integers_are_copied():
    model = Mixed()
    ema = EMA(model, decay=0.5, warmup=False)
    for x in (*model.parameters(), *model.buffers()):
        x.copy_(~x if x.dtype == torch.bool else x + 2)
    ema.update(model)
    state = ema.state_dict()
    expected = dict(
        first=torch.full((3,), 2.0),
        codes=torch.arange(4) + 2,
        mask=torch.tensor([False, True]),
        spectrum=torch.full((2,), 2 + 0j),
        last=torch.full((2,), 2.0),
    )
    assert_equal(state["parameters"], expected)
    assert_equal(state["buffers"], dict(count=torch.tensor(2), scale=torch.full((2,), 3.0)))
    own = snapshot(model)
    with ema.applied(model):
        assert_equal(snapshot(model), {name: x.to(own[name].dtype) for name, x in {**state["parameters"], **state["buffers"]}.items()})
    assert_equal(snapshot(model), own)


def wrappers():
    return {"DataParallel": nn.DataParallel, "compile": lambda model: torch.compile(model, backend="eager"),
            "both": lambda model: torch.compile(nn.DataParallel(model), backend="eager")}  # fmt: skip


@pytest.mark.parametrize("name", wrappers())
def test_wrappers_of_the_model_stand_for_it(name):
    model = small_model()
    wrapped, ema = wrappers()[name](model), EMA(model, decay=0.5)
    of_wrapper = EMA(wrapped, decay=0.5)
    expected = EMA(model, decay=0.5)
    train_step(model, 0)
    ema.update(wrapped)
    of_wrapper.update(model)
    of_wrapper.update(wrapped)
    expected.update(model)
    assert_equal(ema.state_dict()["parameters"], expected.state_dict()["parameters"])
    expected.update(model)
    assert_equal(of_wrapper.state_dict()["parameters"], expected.state_dict()["parameters"])
    own = snapshot(model)
    with ema.applied(wrapped) as inside:
        assert inside is wrapped
        assert_equal(dict(model.named_parameters()), ema.state_dict()["parameters"])
    assert_equal(snapshot(model), own)


@torch.no_grad()
def test_what_does_not_fit_at_the_end_leaves_the_beginning():
    model = Mixed()
    ema = EMA(model, decay=0.5)
    before = {name: x.clone() for name, x in ema.state_dict()["parameters"].items()}
    model.first.add_(1.0)
    model.last = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)
    own = snapshot(model)
    for method in (ema.update, ema.copy_to, lambda m: ema.applied(m).__enter__()):
        with pytest.raises(
            ValueError, match="parameter last must be of a kind with torch.float32, as when the EMA was created, got torch.int64"
        ):
            method(model)
    assert_equal(ema.state_dict()["parameters"], before)
    assert_equal(snapshot(model), own)
    assert ema.num_updates == 0


def test_numbers_of_numpy():
    ema = EMA(nn.Linear(2, 3), decay=np.float32(0.5), warmup=np.bool_(False))
    ema.load_state_dict({**ema.state_dict(), "num_updates": np.int64(7)})
    assert type(ema.num_updates) is int and ema.num_updates == 7 and ema.current_decay() == 0.5
    for number in (7.5, -1, None):
        with pytest.raises(ValueError, match=f"num_updates must be an integer of at least 0, got {number}"):
            ema.load_state_dict({**ema.state_dict(), "num_updates": number})


def test_a_model_without_parameters():
    ema, model = EMA(nn.ReLU()), nn.ReLU()
    ema.update(model)
    ema.copy_to(model)
    with ema.applied(model):
        pass
    assert ema.num_updates == 1


# Errors


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan"), None, "0.9"])
def test_decay_out_of_range(decay):
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got"):
        EMA(small_model(), decay=decay)


@pytest.mark.parametrize("other", [None, 3, "model", {}])
def test_what_is_no_module_and_no_state(other):
    ema = EMA(nn.Linear(2, 3))
    for use in (EMA, ema.update, ema.copy_to, lambda model: ema.applied(model).__enter__()):
        with pytest.raises(TypeError, match=f"model must be a Module, got {type(other).__name__}"):
            use(other)
    state = ema.state_dict()
    for bad in (other, {**state, "parameters": other or None}, {**state, "parameters": {**state["parameters"], "bias": other}}):
        with pytest.raises((TypeError, ValueError), match=r"(EMA state|parameters|bias) must"):
            ema.load_state_dict(bad)
    with pytest.raises(TypeError, match="warmup must be True or False, got 3"):
        EMA(nn.Linear(2, 3), warmup=3)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Linear(2, 3, bias=False), "model does not match the EMA: missing parameters ['bias'], unexpected []"),
        (nn.Sequential(nn.Linear(2, 3)), "missing parameters ['bias', 'weight'], unexpected ['0.bias', '0.weight']"),
        (nn.Linear(4, 3), "parameter weight must have shape (3, 2), got (3, 4)"),
        (nn.Linear(2, 3, device="meta"), "parameter weight must be on cpu, where the EMA was created, got meta"),
    ],
)
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
