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


@pytest.fixture
def nvcc(monkeypatch, tmp_path):
    """setup.py's search, on a machine without any; nvcc.put(folder) makes one."""
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    search = runpy.run_path(str(SETUP))["nvcc"]
    search.__globals__["USUAL_TOOLKIT"] = str(tmp_path / "usual")

    def put(folder):
        path = tmp_path / folder / "nvcc"
        path.parent.mkdir(parents=True)
        path.touch(mode=0o755)
        return str(path)

    search.put = put
    return search


def test_nvcc_is_found_where_a_toolkit_is(nvcc, monkeypatch, tmp_path):
    assert nvcc() == ""
    usual = nvcc.put("usual/bin")
    assert nvcc() == usual
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "nowhere"))
    assert nvcc() == usual
    other = nvcc.put("other/bin")
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "other"))
    assert nvcc() == other
    home = nvcc.put("home/bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert nvcc() == home
    on_path = nvcc.put("path")
    assert nvcc() == on_path
    monkeypatch.setenv("CUDACXX", "mine")
    assert nvcc() == "mine"
