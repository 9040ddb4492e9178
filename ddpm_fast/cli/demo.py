"""``ddpm-fast demo``: trains on the digits, samples, evaluates the bound and draws the pictures. No network, no GPU needed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from ddpm_fast.cli._common import Device, Out, Seed, Threads, app, bound_rows, one_process, print_table, set_threads

if TYPE_CHECKING:
    from ddpm_fast.evaluation import Bound
    from ddpm_fast.training import ImageData, Trainer

SAMPLES = 100
# Ancestral sampling of every third step with the posterior's variance, which is what DDIM with eta = 1 is. After a training
# this short it gives cleaner digits than the learned variance (nearest-neighbour ratio 1.18 against 1.22 in all steps).
SAMPLING_STEPS = 50
TERMS_PER_IMAGE = 20
DEFAULT_FOLDER = Path("demo")
RESULTS = "results.json"
STRIP_COLUMNS, STRIP_ROWS = 8, 4


@app.command()
def demo(
    out: Out = DEFAULT_FOLDER,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; fewer for a quick look.")] = None,
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
) -> None:
    """Train on digits, sample, evaluate, draw: the whole method in about two minutes on two cores."""
    from ddpm_fast.io.lock import exclusive

    one_process("demo")
    set_threads(threads)
    with exclusive(out, "demo"):
        result = run_demo(out, seed=seed, steps=steps, device=device)
    rows = {
        **bound_rows(result.bound),
        "samples in each class 0-9": " ".join(map(str, result.classes)),
        "nearest-neighbour ratio": f"{result.neighbour_ratio:.2f}  (samples' distance to the training set over that of held-out digits)",
        "time": ", ".join(f"{name} {value:.0f} s" for name, value in result.seconds.items()),
    }
    print_table({**rows, **result.paths})


@dataclass(frozen=True)
class DemoResult:
    """Results of the demo; ``paths`` are the files it wrote."""

    bound: Bound
    classes: list[int]
    neighbour_ratio: float
    seconds: dict[str, float]
    paths: dict[str, Path]


def run_demo(out: Path, *, seed: int = 0, steps: int | None = None, device: str = "auto", quiet: bool = False) -> DemoResult:
    """Runs the demo and writes its files into ``out``.

    Args:
        steps: training steps; None for the recipe's.
        quiet: no progress bars.

    Returns:
        :class:`DemoResult`.
    """
    from ddpm_fast.evaluation import class_counts, evaluate_bound, neighbour_distance_ratio
    from ddpm_fast.io.files import write_json
    from ddpm_fast.io.plots import write_bound_plot, write_grid, write_reverse_gif
    from ddpm_fast.io.progress import Bar
    from ddpm_fast.training import TrainConfig, Trainer, load_data

    # An interrupted demo leaves a checkpoint without results: in its own folder it may start again.
    if out.name != DEFAULT_FOLDER.name and (out / "checkpoint.safetensors").exists() and not (out / RESULTS).exists():
        raise ValueError(f"{out} holds another run; choose another folder with --out")
    data = load_data("digits")
    config = TrainConfig.for_data("digits", seed=seed, steps=steps, device=device)
    trainer = Trainer(config, data)
    diffusion, seconds, clock = trainer.diffusion, {}, time.perf_counter

    start = clock()
    with Bar("training", quiet=quiet) as bar:
        trainer.run(out, report=lambda p: bar.update(p.step, p.steps, p.loss))
    seconds["training"] = clock() - start
    model = trainer.averaged_model()

    start = clock()
    x, frames = draw(trainer, model, seed, quiet)
    seconds["sampling"] = clock() - start

    start = clock()
    with Bar("evaluating", quiet=quiet) as bar:
        x_test, _ = data.batch("test", slice(None), trainer.device)
        bound = evaluate_bound(model, diffusion, x_test, terms_per_image=TERMS_PER_IMAGE, seed=seed, report=bar.update)
    seconds["evaluating"] = clock() - start

    paths = {name: out / name for name in ("samples.png", "forward.png", "reverse.gif", "bound.png", RESULTS)}
    write_grid(paths["samples.png"], x, columns=10)
    write_forward(paths["forward.png"], data, trainer)
    write_reverse_gif(paths["reverse.gif"], frames, columns=10)
    write_bound_plot(paths["bound.png"], bound.terms, bound.prior, bound.centers, weights=bound.counts, title="held-out digits")
    result = DemoResult(
        bound, class_counts(x, data), neighbour_distance_ratio(x, data), {k: round(v, 1) for k, v in seconds.items()}, paths
    )
    write_json(paths[RESULTS], dict(
        **bound.summary(), samples_in_each_class=result.classes, neighbour_distance_ratio=result.neighbour_ratio, seconds=result.seconds,
    ))  # fmt: skip
    return result


def draw(trainer: Trainer, model: torch.nn.Module, seed: int, quiet: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws the samples: (N, C, H, W), and their states after each of K steps (K, N, C, H, W)."""
    from ddpm_fast.io.progress import Bar
    from ddpm_fast.sampling import sample

    frames = []
    with Bar("sampling", quiet=quiet) as bar:

        def keep(t: int, x: torch.Tensor, _: torch.Tensor) -> None:
            frames.append(x.cpu())
            bar.update(len(frames), SAMPLING_STEPS)

        x = sample(
            model,
            trainer.diffusion,
            (SAMPLES, *trainer.data.image_shape),
            seed,
            callback=keep,
            sampler="ddim",
            steps=SAMPLING_STEPS,
            eta=1.0,
        )
    return x.cpu(), torch.stack(frames)


def write_forward(path: Path, data: ImageData, trainer: Trainer) -> None:
    """Writes a picture of a few held-out images with more and more noise."""
    from ddpm_fast.io.plots import write_forward_strip
    from ddpm_fast.noise import Noise

    diffusion = trainer.diffusion
    x, _ = data.batch("test", slice(0, STRIP_ROWS))
    # The clean images, then equal steps in the noise's standard deviation, up to the last t.
    sigma = diffusion.schedule.sqrt_one_minus_alphas_bar
    levels = torch.linspace(float(sigma[0]), float(sigma[-1]), STRIP_COLUMNS - 1, dtype=torch.float64, device="cpu")
    timesteps = [int((sigma - level).abs().argmin()) for level in levels]
    noised = [diffusion.q_sample(x, torch.full((len(x),), t, device=x.device), Noise(0)) for t in timesteps]
    labels = ["data", *(f"t = {t}" for t in timesteps)]
    write_forward_strip(path, torch.stack([x, *noised]), labels, [1.0, *diffusion.schedule.alphas_bar[timesteps].tolist()])
