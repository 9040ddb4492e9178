"""The command line, ``ddpm-fast``: train, sample, eval, demo, info."""
from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ddpm_fast import __version__

app = typer.Typer(name="ddpm-fast", add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Train, sample and evaluate denoising diffusion models.")
console = Console(highlight=False, markup=False)  # folders may have brackets in their names

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for what is written.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda[:i].")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random.")]
Run = Annotated[Path, typer.Argument(help="Folder of a training run, or its checkpoint file.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; by default PyTorch's choice.")]


@app.command()
def train(
    data: Annotated[str, typer.Option(help="digits, photos, a folder of images, or a .npy or .npz file.")] = "digits",
    out: Out = Path("runs/train"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is already in --out.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images in each step.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--lr", help="Adam's learning rate.")] = None,
    preset: Annotated[str | None, typer.Option(help="Network: digits, photos32 or cifar10.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Of the network's residual blocks.")] = None,
    schedule: Annotated[str | None, typer.Option(help="linear, cosine, quadratic, constant, jsd or sigmoid.")] = None,
    timesteps: Annotated[int | None, typer.Option("-T", "--timesteps", min=1, help="Length of the chain; a linear schedule's betas scale with its inverse.")] = None,
    prediction: Annotated[str | None, typer.Option(help="epsilon, x_start, v or mean.")] = None,
    variance: Annotated[str | None, typer.Option(help="fixed_small, fixed_large, learned or learned_range.")] = None,
    loss: Annotated[str | None, typer.Option(help="simple, vlb or hybrid.")] = None,
    weight: Annotated[str | None, typer.Option(help="Of the simple loss: uniform, min_snr, p2 or vlb.")] = None,
    warmup: Annotated[int | None, typer.Option(min=0, help="Steps in which the learning rate rises.")] = None,
    flip: Annotated[bool | None, typer.Option("--flip/--no-flip", help="Mirror images at random: on but for digits; wrong for text.")] = None,
    ema: Annotated[float | None, typer.Option(help="Decay of the moving average of the weights.")] = None,
    class_conditional: Annotated[bool | None, typer.Option("--class-conditional/--unconditional", help="Give the network the labels.")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Crop and resize the images of a folder to this side.")] = None,
    levels: Annotated[int | None, typer.Option(min=2, max=256, help="Grey levels of the data in a .npy or .npz file.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, or bf16 for autocast.")] = None,
    save_every: Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints; the end always writes one.")] = None,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between lines of metrics.jsonl.")] = 10,
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
) -> None:
    """Train a model. Options that are not given come from the recipe for the data."""
    from ddpm_fast.plots import write_loss_curve
    from ddpm_fast.progress import Bar
    from ddpm_fast.training import TrainConfig, Trainer, load_data
    from ddpm_fast.training.data import BUILT_IN

    set_threads(threads)
    old = [out / name for name in ("checkpoint.safetensors", "checkpoint.json", "metrics.jsonl")]
    if not overwrite and any(path.exists() and path.stat().st_size for path in old):
        raise ValueError(f"{out} already holds a run; choose another folder with --out, or pass --overwrite")
    if Path(data).exists() and data not in BUILT_IN:
        data = str(Path(data).resolve())  # the run can then be evaluated from any folder
    config = TrainConfig.for_data(
        data, image_size=image_size, levels=levels, steps=steps, batch=batch, learning_rate=learning_rate, warmup=warmup, preset=preset,
        schedule=schedule, timesteps=timesteps, prediction=prediction, variance=variance, loss=loss or implied_loss(variance),
        weight=weight, flip=flip, ema=ema, class_conditional=class_conditional, precision=precision, device=device, seed=seed,
        network=None if dropout is None else {"dropout": dropout},
    )  # fmt: skip
    trainer = Trainer(config, load_data(data, image_size=image_size, levels=levels))
    for path in old:
        path.unlink(missing_ok=True)  # a run that fails early must not leave new metrics beside an old checkpoint
    left = float(trainer.diffusion.schedule.alphas_bar[-1])
    if left > 0.01:
        console.print(f"note: the chain leaves {left:.2g} of the data's variance at its end; samples start from pure noise and will be worse for it")
    parameters = sum(p.numel() for p in trainer.model.parameters())
    console.print(f"{trainer.data.name}: {len(trainer.data.train)} images, network {config.preset} with {parameters:,} parameters, on {trainer.device}")
    try:
        with Bar("training") as bar:
            history = trainer.run(out, log_every=log_every, save_every=save_every, report=lambda p: bar.update(p.step, p.steps, p.loss))
    except KeyboardInterrupt:
        saved = f"; its checkpoint is in {out}" if trainer.step else ""
        console.print(f"stopped after step {trainer.step} of {config.steps}{saved}")
        raise typer.Exit(130) from None
    write_loss_curve(out / "loss.png", [line["step"] for line in history], [line["loss"] for line in history], ylabel=f"{config.loss} loss")
    print_table({"loss": f"{history[-1]['loss']:.4f}", "images/s": history[-1]["images_per_s"], "checkpoint": out / "checkpoint.safetensors", "metrics": out / "metrics.jsonl", "loss curve": out / "loss.png"})


@app.command()
def sample(
    run: Run,
    out: Out = Path("runs/samples"),
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Number of images.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 256,
    sampler: Annotated[str, typer.Option(help="ddpm or ddim.")] = "ddpm",
    steps: Annotated[int | None, typer.Option(min=1, help="Steps; by default all T.")] = None,
    eta: Annotated[float, typer.Option(min=0.0, max=1.0, help="DDIM's share of noise.")] = 0.0,
    label: Annotated[int | None, typer.Option("--class", min=0, help="Class of all images, for a class-conditional model.")] = None,
    gif: Annotated[bool, typer.Option("--gif", help="Also draw the reverse process of the first batch.")] = False,
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
) -> None:
    """Draw images from a trained model: a grid as PNG and all of them as samples.npz. Image i does not depend on --count or --batch."""
    import numpy as np
    import torch

    from ddpm_fast.files import atomic_write
    from ddpm_fast.plots import write_grid, write_reverse_gif
    from ddpm_fast.progress import Bar
    from ddpm_fast.sampling import make_table
    from ddpm_fast.sampling import sample as draw
    from ddpm_fast.training import load_trained
    from ddpm_fast.training.data import to_levels
    from ddpm_fast.training.trainer import resolve_device

    set_threads(threads)
    trained = load_trained(run, resolve_device(device))
    model = trained.model
    if label is not None:
        classes = trained.model.num_classes
        if classes is None or label >= classes:
            raise ValueError(f"--class must be {f'in 0..{classes - 1}' if classes else 'left out: the model is not class-conditional'}, got {label}")
        model = lambda x, t: trained.model(x, t, torch.full_like(t, label))  # noqa: E731
    length = len(make_table(trained.diffusion, sampler, steps, eta).timesteps)
    make_folder(out)
    batches, frames, every = range(0, count, batch), [], max(1, length // 40)
    images = []
    with Bar("sampling") as bar:
        for index, start in enumerate(batches):
            done = iter(range(1, length + 1))

            def step(t: int, x: torch.Tensor, _: torch.Tensor, index: int = index, done: Any = done) -> None:
                k = next(done)
                bar.update(index * length + k, len(batches) * length)
                if gif and index == 0 and (k % every == 0 or k == length):
                    frames.append(x[:100].to("cpu", copy=True))  # the next step writes over x

            size = min(batch, count - start)
            shape = (size, *trained.image_shape)
            x = draw(model, trained.diffusion, shape, seed, sampler=sampler, steps=steps, eta=eta, first_sample=start, device=trained.device, callback=step, keep=False)
            images.append(x.cpu())
    x = torch.cat(images)
    written = {"grid": out / "samples.png", "images": out / "samples.npz"}
    write_grid(written["grid"], x[:400])
    with atomic_write(written["images"]) as temporary:
        np.savez_compressed(temporary, images=to_levels(x, trained.diffusion.levels).numpy())
    if gif:
        written["reverse process"] = out / "reverse.gif"
        write_reverse_gif(written["reverse process"], torch.stack(frames))
    print_table(written)


@app.command("eval")
def evaluate(
    run: Run,
    data: Annotated[str | None, typer.Option(help="Data whose held-out part is evaluated; by default what the run was trained on.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for bound.json and bound.png; by default the run's.")] = None,
    terms: Annotated[int | None, typer.Option(min=2, help="Terms of the bound for each image: an unbiased estimate. By default all T.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many images.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images in a pass.")] = 256,
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
) -> None:
    """The variational bound on held-out data, in bits per dimension."""
    from ddpm_fast.evaluation import evaluate_bound
    from ddpm_fast.files import atomic_write
    from ddpm_fast.plots import write_bound_plot
    from ddpm_fast.progress import Bar
    from ddpm_fast.training import load_data, load_trained
    from ddpm_fast.training.trainer import resolve_device

    set_threads(threads)
    device = resolve_device(device)
    trained = load_trained(run, device)
    source = data or trained.config.data
    images = load_data(source, image_size=trained.config.image_size, levels=trained.config.levels)
    if images.image_shape != trained.image_shape or images.levels != trained.diffusion.levels:
        raise ValueError(f"the model was trained on {trained.image_shape} with {trained.diffusion.levels} levels, but {source} has {images.image_shape} with {images.levels}")
    out = out or (run if run.is_dir() else run.parent)
    make_folder(out)
    count = min(limit or len(images.test), len(images.test))
    with Bar("evaluating") as bar:
        bound = evaluate_bound(
            trained.model, trained.diffusion, lambda part: images.batch("test", part, device)[0], count,
            terms_per_image=terms, batch=batch, seed=seed, report=bar.update,
        )  # fmt: skip
    summary = dict(
        **bound.summary(), images=count, data=source, estimated=terms is not None, seed=seed, step=trained.step,
        first_t=bound.first.tolist(), count_t=bound.counts.tolist(), mean_term=bound.terms.mean(0).tolist(),
    )  # fmt: skip
    with atomic_write(out / "bound.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=1) + "\n")
    write_bound_plot(out / "bound.png", bound.terms, bound.prior, bound.centers, weights=bound.counts, title=f"held-out {images.name}")
    print_table({**bound_rows(bound), "table": out / "bound.json", "picture": out / "bound.png"})


@app.command()
def demo(
    out: Out = Path("demo"),
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; fewer for a quick look.")] = None,
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
) -> None:
    """Train on digits, sample, evaluate, draw: the whole method in about two minutes on two cores."""
    from ddpm_fast.demo import run_demo

    set_threads(threads)
    result = run_demo(out, seed=seed, steps=steps, device=device)
    rows = {
        **bound_rows(result.bound),
        "samples in each class 0-9": " ".join(map(str, result.classes)),
        "nearest-neighbour ratio": f"{result.neighbour_ratio:.2f}  (samples' distance to the training set over that of held-out digits)",
        "time": ", ".join(f"{name} {value:.0f} s" for name, value in result.seconds.items()),
    }
    print_table({**rows, **result.paths})


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False) -> None:
    """Versions, the native build, and which backend each op uses, or why not."""
    from ddpm_fast.info import print_report, report

    if as_json:
        print(json.dumps(report(), indent=2))
    else:
        print_report()


def bound_rows(bound: Any) -> dict[str, str]:
    return {
        "bound (bits/dim)": f"{bound.total:.3f} ± {bound.standard_error:.3f}",
        "  decoder L_0": f"{bound.decoder:.4f}",
        "  sum of L_t, t > 0": f"{bound.divergence:.4f}",
        "  prior L_T": f"{float(bound.prior.mean()):.2g}",
    }


def print_table(rows: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, str(value))
    console.print(table)


def implied_loss(variance: str | None) -> str | None:
    """A variance given without a loss: a fixed one cannot train with a recipe's hybrid loss, nor a learned one with simple."""
    if variance is None:
        return None
    return "hybrid" if variance.startswith("learned") else "simple"


def make_folder(path: Path) -> None:
    """Creates the output folder, and notices before any work that it cannot be written."""
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
        pass


def set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point. What the user can mend is one line on stderr and exit code 2."""
    try:
        app()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"ddpm-fast: {error}", file=sys.stderr)
        sys.exit(2)
