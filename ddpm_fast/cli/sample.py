"""``ddpm-fast sample``."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ddpm_fast.cli._common import Device, Out, Run, Seed, Threads, app, make_folder, print_table, set_threads


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
