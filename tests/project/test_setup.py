"""What building says of its environment before CMake is started."""

import runpy
import shutil
from pathlib import Path

import pytest

import ddpm_fast

SETUP = Path(ddpm_fast.__file__).parents[1] / "setup.py"


@pytest.fixture
def check_compiler(monkeypatch):
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(SETUP))["check_compiler"]


@pytest.mark.parametrize(
    "value, message",
    [
        (" ", "CXX must name a compiler or be unset, got ' '"),
        ("\t", "CXX must name a compiler"),
        ("nothing --fast", r"found no C\+\+ compiler \(looked for nothing\)"),
    ],
)
def test_cxx_that_names_no_compiler(check_compiler, monkeypatch, value, message):
    monkeypatch.setenv("CXX", value)
    with pytest.raises(SystemExit, match=message):
        check_compiler()


@pytest.mark.parametrize("value, names", [("", {"c++"}), ("g++ -O1", {"g++"})])
def test_cxx_that_does(check_compiler, monkeypatch, value, names):
    monkeypatch.setenv("CXX", value)
    asked = []
    monkeypatch.setattr(shutil, "which", lambda name: asked.append(name) or name)
    check_compiler()
    assert set(asked) == names
