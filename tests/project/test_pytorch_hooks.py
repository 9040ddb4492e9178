"""PyTorch's private hooks still do what ddpm_fast/_pytorch.py says of them, and nothing else uses any."""

import ast
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import ddpm_fast
from ddpm_fast import _pytorch

X = torch.arange(6.0).reshape(2, 3)


def during(transform, question):
    """What question() says inside a transform of torch.func."""
    said = []

    def function(x):
        said.append(question())
        return x.sum()

    transform(function)(X)
    return said[0]


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.jacfwd], ids=lambda f: f.__name__)
def test_transforms_are_seen(transform):
    assert during(transform, _pytorch.in_functorch) and during(transform, _pytorch.transforms_active)
    assert not _pytorch.in_functorch() and not _pytorch.transforms_active()


def test_below_functorch_is_outside_of_it():
    found = []

    def function(x):
        with _pytorch.below_functorch():
            values, levels = _pytorch.unwrapped(x)
            found.extend([_pytorch.in_functorch(), _pytorch.transforms_active(), values.data_ptr(), levels])
        return x

    torch.func.vmap(function)(X)
    assert found == [False, True, X.data_ptr(), {1}]
    with _pytorch.below_functorch():
        assert _pytorch.unwrapped(X) == (X, set())


def test_forward_mode_is_seen():
    assert not _pytorch.in_forward_mode()
    with forward_ad.dual_level():
        assert _pytorch.in_forward_mode()
    assert not _pytorch.in_forward_mode()


def test_what_watches_operators_is_seen():
    said = []

    def function(x):
        said.append(_pytorch.goes_through_dispatcher())
        return x + 1

    function(X)
    with FlopCounterMode(display=False):
        function(X)
    torch.jit.trace(function, X, check_trace=False)
    torch.compile(function, backend="eager")(X)
    assert said[:3] == [False, True, True] and said[-1] is True


def test_tensors_that_stand_for_others_hold_no_values():
    assert _pytorch.holds_values(X) and _pytorch.holds_values(torch.nn.Parameter(X))
    with torch._subclasses.FakeTensorMode():
        assert not _pytorch.holds_values(torch.empty(2))


def test_batches_of_gradients_are_seen():
    said = []

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            said.append(_pytorch.in_batches([None, grad]))
            return grad

    x = X.clone().requires_grad_()
    torch.autograd.grad(Function.apply(x), x, torch.ones(4, 2, 3), is_grads_batched=True)
    torch.autograd.grad(Function.apply(x), x, torch.ones(2, 3))
    assert said == [True, False]


def test_lasting_tensors_outlive_inference_mode():
    with torch.inference_mode():
        with _pytorch.lasting():
            kept = torch.ones(2)
        assert torch.ones(2).is_inference() and not kept.is_inference()
    (kept.requires_grad_() * 2).sum().backward()


@pytest.mark.parametrize("randomness, rows", [("same", [0, 0, 0, 0]), ("different", [0, 2, 4, 6])])
def test_a_draw_is_as_vmap_asks(randomness, rows):
    drawn = torch.func.vmap(lambda x: _pytorch.draw(lambda count: torch.arange(count), 2, x), randomness=randomness)(torch.ones(4, 2))
    assert drawn[:, 0].tolist() == rows


def test_a_draw_raises_as_vmap_asks():
    def draw(x):
        return _pytorch.draw(lambda count: torch.arange(count), 2, x)

    with pytest.raises(RuntimeError, match="pass randomness='different'"):
        torch.func.vmap(draw)(torch.ones(4, 2))
    with pytest.raises(RuntimeError, match="chunk_size"):
        torch.func.vmap(draw, randomness="different", chunk_size=2)(torch.ones(4, 2))


def test_a_compiler_calls_what_is_marked_and_does_not_trace_it():
    @_pytorch.constant_while_compiling
    def asked(device):
        with open(__file__):  # which no compiler can trace
            return f"{device} is asked"

    compiled = torch.compile(lambda x: x + len(asked(x.device)), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2)).tolist() == [len("cpu is asked")] * 2


def private(node):
    return (
        isinstance(node, ast.Attribute)
        and node.attr in ("_C", "_functorch", "_current_level", "_dynamo")
        and isinstance(node.value, ast.Name)
    )


def test_no_other_file_uses_private_hooks():
    package = Path(ddpm_fast.__file__).parent
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if any(private(node) and node.value.id in ("torch", "forward_ad") for node in ast.walk(ast.parse(path.read_text())))
    }
    assert found == {"_pytorch.py"}
