"""What a kernel reads and writes through an address: views that negate, tensors without memory or strides, memory that overlaps.

The calls are op_cases.py's; the results of writing into tensors are in test_ops_destinations.py.
"""

import numpy as np
import pytest
import torch
from numerics import assert_bits_equal
from op_cases import KEY, TABLES, every_case, everything, make, step_arguments, upstreams

from ddpm_fast.ops import attention, conv3x3, group_norm, p_step, q_sample, randn

SHAPE = (3, 2, 5)
X = torch.randn(3, 4, 6, 6)


def negating(x):
    """The same values as a view of memory with the opposite sign, which z.conj().imag is of a complex z."""
    view = torch._neg_view(x.neg())
    assert view.is_neg() and (x.dtype == torch.int64 or view.equal(x))
    return view


def tensors_of(case):
    return [name for name, x in case.arguments.items() if isinstance(x, torch.Tensor)]


@every_case
def test_views_that_negate_are_read_as_what_they_say(name, given):
    case = make(name, given, SHAPE)
    with torch.no_grad():
        expected = case()
        for part in tensors_of(case):
            for x, y in zip(case.given(**{part: negating(case.arguments[part])})(), expected, strict=True):
                assert_bits_equal(x, y, part)
    grads = upstreams(expected)
    expected = everything(case, grads)
    watched = case.watched()
    views = watched.map(lambda _, x: torch._neg_view(x.neg()))
    got = torch.autograd.grad(views(), watched.inputs(), [negating(g) for g in grads])
    for leaf, x in zip(case.leaves, got, strict=True):
        assert_bits_equal(x, expected[f"gradient of {leaf}"], leaf)


NETWORK_OPS = {
    "group_norm": lambda x, w, row: group_norm(x, 2, w, w, pre_bias=row, scale=row, shift=row),
    "attention": lambda x, w, row: attention(x.flatten(2).transpose(1, 2).repeat(1, 1, 3), 2),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("op", NETWORK_OPS)
def test_ops_of_networks_read_views_that_negate(op, layout):
    x = X.to(memory_format=layout)
    weight, row = torch.randn(4), torch.randn(3, 4)
    call = NETWORK_OPS[op]
    expected = call(x, weight, row)
    assert_bits_equal(call(negating(x), negating(weight), negating(row)), expected)
    x.requires_grad_()
    y = call(x, weight, row)
    upstream = torch.randn_like(y)
    assert_bits_equal(torch.autograd.grad(y, x, negating(upstream), retain_graph=True)[0], torch.autograd.grad(y, x, upstream)[0])


@torch.no_grad()
def test_conv3x3_reads_views_that_negate():
    x, weight, bias = torch.randn(2, 16, 4, 4), torch.randn(16, 16, 3, 3), torch.randn(16)
    tensors = dict(x=x, weight=weight, bias=bias, residual=x)
    tensors = {name: y if name == "bias" else y.to(memory_format=torch.channels_last) for name, y in tensors.items()}
    expected = conv3x3(**tensors, backend="reference")
    for name, y in tensors.items():
        torch.testing.assert_close(conv3x3(**tensors | {name: negating(y)}), expected, rtol=1e-5, atol=1e-4)


def test_the_imaginary_part_of_a_conjugate_is_what_it_says():
    z = torch.randn(3, 2, 5, dtype=torch.complex64).conj()
    arguments = make("q_sample", "Noise", SHAPE).arguments
    assert z.imag.is_neg()
    assert_bits_equal(q_sample(**arguments | dict(x_start=z.imag)), q_sample(**arguments | dict(x_start=z.imag.clone())))


def freed(x):
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


@every_case
def test_a_tensor_without_memory_is_refused(name, given):
    """Its address is 0: of a storage that was freed, as sharded training does, and of PyTorch's tensor of zeros that is none."""
    case = make(name, given, SHAPE)
    for part in tensors_of(case):
        for empty in (freed, lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype)):
            with pytest.raises(ValueError, match="a tensor has no memory to read"):
                case(**{part: empty(case.arguments[part])})


@every_case
def test_a_tensor_without_strides_is_refused_by_name(name, given):
    case = make(name, given, SHAPE)
    for part in tensors_of(case):
        x = case.arguments[part]
        others = {"torch.sparse_coo": x.to_sparse()}
        if x.dtype == torch.float32:
            others["torch._mkldnn"] = x.to_mkldnn()
        for layout, other in others.items():
            wanted = f"(contiguous|a dense tensor, got {layout})" if part in TABLES else f"a dense tensor, got {layout}"
            with pytest.raises((TypeError, ValueError), match=f"^{part} must be {wanted}$"):
                case(**{part: other})


def test_ops_of_networks_refuse_what_has_no_strides():
    weight = torch.ones(4)
    for name, call in {
        "x": lambda: group_norm(X.to_sparse(), 2),
        "weight": lambda: group_norm(X, 2, weight.to_sparse()),
        "pre_bias": lambda: group_norm(X, 2, pre_bias=X[:, :, 0, 0].to_sparse()),
        "qkv": lambda: attention(torch.randn(2, 3, 3, 1, 8).to_sparse()),
    }.items():
        with pytest.raises(TypeError, match=f"{name} must be a dense tensor, got torch.sparse_coo"):
            call()


# Overlaps. Whatever storages two tensors were made from, their bytes are compared.


def floats(count):
    """Two tensors of one NumPy array, each with a storage of its own."""
    array = np.zeros(count, np.float32)
    return lambda first, shape: torch.from_numpy(array[first : first + int(np.prod(shape))].reshape(shape))


def test_two_views_of_one_numpy_array_are_seen_to_overlap():
    arguments = make("q_sample", "tensor", SHAPE).arguments
    part = floats(100)
    x_start, out = part(0, SHAPE), part(29, SHAPE)
    assert x_start.untyped_storage().data_ptr() != out.untyped_storage().data_ptr()
    with pytest.raises(ValueError, match="out must not share memory with another input"):
        q_sample(**arguments | dict(x_start=x_start), out=out)
    q_sample(**arguments | dict(x_start=x_start), out=part(30, SHAPE))  # the next byte is free
    q_sample(**arguments | dict(x_start=x_start), out=part(0, SHAPE))  # the same elements are written in place


@pytest.mark.parametrize("part", ["t", "signal", "sigma", "noise"])
def test_q_sample_does_not_write_over_what_it_reads(part):
    arguments = make("q_sample", "tensor", SHAPE).arguments
    x = arguments[part]
    memory = torch.zeros(1100)
    held = memory.view(x.dtype)[: x.numel()].view(x.shape).copy_(x)
    with pytest.raises(ValueError, match="out must not share memory with another input"):
        q_sample(**arguments | {part: held}, out=memory[:30].view(SHAPE))
    end = held.numel() * held.element_size() // 4
    expected = q_sample(**arguments)
    assert_bits_equal(q_sample(**arguments | {part: held}, out=memory[end : end + 30].view(SHAPE)), expected)


@pytest.mark.parametrize("target", ["x_next", "x_start"])
@pytest.mark.parametrize("part", ["model_output", "t", "table", "noise", "x_t", "x_start_previous", "guidance"])
def test_p_step_does_not_write_over_what_it_reads(part, target):
    case = step_arguments(make("p_step learned, multistep and guided", "tensor", SHAPE))
    given = case[part][0] if part == "guidance" else case[part]
    in_place = (part, target) in (("x_t", "x_next"), ("x_start_previous", "x_start"))
    shift = 1 if in_place else 0  # which is right; a little beside it is not
    memory = torch.zeros(400)
    held = memory.view(given.dtype)[: given.numel()].view(given.shape).copy_(given)
    changed = {part: (held, case[part][1]) if part == "guidance" else held}
    with pytest.raises(ValueError, match=f"{target} must not share memory with another input"):
        p_step(**case | changed, **{target: memory[shift : 30 + shift].view(SHAPE)})


def test_destinations_do_not_overlap_each_other():
    case = step_arguments(make("p_step learned, multistep and guided", "tensor", SHAPE))
    part = floats(100)
    with pytest.raises(ValueError, match="x_start must not share memory with another input"):
        p_step(**case, x_next=part(0, SHAPE), x_start=part(29, SHAPE))
    x_t = part(60, SHAPE)
    with pytest.raises(ValueError, match="x_start must not share memory with another input"):
        p_step(**case | dict(x_t=x_t, x_start_previous=None), x_start=part(60, SHAPE))


def test_strides_of_zero_and_gaps_count_as_what_they_reach():
    arguments = make("q_sample", "tensor", SHAPE).arguments
    memory = torch.randn(3, 2, 20)
    gaps = memory[..., ::4]  # its last element is three before the end
    with pytest.raises(ValueError, match="out must not share memory"):
        q_sample(
            **arguments | dict(noise=gaps),
            out=memory.view(-1)[116 - 29 : 117].view(SHAPE).contiguous().set_(memory.untyped_storage(), 87, SHAPE),
        )
    free = torch.empty(0).set_(torch.cat([memory.view(-1), torch.zeros(30)]).untyped_storage(), 117, SHAPE)
    q_sample(**arguments | dict(noise=gaps), out=free)
    one = torch.zeros(40)
    spread = one[:1].expand(3).view(3, 1, 1).expand(SHAPE)  # a single element
    assert_bits_equal(
        q_sample(**arguments | dict(noise=spread), out=one[1:31].view(SHAPE)), q_sample(**arguments | dict(noise=torch.zeros(SHAPE)))
    )
    with pytest.raises(ValueError, match="out must not share memory"):
        q_sample(**arguments | dict(noise=spread), out=one[:30].view(SHAPE))


@pytest.mark.parametrize("target, message", [
    (torch.zeros(1).expand(SHAPE), "must be contiguous"),
    (torch.zeros(3, 1, 5).expand(SHAPE), "must be contiguous"),
    (torch._neg_view(torch.zeros(SHAPE)), "must not be a view that negates what it reads"),
], ids=["one element", "overlaps itself", "negates"])  # fmt: skip
def test_targets_that_cannot_be_written_as_memory(target, message):
    arguments = make("q_sample", "tensor", SHAPE).arguments
    with pytest.raises(ValueError, match=f"out {message}"):
        q_sample(**arguments, out=target)
    with pytest.raises(ValueError, match=f"out {message}"):
        randn(SHAPE, KEY, out=target)
    with pytest.raises(ValueError, match=f"x_next {message}"):
        p_step(**step_arguments(make("p_step", "tensor", SHAPE)), x_next=target)
