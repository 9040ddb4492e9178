"""``ddpm-fast eval``."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ddpm_fast.cli._common import (
    Device,
    PrecisionOption,
    Run,
    Seed,
    Threads,
    app,
    bound_rows,
    console,
    parse_size,
    print_table,
    set_threads,
)
from ddpm_fast.cli.errors import reading

if TYPE_CHECKING:
    from torch import Tensor

    from ddpm_fast.evaluation.features import Features
    from ddpm_fast.io.parts import Parts
    from ddpm_fast.io.ranks import Ranks
    from ddpm_fast.training import ImageData, TrainedModel
    from ddpm_fast.types import Split


FEATURES_HELP = (
    "What it is measured on: digits, inception, or package.module:attribute from images (N, C, H, W) in [-1, 1] to (N, F). "
    "By default digits for digits, else inception."
)


@app.command("eval")
def evaluate(
    run: Run,
    data: Annotated[
        str | None,
        typer.Option(
            help="Held-out data of your own, of which all are evaluated, or the test part that a file has. "
            "By default the held-out part of what the run was trained on."
        ),
    ] = None,
    image_size: Annotated[
        str | None,
        typer.Option(
            help="Crop and resize the images of a folder given with --data to this side, or to HEIGHTxWIDTH; by default as in training."
        ),
    ] = None,
    value_range: Annotated[
        tuple[float, float] | None,
        typer.Option("--range", metavar="LOW HIGH", help="Values in --data that are black and white; by default as in training."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for what is written; by default the run's.")] = None,
    no_bound: Annotated[bool, typer.Option("--no-bound", help="Leave the bound out, with --samples.")] = False,
    terms: Annotated[int | None, typer.Option(min=2, help="Of the bound for each image: an unbiased estimate. By default all T.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The bound of only the first so many images.")] = None,
    batch: Annotated[
        int,
        typer.Option(
            min=1, help="Images in a pass and a save of what is done; it changes results by the fp32 rounding of the network only."
        ),
    ] = 256,
    clip: Annotated[bool, typer.Option("--clip/--no-clip", help="Clip the model's guess of the image to [-1, 1].")] = True,
    samples: Annotated[Path | None, typer.Option(help="Also the quality of these: a .npz or a folder of images.")] = None,
    features: Annotated[str | None, typer.Option(help=FEATURES_HELP)] = None,
    inception_weights: Annotated[Path | None, typer.Option(help="Inception's file; by default PyTorch's cache, or a download.")] = None,
    reference: Annotated[str, typer.Option(help="What samples are compared with: train, as is usual for FID, or test.")] = "train",
    precision: PrecisionOption = "fp32",
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
) -> None:
    """The variational bound on held-out data, in bits per dimension, and the quality of samples.

    Stopped, it goes on where it was when the same command is given again. Under torchrun the processes share the bound.
    """
    from ddpm_fast.data.images import DataWarning
    from ddpm_fast.evaluation.features import DIGITS, INCEPTION, load_features
    from ddpm_fast.evaluation.quality import REFERENCES, check_enough, load_samples
    from ddpm_fast.evaluation.report import BOUND_FILES
    from ddpm_fast.io.lock import exclusive
    from ddpm_fast.io.parts import Parts
    from ddpm_fast.io.ranks import launched_ranks
    from ddpm_fast.training import load_data, load_trained
    from ddpm_fast.training.config import autocast
    from ddpm_fast.training.trained import fingerprint
    from ddpm_fast.training.trainer import resolve_device

    if samples is None and (no_bound or features or inception_weights):
        raise ValueError("--no-bound, --features and --inception-weights go with --samples, which is missing")
    if reference not in REFERENCES:
        raise ValueError(f"--reference must be one of {', '.join(REFERENCES)}, got {reference!r}")
    given = {name: value for name, value in dict(image_size=parse_size(image_size), value_range=value_range).items() if value is not None}
    set_threads(threads)
    warnings.simplefilter("ignore", DataWarning)  # printed as notes
    with launched_ranks() as ranks, contextlib.ExitStack() as held:
        trained = load_trained(run, resolve_device(ranks.device(device)))
        computing = autocast(trained.device, precision, "--precision")
        source = data or trained.config.data
        with reading(source):
            images = images_to_evaluate(source, trained, given)
        for note in images.origin.notes if ranks.first else ():
            console.print(f"note: {note}", soft_wrap=True)
        if images.image_shape != trained.image_shape or images.levels != trained.diffusion.levels:
            trained_on = f"{trained.image_shape} with {trained.diffusion.levels} levels"
            raise ValueError(f"the model was trained on {trained_on}, but {source} has {images.image_shape} with {images.levels}")
        out = out or (run if run.is_dir() else run.parent)
        extractor = drawn = compared = None

        def prepare() -> None:
            nonlocal extractor, drawn, compared
            held.enter_context(exclusive(out, "evaluation", *BOUND_FILES, "quality.json"))
            if samples is not None:  # what cannot be read is noticed before the long part
                compared = images if len(images.train) or reference == "test" else load_data(source, **as_trained(source, trained, given))
                drawn = load_samples(samples, compared)
                name = features or (DIGITS if images.name == DIGITS else INCEPTION)
                extractor = load_features(name, trained.device, inception_weights=inception_weights)
                check_enough(drawn, compared, reference)

        ranks.lead(prepare)
        if not no_bound:
            settings = dict(**trained.settings, images=fingerprint(images.test), terms=terms, clip=clip, seed=seed, precision=precision)
            count = min(limit or len(images.test), len(images.test))
            parts = Parts(out / "bound.parts", settings)
            part = "held-out" if len(images.train) else "all"
            if ranks.first and part == "all":
                console.print(f"evaluating {count} of all {len(images.test)} images of {source}", soft_wrap=True)
            with computing:
                evaluate_run(out, trained, images, count, batch, parts, ranks, dict(data=source, part=part, step=trained.step))
        if extractor is not None and drawn is not None and compared is not None:
            measure_samples(out, drawn, compared, extractor, reference, batch, seed)


def as_trained(source: str, trained: TrainedModel, given: dict[str, Any]) -> dict[str, Any]:
    """Options of `load_data` with which ``source`` is read for a model: those of its training, replaced by what is ``given``.

    A .npy or .npz file does not say how many grey levels it has. If the model was trained on a built-in data set with fewer than 256,
    or if a range is given, the file gets the model's number of levels.
    """
    from ddpm_fast.data.images import BUILT_IN

    options, levels = trained.config.data_options, trained.diffusion.levels
    if trained.config.data in BUILT_IN and levels < 256 and Path(source).suffix.lower() in (".npy", ".npz"):
        options["levels"] = levels
    return {**options, **given, **({"levels": levels} if "value_range" in given else {})}


def images_to_evaluate(source: str, trained: TrainedModel, given: dict[str, Any]) -> ImageData:
    """Loads the images to evaluate, as the ``test`` part of the result.

    For the data that the model was trained on they are the held-out part. For other data they are its test part if it has one, else
    all of it.

    Raises:
        ValueError: the data that the model was trained on have changed, or are to be read with other options than in training.
    """
    from ddpm_fast.training import load_data
    from ddpm_fast.training.trained import fingerprint, load_run_data

    config, known = trained.config, trained.meta["fingerprints"]
    options = as_trained(source, trained, given)
    own = source == config.data or Path(source).resolve() == Path(config.data).resolve()
    if own and given:
        raise ValueError("--image-size and --range go with other data, given with --data; those of the run are read as in training")
    images = load_run_data(config) if own else load_data(source, **options, test_fraction=1.0)
    if own:
        if fingerprint(images.test) != known["test"]:
            raise ValueError(
                f"{source} has changed since the model was trained on it, so that its held-out part may hold images that it was "
                "trained on; put images that it has not seen into a folder of their own and give that with --data"
            )
        return images
    if not len(images.train) and len(images.test) > trained.meta["images"]:
        parted = load_data(source, **options)
        if fingerprint(parted.test) == known["test"]:  # the data of training in another place
            return parted
    return images


def evaluate_run(
    out: Path, trained: TrainedModel, images: ImageData, count: int, batch: int, parts: Parts, ranks: Ranks, about: dict[str, Any]
) -> None:
    """Evaluates, writes and prints the bound of the first ``count`` held-out images, with the options in ``parts.settings``."""
    from ddpm_fast.evaluation import evaluate_bound, rate_distortion, write_bound
    from ddpm_fast.io.progress import Bar

    def done() -> int:
        return count - sum(map(len, parts.missing(count, count)))

    terms, clip, seed = (parts.settings[name] for name in ("terms", "clip", "seed"))
    ranks.lead(parts.open)
    if ranks.first and done():
        console.print(f"{done()} of {count} images are done already, in {parts.folder}", soft_wrap=True)
    try:
        with Bar("evaluating", quiet=not ranks.first) as bar:
            bound = evaluate_bound(
                trained.model, trained.diffusion, lambda part: images.batch("test", part, trained.device)[0], count,
                terms_per_image=terms, batch=batch, seed=seed, clip=clip, parts=parts, ranks=ranks, report=bar.update,
            )  # fmt: skip
    except KeyboardInterrupt:
        if ranks.first:
            text = f"stopped with {done()} of {count} images done, which are in {parts.folder}; the same command goes on from there"
            console.print(text, soft_wrap=True)
        raise
    if ranks.first:
        about = {"images": count, **about, "estimated": bool((bound.counts > 1).any()), "clip": clip, "seed": seed}
        written = write_bound(out, bound, about=about, title=f"{'held-out ' * (about['part'] == 'held-out')}{images.name}")
        parts.remove()
        curve = rate_distortion(bound)
        at_end = {"rate, RMSE at t = 0": f"{float(curve.rate[-1]):.3f} bits/dim, {float(curve.distortion[-1]):.3g} of 255"}
        print_table({**bound_rows(bound), **at_end, **written})


def measure_samples(out: Path, samples: Tensor, images: ImageData, features: Features, reference: Split, batch: int, seed: int) -> None:
    """Evaluates, writes and prints the quality of samples, and beside it that of real images."""
    from ddpm_fast.evaluation import evaluate_quality
    from ddpm_fast.io.files import write_json

    rows = evaluate_quality(samples, images, features, reference=reference, batch=batch, seed=seed)
    number = len(getattr(images, reference))
    about = dict(data=images.name, reference=reference, reference_images=number, features=features.name, seed=seed)
    write_json(out / "quality.json", {**about, "rows": rows})
    table = Table(box=None, pad_edge=False)
    console.print(f"{features.name} features, against the {number} images for {'training' if reference == 'train' else 'testing'}")
    for heading in ("", "images", "FID", "KID", "precision", "recall", "IS"):
        table.add_column(heading, justify="right" if table.columns else "left")
    for row in rows:
        score, spread = row.get("inception_score"), row.get("inception_score_std")
        table.add_row(
            row["name"], str(row["images"]), f"{row['fid']:.4g}", f"{row['kid_mean']:.4g} ± {row['kid_std']:.2g}",
            f"{row['precision']:.3f}", f"{row['recall']:.3f}",
            "" if score is None else f"{score:.3f}" + ("" if spread is None else f" ± {spread:.2g}"),
        )  # fmt: skip
    console.print(table)
    if len(rows) == 1:
        console.print(f"{images.name} has too few other images to show what real ones would get")
    console.print("FID falls with the number of images: compare rows of one number only")
    print_table({"quality": out / "quality.json"})
