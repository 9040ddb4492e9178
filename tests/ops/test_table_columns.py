"""The eight columns of a step's table stand in the same order in Python, C++ and Triton."""

import re
from pathlib import Path

import pytest

import ddpm_fast

ROOT = Path(ddpm_fast.__file__).parents[1]
SHORT = {"low": "log_variance_low", "high": "log_variance_high", "_": "unused"}


def names(text):
    return tuple(SHORT.get(name, name) for name in text.split(", "))


def written_columns(op):
    """Where each of the three languages writes the row of an op's table."""
    (python,) = re.findall(r"^COLUMNS = \((.*)\)$", (ROOT / f"ddpm_fast/ops/_{op}.py").read_text(), re.M)
    cpp = re.findall(r"struct Row \{\s*float ([\w, ]+);", (ROOT / f"csrc/cpu/{op}.cpp").read_text())
    triton = re.findall(r"^    ([\w, ]+) = row\(", (ROOT / f"ddpm_fast/ops/triton/{op}.py").read_text(), re.M)
    return names(python.replace('"', "")), {"C++": [names(row) for row in cpp], "Triton": [names(row) for row in triton]}


@pytest.mark.parametrize("op, in_triton", [("p_step", 2), ("vlb_terms", 1)])
def test_the_columns_are_the_same_everywhere(op, in_triton):
    columns, others = written_columns(op)
    assert len(columns) == 8
    assert others == {"C++": [columns], "Triton": [columns] * in_triton}


def test_triton_reads_a_row_in_order():
    source = (ROOT / "ddpm_fast/ops/triton/_output.py").read_text()
    places = re.findall(r"entry\(table_ptr, at(?: \+ (\d))?, known\)", source)
    assert "at = t * 8" in source and places == ["", *"1234567"]
