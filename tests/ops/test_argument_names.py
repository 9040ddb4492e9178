"""Arguments that go by position have one order: that of the operator, by the names that every function of an op gives them."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import ddpm_fast
from ddpm_fast.backends import tables

OPS = Path(ddpm_fast.__file__).parent / "ops"
NAMES = sorted(
    name for name in tables if (OPS / f"_{name}.py").exists() and hasattr(importlib.import_module(f"ddpm_fast.ops._{name}"), "_op")
)


def names_of(name):
    return importlib.import_module(f"ddpm_fast.ops._{name}")._op.names


def test_every_op_is_looked_at():
    assert set(NAMES) >= {"q_sample", "p_step", "simple_loss", "gaussian_kl", "vlb_terms", "group_norm", "attention"}


@pytest.mark.parametrize("name", NAMES)
def test_functions_take_them_in_the_operators_order(name):
    op = importlib.import_module(f"ddpm_fast.ops._{name}")._op
    functions = [op.operator.check, *op.backends.implementations.values()]
    looked_at = 0
    for function in functions:
        positional = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY]
        if any(p.kind is p.VAR_POSITIONAL for p in positional):
            continue  # what is unpacked from it is looked at below
        looked_at += 1
        assert [p.name for p in positional] == op.names, function.__qualname__
    assert looked_at >= 2  # the check and the reference at least


@pytest.mark.parametrize(
    "path",
    [path for name in NAMES for path in (OPS / f"_{name}.py", OPS / f"triton/{name}.py") if path.exists()],
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_what_is_unpacked_has_its_own_name(path):
    names = names_of(path.stem.lstrip("_"))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        unpacked = node.targets if isinstance(node, ast.Assign) and ast.unparse(node.value) == "arguments" else []
        for target in (target for target in unpacked if isinstance(target, ast.Tuple)):
            star = next((i for i, element in enumerate(target.elts) if isinstance(element, ast.Starred)), len(target.elts))
            first, last = ([ast.unparse(x).removeprefix("self.") for x in part] for part in (target.elts[:star], target.elts[star + 1 :]))
            assert star < len(target.elts) or len(first) == len(names), ast.unparse(node)
            pairs = [*zip(first, names, strict=False), *zip(reversed(last), reversed(names), strict=False)]
            assert all(mine in (theirs, "_") for mine, theirs in pairs), ast.unparse(node)
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "arguments":
            pytest.fail(f"{ast.unparse(node)}: by name, or unpacked")
