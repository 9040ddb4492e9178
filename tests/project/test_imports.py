"""The package's imports have no cycle, those inside functions included: what a module needs lies below it."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "ddpm_fast"


def imports(path: Path, modules: dict[str, Path]) -> set[str]:
    """Modules of the package that a file imports anywhere, but for what is there for type checkers alone."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports name their module in full"
            found.update(
                name if (name := f"{node.module}.{alias.name}") in modules or alias.name == "_C" else node.module for alias in node.names
            )
    return found & modules.keys()


def graph() -> dict[str, set[str]]:
    modules = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: imports(path, modules) - {name} for name, path in modules.items()}


def cycle(edges: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_cycle_of_modules():
    edges = graph()
    assert len(edges) > 60 and "ddpm_fast.noise" in edges["ddpm_fast.ops._randn"]
    assert cycle(edges) == []


@pytest.mark.parametrize("depth", [2])
def test_no_cycle_of_folders(depth):
    folders: dict[str, set[str]] = {}
    for name, needs in graph().items():
        own = ".".join(name.split(".")[:depth])
        folders.setdefault(own, set()).update({".".join(need.split(".")[:depth]) for need in needs} - {own})
    assert cycle(folders) == []


def test_no_name_hides_a_module():
    """A package's function of the name of a module in it would be the one or the other, by who asks: for mypy, the module."""
    modules = graph()
    hidden = []
    for path in PACKAGE.rglob("__init__.py"):
        package = ".".join(path.parent.relative_to(PACKAGE.parent).parts)
        bound = [alias.asname or alias.name for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.ImportFrom)
                 for alias in node.names if f"{node.module}.{alias.name}" not in modules]  # fmt: skip
        hidden += [f"{package}.{name}" for name in bound if f"{package}.{name}" in modules]
    assert hidden == []


def test_a_cycle_is_seen(tmp_path):
    lazy = tmp_path / "lazy.py"
    lazy.write_text("def f():\n    from ddpm_fast.ops import randn\n")
    modules = {"ddpm_fast.ops": lazy, "ddpm_fast.noise": lazy}
    assert imports(lazy, modules) == {"ddpm_fast.ops"}
    assert set(cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}


@pytest.mark.parametrize(
    "path",
    sorted(path for folder in ("benchmarks", "examples") for path in (PACKAGE.parent / folder).glob("*.py")),
    ids=lambda path: path.name,
)
def test_scripts_import_what_is_there(path):
    """Benchmarks and examples need more than the tests do, so that no test runs all of them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE.name:
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}"), (
                    f"{node.module} has no {alias.name}"
                )
