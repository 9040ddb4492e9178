"""Self-test: the kernels of a device against the reference in float64, forward and backward, on small inputs.

``python -m ddpm_fast.selftest`` runs it for all that runs here and ends with status 1 where something is wrong. A kernel that crashes
takes its process with it: whoever wants to live on calls :func:`in_process` for one backend at a time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.backends import BACKENDS, NATIVE_DTYPES, TAKES, missing, tables
from ddpm_fast.diffusion.parameterisation import bound_table
from ddpm_fast.diffusion.schedules import NoiseSchedule
from ddpm_fast.noise import Noise
from ddpm_fast.ops._common import table_dtype

SHAPE = (3, 4, 7, 9)  # rows that no vector divides
KEY = Noise(seed=2**63 + 5, stream=7, first_sample=2**32 - 2)
STEPS = 50
FACTOR, ULPS = 4.0, 16.0  # of the reference's largest error, and of the result's largest value: a wrong kernel is off by far more


@dataclass(frozen=True)
class Verdict:
    """Outcome of one op on one backend.

    Attributes:
        op, backend, device, dtype: what was run.
        worst: largest error of a result or gradient, in parts of what is allowed; 0 where the bits must be equal and are.
        problem: what is wrong; empty where nothing is.
    """

    op: str
    backend: str
    device: str
    dtype: str
    worst: float
    problem: str = ""


Leaves = dict[str, Any]  # tensors by argument, tables among them
Call = Callable[[Any, Any], Any]  # of leaves and a backend


def _draw(stream: int, *shape: int) -> Tensor:
    return KEY.at(stream=stream).materialize(shape, "cpu", torch.float64)


def _cases() -> Iterator[tuple[str, Leaves, Call]]:
    """Name of an op, its floating inputs in float64, and the call."""
    schedule, t = NoiseSchedule.linear(STEPS), torch.tensor([0, 17, STEPS - 1], device="cpu")
    x, other, noise = (_draw(stream, *SHAPE) for stream in range(3))
    doubled, without = (_draw(stream, SHAPE[0], 2 * SHAPE[1], *SHAPE[2:]) for stream in (3, 4))
    signal, sigma = dict(signal=schedule.sqrt_alphas_bar), dict(sigma=schedule.sqrt_one_minus_alphas_bar)
    grid = dict(x_start=((x.clamp(-1, 1) + 1) * 8).round() / 8 - 1)

    def at(a: Leaves) -> Tensor:
        return t.to(next(iter(a.values())).device)

    yield "q_sample", dict(x_start=x, noise=noise) | signal | sigma, lambda a, b: ops.q_sample(t=at(a), backend=b, **a)
    yield "q_sample", dict(x_start=x) | signal | sigma, lambda a, b: ops.q_sample(t=at(a), noise=KEY, backend=b, **a)
    yield (
        "simple_loss",
        dict(model_output=other, x_start=x, weight=schedule.snr.clamp_max(5.0), x_start_coef=signal["signal"], noise_coef=sigma["sigma"]),
        lambda a, b: ops.simple_loss(t=at(a), noise=KEY, backend=b, **a),
    )
    # A model that is nearly right: far off, a bin's probability is a difference that fp32 has little of.
    x_t = ops.q_sample(grid["x_start"], t, signal["signal"], sigma["sigma"], noise, backend="reference")
    nearly = torch.cat([noise + 0.1 * other, x.clamp(-1, 1)], 1)
    table = dict(table=bound_table(schedule, "epsilon", "learned_range"))
    yield (
        "vlb_terms",
        grid | dict(model_output=nearly, x_t=x_t) | table,
        lambda a, b: ops.vlb_terms(t=at(a), variance="learned_range", clip=True, levels=17, backend=b, **a),
    )
    step = dict(table=torch.stack([_draw(stream, STEPS) for stream in range(10, 18)], 1))
    yield (
        "p_step",
        dict(x_t=x, model_output=doubled, x_start_previous=other, without=without) | step,
        lambda a, b: ops.p_step(
            t=at(a),
            noise=KEY,
            variance="learned_range",
            backend=b,
            guidance=(a["without"], 1.5),
            **{k: v for k, v in a.items() if k != "without"},
        ),
    )
    kl = dict(mean1=x, logvar1=other, mean2=noise, logvar2=x.flip(1))
    yield "gaussian_kl", kl, lambda a, b: ops.gaussian_kl(backend=b, **a)
    yield "gaussian_kl", kl, lambda a, b: ops.gaussian_kl(reduction="mean_per_sample", backend=b, **a)
    per_channel = dict(zip(("pre_bias", "scale", "shift"), (_draw(stream, *SHAPE[:2]) for stream in (5, 6, 7)), strict=True))
    norm = dict(x=x, weight=_draw(8, SHAPE[1]), bias=_draw(9, SHAPE[1])) | per_channel
    for layout in (torch.contiguous_format, torch.channels_last):
        yield (
            "group_norm",
            norm | dict(x=x.contiguous(memory_format=layout)),
            lambda a, b: ops.group_norm(groups=2, activation="silu", dropout=(0.3, KEY), backend=b, **a),
        )
    for tokens, heads, channels in ((33, 2, 64), (65, 1, 40)):
        qkv = dict(qkv=_draw(20, 2, tokens, 3, heads, channels))
        yield "attention", qkv, lambda a, b: ops.attention(backend=b, **a)


_TABLES = {"signal", "sigma", "weight", "x_start_coef", "noise_coef", "table"}


def _everything(call: Call, leaves: Leaves, backend: str | None) -> list[Tensor]:
    """Results, and the gradients of all that is no table."""
    watched = {name: x if name in _TABLES else x.detach().requires_grad_() for name, x in leaves.items()}
    results = call(watched, backend)
    outputs = [y for y in (results if isinstance(results, tuple) else (results,)) if y is not None]
    upstream = [KEY.at(stream=30 + i).materialize(tuple(y.shape), "cpu").to(y) for i, y in enumerate(outputs)]
    sources = [x for name, x in watched.items() if name not in _TABLES]
    grads = torch.autograd.grad(outputs, sources, upstream, allow_unused=True)
    return [y.detach() for y in outputs] + [g.detach() for g in grads if g is not None]


def _compare(found: list[Tensor], baseline: list[Tensor], exact: list[Tensor]) -> tuple[float, str]:
    worst = 0.0
    for i, (x, plain, truth) in enumerate(zip(found, baseline, exact, strict=True)):
        x64, plain64, truth64 = (y.cpu().double() for y in (x, plain, truth))
        if not torch.equal(x64.isfinite(), truth64.isfinite()):
            return float("inf"), f"result {i} is not finite where it must be"
        allowed = FACTOR * (plain64 - truth64).abs().max() + ULPS * torch.finfo(x.dtype).eps * truth64.abs().max()
        worst = max(worst, float((x64 - truth64).abs().max() / allowed.clamp_min(torch.finfo(x.dtype).tiny)))
    return worst, f"an error of {worst:.3g} times what is allowed" if worst > 1 else ""


def check(backend: str, device: torch.device | str) -> list[Verdict]:
    """Runs every op that has a backend, in each dtype.

    Args:
        backend: "cpu", "triton" or "cuda".
        device: whose tensors it takes.

    Returns:
        A verdict for each op, dtype and case. An exception is a problem, not raised.
    """
    device = torch.device(device)
    verdicts = []
    for op, leaves, call in _cases():
        if backend not in tables[op].implementations:
            continue
        for dtype in NATIVE_DTYPES:
            inputs = {n: x.to(device, table_dtype(dtype) if n in _TABLES else dtype) for n, x in leaves.items()}
            try:
                exact = _everything(call, {n: x.double() for n, x in inputs.items()}, "reference")
                worst, problem = _compare(_everything(call, inputs, backend), _everything(call, inputs, "reference"), exact)
            except Exception as error:  # whatever it is, it is the verdict
                worst, problem = float("inf"), " ".join(f"{type(error).__name__}: {error}".split())[:500]
            verdicts.append(Verdict(op, backend, str(device), str(dtype).removeprefix("torch."), worst, problem))
    if backend in tables["randn"].implementations:
        verdicts += [_noise(backend, device, dtype) for dtype in NATIVE_DTYPES]
    return verdicts


def _noise(backend: str, device: torch.device, dtype: torch.dtype) -> Verdict:
    """The contract: the same bits everywhere."""
    problem = ""
    try:
        ours, theirs = (ops.randn((5, 1027), KEY, device=device, dtype=dtype, backend=b) for b in (backend, "reference"))  # type: ignore[arg-type]
        if not torch.equal(ours, theirs):
            problem = f"{int((ours != theirs).sum())} of {ours.numel()} normals have other bits"
    except Exception as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    return Verdict("randn", backend, str(device), str(dtype).removeprefix("torch."), float("inf") if problem else 0.0, problem)


def in_process(backend: str, device: str, timeout: float = 300.0) -> list[Verdict]:
    """:func:`check` in a process of its own: a crash is a verdict too.

    Args:
        backend, device: as there.
        timeout: seconds.

    Returns:
        Its verdicts; if it did not end well, one whose op is "all".
    """
    command = [sys.executable, "-m", "ddpm_fast.selftest", "--backend", backend, "--device", device, "--json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return [Verdict("all", backend, device, "all", float("inf"), f"it took more than {timeout:g} s")]
    lines = done.stdout.splitlines()
    if done.returncode in (0, 1) and lines:
        return [Verdict(**verdict) for verdict in json.loads(lines[-1])]
    last = (done.stderr.strip() or "no output").splitlines()[-1]
    return [Verdict("all", backend, device, "all", float("inf"), f"its process ended with status {done.returncode}: {last}")]


def places() -> list[tuple[str, str]]:
    """(backend, device) of all that can run here."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return [
        (backend, device)
        for backend in BACKENDS
        if backend != "reference"
        for device in (["cpu"] if "cpu" in TAKES[backend] else gpus)
        if not missing(backend, torch.device(device))
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ddpm_fast.selftest", description="Kernels against the reference in float64.")
    parser.add_argument("--backend", choices=[backend for backend in BACKENDS if backend != "reference"])
    parser.add_argument("--device", help="for instance cuda:0; without it, all that the backends take")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    given = parser.parse_args(arguments)
    chosen = [(b, d) for b, d in places() if given.backend in (None, b) and given.device in (None, d)]
    verdicts = [verdict for backend, device in chosen for verdict in check(backend, device)]
    if given.json:
        print(json.dumps([asdict(verdict) for verdict in verdicts]))
    else:
        print(table(verdicts) if verdicts else "no kernels run here")
    return int(any(verdict.problem for verdict in verdicts))


def table(verdicts: list[Verdict]) -> str:
    """A Markdown table, with the worst of each op, backend, device and dtype."""
    rows: dict[tuple[str, str, str, str], Verdict] = {}
    for v in verdicts:
        place = (v.backend, v.device, v.op, v.dtype)
        rows[place] = max(rows.get(place, v), v, key=lambda one: one.worst)
    lines = ["| backend | device | op | dtype | error / allowed | |", "|---|---|---|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(place)} | {v.worst:.2f} | {v.problem or 'ok'} |" for place, v in rows.items()])


if __name__ == "__main__":
    sys.exit(main())
