"""GPU report: ``python -m ddpm_fast.gpu_report`` runs everything that a first GPU can tell, and writes one Markdown file to send back.

Kernels against float64, in a process for each backend and GPU, so that a crash is a line of the report; compute-sanitizer on them where
it is installed; the CUDA graph of a sampling step; times against PyTorch; the repository's tests, where this is a clone of it. What
cannot run here is named with its reason. Ends with status 1 where something is wrong. Takes less than ten minutes.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

import ddpm_fast as df
from ddpm_fast import selftest
from ddpm_fast.autotune import measure
from ddpm_fast.backends import missing, native
from ddpm_fast.io.files import atomic_write

SECONDS = 540.0  # in all
TESTS = Path(__file__).resolve().parents[1] / "tests"
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")


class Skipped(Exception):
    """Reason why a section cannot run here."""


class Report:
    """Markdown, section by section.

    Args:
        seconds: for all sections together.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.end = time.monotonic() + seconds
        self.text: list[str] = []
        self.wrong: list[str] = []

    @property
    def left(self) -> float:
        """Seconds, at least one."""
        return max(1.0, self.end - time.monotonic())

    def section(self, title: str, body: Callable[[Report], Iterator[str]]) -> None:
        """Adds the lines of ``body``. An exception ends the section, not the report."""
        self.text += ["", f"## {title}", ""]
        start = time.monotonic()
        try:
            self.text.extend(body(self))
        except Skipped as reason:
            self.text.append(f"Skipped: {reason}.")
        except Exception as error:  # the report says which, and goes on
            self.fail(title, f"{type(error).__name__}: {' '.join(str(error).split())[:1000]}")
        self.text += ["", f"({time.monotonic() - start:.0f} s)"]

    def fail(self, where: str, what: str) -> None:
        """Adds a line on something that is wrong."""
        self.wrong.append(where)
        self.text.append(f"**Wrong**: {what}")


def machine(report: Report) -> Iterator[str]:
    """Versions, GPUs and what runs on each."""
    build = native.build_info() if native else {}
    yield f"- ddpm_fast {df.__version__}, PyTorch {torch.__version__} (CUDA {torch.version.cuda}), Python {sys.version.split()[0]}"
    built = f"CUDA {build['cuda'] / 1000:.1f} for {build['cuda_architectures']}" if build.get("cuda") else "none"
    yield f"- CUDA kernels: {built}; nvcc: {shutil.which('nvcc') or 'not on PATH'}"
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        size = f"{facts.multi_processor_count} SMs, {facts.total_memory >> 20} MiB"
        yield f"- cuda:{index}: {facts.name}, {facts.major}.{facts.minor}, {size}"
        for backend in ("triton", "cuda"):
            yield f"  - {backend}: {missing(backend, torch.device('cuda', index)) or 'runs'}"
    for backend in ("cpu", "triton", "cuda"):
        yield f"- backend {backend}: {missing(backend) or 'runs'}"


def kernels(report: Report) -> Iterator[str]:
    """Every kernel against the reference in float64."""
    verdicts = []
    for backend, device in selftest.places():
        found = selftest.in_process(backend, device, timeout=min(report.left, 180.0))
        verdicts += found
        for verdict in found:
            if verdict.problem:
                report.fail("kernels", f"{verdict.op} by {backend} on {device} in {verdict.dtype}: {verdict.problem}")
    if not verdicts:
        raise Skipped("no kernels run here")
    yield from selftest.table(verdicts).splitlines()


def sanitizer(report: Report) -> Iterator[str]:
    """compute-sanitizer on the CUDA kernels."""
    program = shutil.which("compute-sanitizer")
    if missing("cuda"):
        raise Skipped(missing("cuda"))
    if program is None:
        raise Skipped("compute-sanitizer is not on PATH")
    for tool in SANITIZERS:
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "ddpm_fast.selftest", "--backend", "cuda"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=min(report.left, 90.0))
        except subprocess.TimeoutExpired:
            yield f"- {tool}: not finished in its time"
            continue
        summary = re.findall(r"^=+ +((?:ERROR|RACECHECK) SUMMARY: .*)$", done.stdout, re.M)
        yield f"- {tool}: {summary[-1] if summary else f'status {done.returncode}'}"
        if done.returncode == 9:
            report.fail(tool, "the first errors: " + " / ".join(line for line in done.stdout.splitlines() if line.startswith("="))[:1500])


def graphs(report: Report) -> Iterator[str]:
    """A replayed sampling step against the step, in fp32 and under autocast, on each GPU."""
    if not torch.cuda.is_available():
        raise Skipped("PyTorch sees no CUDA device")
    diffusion = df.GaussianDiffusion(df.NoiseSchedule.linear(100))
    for index in range(torch.cuda.device_count()):
        model = df.UNet.from_preset("digits").to(f"cuda:{index}").eval()
        for dtype in (torch.float32, torch.bfloat16):
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                shape = (4, 1, 8, 8)
                captured, plain = (df.Sampler(model, diffusion, steps=10, graph=graph) for graph in (True, False))
                worst = max(float((captured(shape, seed) - plain(shape, seed)).abs().max()) for seed in (0, 1))
            yield f"- cuda:{index}, {dtype}: largest difference {worst:.2e}"
            if not worst <= (1e-3 if dtype == torch.float32 else 0.1):
                report.fail("graphs", f"replayed steps on cuda:{index} in {dtype} are not the steps")


def times(report: Report) -> Iterator[str]:
    """Median times of a call, ours and PyTorch's, in turn."""
    if not torch.cuda.is_available():
        raise Skipped("PyTorch sees no CUDA device; the scripts in benchmarks/ time the CPU kernels")
    device = torch.device("cuda", 0)
    yield "| call | dtype | ours, µs | PyTorch, µs | times as fast |"
    yield "|---|---|---|---|---|"
    for dtype in (torch.float32, torch.bfloat16):
        for name, ours, theirs in _calls(device, dtype):
            if report.left < 60:
                yield f"| {name} | {dtype} | no time left | | |"
                continue
            seconds = measure({"ours": ours, "PyTorch": theirs}, device)
            us = {side: 1e6 * x for side, x in seconds.items()}
            yield f"| {name} | {dtype} | {us['ours']:.1f} | {us['PyTorch']:.1f} | {us['PyTorch'] / us['ours']:.2f} |"


def _calls(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    """Name, our call and PyTorch's of the same result."""
    diffusion, noise = df.GaussianDiffusion(df.NoiseSchedule.linear(1000)), df.Noise(0)
    x, out = (torch.randn(128, 3, 64, 64, device=device).to(dtype) for _ in range(2))
    t = torch.arange(128, device=device) * 7
    signal, sigma = diffusion.table("sqrt_alphas_bar", x), diffusion.table("sqrt_one_minus_alphas_bar", x)

    def broad(table: torch.Tensor) -> torch.Tensor:
        return table[t].view(-1, 1, 1, 1)

    def noised() -> torch.Tensor:
        return (broad(signal) * x + broad(sigma) * torch.randn_like(x)).to(dtype)

    def step() -> torch.Tensor:
        x_start = (broad(signal) * x - broad(sigma) * out).clamp(-1, 1)
        return (broad(signal) * x_start + broad(sigma) * x + broad(sigma) * torch.randn_like(x)).to(dtype)

    yield "q_sample", lambda: diffusion.q_sample(x, t, noise), noised
    yield "p_step", lambda: diffusion.p_step(x, out, t, noise), step
    leaf = out.detach().requires_grad_()
    yield (
        "simple_loss, forward and backward",
        lambda: torch.autograd.grad(diffusion.simple_loss(leaf, x, t, noise).mean(), leaf),
        lambda: torch.autograd.grad(F.mse_loss(leaf.float(), torch.randn_like(x).float()), leaf),
    )
    h = torch.randn(32, 128, 32, 32, device=device).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = (torch.randn(128, device=device, requires_grad=True) for _ in range(2))
    same, upstream = [p.detach().to(dtype).requires_grad_() for p in (weight, bias)], torch.ones_like(h)
    yield (
        "group_norm and SiLU, forward and backward, channels_last",
        lambda: torch.autograd.grad(df.group_norm(h, 32, weight, bias, activation="silu"), (h, weight, bias), upstream),
        lambda: torch.autograd.grad(F.silu(F.group_norm(h, 32, same[0], same[1])), (h, *same), upstream),
    )
    qkv = torch.randn(32, 256, 3, 4, 64, device=device).to(dtype).requires_grad_()
    grad = torch.ones(32, 256, 256, device=device, dtype=dtype)

    def sdpa() -> object:
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return torch.autograd.grad(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2), qkv, grad)

    if not missing("cuda", device):
        yield "attention, 256 tokens, forward and backward", lambda: torch.autograd.grad(df.attention(qkv, backend="cuda"), qkv, grad), sdpa


def tests(report: Report) -> Iterator[str]:
    """The repository's tests that need a device."""
    if not (TESTS / "conftest.py").exists():
        raise Skipped("this is no clone of the repository")
    if not torch.cuda.is_available():
        raise Skipped("PyTorch sees no CUDA device; pytest runs the tests of the CPU")
    chosen = ["-m", "not simulator and not interpreter and not slow and not statistics", str(TESTS / "ops"), str(TESTS / "sampling")]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "--maxfail", "50", "-rf", "--tb=line", *chosen]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent, timeout=report.left)
    except subprocess.TimeoutExpired as stopped:
        output = stopped.stdout.decode() if isinstance(stopped.stdout, bytes) else stopped.stdout or ""
        yield f"Not finished in its time; as far as it came:\n\n```\n{output[-1500:]}\n```"
        return
    yield f"```\n{done.stdout[-6000:]}{done.stderr[-1000:]}\n```"
    if done.returncode:
        report.fail("tests", f"pytest ended with status {done.returncode}")


SECTIONS: dict[str, Callable[[Report], Iterator[str]]] = {
    "Machine": machine,
    "Kernels against float64": kernels,
    "compute-sanitizer": sanitizer,
    "CUDA graphs": graphs,
    "Times": times,
    "Tests on the device": tests,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ddpm_fast.gpu_report", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", default="ddpm_fast_gpu_report.md", type=Path, help="the file, by default %(default)s")
    out = parser.parse_args(arguments).out
    report = Report()
    for title, body in SECTIONS.items():
        print(f"{title} ...", flush=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report.section(title, body)
    verdict = f"Wrong: {', '.join(dict.fromkeys(report.wrong))}." if report.wrong else "Nothing wrong was found in what ran."
    with atomic_write(out) as path:
        path.write_text("\n".join(["# ddpm_fast on a GPU", "", verdict, *report.text, ""]), encoding="utf-8")
    print(f"{verdict} Report: {out}")
    return int(bool(report.wrong))


if __name__ == "__main__":
    sys.exit(main())
