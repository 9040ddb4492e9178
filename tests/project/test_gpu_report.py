"""The report for the first GPU: it runs to its end on any machine, says what it left out, and survives what fails."""

import pytest
import torch

from ddpm_fast import gpu_report, selftest
from ddpm_fast.gpu_report import Report, Skipped


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it takes minutes")
def test_it_runs_to_its_end_without_a_gpu(tmp_path, capsys):
    path = tmp_path / "report.md"
    assert gpu_report.main(["--out", str(path)]) == 0
    text = path.read_text(encoding="utf-8")
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == list(gpu_report.SECTIONS)
    assert text.count("Skipped: PyTorch sees no CUDA device") + text.count("Skipped: ddpm_fast._C was built without CUDA") == 4
    assert "| cpu | cpu | q_sample | float32 |" in text and "Nothing wrong was found in what ran." in text
    assert capsys.readouterr().out.endswith(f"Nothing wrong was found in what ran. Report: {path}\n")


def test_a_section_that_fails_is_not_the_end():
    report = Report()

    def fails(_):
        yield "a line"
        raise RuntimeError("CUDA error:\nunspecified launch failure")

    def skipped(_):
        raise Skipped("there is none")
        yield

    report.section("First", fails)
    report.section("Second", skipped)
    text = "\n".join(report.text)
    assert "a line\n**Wrong**: RuntimeError: CUDA error: unspecified launch failure" in text and "Skipped: there is none." in text
    assert report.wrong == ["First"]


def test_what_is_wrong_is_said_first_and_in_the_status(tmp_path, monkeypatch):
    bad = selftest.Verdict("all", "cuda", "cuda:0", "all", float("inf"), "its process ended with status -6: abort")
    monkeypatch.setattr(selftest, "places", lambda: [("cuda", "cuda:0")])
    monkeypatch.setattr(selftest, "in_process", lambda *_, **__: [bad])
    monkeypatch.setattr(gpu_report, "SECTIONS", {"Kernels against float64": gpu_report.kernels})
    path = tmp_path / "report.md"
    assert gpu_report.main(["--out", str(path)]) == 1
    text = path.read_text(encoding="utf-8")
    assert text.splitlines()[2] == "Wrong: kernels." and "**Wrong**: all by cuda on cuda:0 in all: its process ended with status -6" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_timed_gives_results_alike(dtype):
    """On the CPU here: both sides run, and their results have the same shapes and dtypes."""
    names = []
    for name, ours, theirs in gpu_report._calls(torch.device("cpu"), dtype):
        sides = [[(x.shape, x.dtype) for x in flat(call())] for call in (ours, theirs)]
        names.append(name)
        if name != "p_step" and not (name.startswith("group_norm") and dtype != torch.float32):  # x̂0 too; gradients of fp32 parameters
            assert sides[0] == sides[1], name
    assert len(names) >= 4


def flat(result):
    return [result] if isinstance(result, torch.Tensor) else [x for part in result for x in flat(part)]
