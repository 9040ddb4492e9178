"""What a user writes, for mypy and pyright: every line stands, but those with ``type: ignore``, which both must refuse.

Never run. An ``ignore`` that is not needed is an error too, so a misspelt name that passed would be noticed.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

import ddpm_fast as df
from ddpm_fast.training import TrainConfig, Trainer, load_data
from ddpm_fast.types import Backend, Loss, Prediction, Reduction, SamplerName, Spacing, Variance, VarianceKind, Weight

schedule = df.NoiseSchedule.cosine(1000)
diffusion = df.GaussianDiffusion(schedule, prediction="epsilon", variance="learned_range", levels=256, cdf="tanh")
model = df.UNet.from_preset("photos32", learned_variance=True, num_classes=10)
average = df.EMA(model, decay=0.999)
optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)


def train_step(x_start: Tensor, labels: Tensor, step: int, kind: Loss = "hybrid", weight: Weight = "uniform") -> float:
    noise = df.Noise(seed=0, stream=step)
    t = noise.fold_in(1).integers(len(x_start), high=len(schedule))
    x_t = diffusion.q_sample(x_start, t, noise)
    out: Tensor = model(x_t, t, labels=labels, dropout=noise.fold_in(2))
    loss = diffusion.loss(out, x_start, x_t, t, noise, kind=kind, weight=weight).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    average.update(model)
    return loss.item()


def every_sampler(labels: Tensor) -> dict[str, Tensor]:
    with average.applied(model):
        images = {
            name: df.sample(model, diffusion, (4, 3, 32, 32), 7, sampler=name, steps=20, labels=labels) for name in get_args(SamplerName)
        }
    images["ddpm"] = df.sample(model, diffusion, shape=[4, 3, 32, 32], seed=0)
    images["ddim"] = df.sample(model, diffusion, (4, 3, 32, 32), sampler="ddim", steps=torch.arange(0, 1000, 50), eta=0.5, clip=False)
    draw = df.Sampler(model, diffusion, "dpmpp_2m", steps=20, spacing="logsnr", threshold=0.995, guidance=2.0)
    images["dpmpp_2m"] = draw((4, 3, 32, 32), seed=1, labels=labels, callback=lambda t, x, x_start: print(t, x.shape, x_start.shape))
    images["between"] = draw.interpolate(images["ddpm"], images["ddim"], [0.5], t=500)
    return images


def measured(x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    x_t = diffusion.q_sample(x_start, t, torch.randn_like(x_start))
    step = diffusion.p_mean_variance(model(x_t, t), x_t, t)
    mean: Tensor = step.mean
    return diffusion.vlb_terms(model(x_t, t), x_start, x_t, t, clip=True), mean


def ops(qkv: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
    attended = df.attention(qkv, heads=2, scale=0.5, backend="reference")
    normed = df.group_norm(x, 8, weight, weight, activation="silu", dropout=(0.1, df.Noise(3)))
    return [attended, normed, df.gaussian_kl(x, x, x, x), df.ops.conv3x3(x, weight, None), df.ops.randn((2, 3), df.Noise(0))]


def ops_by_name(x: Tensor, t: Tensor, table: Tensor, kind: VarianceKind, reduction: Reduction, backend: Backend) -> list[Tensor]:
    x_next, _ = df.ops.p_step(x, x, t, table, None, variance=kind, backend=backend)
    terms = df.ops.vlb_terms(x, x, x, t, table, variance="learned_range", cdf="erf", backend=None)
    return [x_next, terms, df.gaussian_kl(x, x, x, x, reduction=reduction, backend="cpu")]


def a_run() -> Trainer:
    config = TrainConfig(
        data="digits", preset="digits", prediction="v", loss="hybrid", variance="learned_range", weight="p2", precision="bf16"
    )
    return Trainer(config, load_data("digits"))


def key(noise: df.Noise) -> tuple[int, int, int]:
    return noise.seed, noise.stream, noise.at(stream=3).first_sample


def by_name(prediction: Prediction, variance: Variance, spacing: Spacing, backend: Backend) -> tuple[df.GaussianDiffusion, df.Sampler]:
    chain = df.GaussianDiffusion(df.NoiseSchedule.from_name("linear", 100), prediction, variance)
    return chain, df.Sampler(lambda x, t: x, chain, "ddim", steps=10, spacing=spacing)


# Refused.
x = torch.zeros(1)
TrainConfig(prediction="epsilom")  # type: ignore[arg-type]
TrainConfig(decay="linear")  # type: ignore[arg-type]
df.GaussianDiffusion(schedule, prediction="epsilom")  # type: ignore[arg-type]
df.GaussianDiffusion(schedule, variance="learnt")  # type: ignore[arg-type]
df.GaussianDiffusion(schedule, cdf="erv")  # type: ignore[arg-type]
df.NoiseSchedule.from_name("cosin", 100)  # type: ignore[arg-type]
df.Sampler(model, diffusion, "dppm")  # type: ignore[arg-type]
df.Sampler(model, diffusion, spacing="snr")  # type: ignore[arg-type]
df.sample(model, diffusion, (4, 3, 32, 32), sampler="dimm")  # type: ignore[arg-type]
df.sample(model, diffusion, (4, 3, 32, 32), step=20)  # type: ignore[call-arg]
df.UNet.from_preset("photos")  # type: ignore[arg-type]
print(df.Noise(0).sead)  # type: ignore[attr-defined]
df.Noise("0")  # type: ignore[arg-type]
train_step(torch.zeros(1), torch.zeros(1), 0, kind="hybird")  # type: ignore[arg-type]
df.attention(x, backend="cude")  # type: ignore[arg-type]
df.group_norm(x, 1, activation="relu")  # type: ignore[arg-type]
df.gaussian_kl(x, x, x, x, reduction="mean")  # type: ignore[arg-type]
df.ops.randn((2, 3), df.Noise(0), backend="gpu")  # type: ignore[arg-type]
df.ops.conv3x3(x, x, backend="cdnn")  # type: ignore[arg-type]
df.ops.q_sample(x, x, x, x, x, backend="trition")  # type: ignore[arg-type]
df.ops.p_step(x, x, x, x, None, variance="fixed_large")  # type: ignore[arg-type]
df.ops.vlb_terms(x, x, x, x, x, variance="learnt")  # type: ignore[arg-type]
df.ops.vlb_terms(x, x, x, x, x, cdf="erv")  # type: ignore[arg-type]
