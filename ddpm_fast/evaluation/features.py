"""Feature extractors, by name: what images are turned into before their distributions are compared."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast.data.images import load_data, to_levels

DIGITS, INCEPTION = "digits", "inception"
_DIGITS_FEATURES, _DIGITS_SEED, _DIGITS_EPOCHS, _DIGITS_BATCH = 64, 0, 20, 128


@dataclass(frozen=True)
class Features:
    """An extractor under the name it was asked for by.

    Attributes:
        name: for reports.
        extract: images (N, C, H, W) in [-1, 1] to features (N, F).
        logits: fp32 features on ``device`` to the logits (N, K) of a classifier, for the Inception score; None where there is none.
        device: where it takes its images.
    """

    name: str
    extract: Callable[[Tensor], Tensor]
    logits: Callable[[Tensor], Tensor] | None = None
    device: torch.device | str = "cpu"

    @torch.no_grad()
    def __call__(self, images: Tensor, batch: int = 256) -> Tensor:
        """Features of images, a batch at a time.

        Args:
            images: (N, C, H, W) float in [-1, 1], on any device.

        Returns:
            (N, F) float64 on the CPU.

        Raises:
            ValueError: where the extractor returns anything else than N finite vectors.
        """
        results = []
        for part in images.split(batch):
            found = self.extract(part.to(self.device))
            if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(part) or not found.is_floating_point():
                got = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(f"features {self.name!r} must turn {tuple(part.shape)} images into ({len(part)}, F) floats, got {got}")
            results.append(found.double().cpu())
        features = torch.cat(results)
        if not features.isfinite().all():
            raise ValueError(f"features {self.name!r} must be finite, got {int((~features.isfinite()).sum())} NaN or infinite values")
        return features


def load_features(name: str, device: torch.device | str = "cpu", *, inception_weights: str | os.PathLike[str] | None = None) -> Features:
    """An extractor by its name.

    Args:
        name: "digits", a small classifier of 8x8 digits, trained here and now; "inception", the network of the published
            FID, KID and Inception score; or ``package.module:attribute`` or ``package.module.attribute``: a function or a
            module from images (N, C, H, W) in [-1, 1] to (N, F), or a class that makes one without arguments. A method
            ``logits`` of it, from features to the logits of a classifier, gives the Inception score too.
        device: where modules go.
        inception_weights: file of Inception's weights (torch-fidelity's ``weights-inception-2015-12-05-6726825d.pth``);
            by default PyTorch's cache, or a download.

    Raises:
        ValueError: for a name that leads to nothing callable, or "inception" without the package torch-fidelity.
        OSError: weights that cannot be read, or downloaded.
    """
    if inception_weights is not None and name != INCEPTION:
        raise ValueError(f"Inception's weights go with the features {INCEPTION!r}, got {name!r}")
    if name == DIGITS:
        classifier = digits_classifier()
        return Features(name, classifier, classifier.logits)  # on the CPU: it is smaller than the way to a GPU
    module = _Inception(inception_weights) if name == INCEPTION else _import(name)
    if isinstance(module, nn.Module):
        module = module.to(device).eval()
    return Features(name, module, getattr(module, "logits", None), device)


class DigitsClassifier(nn.Module):
    """A perceptron for 8x8 digits; its features are what its last layer reads, on a scale on which their mean square is 1."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, _DIGITS_FEATURES), nn.ReLU())
        self.head = nn.Linear(_DIGITS_FEATURES, 10)
        self.register_buffer("scale", torch.ones(()))  # KID's kernel, a power of 1 + xᵀy/F, has no scale of its own

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1:] != (1, 8, 8):
            raise ValueError(f"features {DIGITS!r} are of (1, 8, 8) images, got {tuple(images.shape[1:])}")
        return self.trunk(images) / self.scale

    def logits(self, features: Tensor) -> Tensor:
        return self.head(features * self.scale)


@functools.cache
def digits_classifier() -> DigitsClassifier:
    """The classifier, trained on the digits' training part alone: about a second, the same each time, once a process.

    It names 98% of the held-out digits.
    """
    images, labels = load_data("digits").batch("train", slice(None))
    assert labels is not None  # the digits have them
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small are slower on more, and sums in one order give one result
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
            torch.default_generator.manual_seed(_DIGITS_SEED)
            classifier = DigitsClassifier()
            optimizer = torch.optim.AdamW(classifier.parameters(), fused=True)
            batches = len(images) // _DIGITS_BATCH
            rise_and_fall = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=_DIGITS_EPOCHS * batches)
            for _ in range(_DIGITS_EPOCHS):
                for chosen in torch.randperm(len(images))[: batches * _DIGITS_BATCH].split(_DIGITS_BATCH):
                    optimizer.zero_grad()
                    F.cross_entropy(classifier.logits(classifier(images[chosen])), labels[chosen]).backward()
                    optimizer.step()
                    rise_and_fall.step()
        classifier.requires_grad_(False).eval()
        classifier.scale = classifier(images).square().mean().sqrt()
    finally:
        torch.set_num_threads(threads)
    return classifier


class _Inception(nn.Module):
    """torch-fidelity's copy of the network that FID was defined with, resizing as that one did; features of 2048."""

    def __init__(self, weights: str | os.PathLike[str] | None) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            raise ValueError(
                f"features {INCEPTION!r} need the package torch-fidelity (pip install torch-fidelity); "
                f"{DIGITS!r} and package.module:attribute do without it"
            ) from None
        # It takes a path as a string, and fails on a missing one only after building the network.
        if weights is not None and not os.path.isfile(weights):
            raise FileNotFoundError(f"no such file: {weights}")
        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], None if weights is None else os.fspath(weights))

    def forward(self, images: Tensor) -> Tensor:
        return self.network(to_levels(images).expand(-1, 3, -1, -1))[0]

    def logits(self, features: Tensor) -> Tensor:
        return features @ self.network.fc.weight.T  # without the bias: the published score's "unbiased" logits


def _import(name: str) -> Any:
    module_name, _, attribute = name.partition(":") if ":" in name else name.rpartition(".")
    if not module_name or not attribute:
        raise ValueError(f"features must be {DIGITS}, {INCEPTION} or package.module:attribute, got {name!r}")
    here = os.getcwd()
    sys.path.insert(0, here)  # a script's own modules lie where the command runs
    try:
        found = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"features {name!r} cannot be imported: {error}") from None
    finally:
        sys.path.remove(here)
    if isinstance(found, type):
        found = found()
    if not callable(found):
        raise ValueError(f"features {name!r} must be callable, got {type(found).__name__}")
    return found
