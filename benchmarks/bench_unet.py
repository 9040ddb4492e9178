"""Our UNet beside diffusers' UNet2DModel of the same architecture with the same weights: forward, a training step, and its memory.

Forward is in eval mode without gradients, as in sampling. A step is in training mode, with dropout: forward, the mean squared error
to a given noise, backward, gradients set to None. The optimizer is left out on both sides; it does not depend on the network.
diffusers is measured in NCHW, as it comes ("plain"), and moved to channels_last; ours is in channels_last always.

`python benchmarks/bench_unet.py --help` says what can be chosen. `pytest benchmarks` has the eager sides in fp32.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import harness
import peers
import pytest
import torch
import torch.nn.functional as F
from harness import OURS, need
from measure import Side, alternate, environment, threads_set
from numerics import assert_as_accurate
from torch import Tensor, nn

from ddpm_fast import Noise, UNet
from ddpm_fast.io.files import atomic_write
from ddpm_fast.models.presets import PRESETS

PLAIN, CHANNELS_LAST = "diffusers", "diffusers, channels_last"
NAMES = (OURS, PLAIN, CHANNELS_LAST)
FORWARD, STEP = "forward", "step"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
PARAMETERS = {"cifar10": 35_746_307}  # Ho et al. (2020), appendix B


class Network:
    """One side: a model, how it is called, and its inputs in the layout that it is given them in."""

    def __init__(self, name: str, model: nn.Module, x_t: Tensor, t: Tensor, noise: Tensor, precision: str) -> None:
        self.name, self.model, self.precision = name, model, precision
        layout = torch.channels_last if name == CHANNELS_LAST else torch.contiguous_format
        self.x_t, self.t, self.noise = x_t.contiguous(memory_format=layout), t, noise.contiguous(memory_format=layout)
        self.call: Callable = model
        self.steps = 0

    def compile(self) -> None:
        self.call = torch.compile(self.model, dynamic=False, fullgraph=True)

    def out(self) -> Tensor:
        with self.autocast():
            if self.name == OURS:
                return self.call(self.x_t, self.t, dropout=self.noise_of_dropout())
            return self.call(self.x_t, self.t, return_dict=False)[0]

    def noise_of_dropout(self) -> Noise | None:
        """As the trainer gives it: a stream for each step. One for all where numbers are compiled in (dynamic=False)."""
        self.steps += self.model.training and self.call is self.model
        return Noise(seed=0, stream=self.steps) if self.model.training else None

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.out()

    def step(self) -> None:
        F.mse_loss(self.out().float(), self.noise).backward()
        self.model.zero_grad(set_to_none=True)

    def call_of(self, what: str) -> Callable[[], object]:
        self.model.train(what == STEP)
        return self.forward if what == FORWARD else self.step

    def autocast(self):
        return contextlib.nullcontext() if self.precision == "fp32" else torch.autocast("cpu", PRECISIONS[self.precision])

    def results(self) -> list[Tensor]:
        """The output, and the loss's gradients at the first and the last convolution, without dropout."""
        self.model.eval()
        out = self.out()
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        ends = [self.model.conv_in.weight, self.model.conv_out.weight]
        return [out, *torch.autograd.grad(F.mse_loss(out, self.noise.to(out)), ends)]


@functools.lru_cache(maxsize=1)
def models(preset: str) -> dict[str, nn.Module]:
    """The three with the same weights. What Ho et al. begin at zero is drawn: else every output would be zero."""
    need("diffusers")
    torch.manual_seed(0)
    ours = UNet.from_preset(preset)
    for parameter in ours.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    plain = peers.diffusers_unet(ours)
    found = {OURS: ours, PLAIN: plain, CHANNELS_LAST: copy.deepcopy(plain).to(memory_format=torch.channels_last)}
    for name, model in found.items():
        count = sum(parameter.numel() for parameter in model.parameters())
        expected = PARAMETERS.get(preset, sum(parameter.numel() for parameter in ours.parameters()))
        assert count == expected, f"{name} has {count} parameters, expected {expected}"
    return found


def networks(preset: str, batch: int, precision: str) -> dict[str, Network]:
    generator = torch.Generator().manual_seed(0)
    size, channels = PRESETS[preset]["image_size"], PRESETS[preset]["in_channels"]
    x_t, noise = (torch.randn(batch, channels, size, size, generator=generator) for _ in range(2))
    t = harness.timesteps(batch)
    return {name: Network(name, model, x_t, t, noise, precision) for name, model in models(preset).items()}


def check(preset: str, precision: str) -> None:
    """Each side's output and gradients err, against float64, at most some times as much as plain diffusers.

    Four times: every convolution may add up in another order, and the largest of the errors is only as stable as that. One wrong
    weight is thousands of times off.
    """
    sides = networks(preset, 2, precision)
    ours = sides[OURS]
    wide = Network(OURS, copy.deepcopy(ours.model).double(), ours.x_t.double(), ours.t, ours.noise.double(), "fp32")
    exact = wide.results()
    baseline = sides[PLAIN].results()
    for name in (OURS, CHANNELS_LAST):
        for what, actual, theirs, truth in zip(
            ("output", "gradient of conv_in", "gradient of conv_out"), sides[name].results(), baseline, exact
        ):
            assert_as_accurate(actual, theirs, truth, factor=4.0, what=f"{what} of {name}, {precision}")


def timed_sides(preset: str, batch: int, precision: str, what: str, compiled: bool) -> dict[str, Callable[[], object]]:
    """What is timed, by name; the eager results have been checked."""
    sides = networks(preset, batch, precision)
    calls = {name: side.call_of(what) for name, side in sides.items()}
    if compiled:
        torch._dynamo.reset()  # past its limit of recompilations it would run eager in silence
        expected = {name: side.forward() for name, side in sides.items()} if what == FORWARD else {}
        for name, side in sides.items():
            side.compile()
            if what == FORWARD:  # a step's is another program and draws dropout: only that it runs is seen
                torch.testing.assert_close(side.forward(), expected[name], atol=1e-4 if precision == "fp32" else 0.1, rtol=0)
    return calls


def saved_bytes(side: Network) -> int:
    """What a step's graph keeps for backward: every storage once, the parameters' own not. Copies of them that autocast makes count."""
    own = {x.untyped_storage().data_ptr() for x in (*side.model.parameters(), *side.model.buffers())}
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()  # the graph keeps it alive, so that no other one gets its address
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    side.model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = F.mse_loss(side.out().float(), side.noise)
    loss.backward()
    side.model.zero_grad(set_to_none=True)
    return sum(sizes.values())


def memory(name: str, preset: str, batch: int, precision: str, compiled: bool) -> dict[str, int]:
    """Of one side, in a process of its own, where nothing that was there before hides a peak (tests/support/peak_memory.py)."""
    from peak_memory import extra

    side = networks(preset, batch, precision)[name]
    found = {} if compiled else {"saved": saved_bytes(side)}
    if compiled:
        side.compile()
    step = side.call_of(STEP)
    for _ in range(2):
        step()  # what is made once: threads, kernels, their scratch memory
    return found | {"peak": extra(lambda: step() or [])}


def memory_in_a_process(name: str, preset: str, batch: int, precision: str, compiled: bool) -> dict[str, int]:
    from peak_memory import ENVIRONMENT

    if not Path("/proc/self/clear_refs").exists():
        raise LookupError("the peak of a process's memory is read from Linux's /proc")
    arguments = json.dumps([name, preset, batch, precision, compiled])
    threads = str(torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, __file__, "--memory-of", arguments, "--threads", threads],
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def table(results: dict[str, Side]) -> str:
    """Medians and quartiles, and how many times our time each side takes (median and quartiles of the rounds' ratios)."""
    lines = [f"  {'side':<26}{'median ms':>11}{'quartiles':>18}{'x ours':>8}{'quartiles':>14}"]
    for name, side in results.items():
        low, middle, high = statistics.quantiles([theirs / mine for theirs, mine in zip(side.times, results[OURS].times)], n=4)
        spread = "{:.1f}..{:.1f}".format(*(1e3 * second for second in side.spread))
        lines.append(f"  {name:<26}{1e3 * side.median:>11.1f}{spread:>18}{middle:>8.2f}{f'{low:.2f}..{high:.2f}':>14}")
    return "\n".join(lines)


def memory_table(results: dict[str, dict[str, int]]) -> str:
    """MiB kept for backward and at the peak of a step beyond the parameters, and how many times ours that is."""
    columns = {"saved": "kept for backward", "peak": "peak of a step"}
    lines = ["  " + f"{'side':<26}" + "".join(f"{columns[c] + ', MiB':>24}{'x ours':>8}" for c in results[OURS])]
    for name, found in results.items():
        lines.append(f"  {name:<26}" + "".join(f"{value / 2**20:>24.1f}{value / results[OURS][c]:>8.2f}" for c, value in found.items()))
    return "\n".join(lines)


@pytest.fixture(scope="module")
def checked():
    try:
        check("cifar10", "fp32")
    except LookupError as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", [FORWARD, STEP])
@pytest.mark.benchmark(group="unet")
def test_unet(benchmark, checked, what, name):
    """With all threads and few rounds: a step takes a second or so."""
    benchmark.extra_info.update(environment() | {"threads": torch.get_num_threads(), "batch": 4})
    benchmark.pedantic(timed_sides("cifar10", 4, "fp32", what, False)[name], rounds=3, warmup_rounds=1)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cifar10", help="architecture")
    parser.add_argument("--batch", type=int, default=4, help="images")
    parser.add_argument("--repeats", type=int, default=10, help="rounds, at least 2, in each of which every side is timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch")
    parser.add_argument("--passes", nargs="+", choices=[FORWARD, STEP], default=[FORWARD, STEP], help="what to time")
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS), help="bf16 is under autocast")
    parser.add_argument(
        "--modes", nargs="+", choices=["eager", "compiled"], default=["eager"], help="compiling takes minutes a side and pass"
    )
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure the memory of a step too")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # the process that measures one side
    found = parser.parse_args()
    if found.repeats < 2:
        parser.error(f"--repeats must be at least 2, got {found.repeats}")
    if found.batch < 1:
        parser.error(f"--batch must be at least 1, got {found.batch}")
    return found


def main(chosen: argparse.Namespace) -> list[dict]:
    print(", ".join(f"{name} {value}" for name, value in environment().items()))
    count = sum(parameter.numel() for parameter in models(chosen.preset)[OURS].parameters())
    print(f"{chosen.preset}, {count:,} parameters on every side, batch {chosen.batch}, {chosen.threads} thread{'s' * (chosen.threads > 1)}")
    figures = []
    for precision in chosen.precisions:
        check(chosen.preset, precision)
        for mode in chosen.modes:
            compiled = mode == "compiled"
            for what in chosen.passes:
                results = alternate(timed_sides(chosen.preset, chosen.batch, precision, what, compiled), chosen.repeats)
                print(f"{what}, {precision}, {mode}\n{table(results)}", flush=True)
                figures.append(
                    {"what": what, "precision": precision, "mode": mode, "seconds": {name: side.times for name, side in results.items()}}
                )
            if chosen.memory:
                try:
                    results = {name: memory_in_a_process(name, chosen.preset, chosen.batch, precision, compiled) for name in NAMES}
                except LookupError as reason:
                    print(f"  memory left out: {reason}")
                    continue
                print(f"memory of a step, {precision}, {mode}\n{memory_table(results)}", flush=True)
                figures.append({"what": "memory of a step", "precision": precision, "mode": mode, "bytes": results})
    return figures


if __name__ == "__main__":
    chosen = options()
    with threads_set(chosen.threads):
        if chosen.memory_of:
            print(json.dumps(memory(*json.loads(chosen.memory_of))))
            sys.exit()
        try:
            figures = main(chosen)
        except LookupError as reason:
            sys.exit(str(reason))
    if chosen.json:
        settings = {name: getattr(chosen, name) for name in ("preset", "batch", "repeats", "threads")}
        with atomic_write(chosen.json) as temporary:
            temporary.write_text(json.dumps({"environment": environment(), **settings, "figures": figures}, indent=1))
