"""``ddpm-fast train``."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddpm_fast.cli._common import Device, Out, Seed, Threads, app, console, one_process, parse_size, print_table, set_threads
from ddpm_fast.cli.errors import reading

if TYPE_CHECKING:
    from ddpm_fast.training import TrainConfig


@app.command()
def train(
    context: typer.Context,
    data: Annotated[str, typer.Option(help="digits, photos, a folder of images, or a .npy or .npz file.")] = "digits",
    out: Out = Path("runs/train"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is already in --out.")] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in --out; --steps may extend it, and --data say where the same images now lie."),
    ] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images in each step.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--lr", help="Adam's learning rate.")] = None,
    preset: Annotated[str | None, typer.Option(help="Network: digits, photos32 or cifar10.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Of the network's residual blocks.")] = None,
    schedule: Annotated[str | None, typer.Option(help="linear, cosine, quadratic, constant, jsd or sigmoid.")] = None,
    timesteps: Annotated[
        int | None, typer.Option("-T", "--timesteps", min=1, help="Length of the chain; a linear schedule's betas scale with its inverse.")
    ] = None,
    prediction: Annotated[str | None, typer.Option(help="epsilon, x_start, v or mean.")] = None,
    variance: Annotated[str | None, typer.Option(help="fixed_small, fixed_large, learned or learned_range.")] = None,
    loss: Annotated[
        str | None, typer.Option(help="simple, vlb or hybrid; by default the recipe's, or that which can train the --variance given.")
    ] = None,
    weight: Annotated[str | None, typer.Option(help="Of the simple loss: uniform, min_snr, p2 or vlb.")] = None,
    timestep_sampler: Annotated[str | None, typer.Option(help="Of t: uniform, stratified, or loss_aware as for loss vlb.")] = None,
    warmup: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Steps in which the learning rate rises; by default the recipe's, but at most an eighth of --steps, "
            "or a short run would never reach the rate.",
        ),
    ] = None,
    flip: Annotated[
        bool | None, typer.Option("--flip/--no-flip", help="Mirror images at random: on but for digits; wrong for text.")
    ] = None,
    ema: Annotated[
        float | None,
        typer.Option(
            help="Largest decay of the moving average of the weights. After k steps it is (1 + k) / (10 + k) where that is less, "
            "an average over a ninth of them, so that short runs need no other value."
        ),
    ] = None,
    class_conditional: Annotated[
        bool | None, typer.Option("--class-conditional/--unconditional", help="Give the network the labels.")
    ] = None,
    image_size: Annotated[str | None, typer.Option(help="Crop and resize the images of a folder to this side, or to HEIGHTxWIDTH.")] = None,
    value_range: Annotated[
        tuple[float, float] | None,
        typer.Option(
            "--range",
            metavar="LOW HIGH",
            help="Values of a folder or file that are black and white, say 0 4095; by default what their type spans.",
        ),
    ] = None,
    levels: Annotated[
        int | None,
        typer.Option(min=2, max=256, help="Grey levels of a folder or file; by default one for each integer of --range, at most 256."),
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, or bf16 for autocast.")] = None,
    save_minutes: Annotated[
        float, typer.Option(min=0.0, help="Minutes between checkpoints, 0 for none by time. The end, Ctrl-C and SIGTERM always write one.")
    ] = 10.0,
    save_every: Annotated[int | None, typer.Option(min=1, help="Also a checkpoint every so many steps.")] = None,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between lines of metrics.jsonl.")] = 10,
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
) -> None:
    """Train a model. Options that are not given come from the recipe for the data, and fit it to the number of steps."""
    from ddpm_fast.data.images import BUILT_IN, DataWarning
    from ddpm_fast.io.lock import exclusive
    from ddpm_fast.io.plots import write_loss_curve
    from ddpm_fast.io.progress import Bar
    from ddpm_fast.training import TrainConfig, Trainer, load_data

    one_process("train")
    set_threads(threads)
    warnings.simplefilter("ignore", DataWarning)  # printed as notes
    if Path(data).exists() and data not in BUILT_IN:
        data = str(Path(data).resolve())  # the run can then be evaluated from any folder
    options: dict[str, Any] = dict(
        data=data, image_size=parse_size(image_size), levels=levels, value_range=value_range,
        steps=steps, batch=batch, learning_rate=learning_rate, warmup=warmup,
        preset=preset, schedule=schedule, timesteps=timesteps, prediction=prediction, variance=variance, loss=loss, weight=weight,
        timestep_sampler=timestep_sampler, flip=flip, ema=ema, class_conditional=class_conditional, precision=precision,
        device=device, seed=seed, network=None if dropout is None else {"dropout": dropout},
    )  # fmt: skip
    with contextlib.ExitStack() as held:
        if out.is_dir():  # another training there is noticed before anything is read, and a new folder made after all checks
            held.enter_context(exclusive(out, "training"))
        checkpoint = out / "checkpoint.safetensors"
        old = [path for path in (checkpoint, checkpoint.with_suffix(".json")) if path.exists()]
        if resume:
            if overwrite:
                raise ValueError("--resume goes on with a run and --overwrite removes it; give one of them")
            if not old:
                raise ValueError(f"no checkpoint at {out} to go on from; the same command without --resume starts the run")
            # Of the options that have a value by default, only those that were typed can contradict the run.
            # (By the source's name: its class is click's, or that of the copy which newer versions of typer bring.)
            source: Any = context.get_parameter_source
            typed = [name for name in options if name == "network" or source(name).name == "COMMANDLINE"]
            with reading("the data of the run"):
                trainer = Trainer.restore(out, **{name: options[name] for name in typed})
            if trainer.step == trainer.config.steps:
                further = "; --steps goes further" if trainer.config.decay == "constant" else ""
                console.print(
                    f"the run in {out} is finished: {trainer.step} of {trainer.config.steps} steps are done{further}", soft_wrap=True
                )
                return
            console.print(f"going on after step {trainer.step} of {trainer.config.steps}")
        else:
            if old and not overwrite:
                raise ValueError(
                    f"{out} already holds a run; go on with it by --resume, choose another folder with --out, or pass --overwrite"
                )
            config = TrainConfig.for_data(**options)
            with reading(data):
                images = load_data(data, **config.data_options)
            trainer = Trainer(config, images)
            held.enter_context(exclusive(out, "training"))
            for path in old:
                path.unlink()  # a run that fails early must not leave new metrics beside an old checkpoint
        config = trainer.config
        left = float(trainer.diffusion.schedule.alphas_bar[-1])
        if left > 0.01:
            console.print(
                f"note: the chain leaves {left:.2g} of the data's variance at its end; samples start from pure noise and will be "
                "worse for it",
                soft_wrap=True,
            )
        for line in trainer.data.summary:
            console.print(line, soft_wrap=True)
        parameters = sum(p.numel() for p in trainer.model.parameters())
        console.print(f"network {config.preset} with {parameters:,} parameters, on {trainer.device}", soft_wrap=True)
        console.print(describe(config), soft_wrap=True)
        try:
            with Bar("training") as bar:
                history = trainer.run(
                    out, log_every=log_every, save_every=save_every, save_minutes=save_minutes or None,
                    report=lambda p: bar.update(p.step, p.steps, p.loss),
                )  # fmt: skip
        except KeyboardInterrupt:
            saved = f"; its checkpoint is in {out}, and --resume goes on from there" if trainer.step else ""
            console.print(f"stopped after step {trainer.step} of {config.steps}{saved}", soft_wrap=True)
            raise
        write_loss_curve(
            out / "loss.png", [line["step"] for line in history], [line["loss"] for line in history], ylabel=f"{config.loss} loss"
        )
    print_table(
        {
            "loss": f"{history[-1]['loss']:.4f}",
            "images/s": history[-1]["images_per_s"],
            "checkpoint": checkpoint,
            "metrics": out / "metrics.jsonl",
            "loss curve": out / "loss.png",
        }
    )


def describe(config: TrainConfig) -> str:
    """Text of one line with the values that depend on the number of steps: the learning rate, its warm-up, and the average's length."""
    warmup = f" after a warm-up of {config.warmup}" if config.warmup else ""
    decay = min(config.ema, config.steps / (config.steps + 9))  # of the last update of `EMA`
    back = f"in the end the weights of the last {1 / (1 - decay):.0f} or so are averaged"
    return f"{config.steps} steps of {config.batch} images, learning rate {config.learning_rate:g}{warmup}; {back}"
