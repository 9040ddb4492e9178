"""The quality of samples: the distance of their distribution from the data's, in the features of an extractor network.

FID, KID and the Inception score come from torchmetrics. Precision and recall, which it does not have, are computed here. All in float64.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_fast.data.array_files import read_array_file, reading
from ddpm_fast.data.grey_levels import Scale
from ddpm_fast.data.images import ImageData, to_levels, to_unit
from ddpm_fast.data.readers import read_folder
from ddpm_fast.evaluation.features import Features
from ddpm_fast.types import Split

REFERENCES: tuple[Split, ...] = get_args(Split)
_NEIGHBOURS = 3  # Kynkäänniemi et al. 2019
_KID_SUBSET = 1000  # Bińkowski et al. 2018
_IMAGES_PER_SPLIT = 5000  # Salimans et al. 2016: 50,000 images in 10 parts
_DISTANCES = 2**24  # in memory at a time: 128 MiB


def quality_from_features(
    real: Tensor, generated: Tensor, *, neighbours: int = _NEIGHBOURS, kid_subsets: int = 100, seed: int = 0
) -> dict[str, float]:
    """Distances between two sets of features.

    FID has a bias that falls with the number of images: compare only values from equally many. KID has none; its mean and
    standard deviation are over random subsets of half of the smaller set, at most 1000. Precision and recall want sets of one
    size, as a larger one has smaller balls.

    Args:
        real: (N, F) floating, of the data.
        generated: (M, F) floating, of the samples; N and M above ``neighbours``, at least 4.
        neighbours: k of precision and recall.
        kid_subsets: number of subsets.
        seed: of the random choice of the subsets.

    Returns:
        ``fid``, ``kid_mean``, ``kid_std``, ``precision`` and ``recall``.

    Raises:
        ValueError: for other shapes, too few images, NaN or infinity.

    Source: Heusel et al. 2017 (FID), Bińkowski et al. 2018 (KID, (xᵀy/F + 1)³), :func:`precision_recall`.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance  # slow to import
    from torchmetrics.image.kid import KernelInceptionDistance

    precision, recall = precision_recall(real, generated, neighbours)
    real, generated = real.detach().double().cpu(), generated.detach().double().cpu()
    smaller = min(len(real), len(generated))
    if smaller < 4:
        raise ValueError(f"FID and KID need at least 4 images of each kind, got {len(real)} and {len(generated)}")
    given = _Given(real.shape[1])
    fid = FrechetInceptionDistance(feature=given, sync_on_compute=False)
    with _quiet_and_seeded(seed):
        kid = KernelInceptionDistance(feature=given, subsets=kid_subsets, subset_size=min(_KID_SUBSET, smaller // 2), sync_on_compute=False)
        center = real.mean(0)  # FID depends on differences alone, and its sums of squares lose digits far from 0
        for features, is_real in ((real, True), (generated, False)):
            fid.update(features - center, real=is_real)
            kid.update(features, real=is_real)
        kid_mean, kid_std = map(float, kid.compute())
        # Of equal sets the rounding may leave it a little below 0.
        return dict(fid=max(0.0, float(fid.compute())), kid_mean=kid_mean, kid_std=kid_std, precision=precision, recall=recall)


def precision_recall(real: Tensor, generated: Tensor, neighbours: int = _NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall: the share of samples that lie among the data, and of data that lie among the samples.

    A point lies among a set if it is in the ball around one of its points that reaches to that point's k-th neighbour.

    Args:
        real: (N, F) floating.
        generated: (M, F) floating; N and M above ``neighbours``.
        neighbours: k.

    Returns:
        (precision, recall), each in 0..1.

    Raises:
        ValueError: for other shapes, too few points, NaN or infinity.

    Source: Kynkäänniemi et al. 2019, eq. 1 and 2.
    """
    if neighbours < 1:
        raise ValueError(f"neighbours must be at least 1, got {neighbours}")
    for name, features in (("real", real), ("generated", generated)):
        if features.ndim != 2 or not features.is_floating_point() or features.shape[1] != real.shape[1] or features.shape[1] == 0:
            width = "F" if features is real or real.ndim != 2 else real.shape[1]
            raise ValueError(f"{name} must be floats of shape (N, {width}), got {features.dtype} {tuple(features.shape)}")
        if len(features) <= neighbours:
            raise ValueError(f"{name} must have more than {neighbours} images, each with {neighbours} neighbours, got {len(features)}")
        if not features.isfinite().all():
            raise ValueError(f"{name} must be finite, got {int((~features.isfinite()).sum())} NaN or infinite of {features.numel()} values")
    real, generated = real.detach().double(), generated.detach().double()
    return _share_among(generated, real, neighbours), _share_among(real, generated, neighbours)


def inception_score(logits: Tensor, *, seed: int = 0) -> tuple[float, float | None]:
    """exp of the mean KL(p(y | x) ‖ p(y)): sure about each image, and of many classes.

    Args:
        logits: (N, K) floating, of a classifier.
        seed: of the order in which the images are split, into parts of 5000 as in the paper, at most 10.

    Returns:
        The mean over the parts, in 1..K, and their standard deviation, None for fewer than two parts. Biased downwards for few images.

    Source: Salimans et al. 2016.
    """
    from torchmetrics.image.inception import InceptionScore

    if logits.ndim != 2 or logits.numel() == 0 or not logits.isfinite().all():
        raise ValueError(f"logits must be finite, of shape (N, K), got {tuple(logits.shape)}")
    splits = min(10, max(1, len(logits) // _IMAGES_PER_SPLIT))
    with _quiet_and_seeded(seed):
        score = InceptionScore(feature=_Given(logits.shape[1]), splits=splits, sync_on_compute=False)
        score.update(logits.detach().double().cpu())
        mean, deviation = score.compute()
    return float(mean), float(deviation) if splits > 1 else None


def evaluate_quality(
    samples: Tensor, data: ImageData, features: Features, *, reference: Split = "train", batch: int = 256, seed: int = 0
) -> list[dict[str, Any]]:
    """Measures samples against the data. Real images that are not in the reference are measured too, to show what a perfect model gets.

    The real images come from the other part of the data: as many as there are samples, or all if it has fewer. In the second case a
    third row measures as many samples as there are real images, as FID can be compared for equal numbers only.

    Args:
        samples: (N, C, H, W) in [-1, 1].
        features: from :func:`ddpm_fast.evaluation.load_features`.
        reference: the part that is compared with: "train", as usual for FID, or "test".
        batch: images in a pass of the extractor.
        seed: of KID's subsets.

    Returns:
        Rows with ``name``, ``images``, what :func:`quality_from_features` returns, and ``inception_score`` and
        ``inception_score_std`` where the extractor has logits.

    Raises:
        ValueError: for another reference, images of another shape or range, and as :func:`quality_from_features`. It is not an error
            if the other part of the data has too few images: there are then no rows of real images.
    """
    check_enough(samples, data, reference)
    other, least = REFERENCES[1 - REFERENCES.index(reference)], _NEIGHBOURS + 1
    device = features.device  # where distances between all pairs are quicker too

    def extract(images: Tensor) -> Tensor:
        return features(images, batch).to(device)

    known, generated = extract(data.batch(reference, slice(None))[0]), extract(samples)
    others = getattr(data, other)
    # Spread over the part: folders and photos are in order of their classes.
    chosen = torch.linspace(0, len(others) - 1, min(len(samples), len(others)), dtype=torch.float64, device="cpu").round().long()
    sets = {"samples": generated}
    if len(chosen) >= least:
        sets[f"real ({other})"] = extract(data.batch(other, chosen)[0])
        if len(chosen) < len(samples):
            sets[f"first {len(chosen)} samples"] = generated[: len(chosen)]
    rows = []
    for name, found in sets.items():
        row = dict(name=name, images=len(found), **quality_from_features(known, found, seed=seed))
        if features.logits is not None:
            row["inception_score"], row["inception_score_std"] = inception_score(features.logits(found.float()), seed=seed)
        rows.append(row)
    return rows


def check_enough(samples: Tensor, data: ImageData, reference: str) -> None:
    """Checks the arguments of `evaluate_quality`, before its long part: the reference's name, and shapes and numbers of images.

    Raises:
        ValueError: what was expected and what came.
    """
    if reference not in REFERENCES:
        raise ValueError(f"reference must be one of {', '.join(REFERENCES)}, got {reference!r}")
    if tuple(samples.shape[1:]) != data.image_shape:
        raise ValueError(f"samples must be {data.image_shape} images like the data, got {tuple(samples.shape[1:])}")
    least = _NEIGHBOURS + 1
    if len(samples) < least:
        raise ValueError(f"samples must be at least {least} images, got {len(samples)}")
    if len(getattr(data, reference)) < least:
        raise ValueError(
            f"{data.name} must have at least {least} images for {reference} to compare samples with, got {len(getattr(data, reference))}"
        )


def load_samples(path: str | os.PathLike[str], data: ImageData) -> Tensor:
    """Samples from files, on the grey levels of the data.

    Args:
        path: a .npz or .npy file as :func:`ddpm_fast.training.load_data` reads (``images``), the folder of a ``ddpm-fast sample``,
            or any folder of images, whose black and white are -1 and 1 for any number of levels.

    Returns:
        (N, C, H, W) float32 in [-1, 1].

    Raises:
        DataError: for a path that is missing or cannot be read, and images of another shape than the data's.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if (path / "samples.json").exists():  # of `write_samples`, which also puts a grid there
        path = _larger_set(path)
    if path.is_file() and path.suffix.lower() not in (".npy", ".npz"):
        raise ValueError(f"samples must be a folder of images, a .npz or a .npy file, got {path}")
    if path.is_dir():
        images = to_levels(to_unit(torch.from_numpy(read_folder(path, None, Scale()).train)), data.levels)
    else:
        images = torch.from_numpy(read_array_file(path, Scale(levels=data.levels)).train)
    if tuple(images.shape[1:]) != data.image_shape:
        raise ValueError(f"{path} must hold {data.image_shape} images like the data, got {tuple(images.shape[1:])}")
    return to_unit(images, data.levels)


def _larger_set(folder: Path) -> Path:
    """Path of the samples in a folder of ``ddpm-fast sample``: ``samples.npz`` or ``images/``, whichever has more images.

    A later run may have added images to one of them only.
    """
    archive, images = folder / "samples.npz", folder / "images"
    files = len(list(images.glob("*.png"))) if images.is_dir() else 0
    if not archive.exists():
        return images
    with reading(str(archive)), np.load(archive, allow_pickle=False) as file:
        return images if files > len(file["images"]) else archive


class _Given(nn.Module):
    """A network that returns its input: with it torchmetrics' classes take features in place of images."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features  # else it would send an image through to find out

    def forward(self, features: Tensor) -> Tensor:
        return features


@contextlib.contextmanager
def _quiet_and_seeded(seed: int) -> Iterator[None]:
    """Seeds PyTorch's generator within the block, restores it afterwards, and hides two warnings of torchmetrics.

    torchmetrics draws from the global generator. It warns that it keeps all features, and that a score of one part has no deviation;
    both are intended here.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        for expected in ("Metric .* will save all extracted features in buffer", r"std\(\): degrees of freedom"):
            warnings.filterwarnings("ignore", message=expected)
        torch.default_generator.manual_seed(seed)
        yield


def _distances(points: Tensor, others: Tensor) -> Iterator[Tensor]:
    """Distances (n, M) of a few points at a time to all others.

    They are not computed by a product of matrices, whose rounding gives equal points a distance above 0.
    """
    for part in points.split(max(1, _DISTANCES // len(others))):
        yield torch.cdist(part, others, compute_mode="donot_use_mm_for_euclid_dist")


def _share_among(points: Tensor, others: Tensor, neighbours: int) -> float:
    # The nearest of a set's points to one of them is itself.
    radii = torch.cat([distances.kthvalue(neighbours + 1).values for distances in _distances(others, others)])
    inside = sum(int((distances <= radii).any(1).sum()) for distances in _distances(points, others))
    return inside / len(points)
