"""Tensors to write into: q_sample(out=), p_step(x_next=, x_start=), randn(out=). The plain call's bits, or an error that says why not."""

import pytest
import torch
from numerics import assert_bits_equal
from op_cases import KEY, make, step_arguments, thread_count
from torch.fx.experimental.proxy_tensor import make_fx

from ddpm_fast.ops import p_step, q_sample, randn

# More than a block and not aligned; enough for two threads.
SHAPES = [(3, 2, 517), (4, 3, 41, 43)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GIVEN = pytest.mark.parametrize("given", ["Noise", "tensor"])
P_STEPS = pytest.mark.parametrize("name", ["p_step", "p_step learned, multistep and guided"])


def new(x):
    return torch.full_like(x, torch.nan, memory_format=torch.contiguous_format)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@GIVEN
def test_q_sample_into_a_tensor_and_in_place(given, shape, dtype, backend):
    arguments = make("q_sample", given, shape, dtype).arguments | dict(backend=backend)
    expected, target = q_sample(**arguments), new(arguments["x_start"])
    assert q_sample(**arguments, out=target) is target
    assert_bits_equal(target, expected)
    x_start = arguments["x_start"] = arguments["x_start"].clone()
    assert q_sample(**arguments, out=x_start) is x_start
    assert_bits_equal(x_start, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@GIVEN
def test_q_sample_in_place_of_a_view(given, dtype):
    """The target may be a part of something larger, as long as it is contiguous: nothing beside it is written."""
    arguments = make("q_sample", given, (3, 2, 517), dtype).arguments
    whole = torch.full((5, 2, 517), 7.0, dtype=dtype)
    whole[1:4] = arguments["x_start"]
    q_sample(**arguments | dict(x_start=whole[1:4]), out=whole[1:4])
    assert_bits_equal(whole[1:4], q_sample(**arguments))
    assert (whole[[0, 4]] == 7).all()


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@GIVEN
@P_STEPS
def test_p_step_into_tensors_and_in_place(name, given, shape, dtype, backend):
    arguments = step_arguments(make(name, given, shape, dtype)) | dict(backend=backend)
    expected = p_step(**arguments)
    previous = arguments["x_start_previous"]
    # Both new; one only; x' over x_t; x̂0 over the one before, if there is one; both in place, as a sampling loop has it.
    for in_place, with_start in ((False, True), (False, False), (True, False), (True, True)):
        x_t = arguments["x_t"].clone()
        kept = previous if previous is None else previous.clone()
        x_next = x_t if in_place else new(x_t)
        x_start = True if not with_start else new(x_t) if kept is None or not in_place else kept
        got = p_step(**arguments | dict(x_t=x_t, x_start_previous=kept), x_next=x_next, x_start=x_start)
        assert got[0] is x_next
        assert with_start is False or got[1] is x_start
        for x, y in zip(got, expected, strict=True):
            assert_bits_equal(x, y)
    x_start = new(arguments["x_t"])
    got = p_step(**arguments, x_start=x_start)
    assert got[1] is x_start
    assert_bits_equal(got[0], expected[0])
    assert_bits_equal(x_start, expected[1])
    x_next = new(arguments["x_t"])
    got = p_step(**arguments, x_next=x_next, x_start=False)
    assert got[1] is None and got[0] is x_next
    assert_bits_equal(x_next, expected[0])


@GIVEN
@P_STEPS
def test_in_place_with_threads_and_instruction_sets(name, given, isa):
    """What one element is written over must have been read by the same thread, in the same block."""
    arguments = step_arguments(make(name, given, (2, 2, 20011)))
    expected = p_step(**arguments)
    for threads in (1, 2, 3):
        with thread_count(threads):
            x_t, previous = (None if x is None else x.clone() for x in (arguments["x_t"], arguments["x_start_previous"]))
            got = p_step(**arguments | dict(x_t=x_t, x_start_previous=previous), x_next=x_t, x_start=True if previous is None else previous)
        for x, y in zip(got, expected, strict=True):
            assert_bits_equal(x, y)


def test_a_loop_in_place_is_the_loop():
    case = step_arguments(make("p_step learned, multistep and guided", "Noise", (3, 2, 517)))
    plain, previous = case["x_t"], case["x_start_previous"]
    x_t, x_start = plain.clone(), previous.clone()
    for step in range(5):
        noise = KEY.at(stream=step)
        plain, previous = p_step(**case | dict(x_t=plain, x_start_previous=previous, noise=noise))
        p_step(**case | dict(x_t=x_t, x_start_previous=x_start, noise=noise), x_next=x_t, x_start=x_start)
    assert_bits_equal(x_t, plain)
    assert_bits_equal(x_start, previous)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (0, 3), *SHAPES], ids=str)
def test_randn_into_a_tensor(shape, dtype, backend):
    target = torch.full(shape, torch.nan, dtype=dtype)
    assert randn(shape, KEY, dtype=dtype, out=target, backend=backend) is target
    assert_bits_equal(target, randn(shape, KEY, dtype=dtype))


@pytest.mark.parametrize("name", ["q_sample", "p_step", "randn"])
def test_strided_inputs_and_unaligned_targets(name):
    """What is read is made contiguous, what is written is not: its address alone decides, also where it is no multiple of 16."""
    case = make(name if name != "randn" else "q_sample", "tensor", (3, 4, 5, 7))
    shifted = torch.empty(3 * 4 * 5 * 7 + 1)[1:].view(3, 4, 5, 7)
    strided = case.map(lambda part, x: x.to(memory_format=torch.channels_last) if x.ndim == 4 else x)
    if name == "q_sample":
        assert_bits_equal(q_sample(**strided.arguments, out=shifted), case()[0])
    elif name == "p_step":
        assert_bits_equal(p_step(**step_arguments(strided), x_next=shifted)[0], case()[0])
    else:
        assert_bits_equal(randn(shifted.shape, KEY, out=shifted), randn(shifted.shape, KEY))


@pytest.mark.parametrize("name", ["q_sample", "p_step", "randn"])
@pytest.mark.parametrize("in_place", [False, True], ids=["", "in place"])
def test_compiled_with_a_target(name, in_place):
    """A compiler has no addresses to compare: it computes the result apart and copies it."""
    torch._dynamo.reset()
    arguments = make("q_sample", "Noise", (3, 2, 5)).arguments if name != "p_step" else step_arguments(make("p_step", "Noise", (3, 2, 5)))
    first = "x_t" if name == "p_step" else "x_start"

    def call(x, target=None):
        if name == "randn":
            return randn(x.shape, KEY, out=target) + 0
        if name == "q_sample":
            return q_sample(**arguments | {first: x}, out=target) + 0
        return p_step(**arguments | {first: x}, x_next=target)[0] + 0

    x = arguments[first].clone()
    target = x if in_place else new(x)
    expected = call(arguments[first])
    assert_bits_equal(torch.compile(call, fullgraph=True, backend="aot_eager")(x, target), expected)
    assert_bits_equal(target, expected)


def test_traced_with_a_target():
    case = make("q_sample", "Noise", (3, 2, 5))
    traced = make_fx(lambda x, target: q_sample(**case.arguments | dict(x_start=x), out=target))(
        case.arguments["x_start"], torch.empty(3, 2, 5)
    )
    assert "ddpm_fast.q_sample" in traced.code
    target = torch.empty(3, 2, 5)
    traced(case.arguments["x_start"], target)
    assert_bits_equal(target, case()[0])
    with torch._subclasses.FakeTensorMode() as mode:
        fake = case.map(lambda part, x: mode.from_tensor(x))
        target = torch.empty(3, 2, 5)
        assert q_sample(**fake.arguments, out=target) is target


# Refusals. Each says what was expected and what came.


def into(name, target, **changes):
    """A call with inputs of shape (4, 6) that writes its first result into target(inputs)."""
    if name == "randn":
        return randn((4, 6), KEY, out=target({}))
    case = make("q_sample" if name == "q_sample" else "p_step learned, multistep and guided", "tensor", (4, 6))
    arguments = (case.arguments if name == "q_sample" else step_arguments(case)) | changes
    tensors = arguments | dict(without=case.arguments["without"]) if name != "q_sample" else arguments
    keyword = {"q_sample": "out", "p_step x_next": "x_next", "p_step x_start": "x_start"}[name]
    return (q_sample if name == "q_sample" else p_step)(**arguments, **{keyword: target(tensors)})


TARGETS = {"q_sample": "out", "p_step x_next": "x_next", "p_step x_start": "x_start", "randn": "out"}


def wide(x):
    """A row of twelve whose even places are x's."""
    return torch.zeros(4, 12)[:, ::2].copy_(x)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (lambda a: 3, TypeError, "must be a tensor, got int"),
        (lambda a: torch.empty(4, 5), ValueError, r"\(4, 6\).*, got .*\(4, 5\)"),
        (lambda a: torch.empty(4, 6, 1), ValueError, r"\(4, 6\).*, got .*\(4, 6, 1\)"),
        (lambda a: torch.empty(4, 6).double(), (TypeError, ValueError), r"torch\.float32.*, got torch\.float64"),
        (lambda a: torch.empty(4, 6).half(), (TypeError, ValueError), r"torch\.float32.*, got torch\.float16"),
        (lambda a: torch.empty(4, 6, device="meta"), ValueError, "on .*cpu, got .*meta"),
        (lambda a: torch.empty(6, 4).T, ValueError, "must be contiguous"),
        (lambda a: wide(0.0), ValueError, "must be contiguous"),
        (lambda a: torch.empty(4, 6, requires_grad=True), RuntimeError, "requires a gradient and cannot be written into"),
    ],
    ids=["int", "shape", "dimensions", "float64", "float16", "device", "transposed", "strided", "requires grad"],
)
def test_unsuitable_targets_are_refused(name, target, error, message):
    with pytest.raises(error, match=f"{TARGETS[name]} .*{message}"):
        into(name, target)


OVERLAPS = {
    "q_sample": ["noise"],
    "p_step x_next": ["model_output", "noise", "x_start_previous", "without"],
    "p_step x_start": ["x_t", "model_output", "noise", "without"],
}


@pytest.mark.parametrize("name, other", [(name, other) for name, others in OVERLAPS.items() for other in others])
def test_memory_of_another_input_is_refused(name, other):
    """It would be written before it is read, or its gradient's input would be gone; the output of a learned variance is twice as large."""
    with pytest.raises(ValueError, match=f"{TARGETS[name]} must not share memory with another input"):
        into(name, lambda a: a[other].flatten()[:24].view(4, 6))


@pytest.mark.parametrize("name, first", [("q_sample", "x_start"), ("p_step x_next", "x_t"), ("p_step x_start", "x_start_previous")])
def test_partial_overlap_with_what_may_be_written_over_is_refused(name, first):
    """In place means the very same elements: a target shifted by one row would be read after it is written."""
    storage = torch.randn(5, 6)
    with pytest.raises(ValueError, match=f"{TARGETS[name]} must not share memory with another input"):
        into(name, lambda a: storage[1:], **{first: storage[:4]})


@pytest.mark.parametrize("name, first", [("q_sample", "x_start"), ("p_step x_next", "x_t"), ("p_step x_start", "x_start_previous")])
def test_in_place_of_what_is_not_contiguous_is_refused(name, first):
    """The same address, another order."""
    storage = torch.randn(4, 6)
    with pytest.raises(ValueError, match="only where that is contiguous"):
        into(name, lambda a: storage, **{first: storage.view(6, 4).T})


def test_two_targets_in_one_place_are_refused():
    arguments = step_arguments(make("p_step", "Noise", (4, 6)))
    target = torch.empty(4, 6)
    with pytest.raises(ValueError, match="x_start must not share memory with another input"):
        p_step(**arguments, x_next=target, x_start=target)
    with pytest.raises(ValueError, match="x_start must not share memory with another input"):
        p_step(**arguments, x_start=arguments["x_t"])  # x_t is read after x̂0 is written


def test_neighbours_in_one_storage_are_no_overlap():
    storage = torch.randn(8, 6)
    arguments = make("q_sample", "Noise", (4, 6)).arguments | dict(x_start=storage[:4])
    expected = q_sample(**arguments)
    assert_bits_equal(q_sample(**arguments, out=storage[4:]), expected)


@pytest.mark.parametrize("name", ["q_sample", "p_step x_next", "p_step x_start"])
def test_refused_where_a_gradient_is_needed(name):
    first = "x_start" if name == "q_sample" else "x_t"
    x = torch.randn(4, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match="cannot write into a given tensor where a gradient is needed"):
        into(name, lambda a: torch.empty(4, 6), **{first: x})
    with torch.no_grad():
        into(name, lambda a: torch.empty(4, 6), **{first: x})


@pytest.mark.parametrize("op", ["q_sample", "p_step", "randn"])
def test_a_backward_that_saved_the_target_fails(op):
    """Autograd must know of what a kernel writes by address: the gradient of w would come from the new values."""
    target, w = torch.randn(4, 3, 5, 7), torch.ones(4, 3, 5, 7, requires_grad=True)
    product = (w * target).sum()
    with torch.no_grad():
        if op == "q_sample":
            q_sample(**make("q_sample", "Noise", target.shape).arguments, out=target)
        elif op == "p_step":
            p_step(**step_arguments(make("p_step", "Noise", target.shape)), x_next=target)
        else:
            randn(target.shape, KEY, out=target)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_inference_tensors_are_written_too():
    with torch.inference_mode():
        target = torch.empty(4, 3, 5, 7)
        assert_bits_equal(randn(target.shape, KEY, out=target), randn(target.shape, KEY))
