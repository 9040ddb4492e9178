"""attention: the CPU path and the reference against float64, the operator, the choice on CUDA with stand-ins, and errors.

The CUDA kernels are proved in the simulator by test_attention_cuda.py.
"""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from numerics import UNIT, Rounded, assert_bits_equal, assert_close_to_exact, assert_within_rounding
from torch.utils.checkpoint import checkpoint

from ddpm_fast import attention, autotune
from ddpm_fast.ops import _attention as MODULE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [  # (N, tokens, heads, d)
    (1, 1, 1, 8),  # one token attends to itself
    (2, 17, 3, 8),  # a prime
    (2, 64, 2, 40),
    (3, 49, 1, 64),
    (1, 256, 1, 256),  # Ho's single head at 16x16
    (2, 5, 1, 3),  # no multiple of 8: the CPU takes any
]


def make(size, dtype=torch.float32, seed=0):
    n, tokens, heads, d = size
    return torch.randn(n, tokens, 3, heads, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(qkv, backend=None, *, upstream_dtype=None, **options):
    leaf = qkv.detach().requires_grad_()
    out = attention(leaf, backend=backend, **options)
    return {"out": out.detach(), "grad": torch.autograd.grad(out, leaf, upstream(out, upstream_dtype or qkv.dtype).to(out))[0]}


def upstream(out, dtype):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(dtype)


def derived(qkv, scale=None):
    """Both results in float64, with a bound on the rounding of any algorithm that computes softmax and its sums in fp32.

    Probabilities, and in backward the gradients of logits, are rounded to the data's dtype before they are multiplied by 16-bit
    values. An online softmax multiplies by one more exponential for each block of keys, of at least 32.
    """
    n, tokens, heads, d = qkv.shape[0], qkv.shape[1], *qkv.shape[3:]
    query, key, value = (Rounded(x) for x in qkv.double().permute(2, 0, 3, 1, 4))
    factor = Rounded(torch.tensor(d**-0.5 if scale is None else scale, dtype=torch.float64)).stored()
    logits = query @ key.mT * factor
    largest = Rounded(logits.value.amax(-1, keepdim=True))  # any number will do: what is taken from all is divided out again
    weights = (logits - largest).exp()
    p = (weights * weights.sum(-1).reciprocal()).stored(qkv.dtype)
    out = p @ value
    out = Rounded(out.value, out.error + tokens // 32 * 5 * UNIT * (p.value @ value.value.abs())).stored(qkv.dtype)
    flat = lambda x: x.transpose(1, 2).flatten(2)  # noqa: E731
    g = Rounded(upstream(flat(out.value), qkv.dtype).view(n, tokens, heads, d).transpose(1, 2))
    grad_logits = (p * (g @ value.mT - (g * out).sum(-1))).stored(qkv.dtype)
    grads = [(grad_logits @ key) * factor, (grad_logits.mT @ query) * factor, p.mT @ g]
    packed = lambda xs: torch.stack([x.transpose(1, 2) for x in xs], 2)  # noqa: E731
    grad = Rounded(packed([x.value for x in grads]), packed([x.error for x in grads]))
    return {"out": Rounded(flat(out.value), flat(out.error)), "grad": grad}


@pytest.mark.backends("attention", without=("reference",))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_float64(size, dtype, backend):
    if backend.name == "cuda" and size[3] % 8:
        size = (*size[:3], 8)
    qkv = make(size, dtype).to(backend.device)
    got, expected, exact = run(qkv, backend.name), derived(qkv.cpu()), run(qkv.double(), "reference", upstream_dtype=dtype)
    for name, x in got.items():
        assert x.is_contiguous()
        assert_close_to_exact(expected[name].value, exact[name].cpu(), atol=1e-12)  # the steps are attention's
        assert_within_rounding(x.cpu(), expected[name], name)


FAULTS = {
    "a channel is dropped": lambda q, k, v: (q * torch.ones(q.shape[-1]).index_fill_(0, torch.tensor(3), 0.0), k, v),
    "a key is missing": lambda q, k, v: (q, k[:, :, 1:], v[:, :, 1:]),
    "keys in bfloat16": lambda q, k, v: (q, k.bfloat16().double(), v),
    "values in bfloat16": lambda q, k, v: (q, k, v.bfloat16().double()),
    "another scale": lambda q, k, v: (q * 1.001, k, v),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("size", [(2, 17, 3, 8), (1, 256, 1, 256)], ids=str)
def test_the_limit_notices(size, fault):
    """Faults in float64, where rounding hides nothing."""
    qkv = make(size)
    query, key, value = FAULTS[fault](*qkv.double().permute(2, 0, 3, 1, 4))
    wrong = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    with pytest.raises(AssertionError, match="too far off"):
        assert_within_rounding(wrong.float(), derived(qkv)["out"])


def test_reference_is_pytorchs():
    qkv = make((2, 9, 2, 4)).double().requires_grad_()
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    assert_close_to_exact(attention(qkv).detach(), expected.detach(), rtol=1e-12, atol=1e-13)
    assert torch.autograd.gradcheck(attention, [qkv[:1, :4].detach().requires_grad_()])
    assert torch.autograd.gradgradcheck(attention, [qkv[:1, :3].detach().requires_grad_()])


@pytest.mark.parametrize("scale", [0.0, 0.3, -1.0])
def test_scale(scale):
    qkv = make((2, 9, 2, 8))
    expected = derived(qkv, scale)
    for name, x in run(qkv, scale=scale).items():
        assert_within_rounding(x, expected[name], name)


def test_heads_of_a_packed_tensor():
    x = torch.randn(2, 24 * 3, 4, 5).contiguous(memory_format=torch.channels_last)  # as a 1x1 convolution leaves it
    packed = x.permute(0, 2, 3, 1).flatten(1, 2)
    assert packed.data_ptr() == x.data_ptr()
    for heads in (1, 2, 3):
        assert_bits_equal(attention(packed, heads), attention(packed.view(2, 20, 3, heads, 24 // heads), heads))
    assert_bits_equal(attention(packed), attention(packed, 1))


def test_neither_inputs_nor_results_are_copied():
    qkv = make((2, 64, 2, 16))
    seen = []
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def watched(query, key, value, *others, **options):
        seen.extend((query, key, value))
        results = kernel(query, key, value, *others, **options)
        seen.append(results[0])
        return results

    with mock.patch.object(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", watched):
        out = attention(qkv)
    assert [x.untyped_storage().data_ptr() for x in seen[:3]] == [qkv.untyped_storage().data_ptr()] * 3
    assert out.data_ptr() == seen[3].data_ptr()


def test_strided_and_expanded_tensors():
    qkv = make((3, 10, 2, 8))
    expected = derived(qkv)
    turned = qkv.transpose(1, 4).contiguous().transpose(1, 4)
    unaligned = torch.empty(qkv.numel() + 1)[1:].view(qkv.shape).copy_(qkv)
    for x in (turned, unaligned):  # PyTorch's kernel may add up in another order for other strides
        for name, y in run(x).items():
            assert_within_rounding(y, expected[name], name)
    assert_bits_equal(attention(qkv[:1].expand(3, -1, -1, -1, -1)), attention(qkv[:1].repeat(3, 1, 1, 1, 1)))


@pytest.mark.parametrize("backend", [None, "reference"])
def test_autocast_leaves_the_dtype_alone(backend):
    qkv = make((2, 17, 2, 8)).requires_grad_()
    expected = attention(qkv, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert MODULE._sdpa(qkv, 0.3).dtype == torch.float32
        out = attention(qkv, backend=backend)
    assert_bits_equal(out, expected)
    assert_bits_equal(torch.autograd.grad(out.sum(), qkv)[0], torch.autograd.grad(expected.sum(), qkv)[0])


def test_a_result_may_be_changed_in_place():
    qkv = make((2, 5, 1, 8)).requires_grad_()
    out = attention(qkv).mul_(2.0)  # backward needs what it was
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    with torch.no_grad():
        assert_bits_equal(attention(qkv).mul_(2.0), attention(qkv) * 2.0)


def test_large_logits_and_nan():
    qkv = make((2, 33, 1, 16))
    qkv[:, :, :2] *= 100.0
    assert_within_rounding(attention(qkv), derived(qkv)["out"])
    qkv[1, 3, 0, 0, 0] = math.nan  # one query
    out = attention(qkv)
    assert out[1, 3].isnan().all() and out[0].isfinite().all() and out[1, :3].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(dtype):
    qkv = make((2, 6, 2, 8), dtype).requires_grad_()
    # Flash attention adds up a gradient in an order that other strides of the same values need not share.
    torch.library.opcheck(torch.ops.ddpm_fast.attention.default, (qkv, 0.3))


def test_compiles_whole():
    torch._dynamo.reset()
    call = lambda x: attention(x * 1.0) * 1.0  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    qkv = make((2, 12, 2, 8))
    results = []
    for way in (call, compiled):
        leaf = qkv.detach().requires_grad_()
        y = way(leaf)
        results.append((y.detach(), torch.autograd.grad((y * y).sum(), leaf)[0]))
    for x, y in zip(*results, strict=True):
        assert_bits_equal(x, y)


# The choice for CUDA tensors, whose parts are all tested: a stand-in says what device a tensor is on.


class OnCuda:
    """As much of a CUDA tensor as the choice looks at."""

    def __init__(self, shape, dtype=torch.float32, device="cuda"):
        self.shape, self.dtype, self.device, self.requires_grad = torch.Size(shape), dtype, torch.device(device, 0), False


@pytest.mark.parametrize(
    "tensor, lacks, expected",
    [
        (OnCuda((2, 16, 3, 1, 12)), "", "pytorch"),  # heads of 12 channels
        (OnCuda((2, 16, 3, 1, 264)), "", "pytorch"),  # and of more than 256
        (OnCuda((2, 16, 3, 1, 64)), "built without CUDA", "pytorch"),
        (OnCuda((2, 16, 3, 1, 64), device="xpu"), "", "pytorch"),
        (OnCuda((2, 16, 3, 1, 64), torch.float64), "", "ddpm_fast"),  # the reference
        (OnCuda((2, 16, 3, 1, 64)), "", "ddpm_fast"),  # not a plain tensor: through the operator
    ],
)
def test_choice(tensor, lacks, expected):
    with (
        mock.patch.object(MODULE, "missing", lambda *_: lacks),
        mock.patch("torch.cuda.get_device_capability", lambda _: (9, 0)),
    ):
        assert MODULE._choice(tensor, 1.0) == expected


@pytest.mark.parametrize(
    ("dtype", "capability", "expected"),
    [
        (torch.float32, (8, 0), "ddpm_fast"),
        (torch.float32, (9, 0), "ddpm_fast"),
        (torch.float32, (8, 9), "pytorch"),  # TF32 is no faster there than fp32
        (torch.float32, (7, 5), "pytorch"),  # and not there at all
        (torch.bfloat16, (9, 0), "pytorch"),
        (torch.float16, (8, 0), "pytorch"),
    ],
)
def test_choice_where_nothing_may_be_timed(dtype, capability, expected):
    """In a compiled graph (here for a tensor that is not a plain one) and under deterministic algorithms, without the autotuner."""
    tensor, chosen = OnCuda((2, 16, 3, 1, 64), dtype), []
    with (
        mock.patch.object(MODULE, "missing", lambda *_: ""),
        mock.patch("torch.cuda.get_device_capability", lambda _: capability),
        mock.patch.object(MODULE.autotune, "choose", lambda *arguments, **_: chosen.append(arguments[3]) or arguments[3]),
    ):
        assert MODULE._choice(tensor, 1.0) == expected and not chosen
        with mock.patch.object(MODULE, "Tensor", OnCuda):
            assert MODULE._choice(tensor, 1.0) == expected and chosen == [expected]


def test_candidates_give_the_same_and_leave_nothing_behind():
    """What the autotuner would time, with the CPU's kernel in the place of CUDA's."""
    qkv = make((2, 16, 2, 8)).requires_grad_()
    with (
        mock.patch.dict(MODULE.backends.implementations, cuda=MODULE._forward_cpu),
        mock.patch.dict("ddpm_fast.backends.TAKES", cuda=("cpu",)),
        mock.patch("ddpm_fast.backends.missing", lambda *_: ""),
    ):
        plain = [call()[0] for call in MODULE.candidates(qkv, 0.3, False).values()]
        with torch.no_grad():
            both = [call() for call in MODULE.candidates(qkv, 0.3, True).values()]
    for x in plain:
        assert_within_rounding(x.detach(), derived(qkv.detach(), 0.3)["out"])
    for x, y in zip(*both, strict=True):
        assert_close_to_exact(x, y.double(), atol=1e-5)
    assert qkv.grad is None


def test_timing_is_hidden_from_the_callers_hooks():
    """Inside a checkpoint, which counts the tensors saved, a choice is made as anywhere."""
    autotune.clear()
    qkv, made = make((2, 16, 2, 8)).requires_grad_(), []

    def call(x):
        calls = dict.fromkeys(("a", "b"), lambda: torch.autograd.grad(_with_grad(x), x))
        autotune.choose("attention", (len(made),), calls, "a", x.device)
        made.append(len(autotune.choices()))
        return attention(x)

    def _with_grad(x):
        with torch.enable_grad():
            return attention(x).sum()

    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        call(qkv)
    alone = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: alone.append(x) or x, lambda x: x):
        attention(qkv)
    assert len(saved) == len(alone) and made == [1]
    checkpoint(call, qkv, use_reentrant=False).sum().backward()
    assert qkv.grad is not None and made == [1, 2, 3]  # once more in the recomputation
    autotune.clear()


QKV = torch.zeros(2, 4, 3, 2, 8)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(qkv=1.0), TypeError, "qkv must be a tensor, got float"),
        (dict(qkv=QKV.long()), TypeError, "qkv must be float32, bfloat16, float16 or float64, got torch.int64"),
        (dict(qkv=QKV[:, :, :2]), ValueError, r"qkv must have shape \(N, tokens, 3, heads, d\), got \(2, 4, 2, 2, 8\)"),
        (dict(qkv=QKV[0]), ValueError, r"qkv must have shape \(N, tokens, 3, heads, d\), got \(4, 3, 2, 8\)"),
        (dict(qkv=QKV[:, :0]), ValueError, "at least one element a sample"),
        (dict(heads=3), ValueError, r"qkv must have 3 heads, got shape \(2, 4, 3, 2, 8\)"),
        (dict(qkv=torch.zeros(2, 4, 32)), ValueError, "the last size of qkv must be a multiple of 3 heads = 3, got 32"),
        (dict(qkv=torch.zeros(2, 4, 48), heads=5), ValueError, "the last size of qkv must be a multiple of 3 heads = 15, got 48"),
        (dict(scale=math.inf), ValueError, "scale must be finite, got inf"),
        (dict(backend="cuda", qkv=torch.zeros(2, 4, 3, 2, 12)), ValueError, "takes heads of a multiple of 8 channels, at most 256, got 12"),
        (dict(backend="triton"), ValueError, "attention has no triton backend"),
    ],
)
def test_errors(change, error, message):
    arguments = dict(qkv=QKV) | change
    with pytest.raises(error, match=message):
        attention(arguments.pop("qkv"), **arguments)
