"""``ddpm-fast eval``."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ddpm_fast.cli._common import Device, Run, Seed, Threads, app, bound_rows, make_folder, print_table, set_threads


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
