"""What autograd may ask of every differentiable op: subsets of gradients, a graph kept, second derivatives, transforms of backward.

Each op's own gradients are checked against float64 in its own file. The calls are op_cases.py's.
"""

import pytest
import torch
from interpreter import INTERPRETED
from numerics import assert_as_accurate, assert_bits_equal, assert_close_to_exact
from op_cases import CLIPPED, every_case, everything, make, upstreams, with_guesses_at_the_ends
from torch.utils.checkpoint import checkpoint

# Rows of 1066 elements: more than a block, not aligned. Triton's interpreter takes as long for each block as a kernel for all.
SHAPE = (2 if INTERPRETED else 4, 2, 13, 41)


def gradients(case, grads, *leaves):
    """Of the leaves named, all by default, as a dictionary."""
    case, names = case.watched(*leaves), leaves or case.leaves
    found = torch.autograd.grad(case(), [case.arguments[name] for name in names], grads)
    return dict(zip(names, found, strict=True))


def second_derivatives(case, grads):
    """Of L = Σ g y² + Σ (dL/dx)²: what double backward gives each leaf."""
    case = case.watched()
    results = case()
    # y²: so that an op that is linear has a second derivative too.
    value = sum((g.to(y.dtype) * y.square()).sum() for g, y in zip(grads, results, strict=True))
    first = torch.autograd.grad(value, case.inputs(), create_graph=True)
    return torch.autograd.grad(sum(x.square().sum() for x in first), case.inputs())


@every_case
def test_second_derivatives_are_those_of_the_reference_in_float64(name, given):
    case = make(name, given, (4, 2, 37))
    grads = upstreams(case())
    exact = second_derivatives(case.in_float64(), grads)
    baseline = second_derivatives(case.given(backend="reference"), grads)
    # 8 ulps: each is a chain of about ten roundings, of which the baseline's may happen to cancel.
    for leaf, x, base, truth in zip(case.leaves, second_derivatives(case, grads), baseline, exact, strict=True):
        assert_as_accurate(x, base, truth, floor=8.0, what=leaf)


@pytest.mark.parametrize("name", CLIPPED)
def test_the_ends_of_the_clipping_range_pass_a_gradient(name, isa):
    """As they pass torch.clamp."""
    case = with_guesses_at_the_ends(make(name, None if name.startswith("vlb") else "tensor", SHAPE))
    grads = upstreams(case())
    exact, baseline = everything(case.in_float64(), [g.double() for g in grads]), everything(case, grads, backend="reference")
    for what, x in everything(case, grads).items():
        assert_as_accurate(x, baseline[what], exact[what], floor=4.0, what=what)


@every_case
def test_a_graph_with_and_without_a_graph_of_its_own_gives_the_same_gradient(name, given):
    """create_graph=True takes another way, plain PyTorch; to rounding it must not matter."""
    case = make(name, given, SHAPE)
    grads = upstreams(case())
    exact = gradients(case.in_float64(), [g.double() for g in grads])
    watched, plain = case.watched(), gradients(case, grads)
    with_graph = torch.autograd.grad(watched(), watched.inputs(), grads, create_graph=True)
    for leaf, x in zip(case.leaves, with_graph, strict=True):
        assert x.requires_grad or case.op in ("q_sample", "p_step")  # linear in some of their leaves
        assert_as_accurate(plain[leaf], x, exact[leaf], floor=4.0, what=leaf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@every_case
def test_backward_twice_gives_the_same_bits(name, given, dtype):
    case = make(name, given, SHAPE, dtype).watched()
    results = case()
    grads = upstreams(results)
    first = torch.autograd.grad(results, case.inputs(), grads, retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(results, case.inputs(), grads, retain_graph=True)
    third = torch.autograd.grad(results, case.inputs(), grads)
    for leaf, *each, x in zip(case.leaves, second, third, first, kept, strict=True):
        for other in each:  # the first again: the second must not have written into it
            assert_bits_equal(other, x, leaf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_case
def test_backward_with_different_upstreams_is_right_each_time(name, given, dtype):
    """A gradient that forward has prepared may be given away once; what comes later is computed anew."""
    case = make(name, given, SHAPE, dtype)
    watched, base = case.watched(), case.given(backend="reference").watched()
    results, base_results = watched(), base()
    # Ones, ones of both signs, then a large and a small scale as loss scaling gives them.
    for seed, scale in ((None, 1.0), (4, 1.0), (5, 2.0**12 + 1), (6, 1e-3), (4, 1.0)):
        grads = [torch.ones_like(x) for x in results] if seed is None else [scale * g for g in upstreams(results, seed)]
        found = torch.autograd.grad(results, watched.inputs(), grads, retain_graph=True)
        baseline = torch.autograd.grad(base_results, base.inputs(), grads, retain_graph=True)
        exact = gradients(case.in_float64(), [g.double() for g in grads])
        for leaf, x, b in zip(case.leaves, found, baseline, strict=True):
            assert_as_accurate(x, b, exact[leaf], floor=4.0, what=f"{leaf}, upstream of seed {seed}")


@every_case
def test_gradients_accumulate_and_are_not_shared(name, given):
    """backward() gives a leaf the op's own tensor: a second call adds into it, and must not add into anything else."""
    case = make(name, given, SHAPE)
    watched = case.watched()
    results = watched()
    a, b = upstreams(results, 4), upstreams(results, 5)
    torch.autograd.backward(results, a, retain_graph=True)
    kept = [x.grad.clone() for x in watched.inputs()]
    torch.autograd.backward(results, b)
    later = gradients(case, b)
    for leaf, x, first in zip(case.leaves, watched.inputs(), kept, strict=True):
        assert_close_to_exact(x.grad, first.double() + later[leaf].double(), ulps=1, atol=4e-7 * float(later[leaf].abs().max()), what=leaf)


@every_case
def test_one_graph_used_by_two_losses_at_once(name, given):
    """The op's gradients meet in its inputs: two calls on the same leaves are two graphs that know nothing of each other."""
    case = make(name, given, SHAPE).watched()
    one, two = case(), case()
    a, b = upstreams(one, 4), upstreams(two, 5)
    second = torch.autograd.grad(two, case.inputs(), b)
    first = torch.autograd.grad(one, case.inputs(), a)
    for grads, found in ((a, first), (b, second)):
        expected = gradients(case, grads)
        for leaf, x in zip(case.leaves, found, strict=True):
            assert_bits_equal(x, expected[leaf], leaf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_case
def test_each_gradient_alone_has_the_bits_it_has_among_all(name, given, dtype):
    case = make(name, given, SHAPE, dtype)
    grads = upstreams(case())
    among_all = gradients(case, grads)
    for leaf in case.leaves:
        assert_bits_equal(gradients(case, grads, leaf)[leaf], among_all[leaf], f"{leaf} alone")
        others = [other for other in case.leaves if other != leaf]
        for other, x in gradients(case, grads, *others).items() if others else ():
            assert_bits_equal(x, among_all[other], f"{other} without {leaf}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", [0, 1], ids=["x_next", "x_start"])
@pytest.mark.parametrize("given", ["Noise", "tensor"])
@pytest.mark.parametrize("name", ["p_step", "p_step learned, multistep and guided"])
def test_gradient_of_one_of_two_outputs(name, given, wanted, dtype):
    """None comes for the other output. All leaves at once, and each alone, also where its gradient is zero or none."""
    case = make(name, given, SHAPE, dtype)
    grad = upstreams(case())[wanted]

    def one(case, grad, leaves):
        case = case.watched(*leaves)
        return torch.autograd.grad(case()[wanted], [case.arguments[leaf] for leaf in leaves], grad, allow_unused=True)

    exact = one(case.in_float64(), grad.double(), case.leaves)
    baseline = one(case.given(backend="reference"), grad, case.leaves)
    among_all = one(case, grad, case.leaves)
    for leaf, x, base, truth in zip(case.leaves, among_all, baseline, exact, strict=True):
        zero = torch.zeros_like(case.arguments[leaf])  # autograd says None, the kernel may say zeros
        x, base, truth = (zero.to(like) if part is None else part for part, like in ((x, dtype), (base, dtype), (truth, torch.float64)))
        assert_as_accurate(x, base, truth, floor=2.0, what=leaf)
        if wanted == 1 and leaf not in ("noise", "x_start_previous"):  # of which x̂0 is no function
            assert_bits_equal(one(case, grad, [leaf])[0], x, f"{leaf} alone")


@every_case
def test_no_gradient_where_none_is_wanted(name, given):
    case = make(name, given, SHAPE)
    assert not any(x.requires_grad for x in case())
    watched = case.watched()
    with torch.no_grad():
        assert not any(x.requires_grad for x in watched())
    with torch.inference_mode():
        for x, expected in zip(watched(), case(), strict=True):
            assert_bits_equal(x, expected)


@every_case
def test_recomputation_by_checkpoint(name, given):
    """Forward without a graph, then again with one: the bits of the plain gradient, in both of PyTorch's ways."""
    case = make(name, given, SHAPE)
    grads = upstreams(case())
    expected = gradients(case, grads)
    for use_reentrant in (False, True):
        watched = case.watched()
        results = checkpoint(
            lambda *inputs: case(**dict(zip(case.leaves, inputs, strict=True))), *watched.inputs(), use_reentrant=use_reentrant
        )
        torch.autograd.backward(results, grads)
        for leaf, x in zip(case.leaves, watched.inputs(), strict=True):
            assert_bits_equal(x.grad, expected[leaf], leaf)


class Stop(torch.autograd.Function):
    """An identity whose backward says that there is no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("backend", [None, "reference"])
@every_case
def test_no_gradient_came(name, given, backend):
    """What follows the op may answer None; PyTorch's own operators pass that on."""
    case = make(name, given, (3, 2, 5)).given(backend=backend).watched()
    total = sum(Stop.apply(x).sum() for x in case())
    for leaf, x in zip(case.leaves, torch.autograd.grad(total, case.inputs(), allow_unused=True), strict=True):
        assert x is None or not x.any(), leaf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_case
def test_many_gradients_at_once(name, given, dtype):
    """is_grads_batched, which torch.autograd.functional.jacobian(vectorize=True) uses: backward under vmap, where none has an address."""
    case = make(name, given, (3, 2, 5), dtype)
    each = [upstreams(case(), seed) for seed in (4, 5, 6)]
    exact = [gradients(case.in_float64(), [g.double() for g in grads]) for grads in each]
    baseline = [gradients(case.given(backend="reference"), grads) for grads in each]
    watched = case.watched()
    found = torch.autograd.grad(
        watched(), watched.inputs(), [torch.stack(grads) for grads in zip(*each, strict=True)], is_grads_batched=True
    )
    for leaf, x in zip(case.leaves, found, strict=True):
        for i in range(3):
            assert_as_accurate(x[i], baseline[i][leaf], exact[i][leaf], floor=4.0, what=f"{leaf}, gradient {i}")


@every_case
def test_input_changed_before_backward(name, given):
    """Either PyTorch's error, or the gradient where the input was: never the gradient of other values."""
    case = make(name, given, SHAPE)
    grads = upstreams(case())
    expected = gradients(case, grads)
    for changed in case.leaves:
        watched = case.watched()
        # A leaf cannot be changed in place, what is computed from it can.
        arguments = {leaf: watched.arguments[leaf] * 1.0 for leaf in case.leaves}
        results = watched(**arguments)
        arguments[changed].add_(1.0)
        try:
            found = torch.autograd.grad(results, watched.inputs(), grads)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            continue
        for leaf, x in zip(case.leaves, found, strict=True):
            assert_bits_equal(x, expected[leaf], f"{leaf} after {changed} was changed")


@every_case
def test_everything_is_one_call(name, given):
    """op_cases.everything, which other files compare by, is what backward() gives."""
    case = make(name, given, SHAPE)
    expected, watched = everything(case), case.watched()
    results = watched()
    torch.autograd.backward(results, upstreams(results))
    for leaf, x in zip(case.leaves, watched.inputs(), strict=True):
        assert_bits_equal(x.grad, expected[f"gradient of {leaf}"], leaf)
