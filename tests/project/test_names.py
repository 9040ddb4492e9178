"""What ``import ddpm_fast`` gives: the names that are promised, the rest when it is asked for, and nothing internal."""

import subprocess
import sys

import pytest

import ddpm_fast


def test_every_name_is_there():
    assert [name for name in ddpm_fast.__all__ if not hasattr(ddpm_fast, name)] == []


IMPORTING = """
import sys, torch
before = set(sys.modules)
import ddpm_fast as df
print(*sorted({name for name in sys.modules.keys() - before if not name.startswith(("ddpm_fast.", "torch."))}))
print(*[name for name in ("data", "evaluation", "training") if f"ddpm_fast.{name}" in sys.modules])
print(df.data.load_data.__name__, df.training.Trainer.__name__, df.evaluation.evaluate_bound.__name__)
"""


def test_data_training_and_evaluation_come_when_asked_for():
    done = subprocess.run([sys.executable, "-c", IMPORTING], capture_output=True, text=True, check=True)
    with_torch, at_once, asked_for = done.stdout.splitlines()
    assert not {"matplotlib", "PIL", "rich", "sklearn", "torchmetrics", "triton", "typer"} & set(with_torch.split())
    assert (at_once, asked_for) == ("", "load_data Trainer evaluate_bound")


def test_dir_has_what_is_promised_alone():
    assert [name for name in dir(ddpm_fast) if not name.startswith("__")] == sorted(
        name for name in ddpm_fast.__all__ if not name.startswith("__")
    )


def test_another_name_is_no_attribute():
    with pytest.raises(AttributeError, match="module 'ddpm_fast' has no attribute 'trainer'"):
        ddpm_fast.trainer  # noqa: B018
