"""Quick looks at samples against labelled data, without a pretrained network: meant for small images such as the digits."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.data.images import ImageData, to_levels, to_unit


def class_counts(samples: Tensor, data: ImageData) -> list[int]:
    """How many samples fall into each class, by an RBF-kernel SVM trained on the real training images.

    Args:
        samples: (N, C, H, W) in [-1, 1].
        data: with labels.
    """
    from sklearn.svm import SVC  # slow to import

    x, labels = data.batch("train", slice(None))
    if labels is None or data.num_classes is None:
        raise ValueError(f"the data must have labels to count classes by, but {data.name} has none")
    classifier = SVC(C=10.0).fit(x.flatten(1).numpy(), labels.numpy())
    predicted = torch.from_numpy(classifier.predict(_quantised(samples, data).flatten(1).numpy()))
    return torch.bincount(predicted, minlength=data.num_classes).tolist()


def neighbour_distance_ratio(samples: Tensor, data: ImageData) -> float:
    """Mean distance of the samples to their nearest training image, over that of the held-out images.

    Near 1 for samples from the data's distribution, well below it for copies of training images, above it for blurred or
    broken ones.
    """
    train, _ = data.batch("train", slice(None))
    test, _ = data.batch("test", slice(None))
    return float(_nearest(_quantised(samples, data), train) / _nearest(test, train))


def _quantised(samples: Tensor, data: ImageData) -> Tensor:
    return to_unit(to_levels(samples.cpu(), data.levels), data.levels)


def _nearest(x: Tensor, train: Tensor) -> Tensor:
    return torch.cdist(x.flatten(1), train.flatten(1)).min(1).values.mean()
