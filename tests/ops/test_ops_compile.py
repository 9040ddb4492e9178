"""Every differentiable op under torch.compile, tracing, fake tensors and torch.func, and the registration that these need.

The calls are op_cases.py's.
"""

import warnings

import op_cases
import pytest
import torch
from compiling import count_compilations
from numerics import assert_as_accurate, assert_bits_equal, assert_close_to_exact
from op_cases import KEY, NAMES, every_case, make, upstreams
from torch.fx.experimental.proxy_tensor import make_fx

from ddpm_fast import Noise

SHAPE = (4, 3, 5, 7)
WITH_NOISE = [name for name, given in NAMES if given == "Noise"]


@pytest.mark.parametrize(
    "dtype, requires_grad", [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True), (torch.float64, True)], ids=str
)
@every_case
def test_opcheck(name, given, dtype, requires_grad):
    case = make(name, given, (3, 2, 5), dtype)
    case = case.watched() if requires_grad else case
    torch.library.opcheck(getattr(torch.ops.ddpm_fast, case.op).default, case.for_operator())


@pytest.mark.parametrize("name", ["p_step", "p_step learned, multistep and guided"])
def test_opcheck_without_the_second_output(name):
    """An operator cannot return None: an empty tensor stands for it."""
    case = make(name, "Noise", (3, 2, 5)).given(with_x_start=False).watched()
    torch.library.opcheck(torch.ops.ddpm_fast.p_step.default, case.for_operator())


@every_case
def test_operator_checks_what_the_function_checks(name, given):
    """Its arguments are known only when a compiled graph runs."""
    case = make(name, given, SHAPE)
    wrong = case.given(t=case.arguments["t"] + 10**6) if "t" in case.arguments else case.given(reduction="sum")
    if op_cases.DEVICE.type != "cpu" and "t" in case.arguments:  # looking at its values would wait for the device
        results = getattr(torch.ops.ddpm_fast, case.op)(*wrong.for_operator())
        assert all([x.isnan().all() for x in (results if isinstance(results, tuple) else (results,))])
        return
    with pytest.raises(
        ValueError, match=r"t must lie in 0\.\.\d+, got t\[0\] = 1000000|reduction must be None or 'mean_per_sample', got 'sum'"
    ):
        getattr(torch.ops.ddpm_fast, case.op)(*wrong.for_operator())


def run(case, call, grads):
    """Results and gradients of a call of the leaves; ×1 so that the op's inputs and results are inner nodes of the graph."""
    case = case.watched()
    results = call(*case.inputs())
    return results, torch.autograd.grad(results, case.inputs(), grads)


def call_of(case):
    def call(*inputs):
        return tuple(x * 1.0 for x in case(**{leaf: x * 1.0 for leaf, x in zip(case.leaves, inputs, strict=True)}))

    return call


# aot_eager runs the graph op by op; inductor compiles it, slowly, and sees no more of the operator: one dtype is enough.
COMPILERS = [("aot_eager", torch.float32), ("aot_eager", torch.bfloat16), pytest.param("inductor", torch.float32, marks=pytest.mark.slow)]


@pytest.mark.parametrize("compiler, dtype", COMPILERS)
@every_case
def test_compiles_whole_forward_and_backward(name, given, compiler, dtype):
    torch._dynamo.reset()
    case = make(name, given, SHAPE, dtype)
    grads = upstreams(case())
    expected, expected_grads = run(case, call_of(case), grads)
    results, found = run(case, torch.compile(call_of(case), fullgraph=True, backend=compiler), grads)
    for i, (x, y) in enumerate(zip(results, expected, strict=True)):
        assert_bits_equal(x, y, f"result {i}")
    # Eager may scale a gradient that forward has prepared, the operator scales before it rounds: 2 ulps. The sum over a broadcast
    # operand is PyTorch's, in an order of the compiler's choice.
    for leaf, x, y in zip(case.leaves, found, expected_grads, strict=True):
        summed = x.numel() < results[0].numel() and 1e-6 * float(y.abs().max())
        assert_close_to_exact(x, y.double(), ulps=2, atol=summed, what=f"gradient of {leaf}")


@pytest.mark.parametrize("given", ["Noise", "tensor"])
@pytest.mark.parametrize("wanted", [0, 1], ids=["x_next", "x_start"])
def test_compiled_gradient_of_one_of_two_outputs(given, wanted):
    torch._dynamo.reset()
    case = make("p_step learned, multistep and guided", given, SHAPE)
    grad = upstreams(case())[wanted]
    found = {}
    for way in ("eager", "compiled"):
        watched = case.watched("x_t", "model_output")
        call = lambda x_t, out: case(x_t=x_t * 1.0, model_output=out * 1.0)[wanted] * 1.0  # noqa: E731
        call = call if way == "eager" else torch.compile(call, fullgraph=True, backend="aot_eager")
        inputs = [watched.arguments["x_t"], watched.arguments["model_output"]]
        found[way] = torch.autograd.grad(call(*inputs), inputs, grad)
    for x, y in zip(found["compiled"], found["eager"], strict=True):
        assert_bits_equal(x, y)


@pytest.mark.parametrize("name", WITH_NOISE)
def test_does_not_recompile_for_each_stream_and_seed(name):
    """Forward and backward: two graphs for the first key, at most two more once a key is known to be a variable."""
    torch._dynamo.reset()
    compiler, graphs = count_compilations("aot_eager")
    case = make(name, "Noise", SHAPE)
    grads = upstreams(case())
    compiled = torch.compile(lambda noise, *inputs: call_of(case.given(noise=noise))(*inputs), fullgraph=True, backend=compiler)
    for step in range(6):
        key = Noise(seed=3 + step, stream=step, first_sample=4 * step)
        results, _ = run(case, lambda *inputs, key=key: compiled(key, *inputs), grads)
        for x, y in zip(results, case(noise=key), strict=True):
            assert_bits_equal(x, y)
    assert len(graphs) <= 2, f"{len(graphs)} graphs for six keys"


@pytest.mark.parametrize("name", WITH_NOISE)
def test_compiled_with_keys_beyond_int64(name):
    torch._dynamo.reset()
    case = make(name, "Noise", SHAPE)
    compiled = torch.compile(lambda noise: tuple(x + 0 for x in case(noise=noise)), fullgraph=True, backend="aot_eager")
    for key in (KEY, Noise(2**64 - 1, 2**32 - 1, 2**64 - 1), Noise(3)):
        for x, y in zip(compiled(key), case(noise=key), strict=True):
            assert_bits_equal(x, y)


@every_case
def test_compiles_for_any_batch_size(name, given):
    """dynamic=True: sizes are symbols, which the fake kernels and the checks must let pass."""
    torch._dynamo.reset()
    compiler, graphs = count_compilations("aot_eager")
    cases = [make(name, given, (size, 3, 5, 7)) for size in (4, 6, 9)]
    names = [part for part, x in cases[0].arguments.items() if isinstance(x, torch.Tensor)]
    compiled = torch.compile(
        lambda *tensors: cases[0](**dict(zip(names, tensors, strict=True))), fullgraph=True, dynamic=True, backend=compiler
    )
    first = None
    for case in cases:
        for x, y in zip(compiled(*(case.arguments[part] for part in names)), case(), strict=True):
            assert_bits_equal(x, y)
        # The first size may be traced twice: guidance's scale is a symbol until PyTorch finds that the operator takes a number.
        first = first or len(graphs)
    assert len(graphs) == first <= 2, f"{len(graphs)} graphs for three sizes, {first} for one"


@every_case
def test_compiled_strided_inputs(name, given):
    torch._dynamo.reset()
    case = make(name, given, SHAPE)
    other = case.map(lambda part, x: x.to(memory_format=torch.channels_last) if x.ndim == 4 else x)
    grads = upstreams(case())
    expected, expected_grads = run(case, call_of(case), grads)
    results, found = run(other, torch.compile(call_of(other), fullgraph=True, backend="aot_eager"), grads)
    for x, y in zip((*results, *found), (*expected, *expected_grads), strict=True):
        assert_close_to_exact(x.contiguous(), y.double(), ulps=2, atol=1e-6 * float(y.abs().max()) if y.numel() == 4 else 0.0)


@every_case
def test_fake_tensors_get_a_fake_result(name, given):
    """A subclass of Tensor must reach the operator, not a kernel that reads its address."""
    case = make(name, given, SHAPE)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = case.map(lambda part, x: mode.from_tensor(x))()
    for x, real in zip(fake, case(), strict=True):
        assert type(x).__name__ == "FakeTensor"
        assert (x.shape, x.dtype, x.stride()) == (real.shape, real.dtype, real.stride())


@every_case
def test_tracers_see_the_operator(name, given):
    """A tracer that saw only the allocation of the output would replay uninitialised memory."""
    case = make(name, given, SHAPE)
    first = case.leaves[0]
    other = torch.randn_like(case.arguments[first])
    call = lambda x: case(**{first: x})  # noqa: E731
    traced = make_fx(call)(case.arguments[first])
    assert f"ddpm_fast.{case.op}" in traced.code
    for x, y in zip(traced(other), call(other), strict=True):
        assert_bits_equal(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and it warns of every Python branch
        scripted = torch.jit.trace(call, case.arguments[first])
    for x, y in zip(scripted(other), call(other), strict=True):
        assert_bits_equal(x, y)


@every_case
def test_tracers_see_backward(name, given):
    case = make(name, given, SHAPE)
    first, grads = case.leaves[0], upstreams(case())

    def gradient(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(case(**{first: x}), x, grads)[0]

    traced = make_fx(gradient)(case.arguments[first])
    other = torch.randn_like(case.arguments[first])
    assert_close_to_exact(traced(other), gradient(other).double(), ulps=2)


@every_case
def test_torch_export(name, given):
    """The program of a module has the operator in it, and gives the same bits."""
    case = make(name, given, SHAPE)
    names = [part for part, x in case.arguments.items() if isinstance(x, torch.Tensor)]

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return case(**dict(zip(names, tensors, strict=True)))

    tensors = tuple(case.arguments[part] for part in names)
    program = torch.export.export(Module(), tensors)
    assert f"ddpm_fast.{case.op}" in program.graph_module.code
    for x, y in zip(program.module()(*tensors), case(), strict=True):
        assert_bits_equal(x, y)


@every_case
def test_functional_transforms(name, given):
    """torch.func's tensors have no address: the reference serves them."""
    case = make(name, given, SHAPE)
    first, grads = case.leaves[0], upstreams(case())
    value = lambda x: sum((y * g).sum() for y, g in zip(case(**{first: x}), grads, strict=True))  # noqa: E731
    x = case.arguments[first]
    exact = case.in_float64()

    def plain(case, x, grads, **options):
        x = x.detach().clone().requires_grad_()
        return torch.autograd.grad(case(**{first: x}, **options), x, grads)[0]

    truth = plain(exact, exact.arguments[first], [g.double() for g in grads])
    assert_as_accurate(torch.func.grad(value)(x), plain(case, x, grads, backend="reference"), truth, floor=4.0, what="grad")

    many = torch.stack([x, 0.5 * x])
    mapped = torch.func.vmap(lambda x: case(**{first: x}), randomness="same")(many)  # of a Noise: test_ops_functorch.py has the others
    for i, each in enumerate(many):
        for y, base, truth in zip(mapped, case(**{first: each}, backend="reference"), exact(**{first: each.double()}), strict=True):
            assert_as_accurate(y[i], base, truth, floor=4.0, what=f"vmap, {i}")

    # A directional derivative is the gradient's product with the direction.
    direction = torch.randn_like(x)
    _, tangent = torch.func.jvp(value, (x,), (direction,))
    product = (plain(exact, exact.arguments[first], [g.double() for g in grads]) * direction.double()).sum()
    scale = float((plain(exact, exact.arguments[first], [g.double() for g in grads]) * direction.double()).abs().sum())
    assert_close_to_exact(tangent, product, atol=16 * torch.finfo(torch.float32).eps * scale, what="jvp")
