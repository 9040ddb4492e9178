"""Where test files lie: in folders as the package's, each by itself, with a name that no other has."""

import ast
from collections import Counter
from pathlib import Path

import pytest
import sanitize

from ddpm_fast.backends import tables

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
# What is about no one folder of the package; the simulator, a package of its own; what tests share; programs for type checkers.
BESIDES = {"project", "ptxsim", "support", "typing"}


def imported(text):
    """Last parts of all module names that a source imports, wherever in it and however."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(name.name for name in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__", "importorskip")):
            found |= {name.value for name in node.args if isinstance(name, ast.Constant)}
    return {name.rpartition(".")[2] for name in found}


def test_no_test_module_is_imported():
    modules = {path.stem for path in TESTS.rglob("test_*.py")}
    taken = {str(path.relative_to(TESTS)): imported(path.read_text(encoding="utf-8")) & modules for path in TESTS.rglob("*.py")}
    taken = {path: names for path, names in taken.items() if names}
    assert not taken, f"what several test files need goes to tests/support: {taken}"


@pytest.mark.parametrize(
    "text",
    [
        "import test_x",
        "from test_x import y",
        "def f():\n    from ops import test_x",
        "import ops.test_x as y",
        "importlib.import_module('test_x')",
    ],
)
def test_every_way_of_importing_is_seen(text):
    assert "test_x" in imported(text)


def test_names_are_of_one_file_each():
    names = Counter(path.name for path in TESTS.rglob("*.py") if "ptxsim" not in path.parts)
    assert [name for name, count in names.items() if count > 1] == []


def test_folders_are_the_packages():
    folders = {path.parent.relative_to(TESTS).parts for path in TESTS.rglob("test_*.py") if "ptxsim" not in path.parts}
    assert () not in folders  # none lies in tests/ itself
    for folder, *deeper in folders:
        assert not deeper and (folder in BESIDES or (ROOT / "ddpm_fast" / folder / "__init__.py").is_file()), folder


def test_the_sanitizers_run_the_tests_of_every_op():
    names = {Path(file).stem for file in sanitize.op_tests()}
    assert len(tables) >= 9 and {f"test_{op}" for op in tables} <= names
    assert {"test_native", "test_noise", "test_ops_addresses"} <= names
