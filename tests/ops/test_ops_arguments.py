"""What ops and the diffusion take besides ordinary tensors: no samples at all, NumPy's integers, None, another default device or dtype."""

import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numerics import assert_bits_equal
from op_cases import KEY, NAMES, every_case, everything, make, step_arguments

from ddpm_fast import GaussianDiffusion, Noise, NoiseSchedule
from ddpm_fast.ops import attention, conv3x3, gaussian_kl, group_norm, p_step, q_sample, randn, vlb_terms
from ddpm_fast.ops._gaussian_kl import gaussian_kl_reference

SHAPE = (3, 2, 5)
DIFFUSION = GaussianDiffusion(NoiseSchedule.linear(10, 1e-3, 0.3))

# No samples: an empty result, as of PyTorch's own functions, and no gradient for what they share.


@pytest.mark.parametrize("backend", [None, "reference", "cpu"])
@every_case
def test_no_samples_give_no_results(name, given, backend):
    case = make(name, given, SHAPE)
    empty = case.samples(0, 0).watched()
    results = empty(backend=backend)
    for x, full in zip(results, case(), strict=True):
        assert x.shape == (0, *full.shape[1:]) and x.dtype == full.dtype
    for grad, x in zip(torch.autograd.grad([x.sum() for x in results], empty.inputs()), empty.inputs(), strict=True):
        assert grad.shape == x.shape


def test_no_samples_into_tensors():
    case = make("q_sample", "tensor", SHAPE).samples(0, 0)
    target = torch.empty(0, *SHAPE[1:])
    assert q_sample(**case.arguments, out=target) is target
    step = step_arguments(make("p_step", "tensor", SHAPE).samples(0, 0))
    assert p_step(**step, x_next=target)[0] is target


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_group_norm_of_no_samples(layout, compiled):
    torch._dynamo.reset()
    x = torch.zeros(0, 4, 3, 3).to(memory_format=layout).requires_grad_()
    weight, bias, row = torch.ones(4, requires_grad=True), torch.zeros(4, requires_grad=True), torch.zeros(0, 4, requires_grad=True)
    call = lambda *a: group_norm(a[0], 2, a[1], a[2], pre_bias=a[3], scale=a[3], shift=a[3], activation="silu", dropout=(0.5, KEY))  # noqa: E731
    y = (torch.compile(call, backend="aot_eager") if compiled else call)(x, weight, bias, row)
    assert y.shape == F.group_norm(x, 2, weight, bias).shape
    for grad, leaf in zip(torch.autograd.grad(y.sum(), (x, weight, bias, row)), (x, weight, bias, row), strict=True):
        assert_bits_equal(grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_attention_of_no_samples(compiled):
    torch._dynamo.reset()
    qkv = torch.zeros(0, 5, 3, 2, 8, requires_grad=True)
    y = (torch.compile(attention, backend="aot_eager") if compiled else attention)(qkv)
    assert y.shape == (0, 5, 16)
    assert torch.autograd.grad(y.sum(), qkv)[0].shape == qkv.shape
    assert attention(torch.zeros(0, 5, 48), 2).shape == (0, 5, 16)


def test_gaussian_kl_of_no_samples_against_operands_for_all():
    """The batch may be empty though an operand is not: its gradient is a sum of nothing."""
    x, shared = torch.zeros(0, 3), torch.ones(1, 3, requires_grad=True)
    for inputs in ((shared, x, x, x), (x, x, x, shared)):
        kl = gaussian_kl(*inputs)
        assert kl.shape == gaussian_kl_reference(*inputs).shape == (0, 3)
        assert_bits_equal(torch.autograd.grad(kl.sum(), shared)[0], torch.zeros(1, 3))


# Integers. Whatever is one is taken as one: NumPy's come out of arrays and configurations.


def test_numpy_integers_are_integers():
    x, qkv = torch.randn(2, 6, 3), torch.randn(2, 5, 48)
    for kind in (np.int64, np.int32, np.uint8, torch.tensor):
        assert_bits_equal(group_norm(x, kind(3)), group_norm(x, 3))
        assert_bits_equal(attention(qkv, kind(2)), attention(qkv, 2))
        assert_bits_equal(randn((kind(2), kind(3)), KEY), randn((2, 3), KEY))
        assert KEY.integers(kind(4), kind(9)).equal(KEY.integers(4, 9))
        assert Noise(kind(7), kind(1), kind(2)) == Noise(7, 1, 2)
    case = make("vlb_terms", None, SHAPE)
    assert_bits_equal(vlb_terms(**case.arguments | dict(levels=np.int64(256))), case()[0])


@pytest.mark.parametrize("call, error, message", [
    (lambda: group_norm(torch.ones(1, 2, 2), 1.0), TypeError, "groups must be an integer, got float"),
    (lambda: group_norm(torch.ones(1, 2, 2), np.float64(1)), TypeError, "groups must be an integer, got float64"),
    (lambda: group_norm(torch.ones(1, 2, 2), np.ones(2, int)), TypeError, "groups must be an integer, got ndarray of shape"),
    (lambda: attention(torch.ones(1, 2, 6), "2"), TypeError, "heads must be an integer, got str"),
    (lambda: attention(torch.ones(1, 2, 6), scale="x"), TypeError, "scale must be a number, got str"),
    (lambda: randn((2.0, 3), KEY), TypeError, "a size must be an integer, got float"),
    (lambda: randn(5, KEY), TypeError, r"shape must be sizes \(N, ...\), got 5"),
    (lambda: KEY.integers(-1, 5), ValueError, "count must be at least 0, got -1"),
    (lambda: KEY.integers(2.5, 5), TypeError, "count must be an integer, got float"),
    (lambda: KEY.integers(2, 5.0), TypeError, "high must be an integer, got float"),
    (lambda: KEY.uniform(-3), ValueError, "count must be at least 0, got -3"),
    (lambda: vlb_terms(**make("vlb_terms", None, SHAPE).arguments | dict(levels=2.5)), TypeError, "levels must be an integer, got float"),
    (lambda: vlb_terms(**make("vlb_terms", None, SHAPE).arguments | dict(clip="x")), TypeError, "clip must be True or False, got 'x'"),
    (lambda: p_step(**step_arguments(make("p_step", "Noise", SHAPE)) | dict(clip="x")), TypeError, "clip must be True or False, got 'x'"),
    (lambda: group_norm(torch.ones(1, 2, 2), 1, eps="x"), TypeError, "eps must be a number, got str"),
    (lambda: group_norm(torch.ones(1, 2, 2), 1, eps=np.ones(2)), TypeError, "eps must be a number, got ndarray"),
    (lambda: attention(torch.ones(1, 2, 6), scale=torch.ones(2)), TypeError, "scale must be a number, got Tensor"),
    (lambda: conv3x3(None, torch.ones(1, 2, 3, 3)), TypeError, "x must be a tensor, got NoneType"),
    (lambda: conv3x3(torch.ones(1, 2, 4, 4), None), TypeError, "weight must be a tensor, got NoneType"),
    (lambda: randn((2,), KEY, device=2.5), ValueError, "device must be a torch.device or its name, got 2.5"),
    (lambda: KEY.materialize((2,), "gpu"), ValueError, "device must be a torch.device or its name, got 'gpu'"),
    (lambda: KEY.integers(2, 3, device=None), ValueError, "device must be a torch.device or its name, got None"),
    (lambda: KEY.uniform(2, ()), ValueError, r"device must be a torch.device or its name, got \(\)"),
    (lambda: group_norm(torch.ones(1, 2, 2), 1, dropout=0.5), TypeError, r"dropout must be \(probability, Noise\), got 0.5"),
    (lambda: group_norm(torch.ones(1, 2, 2), 1, dropout=("x", KEY)), TypeError, "the probability of dropout must be a number, got str"),
    (lambda: p_step(**step_arguments(make("p_step", "Noise", SHAPE)) | dict(guidance=1.5)), TypeError,
     r"guidance must be \(output, scale\), got 1.5"),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_what_is_no_number_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# None where a tensor belongs, which is what a model without a return gives.


@every_case
def test_none_for_a_tensor_is_named(name, given):
    case = make(name, given, SHAPE)
    for part, x in case.arguments.items():
        if isinstance(x, torch.Tensor) and part not in ("x_start_previous", "without") and (name, part) != ("p_step", "noise"):
            if part == "noise" and name.startswith("p_step"):
                continue  # None is no noise there
            expected = "the model output" if part == "model_output" else part
            with pytest.raises(TypeError, match=f"{expected} must be a (Noise or a )?tensor, got NoneType"):
                case(**{part: None})


@pytest.mark.parametrize("call, name", [
    (lambda d, x, t: d.q_sample(None, t, KEY), "x_start"),
    (lambda d, x, t: d.q_sample(x, None, KEY), "t"),
    (lambda d, x, t: d.q_sample(x, t, None), "noise"),
    (lambda d, x, t: d.q_step(None, t, KEY), "x_previous"),
    (lambda d, x, t: d.q_mean_variance(None, t), "x_start"),
    (lambda d, x, t: d.q_mean_variance(x, None), "t"),
    (lambda d, x, t: d.q_posterior(None, x, t), "x_start"),
    (lambda d, x, t: d.q_posterior(x, None, t), "x_t"),
    (lambda d, x, t: d.p_mean_variance(None, x, t), "the model output"),
    (lambda d, x, t: d.p_mean_variance(x, None, t), "x_t"),
    (lambda d, x, t: d.p_step(None, x, t, KEY), "x_t"),
    (lambda d, x, t: d.p_step(x, None, t, KEY), "the model output"),
    (lambda d, x, t: d.predict_x_start(x, None, t), "x_t"),
    (lambda d, x, t: d.target(None, t, KEY), "x_start"),
    (lambda d, x, t: d.simple_loss(None, x, t, KEY), "the model output"),
    (lambda d, x, t: d.simple_loss(x, None, t, KEY), "x_start"),
    (lambda d, x, t: d.vlb_terms(x, x, None, t), "x_t"),
    (lambda d, x, t: d.vlb_terms(x, None, x, t), "x_start"),
    (lambda d, x, t: d.loss(None, x, x, t, KEY), "the model output"),
    (lambda d, x, t: d.prior_bpd(None), "x_start"),
    (lambda d, x, t: d.bits_per_dim(lambda x, t: x, None), "x_start"),
    (lambda d, x, t: d.bits_per_dim(lambda x, t: None, x), "the model output"),
], ids=lambda x: x if isinstance(x, str) else "call")  # fmt: skip
def test_the_diffusion_names_a_missing_tensor(call, name):
    x, t = torch.zeros(2, 1, 4, 4), torch.tensor([0, 3])
    with pytest.raises(TypeError, match=f"^{name} must be a (Noise or a )?tensor, got NoneType"):
        call(DIFFUSION, x, t)


# Defaults of the process are for what a user makes, not for what a library does.


@contextlib.contextmanager
def another_default(kind):
    if kind == "a device of a block":
        with torch.device("meta"):
            yield
        return
    torch.set_default_device("meta" if kind == "a device" else None)
    torch.set_default_dtype(torch.float64 if kind == "a dtype" else torch.float32)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", ["a device", "a device of a block", "a dtype"])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_defaults_change_no_result(backend, kind):
    cases = [make(name, given, SHAPE) for name, given in NAMES]
    x, weight = torch.randn(3, 4, 3, 3), torch.randn(4)
    grads = [[torch.randn_like(y) for y in case()] for case in cases]
    noise = torch.randn(3, 4, 3, 3)

    def results():
        found = [everything(case, g, backend=backend) for case, g in zip(cases, grads, strict=True)]
        y = x.clone().requires_grad_()
        norm = group_norm(y, 2, weight, weight, activation="silu", dropout=(0.5, KEY), backend=backend)
        tokens = attention(y.flatten(2).transpose(1, 2).repeat(1, 1, 3), 2, backend=backend)
        (grad,) = torch.autograd.grad([norm, tokens], y, [noise, torch.ones_like(tokens)])
        others = dict(
            norm=norm,
            tokens=tokens,
            grad=grad,
            randn=randn((2, 5), KEY, backend=backend),
            halves=KEY.materialize((2, 5), dtype=torch.float16),
        )
        return [*found, others, dict(integers=KEY.integers(5, 9), uniform=KEY.uniform(3))]

    expected = results()
    with another_default(kind):
        changed = results()
    for got, want in zip(changed, expected, strict=True):
        for part, y in want.items():
            assert got[part].dtype == y.dtype and got[part].device == y.device
            assert got[part].detach().equal(y.detach()), part
