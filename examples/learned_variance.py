"""What a learned variance and the samplers are worth, measured on the digits from training to table: about ten minutes on two cores.

    python examples/learned_variance.py [--out study] [--train-steps 1500] [--count 300] [--device auto] [--threads N] [--seed 0]

Two models that differ in nothing but the variance and the loss that trains it; the bound on held-out digits of the whole chain and of
shorter ones, and the quality of samples of three samplers, at the same numbers of steps. Stopped, the same command goes on.

Quality is told by FID on the digits extractor's features, of equally many samples each; KID, precision, recall and the neighbours' ratio
are in quality.csv. Of a few hundred samples KID's own spread hides all differences.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.diffusion.samplers import SAMPLERS, spaced_timesteps
from ddpm_fast.evaluation import Bound, evaluate_bound, load_features, neighbour_distance_ratio, quality_from_features
from ddpm_fast.evaluation.features import DIGITS, Features
from ddpm_fast.evaluation.quality import load_samples
from ddpm_fast.io.files import atomic_write, write_csv, write_json
from ddpm_fast.io.lock import exclusive
from ddpm_fast.io.plots import write_grid
from ddpm_fast.io.progress import Bar
from ddpm_fast.io.sample_writer import write_samples
from ddpm_fast.io.signals import exit_status, terminable
from ddpm_fast.sampling import Sampler
from ddpm_fast.training import ImageData, TrainConfig, TrainedModel, Trainer, load_data, load_trained

# Ho's loss and upper variance, against what replaced them (Nichol & Dhariwal 2021).
VARIANTS: dict[str, dict[str, Any]] = {
    "learned": dict(variance="learned_range", loss="hybrid"),
    "fixed": dict(variance="fixed_large", loss="simple"),
}
LENGTHS = (1000, 100, 50, 20, 10)
SPACING = dict(ddpm="even", ddim="quadratic", dpmpp_2m="logsnr")
TERMS = 100  # of the bound of the whole chain, for each image: an unbiased estimate at a tenth of the cost
PICTURED = (("ddpm", 1000), ("dpmpp_2m", 20))
RESULTS = "study.json"


@dataclass(frozen=True)
class Study:
    """What the study measured.

    Attributes:
        bounds: rows of variant, steps, bits_per_dim and its standard error, decoder, divergence and prior.
        quality: rows of variant, sampler, steps, images and what :func:`ddpm_fast.evaluation.quality_from_features` gives, with the
            neighbour_ratio; the one of real held-out digits has no sampler.
        seconds: that this call took for each part.
        paths: the files.
    """

    bounds: list[dict[str, Any]]
    quality: list[dict[str, Any]]
    seconds: dict[str, float]
    paths: dict[str, Path]


def run_study(
    out: Path,
    *,
    train_steps: int = 1500,
    count: int = 300,
    lengths: tuple[int, ...] = LENGTHS,
    terms: int = TERMS,
    device: str = "auto",
    seed: int = 0,
    quiet: bool = False,
) -> Study:
    """Trains, evaluates, samples, and writes the tables and pictures into ``out``. Models and samples
    of an earlier call are not made again; the bound, which takes seconds, is.

    Args:
        train_steps: of each model.
        count: samples of each sampler at each number of steps.
        lengths: numbers of steps, falling; the first is the chain's.
        terms: of the bound of the whole chain, for each image.
        quiet: no progress bars.

    Returns:
        :class:`Study`.
    """
    data, features, seconds = load_data("digits"), load_features(DIGITS), {"training": 0.0, "bound": 0.0, "sampling": 0.0}
    bounds, quality, pictures, known = [], [], {}, features(data.batch("train", slice(None))[0])
    x_test = data.batch("test", slice(None))[0]
    quality.append(measure(x_test[:count], known, data, features, variant="real", sampler=None, steps=None))
    for variant, choice in VARIANTS.items():
        folder = out / variant
        with timed(seconds, "training"):
            trained = train(folder, data, TrainConfig.for_data(
                "digits", timesteps=lengths[0], weight="uniform", steps=train_steps, ema=0.99, seed=seed, device=device, **choice,
            ), f"{variant}: training", quiet)  # fmt: skip
        with timed(seconds, "bound"), Bar(f"{variant}: bound", quiet=quiet) as bar:
            for length in lengths:
                bound = evaluate_bound(
                    trained.model,
                    shortened(trained.diffusion, length),
                    x_test.to(trained.device),
                    terms_per_image=terms,
                    seed=seed,
                    report=bar.update,
                )
                bounds.append(dict(variant=variant, steps=length, **summary(bound)))
        with timed(seconds, "sampling"):
            for sampler in SAMPLERS:
                for length in lengths:
                    x = draw(folder / f"{sampler}-{length}", trained, data, sampler, length, count, seed, f"{variant}: {sampler}", quiet)
                    quality.append(measure(x, known, data, features, variant=variant, sampler=sampler, steps=length))
                    if variant == "learned" and (sampler, length) in PICTURED:
                        pictures[f"{sampler}-{length}.png"] = x[:50]
    seconds = {name: round(value, 1) for name, value in seconds.items()}
    return Study(bounds, quality, seconds, write_study(out, bounds, quality, seconds, pictures))


def train(folder: Path, data: ImageData, config: TrainConfig, title: str, quiet: bool) -> TrainedModel:
    """The model of a finished run in ``folder``, which is trained first, or on from where it was stopped."""
    trainer = Trainer.restore(folder) if (folder / "checkpoint.safetensors").exists() else Trainer(config, data)
    if trainer.config != config:
        raise ValueError(f"{folder} holds a run of other settings; choose another folder with --out")
    if trainer.step < config.steps:
        with Bar(title, quiet=quiet) as bar:
            trainer.run(folder, save_every=250, report=lambda p: bar.update(p.step, p.steps, p.loss))
    return load_trained(folder, trainer.device)


def shortened(diffusion: GaussianDiffusion, length: int) -> GaussianDiffusion:
    """The chain of ``length`` evenly spaced steps: what strided ancestral sampling walks."""
    T = len(diffusion)
    schedule = diffusion.schedule if length == T else diffusion.schedule.respace(spaced_timesteps(T, length))
    return GaussianDiffusion(schedule, diffusion.prediction, diffusion.variance, diffusion.levels)


def draw(
    folder: Path, trained: TrainedModel, data: ImageData, sampler: str, length: int, count: int, seed: int, title: str, quiet: bool
) -> Tensor:
    """(count, C, H, W) samples in [-1, 1], from files where they are there already."""
    chosen = Sampler(trained.model, trained.diffusion, sampler, steps=length, spacing=SPACING[sampler])
    shape, settings = trained.image_shape, dict(**trained.settings, sampler=sampler, steps=length, spacing=SPACING[sampler], seed=seed)
    with Bar(f"{title}, {length} steps", quiet=quiet) as bar:
        write_samples(
            lambda first, size: chosen((size, *shape), seed, first_sample=first, device=trained.device).cpu(), folder,
            count=count, batch=100, levels=data.levels, settings=settings, report=bar.update,
        )  # fmt: skip
    return load_samples(folder, data)[:count]


def measure(x: Tensor, known: Tensor, data: ImageData, features: Features, **about: Any) -> dict[str, Any]:
    return dict(**about, images=len(x), **quality_from_features(known, features(x)), neighbour_ratio=neighbour_distance_ratio(x, data))


def summary(bound: Bound) -> dict[str, float]:
    parts = bound.summary()
    return {name: parts[name] for name in ("bits_per_dim", "standard_error", "decoder", "divergence", "prior")}


def table(study_bounds: list[dict], study_quality: list[dict]) -> list[list[str]]:
    """The result to read: a heading and a row for each number of steps, of the bound and of FID."""
    variants, lengths = list(VARIANTS), sorted({row["steps"] for row in study_bounds}, reverse=True)
    bound = {(row["variant"], row["steps"]): row for row in study_bounds}
    quality = {(row["variant"], row["sampler"], row["steps"]): row for row in study_quality}
    rows = [
        [
            "steps",
            *(f"{variant}: bits/dim" for variant in variants),
            *(f"{variant}: FID {sampler}" for variant in variants for sampler in SAMPLERS),
        ]
    ]
    for length in lengths:
        bits = (bound[variant, length] for variant in variants)
        distances = (quality[variant, sampler, length]["fid"] for variant in variants for sampler in SAMPLERS)
        bits = (f"{row['bits_per_dim']:.3f} ± {row['standard_error']:.3f}" for row in bits)
        rows.append([str(length), *bits, *(f"{distance:.2f}" for distance in distances)])
    return rows


def write_study(
    out: Path, bounds: list[dict], quality: list[dict], seconds: dict[str, float], pictures: dict[str, Tensor]
) -> dict[str, Path]:
    """bounds.csv and quality.csv with all figures, study.json with both, study.md and study.png to look at, and a few samples."""
    paths = {name: out / name for name in ("study.png", "study.md", "bounds.csv", "quality.csv", RESULTS)}
    for name, rows in (("bounds.csv", bounds), ("quality.csv", quality)):
        write_csv(paths[name], {column: ["" if row[column] is None else row[column] for row in rows] for column in rows[0]})
    write_json(paths[RESULTS], dict(bounds=bounds, quality=quality, seconds=seconds))
    lines = [f"| {' | '.join(row)} |" for row in table(bounds, quality)]
    with atomic_write(paths["study.md"]) as temporary:
        temporary.write_text("\n".join([lines[0], "|---" * len(table(bounds, quality)[0]) + "|", *lines[1:]]) + "\n", "utf-8")
    write_plot(paths["study.png"], bounds, quality)
    for name, x in pictures.items():
        paths[name] = out / name
        write_grid(paths[name], x, columns=10)
    return paths


def write_plot(path: Path, bounds: list[dict[str, Any]], quality: list[dict[str, Any]]) -> None:
    """The bound and FID against the number of steps, side by side."""
    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for variant, style in zip(VARIANTS, ("-", "--"), strict=True):
        rows = [row for row in bounds if row["variant"] == variant]
        left.errorbar(
            [row["steps"] for row in rows], [row["bits_per_dim"] for row in rows], [2 * row["standard_error"] for row in rows],
            color="C0", ls=style, marker="o", ms=3, label=f"{variant} variance",
        )  # fmt: skip
        for colour, sampler in enumerate(SAMPLERS):
            rows = [row for row in quality if (row["variant"], row["sampler"]) == (variant, sampler)]
            x, y = [row["steps"] for row in rows], [row["fid"] for row in rows]
            right.plot(x, y, color=f"C{colour}", ls=style, marker="o", ms=3, label=f"{sampler}, {variant}")
    right.axhline(quality[0]["fid"], color="k", lw=0.8, ls=":", label="real held-out images")
    for axes, name in ((left, "bound (bits/dim)"), (right, "FID to the training images")):
        axes.set(xlabel="steps", ylabel=name, xscale="log", yscale="log")
        axes.grid(axis="y", color="#e5e5e5", lw=0.8)
        axes.legend(edgecolor="none", fontsize=8)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", "-o", type=Path, default=Path("study"), help="folder for what is written")
    parser.add_argument("--train-steps", type=int, default=1500, help="training steps of each of the two models")
    parser.add_argument("--count", "-n", type=int, default=300, help="samples of each sampler at each number of steps, at least 8")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda[:i]")
    parser.add_argument("--threads", type=int, help="CPU threads; by default PyTorch's choice")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    options = parser.parse_args()
    for name, least in (("train_steps", 1), ("count", 8), ("threads", 1)):
        if (value := getattr(options, name)) is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        with terminable(), exclusive(options.out, "study"):
            result = run_study(options.out, train_steps=options.train_steps, count=options.count, device=options.device, seed=options.seed)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt as stop:
        print(f"stopped; what is complete is in {options.out}, and the same command goes on from there")
        sys.exit(exit_status(stop))
    print((options.out / "study.md").read_text("utf-8"))
    real, drawn = result.quality[0], result.quality[-1]
    print(f"FID of {drawn['images']} samples to the training digits; {real['fid']:.2f} for {real['images']} held-out digits")
    print("time:", ", ".join(f"{name} {value:.0f} s" for name, value in result.seconds.items()))
    print("\n".join(map(str, result.paths.values())))


if __name__ == "__main__":
    main()
