"""The package and a user's program as type checkers see them, and the names that they know against those at run time."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import get_args

import pytest

import ddpm_fast
from ddpm_fast import types
from ddpm_fast.backends import BACKENDS
from ddpm_fast.diffusion.parameterisation import VARIANCES
from ddpm_fast.models import PRESETS
from ddpm_fast.ops._vlb_terms import CDFS
from ddpm_fast.training.timestep_samplers import TIMESTEP_SAMPLERS

ROOT = next(path for path in Path(__file__).resolve().parents if (path / "pyproject.toml").exists())
CACHE = (
    Path(tempfile.gettempdir()) / f"ddpm_fast_mypy_{os.getuid() if hasattr(os, 'getuid') else 'cache'}"
)  # outlives a run: PyTorch takes half a minute, then all takes seconds
PROGRAM = Path("tests", "typing", "program.py")


def checker(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", name, *arguments], cwd=ROOT, capture_output=True, text=True)


def mypy(*arguments: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("mypy", reason="mypy is not installed")
    return checker("mypy", "--cache-dir", str(CACHE), *arguments)


@pytest.mark.slow
def test_mypy_accepts_the_package_and_the_program():
    done = mypy()
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_mypy_refuses_each_line_that_it_is_to_refuse(tmp_path):
    text = (ROOT / PROGRAM).read_text(encoding="utf-8")
    bare = tmp_path / "bare.py"
    bare.write_text(text.replace("  # type: ignore", "  # refused: "), encoding="utf-8")
    wanted = [i for i, line in enumerate(text.splitlines(), 1) if "# type: ignore" in line]
    found = [int(line.split(":")[1]) for line in mypy(str(bare)).stdout.splitlines() if ": error:" in line]
    assert found == wanted and len(wanted) > 10


@pytest.mark.slow
def test_pyright_accepts_the_program():
    pytest.importorskip("pyright", reason="pyright is not installed")
    if (version := checker("pyright", "--version")).returncode:
        pytest.skip(f"pyright cannot run here: {version.stderr.strip().splitlines()[-1:]}")
    done = checker("pyright", "--project", str(ROOT), "--pythonpath", sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("function", [getattr(ddpm_fast.ops, name) for name in ddpm_fast.ops.__all__], ids=ddpm_fast.ops.__all__)
def test_an_ops_public_function_is_typed(function):
    """mypy does not ask for it in ddpm_fast/ops, for the sake of what is private there."""
    signature = inspect.signature(function)
    assert inspect.Signature.empty not in (
        signature.return_annotation,
        *(parameter.annotation for parameter in signature.parameters.values()),
    )


@pytest.mark.parametrize(
    ("alias", "known"),
    [
        (types.Backend, BACKENDS), (types.Cdf, CDFS), (types.Preset, PRESETS),
        (types.TimestepSampler, TIMESTEP_SAMPLERS), (types.Variance, VARIANCES),
    ],
    ids=["Backend", "Cdf", "Preset", "TimestepSampler", "Variance"],
)  # fmt: skip
def test_a_table_by_name_has_the_names_of_its_type(alias, known):
    assert get_args(alias) == tuple(known)
