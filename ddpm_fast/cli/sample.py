"""``ddpm-fast sample``."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ddpm_fast.cli._common import Device, Out, PrecisionOption, Run, Seed, Threads, app, console, print_table, set_threads

if TYPE_CHECKING:
    from ddpm_fast.types import SamplerName, Spacing

PICTURED = 100  # images in the animation, and in the rows of the progressive picture at most a tenth of them
FRAMES = 40


@app.command()
def sample(
    run: Run,
    out: Out = Path("runs/samples"),
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Number of images.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 256,
    sampler: Annotated[str, typer.Option(help="ddpm, ddim or dpmpp_2m (DPM-Solver++).")] = "ddpm",
    steps: Annotated[str | None, typer.Option(help="Number of steps, or their ascending list: 0,10,50,... By default all T.")] = None,
    spacing: Annotated[str, typer.Option(help="Of a number of steps: even, quadratic or logsnr.")] = "even",
    eta: Annotated[float, typer.Option(min=0.0, max=1.0, help="DDIM's share of noise.")] = 0.0,
    threshold: Annotated[float | None, typer.Option(help="Dynamic thresholding at this quantile, say 0.995, in place of clipping.")] = None,
    label: Annotated[
        str | None,
        typer.Option(
            "--class",
            help="Class of all images, by name or number from 0, or 'each' for every class in turn, for a class-conditional model; "
            "checkpoint.json lists the names.",
        ),
    ] = None,
    guidance: Annotated[float, typer.Option(help="Scale of classifier-free guidance; 1 for none.")] = 1.0,
    formats: Annotated[str, typer.Option(help="Some of png (a file an image), grid (samples.png) and npz (samples.npz).")] = "grid,npz",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace images of other settings that are in --out.")] = False,
    gif: Annotated[bool, typer.Option("--gif", help="Also draw the reverse process of the first images.")] = False,
    progressive: Annotated[bool, typer.Option("--progressive", help="Also draw how the first images' x̂0 takes shape.")] = False,
    graph: Annotated[bool | None, typer.Option("--graph/--no-graph", help="Capture a step in a CUDA graph: by default on CUDA.")] = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile", help="Compile the network, for CUDA; on CPUs it is slower than the kernels' calls that sampling makes by itself."
        ),
    ] = False,
    precision: PrecisionOption = "fp32",
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
) -> None:
    """Draw images from a trained model.

    Image i depends on --seed and i alone: not on --count, and on --batch or the number of processes (torchrun) by the fp32 rounding of
    the network only. Stopped, the same command goes on; with a larger --count it adds images.
    """
    import torch

    from ddpm_fast.io.progress import Bar
    from ddpm_fast.io.ranks import launched_ranks
    from ddpm_fast.io.sample_writer import write_samples
    from ddpm_fast.sampling import Sampler
    from ddpm_fast.training import load_trained
    from ddpm_fast.training.config import autocast
    from ddpm_fast.training.trainer import resolve_device

    set_threads(threads)
    chosen = parse_steps(steps)
    with launched_ranks() as ranks, contextlib.ExitStack() as held:
        trained = load_trained(run, resolve_device(ranks.device(device)))
        held.enter_context(autocast(trained.device, precision, "--precision"))
        labels = parse_label(label, trained.classes)
        draw = Sampler(
            trained.model,
            trained.diffusion,
            cast("SamplerName", sampler),  # checked there
            steps=chosen,
            spacing=cast("Spacing", spacing),
            eta=eta,
            threshold=threshold,
            guidance=guidance,
            graph=graph,
        )
        if guidance != 1.0 and labels is None:
            raise ValueError("--guidance needs --class")
        if compiled:
            trained.model.compile(dynamic=False)
        length, shape = len(draw.table), trained.image_shape
        settings = dict(
            **trained.settings, sampler=sampler, steps=chosen or length, spacing=spacing, eta=eta, threshold=threshold, guidance=guidance,
            label=label, seed=seed, precision=precision,
        )  # fmt: skip

        def batch_labels(first: int, size: int) -> torch.Tensor | None:
            return None if labels is None else torch.tensor([labels[i % len(labels)] for i in range(first, first + size)], device="cpu")

        all_labels = batch_labels(0, count)

        def arguments(first: int, size: int) -> dict[str, Any]:
            return dict(labels=batch_labels(first, size), first_sample=first, device=trained.device)

        with Bar("sampling", quiet=not ranks.first) as bar:
            at = [0, 0]  # images that are done, of all

            def advance(done: int, of: int) -> None:
                at[:] = done, of
                bar.update(done * length, of * length)

            def drawn(first: int, size: int) -> torch.Tensor:
                steps_done = iter(range(1, length + 1))

                def stepped(t: int, x: torch.Tensor, x_start: torch.Tensor) -> None:
                    bar.update(min(at[0] * length + next(steps_done) * size * ranks.size, at[1] * length), at[1] * length)

                return draw((size, *shape), seed, callback=stepped, keep=False, **arguments(first, size)).cpu()

            try:
                written = write_samples(
                    drawn, out, count=count, batch=batch, formats=[name.strip() for name in formats.split(",")],
                    levels=trained.diffusion.levels, settings=settings, labels=None if all_labels is None else all_labels.numpy(),
                    overwrite=overwrite, ranks=ranks, report=advance,
                )  # fmt: skip
            except KeyboardInterrupt:
                if ranks.first:
                    console.print(f"stopped; what is complete is in {out}, and the same command goes on from there", soft_wrap=True)
                raise
        if not ranks.first:
            return
        if gif or progressive:
            size = min(count, PICTURED)
            written |= draw_process(out, draw, (size, *shape), seed, gif, progressive, arguments(0, size))
    print_table(written)


def draw_process(
    out: Path, draw: Any, shape: tuple[int, ...], seed: int, gif: bool, progressive: bool, arguments: dict[str, Any]
) -> dict[str, Path]:
    """The states of the first images on their way (reverse.gif), and what the model took them for (progressive.png)."""
    import torch

    from ddpm_fast.io.plots import write_forward_strip, write_reverse_gif

    length = len(draw.table)
    shown = set(torch.linspace(0, length - 1, min(FRAMES, length), device="cpu").round().int().tolist())
    states, guesses, times, step = [], [], [], itertools.count()

    def keep(t: int, x: torch.Tensor, x_start: torch.Tensor) -> None:
        if next(step) in shown:
            states.append(x.to("cpu", copy=True))  # the next step writes over x
            guesses.append(x_start[: PICTURED // 10].to("cpu", copy=True))
            times.append(t)

    draw(shape, seed, callback=keep, keep=False, **arguments)
    written = {}
    if gif:
        written["reverse process"] = out / "reverse.gif"
        write_reverse_gif(written["reverse process"], torch.stack(states))
    if progressive:
        written["x̂0 on the way"] = out / "progressive.png"
        columns = sorted({round(k) for k in torch.linspace(0, len(times) - 1, min(10, len(times)), device="cpu").tolist()})
        write_forward_strip(written["x̂0 on the way"], torch.stack([guesses[k] for k in columns]), [times[k] for k in columns])
    return written


def parse_steps(text: str | None) -> int | list[int] | None:
    """ "50", or "0,10,50": a number of steps or their list."""
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--steps must be a number or a list such as 0,10,50, got {text!r}") from None
    return numbers if "," in text else numbers[0]


def parse_label(text: str | None, classes: Sequence[str] | None) -> list[int] | None:
    """The numbers of the classes that images take in turn, or None. Names that are numbers themselves leave no others to give."""
    if text is None:
        return None
    if classes is None:
        raise ValueError(f"--class must be left out: the model is not class-conditional, got {text}")
    if text == "each":
        return list(range(len(classes)))
    if text in classes:
        return [classes.index(text)]
    numbered = list(classes) == [str(index) for index in range(len(classes))]
    if not any(name.isdecimal() for name in classes) and text.isdecimal() and int(text) < len(classes):
        return [int(text)]
    listed = ", ".join(classes[:20]) + (f", ... ({len(classes)} of them)" if len(classes) > 20 else "")
    raise ValueError("--class must be 'each' or " + (f"in 0..{len(classes) - 1}" if numbered else f"one of {listed}") + f", got {text}")
