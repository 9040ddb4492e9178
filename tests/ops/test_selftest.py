"""The self-test: right kernels pass it, wrong ones and those that crash do not."""

import json
import subprocess

import pytest
import torch

from ddpm_fast import selftest
from ddpm_fast.backends import native, native_missing, tables

pytestmark = pytest.mark.skipif(native is None, reason=native_missing or "-")
OPS = {"q_sample", "p_step", "simple_loss", "gaussian_kl", "vlb_terms", "group_norm", "attention", "randn"}


def test_the_cpu_kernels_pass():
    verdicts = selftest.check("cpu", "cpu")
    assert {(v.op, v.dtype) for v in verdicts} == {(op, dtype) for op in OPS for dtype in ("float32", "bfloat16", "float16")}
    assert [v for v in verdicts if v.problem] == []
    assert selftest.table(verdicts).count("\n") == 3 * len(OPS) + 1


def test_the_triton_kernels_pass_in_the_simulator():
    pytest.importorskip("triton", reason="Triton is not installed, so its kernels cannot be compiled")
    from interpreter import INTERPRETED

    if INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1: nothing is compiled in this process")
    from simulator import simulated

    with simulated(80) as launches:
        verdicts = selftest.check("triton", "cpu")
    assert {v.op for v in verdicts} == OPS - {"group_norm", "attention"} and len(launches) >= 30
    assert [v for v in verdicts if v.problem] == []


@pytest.mark.parametrize("op", sorted(OPS))
def test_a_wrong_kernel_is_found(op, monkeypatch):
    """Its result too large by a thousandth."""
    right = tables[op].implementations["cpu"]

    def wrong(*arguments, **options):
        results = right(*arguments, **options)
        first, *rest = results if isinstance(results, tuple) else (results,)
        first = first * 1.001
        return (first, *rest) if isinstance(results, tuple) else first

    monkeypatch.setitem(tables[op].implementations, "cpu", wrong)
    found = {v.op for v in selftest.check("cpu", "cpu") if v.problem and v.dtype == "float32"}
    assert found == {op}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_is_found(value, monkeypatch):
    right = tables["q_sample"].implementations["cpu"]
    monkeypatch.setitem(
        tables["q_sample"].implementations,
        "cpu",
        lambda *a, **b: right(*a, **b).flatten(1).index_fill(1, torch.tensor(0), value).view(a[0].shape),
    )
    problems = [v.problem for v in selftest.check("cpu", "cpu") if v.op == "q_sample"]
    assert problems == ["result 0 is not finite where it must be"] * len(problems)


def test_an_exception_is_a_verdict(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("CUDA error:\n  an illegal memory access was encountered")

    monkeypatch.setitem(tables["p_step"].implementations, "cpu", fails)
    found = {v.op: v for v in selftest.check("cpu", "cpu") if v.problem}
    assert found.keys() == {"p_step"}
    assert found["p_step"].problem == "RuntimeError: CUDA error: an illegal memory access was encountered"


def test_in_a_process_of_its_own():
    assert {v.op for v in selftest.in_process("cpu", "cpu")} == OPS


@pytest.mark.parametrize(
    ("outcome", "problem"),
    [
        (
            subprocess.CompletedProcess("", -11, "", "Fatal Python error: Segmentation fault\n"),
            "ended with status -11: Fatal Python error: Seg",
        ),
        (subprocess.CompletedProcess("", 1, "", ""), "its process ended with status 1: no output"),
        (subprocess.TimeoutExpired("", 7), "it took more than 7 s"),
    ],
)
def test_a_crash_and_a_hang_are_verdicts(outcome, problem, monkeypatch):
    def run(*_, **__):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(subprocess, "run", run)
    (verdict,) = selftest.in_process("cuda", "cuda:0", timeout=7)
    assert problem in verdict.problem and (verdict.op, verdict.device) == ("all", "cuda:0")


def test_as_a_program(capsys, monkeypatch):
    assert selftest.main(["--json"]) == 0
    assert {v["op"] for v in json.loads(capsys.readouterr().out)} == OPS
    assert selftest.main(["--device", "cuda:77"]) == 0
    assert capsys.readouterr().out == "no kernels run here\n"
    monkeypatch.setattr(selftest, "check", lambda *_: [selftest.Verdict("q_sample", "cpu", "cpu", "float32", 7.0, "wrong")])
    assert selftest.main([]) == 1
    assert "| cpu | cpu | q_sample | float32 | 7.00 | wrong |" in capsys.readouterr().out
