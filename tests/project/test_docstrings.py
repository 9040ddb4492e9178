"""Docstrings begin with a noun or a verb: "Hash of the weights", not "Of the weights"."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "ddpm_fast"
NO_BEGINNING = {
    "about", "above", "after", "as", "at", "before", "below", "beyond", "by", "for", "from", "how", "if", "in", "into", "its", "like",
    "of", "on", "than", "that", "to", "under", "what", "when", "where", "whether", "which", "who", "why", "with", "without",
}  # fmt: skip


def beginnings(text):
    """Name and first word of each docstring that begins with neither a noun nor a verb."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            words = (ast.get_docstring(node) or "").split()
            if words and words[0].strip(",.:;").lower() in NO_BEGINNING:
                yield getattr(node, "name", "the module"), words[0]


def test_docstrings_begin_with_a_noun_or_a_verb():
    found = {str(path.relative_to(PACKAGE)): list(beginnings(path.read_text(encoding="utf-8"))) for path in PACKAGE.rglob("*.py")}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "text", ['"""Of the weights."""', 'def f():\n    """Whether it is."""', 'class A:\n    def f(self):\n        """Its parts, by name."""']
)
def test_a_riddle_is_seen(text):
    assert list(beginnings(text))
    assert not list(beginnings(text.replace('"""', '"""Hash ', 1)))
